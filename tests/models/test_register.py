"""A family from outside the package: everything that takes a model by its name takes its models.

The family is the one that docs/add_a_family.md prints, found by its entry point, as that of an
installed package. Vim passes the same list, which takes long.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import ROOT
from command import Run
from finetune_cases import CLASSES, PLAIN, RECIPE, write_pictures

import vssm
from vssm.checkpoints.load import save_safetensors
from vssm.errors import CheckpointError, UnsupportedError, VssmError
from vssm.models import registry
from vssm.models.cost import count

PAGE = ROOT / "docs" / "add_a_family.md"
SIZES: dict[str, dict[str, Any]] = {
    "toy_tiny": {"image_size": 32, "patch_size": 8, "depth": 2, "d_model": 16, "d_state": 4},
    "vim_tiny": {"image_size": 32, "stride": 16, "depth": 2, "d_model": 16, "d_state": 4},
}
SCHEDULE = vssm.PruneSchedule({1: 0.7})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's family as an installed package."""
    folder = tmp_path_factory.mktemp("site")
    text = PAGE.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", text, re.S)[::-1])  # the first of a language
    (folder / "toy_family.py").write_text(blocks["python"])
    info = folder / "toy_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    group, line = re.fullmatch(r'\[.*"(.*)"\]\n(.*)\n', blocks["toml"]).groups()  # type: ignore[union-attr]
    (info / "entry_points.txt").write_text(f"[{group}]\n" + line.replace('"', "") + "\n")
    before = dict(registry.families())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        registry._installed.cache_clear()
        yield folder
    registry._families.clear()
    registry._families.update(before)
    sys.modules.pop("toy_family", None)


@pytest.fixture(
    scope="module", params=["toy_tiny", pytest.param("vim_tiny", marks=pytest.mark.slow)]
)
def name(request: pytest.FixtureRequest, toy: Path) -> str:
    return str(request.param)


def build(name: str, schedule: vssm.PruneSchedule | None = SCHEDULE) -> Any:
    return vssm.create_model(name, schedule=schedule, num_classes=CLASSES, **SIZES[name])


def words(name: str) -> list[str]:
    """A model of these sizes on the command line."""
    sizes = [f"--set={key}={json.dumps(value)}" for key, value in SIZES[name].items()]
    return [name, f"--num-classes={CLASSES}", *sizes]


@pytest.fixture(scope="module")
def artifact(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vssm.export(build(name), tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_it_is_listed(name: str, cli: Run, tmp_path: Path) -> None:
    assert name in vssm.list_models()
    assert cli("models", "--json", tmp_path / "models.json") == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "models.json").read_text())}
    with torch.device("meta"):
        model = vssm.create_model(name)
    assert rows[name]["parameters"] == sum(p.numel() for p in model.parameters())
    assert rows[name]["flops_published"] == count(model).published


def test_a_model_is_made_as_any(name: str) -> None:
    dense, pruned = build(name, None), build(name)
    assert not dense.training
    for key, value in dense.state_dict().items():  # seeded, with the same keys
        assert torch.equal(value, pruned.state_dict()[key])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    everything = vssm.PruneSchedule({1: 1.0})
    assert torch.equal(dense.double()(images), build(name, everything).double()(images))
    found = pruned.double().forward_details(images, with_blocks=True)
    assert len(found.blocks) == 2
    assert found.kept_positions[0].shape == (2, pruned.stages[1].num_keep)
    wide = vssm.create_model(name, **{**SIZES[name], "image_size": "32x48"})
    assert wide(torch.zeros(1, 3, 32, 48)).shape == (1, 1000)
    assert vssm.default_schedule(name).ratios


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_modl": 3}, "did you mean 'd_model'"),
        ({"img_size": 32}, "it is called 'image_size' here"),
        ({"depth": "2"}, "is not of type int"),
        ({"schedule": vssm.PruneSchedule({9: 0.5})}, "outside the model's blocks 1 to 2"),
        ({"schedule": vssm.PruneSchedule({1: 0.5}, step_parameters="full")}, "PlainMamba's choice"),
    ],
)
def test_it_refuses(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, UnsupportedError), match=message):
        vssm.create_model(name, **{**SIZES[name], **options})
    with pytest.raises(ValueError, match=r"images\.shape=.* is not \(batch, 3, 32, 32\)"):
        build(name)(torch.zeros(1, 3, 32, 40))


