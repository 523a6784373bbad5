"""What runs with `pip install vssm` alone, and what the rest says there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout import ROOT
from exports import exported, micro
from light import CORE, PROJECT, light_environment
from packaging.requirements import Requirement

import vssm
from vssm.artifact.manifest import Preprocessing
from vssm.errors import MissingPackageError
from vssm.extras import PACKAGES, explain_missing, install_command

_ABSENT = sorted(PACKAGES)


@dataclass(frozen=True)
class Light:
    """The environment, an export and a bundle made outside it, and an image file."""

    python: Path
    folder: Path

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run Python in it, in an empty directory."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [str(self.python), "-W", "error", *map(str, arguments)],
            cwd=empty,
            env={**environment, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    def vssm(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the command line in it."""
        return self("-m", "vssm.commands.main", *arguments)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Light:
    folder = tmp_path_factory.mktemp("light")
    site = light_environment(folder / "venv", CORE)
    (site / "checkout.pth").write_text(f"{ROOT / 'exporter'}\n")
    artifact = exported(folder, micro(), preprocessing=Preprocessing.for_image_size((48, 48)))
    from vssm.bundle.make import BundleRequest, make_bundle

    make_bundle(artifact, folder / "bundle", BundleRequest())
    pixels = importlib.import_module("numpy").arange(60 * 60 * 3, dtype="uint8").reshape(60, 60, 3)
    importlib.import_module("PIL.Image").fromarray(pixels).save(folder / "picture.png")
    return Light(folder / "venv/bin/python", folder)


def test_only_the_core_is_there(light: Light) -> None:
    code = f"import importlib.util as u; print([n for n in {_ABSENT} if u.find_spec(n)])"
    assert light("-c", code).stdout.strip() == "[]"


def test_a_session_runs_what_was_preprocessed(light: Light) -> None:
    code = (
        "import sys, vssm\n"
        "images = vssm.preprocess(sys.argv[2], sys.argv[1])\n"
        "for backend in ('kernel', 'body'):\n"
        "    with vssm.open_session(sys.argv[1], backend=backend, threads=1) as session:\n"
        "        print(session.info.backend, session.run(images)['logits'].shape)"
    )
    done = light("-c", code, light.folder / "out", light.folder / "picture.png")
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["kernel (1, 7)", "body (1, 7)"]


def test_commands_that_run_an_export(light: Light) -> None:
    report = light.folder / "run.json"
    picture = light.folder / "picture.png"
    ran = light.vssm("run", light.folder / "out", picture, "--threads=1", f"--json={report}")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(json.loads(report.read_text())["images"]) == 1
    verified = light.vssm("bundle", "--verify", light.folder / "bundle")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "passed" in verified.stdout
    helped = light.vssm("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "visualize" in helped.stdout


def test_doctor_names_the_extra_of_what_is_absent(light: Light) -> None:
    report = light.folder / "doctor.json"
    done = light.vssm("doctor", f"--json={report}")
    assert (done.returncode, done.stderr) == (0, "")
    found = {finding["part"]: finding for finding in json.loads(report.read_text())}
    assert found["onnxruntime"]["found"]
    for package in _ABSENT:
        finding = found[package.replace("_", "-")]
        assert not finding["found"]
        assert install_command(package) in finding["remedy"]


_REFUSED = (
    "export vim_tiny -o new",
    "export-module model.py:build --input=1x3x8x8 -o new",
    "check OUT",
    "bench OUT",
    "run OUT PICTURE --runtime=torch",
    "engine OUT --rtx",
    "finetune vim_tiny --data=. -o new",
    "ablate vim_tiny . -o new",
    "visualize vim_tiny PICTURE -o new",
    "quantize OUT -o new --weights-only",
)


def test_commands_without_their_extra_say_which(light: Light) -> None:
    """All in one process, which starts once."""
    code = (
        "import sys\n"
        "from vssm.commands.main import main\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = ['vssm', *line.split()]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        print(stop.code, file=sys.stderr)\n"
    )
    places = {"OUT": str(light.folder / "out"), "PICTURE": str(light.folder / "picture.png")}
    lines = [" ".join(places.get(word, word) for word in line.split()) for line in _REFUSED]
    done = light("-c", code, *lines)
    said = done.stderr.splitlines()
    assert said[1::2] == ["2"] * len(_REFUSED), done.stderr
    for line, told in zip(_REFUSED, said[::2], strict=True):
        assert told.startswith("error: package="), line
        extra = "quantize" if line.startswith("quantize") else "export"
        assert told.endswith(f'pip install "vssm[{extra}]"'), line
    assert not (light.folder / "empty/new").exists()


def test_the_models_are_listed(light: Light) -> None:
    done = light("-m", "vssm.commands.main", "models")
    assert "vim_tiny" in done.stdout


def test_functions_without_their_extra_say_which(light: Light) -> None:
    code = (
        "import vssm\n"
        "from vssm.errors import MissingPackageError\n"
        "names = 'export check_parity load_checkpoint prune finetune compat'\n"
        "for name in names.split():\n"
        "    try:\n"
        "        getattr(vssm, name)\n"
        "    except MissingPackageError as error:\n"
        "        assert 'pip install \"vssm[export]\"' in str(error), name\n"
        "    else:\n"
        "        raise SystemExit(name)\n"
        "try:\n"
        "    vssm.create_model('vim_tiny')\n"
        "except MissingPackageError as error:\n"
        "    assert 'pip install \"vssm[export]\"' in str(error)\n"
    )
    done = light("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_package_is_in_the_extra_that_its_error_names() -> None:
    extras = {
        name: {Requirement(line).name.replace("-", "_") for line in lines}
        for name, lines in PROJECT["optional-dependencies"].items()
    }
    assert {name for name, (extra, _) in PACKAGES.items() if name not in extras[extra]} == set()
    named = set().union(*(extras[extra] for extra, _ in PACKAGES.values()))
    assert named - {"vssm"} == set(PACKAGES)


def test_another_module_that_is_absent_is_no_business_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such"), explain_missing():
        importlib.import_module("no_such")
    with pytest.raises(ModuleNotFoundError, match=r"torch\.no_such"), explain_missing():
        importlib.import_module("torch.no_such")
    assert issubclass(MissingPackageError, ImportError)
    with pytest.raises(AttributeError, match="no_such"):
        vssm.no_such  # noqa: B018 - the access is what is tested