def test_checkpoints(name: str, tmp_path: Path) -> None:
    filled = {k: torch.randn_like(v) for k, v in build(name).state_dict().items()}
    save_safetensors(filled, tmp_path / "weights.safetensors")
    model = build(name)
    vssm.load_checkpoint(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(v, filled[k]) for k, v in model.state_dict().items())
    filled.pop("head.weight")
    save_safetensors(filled, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        vssm.load_checkpoint(build(name), tmp_path / "part.safetensors")


def test_parity(name: str, artifact: Any, cli: Run) -> None:
    for backend in ("kernel", "body"):
        assert cli("check", artifact.directory, "--backend", backend, "--per-block") == 0


@pytest.mark.slow
def test_half_precision(name: str, cli: Run, tmp_path: Path) -> None:
    export = ["export", *words(name), "--schedule", "1:0.7", "--dtype", "float16"]
    assert cli(*export, "-o", tmp_path / "out") == 0
    assert cli("check", tmp_path / "out") == 0
    assert cli("export", name, "--schedule", "2:0.7", "--set", "d_modl=2", "-o", tmp_path) == 2
    assert "did you mean 'd_model'" in cli.out


@pytest.mark.slow
def test_bench(name: str, artifact: Any, cli: Run) -> None:
    assert cli("bench", artifact.directory, "--batch", "1", "--samples", "3") == 0
    assert "wrote" in cli.out


def test_evaluate(name: str, artifact: Any, pictures: Path, cli: Run, tmp_path: Path) -> None:
    assert cli("evaluate", artifact.directory, pictures, "--json", tmp_path / "found.json") == 0
    assert 0 <= json.loads((tmp_path / "found.json").read_text())["top1"] <= 1


def test_finetune(name: str, pictures: Path, tmp_path: Path) -> None:
    source = vssm.ModelSource(
        name, schedule="1:0.7", num_classes=CLASSES, options=SIZES[name], tokens="masked"
    )
    recipe = vssm.Recipe(**{**RECIPE, **PLAIN, "epochs": 1, "batch": 21, "warm_up_epochs": 0})
    request = vssm.FinetuneRequest(
        source, pictures, tmp_path / "run", recipe, resources=vssm.Resources(workers=0)
    )
    report = vssm.finetune(request)
    assert report is not None
    before, after = build(name), build(name)
    vssm.load_checkpoint(after, report.weights)
    moved = [not torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items()]
    assert sum(moved) > len(moved) / 2


def test_ablate(name: str, pictures: Path, tmp_path: Path) -> None:
    source = vssm.ModelSource(name, schedule="1:0.7", num_classes=CLASSES, options=SIZES[name])
    report = vssm.ablate(source, pictures, tmp_path, vssm.AblationOptions(seeds=1, ratios=["0.5"]))
    labels = [row.label for row in report.rows]
    assert {"dense", "plain removal", "aligned (gap)", "constant"} <= set(labels)
    assert all(row.published.top1 is None for row in report.rows)
    # What the family does not have is named, with its reason.
    unmerged = ["merge", "merge+size"] if name == "toy_tiny" else []
    assert sorted(report.left_out) == unmerged


def test_visualize(name: str, artifact: Any, pictures: Path, tmp_path: Path) -> None:
    picture = next(pictures.rglob("*.png"))
    vssm.visualize(vssm.ModelSource(str(artifact.directory)), [picture], tmp_path)
    assert list(tmp_path.glob("*.html"))


def test_an_export_runs(name: str, artifact: Any) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    with vssm.open_session(artifact, runtime="ort-cpu") as session:
        got = session.run(images)["logits"]
    with torch.no_grad():
        wanted = build(name)(torch.from_numpy(images))
    assert np.abs(got - wanted.numpy()).max() < 1e-5


def test_registering(toy: Path) -> None:
    family = registry.families()["toy"]
    vssm.register_family(family)  # again: nothing happens
    with pytest.raises(ValueError, match="name='toy' is another family already"):
        vssm.register_family(replace(family, magnifies=2.0))
    with pytest.raises(ValueError, match="cards='toy_tiny' is a model of the family 'toy'"):
        vssm.register_family(replace(family, name="other"))
    with pytest.raises(ValueError, match="cards='A/b' is not of small letters, digits and _"):
        vssm.register_family(replace(family, name="other", cards={"A/b": vssm.ModelCard()}))
    with pytest.raises(TypeError, match="family='toy' is not a family"):
        vssm.register_family("toy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model='toy' is not module:Class"):
        replace(family, model="toy")
    with pytest.raises(ValueError, match="task='naming' is not one of"):
        vssm.ModelCard(task="naming")


def test_a_broken_package_is_named(
    toy: Path, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vssm.families]\nodd = no_such_module:FAMILY\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    for _ in range(2):
        with pytest.raises(VssmError, match=r"odd = 'no_such_module:FAMILY' of broken.*uninstall"):
            vssm.list_models()
    assert cli("models") == 2
    monkeypatch.undo()
    registry._installed.cache_clear()
