"""Modules in every style to files: numbers, nodes, the command line, and refusals."""

from __future__ import annotations

import importlib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkout import ROOT
from command import Run
from compat_cases import (
    CSMS6S,
    IMAGES,
    STYLES,
    LanguageModel,
    MinimalLike,
    SlowPath,
    VimLike,
    VMambaLike,
    built,
    exported_style,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import vssm
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import Preprocessing
from vssm.artifact.reference import stored_reference
from vssm.compat import upstream
from vssm.compat.export import dry_run
from vssm.errors import ArtifactError, UnsupportedError
from vssm.files.atomic import sha256_of
from vssm.ops import operators as ops


def _export(tmp_path: Path, model: nn.Module, x: Tensor, **options: Any) -> Artifact:
    return vssm.export_module(model, x, tmp_path / "out", **options)


def _operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(artifact.model_path)).graph.node)


def _repository(folder: Path, monkeypatch: pytest.MonkeyPatch, core: bool) -> nn.Module:
    name = f"own_scans_{core}"
    (folder / f"{name}.py").write_text(CSMS6S)
    monkeypatch.syspath_prepend(str(folder))
    with upstream() as report:
        module = importlib.import_module(name)
        assert f"{name}.SelectiveScanCore.apply" in report.patched
        del sys.modules[name]  # a later `upstream()` would patch it again
        return VMambaLike(module, core=core).eval()


SCANS = {
    "vim v2": {"GatedSelectiveScan": 1},
    "vim v1": {"GatedSelectiveScan": 1},
    "vim none": {"GatedSelectiveScan": 1},
    "slow path": {"GatedSelectiveScan": 1},
    "transformers": {"GatedSelectiveScan": 1},
    "mambavision": {"SelectiveScan": 1},
    "plain mamba": {"GatedSelectiveScan": 1},
    "mamba-2": {"GatedSelectiveScan": 1},
    "mamba-2, both ways": {"SelectiveScan": 1},
    "mamba-2 block, groups": {"SelectiveScan": 2},
}


@pytest.mark.parametrize("style", SCANS)
def test_every_style_exports(tmp_path: Path, style: str) -> None:
    factory, shape = STYLES[style]
    artifact = exported_style(tmp_path, style)
    found = _operators(artifact)
    assert {k: v for k, v in found.items() if "Scan" in k} == SCANS[style]
    report = vssm.check_parity(None, artifact)
    assert report.passed, report.failures
    # Another batch, and the model itself as the oracle.
    more = np.random.default_rng(1).standard_normal((3, *shape[1:])).astype(np.float32)
    report = vssm.check_parity(built(factory), artifact, images=more)
    assert report.passed, report.failures
    body = vssm.check_parity(None, artifact, backend="body")
    assert body.passed, body.failures


@pytest.mark.parametrize("core", [False, True])
def test_scans_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: bool) -> None:
    model = _repository(tmp_path, monkeypatch, core)
    artifact = _export(tmp_path, model, torch.randn(2, 6, 4, 5))
    report = vssm.check_parity(None, artifact)
    assert report.passed, report.failures
    assert _operators(artifact)["SelectiveScan"] == 1  # all walks of a block


def test_language_model_prefill(tmp_path: Path) -> None:
    model = built(LanguageModel)
    tokens = torch.randint(30, (2, 11))
    artifact = _export(tmp_path, model, tokens)
    spec = artifact.manifest.inputs[0]
    assert (spec.name, spec.dtype, spec.shape) == ("input", "int64", ("batch", 11))
    assert vssm.check_parity(None, artifact).passed
    with pytest.raises(ArtifactError, match="leave --per-block out"):
        vssm.check_parity(None, artifact, per_block=True)
    with vssm.open_session(artifact) as session:
        got = session.run(tokens.numpy())["logits"]
        assert got.shape == (2, 11, 30)
        with pytest.raises(TypeError, match="input=ndarray of float32 is no NumPy array of int64"):
            session.run(np.zeros((2, 11), np.float32))
        with pytest.raises(ValueError, match="shape"):
            session.run(np.zeros((2, 12), np.int64))


def test_scan_of_a_hand_written_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built(MinimalLike), torch.randn(2, 5, 12)
    # Without a scan it is refused before the trace, which is the long part.
    with monkeypatch.context() as patched:
        patched.setattr(torch.export, "export", None)
        with pytest.raises(UnsupportedError, match=r"calls no selective scan.*--scan"):
            _export(tmp_path, model, x)
    assert not (tmp_path / "out").exists()
    want = model(x).detach()
    with upstream() as report:
        artifact = _export(tmp_path, model, x)
    assert "compat_cases.MinimalLike.selective_scan computes our scan" in report.notes
    assert _operators(artifact)["SelectiveScan"] == 1
    with vssm.open_session(artifact) as session:
        got = session.run(x.numpy())["logits"]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


def test_graph_is_that_of_our_own_model(tmp_path: Path) -> None:
    ours = vssm.create_model(
        "vim_tiny",
        image_size=48,
        patch_size=8,
        stride=8,
        depth=2,
        d_model=20,
        d_state=5,
        num_classes=7,
    )
    theirs = _operators(exported_style(tmp_path, "vim v2, two blocks"))
    own = _operators(vssm.export(ours, tmp_path / "ours"))
    assert theirs["TokenConv"] == own["TokenConv"] == 2
    # Nothing in a block is transposed; what is left stands around the blocks.
    assert sum(theirs.values()) <= sum(own.values()) + 2


def test_model_json_says_what_was_done(tmp_path: Path) -> None:
    model = built(lambda: VimLike(depth=1))
    model.train()
    artifact = _export(tmp_path, model, torch.randn(IMAGES), labels=list("abcdefg"), name="mine")
    assert model.training
    manifest = artifact.manifest
    assert manifest.name == "mine"
    assert manifest.config["module"] == "compat_cases.VimLike"
    assert any(line.startswith("merge scans: applied 1") for line in manifest.config["passes"])
    assert manifest.preprocessing is None
    assert manifest.inputs[0].name == "images"
    assert manifest.labels == tuple("abcdefg")
    with pytest.raises(ValueError, match="how images are prepared"):
        vssm.preprocess(np.zeros((9, 9, 3), np.uint8), artifact)
    with pytest.raises(ArtifactError, match="force"):
        _export(tmp_path, model, torch.randn(IMAGES))


class _Pair(nn.Module):
    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Any:
        y = self.model(x)
        return {"dict": {"a": y, "b": y.exp()}, "text": "logits"}[self.kind]


def test_several_outputs(tmp_path: Path) -> None:
    pair = _Pair(built(SlowPath), "dict")
    artifact = _export(tmp_path, pair, torch.randn(2, 9, 12), outputs=["logits", "exp"])
    report = vssm.check_parity(None, artifact)
    assert [c.name for c in report.blocks] == ["exp"]
    assert report.passed
    with pytest.raises(UnsupportedError, match=r"returns dict of 2: a .*, b .* not certain"):
        _export(tmp_path, pair, torch.randn(2, 9, 12), force=True)
    with pytest.raises(UnsupportedError, match=r"returns str|cannot trace"):
        _export(tmp_path, _Pair(built(SlowPath), "text"), torch.randn(2, 9, 12), force=True)


class _Counting(nn.Module):
    """Its control flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.model = built(SlowPath)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if float(x.sum()) > 0 else x


def test_refusals(tmp_path: Path) -> None:
    x = torch.randn(2, 9, 12)
    with pytest.raises(UnsupportedError, match=r"cannot trace _Counting: .*test_export.py:\d+\)"):
        _export(tmp_path, _Counting(), x)
    with pytest.raises(TypeError, match=r"not a torch.nn.Module"):
        _export(tmp_path, "model", x)
    with pytest.raises(TypeError, match="no tensor"):
        _export(tmp_path, built(SlowPath), [x])
    with pytest.raises(ValueError, match="opset=12"):
        _export(tmp_path, built(SlowPath), x, opset=12)
    with pytest.raises(ValueError, match=r"not float32: .*in_proj"):
        _export(tmp_path, built(SlowPath).half(), x)
    bad = built(SlowPath)
    bad.D.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite: D"):
        _export(tmp_path, bad, x)
    spec = Preprocessing.for_image_size(8)
    with pytest.raises(ValueError, match=r"crop=\[8, 8\] makes .* input is float32 of 9 x 12"):
        _export(tmp_path, _Counting(), x, preprocessing=spec)  # untraced: that would fail


class _Single(nn.Module):
    """Another function in another precision, or one that cannot run."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = built(SlowPath), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rounding":  # what float32 has lost at 1e8, float64 has not
            return self.model(x) + (x * 1e8 - (x * 1e8).round()).abs().mean()
        return self.model(x) + torch.zeros(1, dtype=torch.float16) @ torch.zeros(1, 1)


def test_reference_must_be_the_same_function(tmp_path: Path) -> None:
    x = torch.randn(2, 9, 12)
    with pytest.raises(UnsupportedError, match="differs between float32 and float64"):
        _export(tmp_path, _Single("rounding"), x)
    artifact = _export(tmp_path, _Single("rounding"), x, reference=False)
    with pytest.raises(ArtifactError, match="without reference"):
        vssm.check_parity(None, artifact)


class _Chooses(nn.Module):
    """Its output has as many rows as are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MinimalLike()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return y[y.sum(-1) > 0]


def test_an_output_of_no_known_size_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UnsupportedError, match=r"output 'logits' has as many entries as the values"),
        upstream(),
    ):
        vssm.export_module(_Chooses(), torch.ones(1, 3, 12), tmp_path / "out")


def test_a_lazy_module_has_no_weights_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight has no size yet.*call the model once"):
        vssm.export_module(nn.LazyLinear(3), torch.ones(1, 2), tmp_path / "out")


def test_fixed_batch(tmp_path: Path) -> None:
    artifact = _export(tmp_path, built(SlowPath), torch.randn(3, 9, 12), dynamic_batch=False)
    assert artifact.manifest.inputs[0].shape == (3, 9, 12)
    assert vssm.check_parity(None, artifact).passed
    with vssm.open_session(artifact) as session, pytest.raises(ValueError, match="shape"):
        session.run(np.zeros((2, 9, 12), np.float32))


def test_what_needs_the_model_is_refused(tmp_path: Path) -> None:
    artifact = exported_style(tmp_path, "slow path")
    with pytest.raises(ArtifactError, match="module of yours"):
        vssm.open_session(artifact, "torch")
    with pytest.raises(ArtifactError, match="leave the images out"):
        vssm.check_parity(None, artifact, images=np.zeros((2, 9, 12), np.float32))
    path = artifact.directory / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ArtifactError, match=r"reference.safetensors"):
        vssm.check_parity(None, artifact)


def test_a_reference_of_numbers_that_numpy_lacks(tmp_path: Path) -> None:
    made = exported_style(tmp_path, "slow path")
    path = made.directory / "reference.safetensors"
    save_file({"input": torch.zeros(2, dtype=torch.bfloat16)}, path)
    files = {**made.manifest.files, path.name: sha256_of(path)}
    edited = replace(made, manifest=replace(made.manifest, files=files))
    with pytest.raises(ArtifactError, match=r"reference.safetensors is damaged \('BF16'\)"):
        stored_reference(edited)


def test_wrong_file_fails_the_check(tmp_path: Path) -> None:
    artifact = exported_style(tmp_path, "slow path")
    report = vssm.check_parity(built(SlowPath, seed=1), artifact, images=np.ones((1, 9, 12), "f"))
    assert not report.passed


MODEL = """
    import torch
    from mamba_ssm import Mamba
    from .parts import Head

    class Net(torch.nn.Module):
        def __init__(self, width=8, classes=5):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, width, 8, 8)
            self.mixer = Mamba(width, d_state=3)
            self.head = Head(width, classes)

        def forward(self, images):
            x = self.stem(images).flatten(2).transpose(1, 2)
            return self.head(self.mixer(x).mean(1))

    def build(**options):
        return Net(**options)

    def nothing():
        return 1
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    package = tmp_path / "repo" / "nets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(textwrap.dedent(MODEL))
    (package / "parts.py").write_text("from torch.nn import Linear as Head\n")
    return tmp_path / "repo"


@pytest.mark.parametrize("target", ["nets/model.py:build", "nets:model.build"])
def test_targets(cli: Run, repository: Path, tmp_path: Path, target: str) -> None:
    path, _, factory = target.rpartition(":")
    given = ("--input", "1x3x24x32", "--set", "classes=4", "--dry-run", "--json", tmp_path / "dry")
    assert cli("export-module", f"{repository / path}:{factory}", *given) == 0, cli.out
    assert json.loads((tmp_path / "dry").read_text())["outputs"] == {"logits": [1, 4]}
    _forget("nets")


def test_command(cli: Run, repository: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sizes = ("--input", "1x3x24x32", "--set", "classes=4")
    where = f"{repository}:nets.model.Net"
    before = list(sys.path)
    code, text = cli("export-module", where, *sizes, "--imagenet", "-o", str(output)), cli.out
    assert code == 0, text
    assert sys.path == before
    assert "executed the code" in text
    assert "no checkpoint given" in text
    manifest = json.loads((output / "model.json").read_text())
    assert manifest["outputs"][0]["shape"] == ["batch", 4]
    assert cli("check", str(output)) == 0
    code, text = cli("run", str(output), str(picture)), cli.out
    assert code == 0, text
    state = sys.modules["nets.model"].build(classes=4).state_dict()
    torch.save({"model": state}, tmp_path / "weights.pth")
    weights = ("--checkpoint", str(tmp_path / "weights.pth"), "--force")
    code, text = cli("export-module", where, *sizes, *weights, "-o", str(output)), cli.out
    assert code == 0, text
    assert "tensors from" in text
    assert "preprocessing unknown" in text
    assert json.loads((output / "model.json").read_text())["weights"] == "checkpoint"
    _forget("nets")


def test_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "compat.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert "provided: mamba_ssm" in said
    assert said.endswith("True\n")


class _Interleaved(nn.Module):
    """Two maps, one in the even and one in the odd columns; it names the GPU that it is for."""

    def __init__(self, ending: str = "") -> None:
        super().__init__()
        self.mixer = built(SlowPath)
        self.ending = ending

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], x.shape[1], 2 * x.shape[2], device="cuda")
        y[..., ::2], y[..., 1::2] = x, x.flip(1)
        if self.ending == "exit":
            sys.exit()
        if self.ending:
            return self.no_such_module(y)
        return self.mixer(y.cuda()[..., 1:13])


def test_sizes_that_are_not_known_have_no_name(tmp_path: Path) -> None:
    artifact = _export(tmp_path, _Interleaved(), torch.randn(2, 9, 8))
    report = vssm.check_parity(None, artifact)
    assert report.passed, report.failures
    sizes = [
        dim.dim_param
        for value in onnx.load(str(artifact.model_path)).graph.value_info
        for dim in value.type.tensor_type.shape.dim
    ]
    assert "batch" in sizes
    assert "None" not in sizes


class _Asks(nn.Module):
    """Takes another path where it is exported, as far as it can tell."""

    def __init__(self, asks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.mixer, self.asks = built(SlowPath), asks

    def forward(self, x: Tensor) -> Tensor:
        if not self.asks(x):
            return self.mixer(x)
        # Another operator of ours is no scan.
        place = torch.arange(x.shape[1], dtype=torch.int32).expand(x.shape[:2])
        return ops.token_gather(x.sum(2), place, [x], num_keep=x.shape[1])[1][0]


def test_what_runs_is_traced(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 12)
    artifact = _export(tmp_path, _Asks(lambda _: torch.compiler.is_exporting()), x)
    assert vssm.check_parity(None, artifact).passed
    assert _operators(artifact)["GatedSelectiveScan"] == 1
    with pytest.raises(UnsupportedError, match="runs selective scans, and there is none in"):
        _export(
            tmp_path, _Asks(lambda x: isinstance(x, FakeTensor)), x, reference=False, force=True
        )


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("exit", r"before any selective scan: it ends the program \(.*test_export\.py:\d+\)"),
        ("call", r"AttributeError: .*'no_such_module' \(.*test_export\.py:\d+\); give the input"),
    ],
)
def test_what_the_code_of_a_model_raises_is_said_with_its_line(ending: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        dry_run(_Interleaved(ending), torch.randn(2, 9, 8))


def test_command_refuses(
    cli: Run, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = repository / "nets" / "model.py"
    for target, further, message in (
        ("model", (), "is not PATH:FACTORY"),
        (f"{repository}:build", (), "folder without __init__.py"),
        (f"{repository / 'absent'}:build", (), "neither a folder nor a .py file"),
        (f"{file}:absent", (), "name a factory"),
        (f"{file}:builds", (), "did you mean 'build'?"),
        (f"{file}:torch", (), "torch is a module, not a function or class that makes the model"),
        (f"{file}:nothing", (), "returns int"),
        (f"{file}:build", ("--set", "size=3"), "give its arguments"),
        (f"{file}:build", ("--input", "1x3xlarge"), "joined by x"),
        (f"{file}:build", ("--path", str(tmp_path / "absent")), "is not a directory"),
        (f"{file}:build", ("--input", "1x3x24", "--imagenet"), "batch x 3"),
        (f"{file}:build", ("--schedule", "1:0.5", "--input", "1x3x24x24"), "if_cls_token"),
        (f"{file}:build", ("--alignment", "none"), "without a schedule prunes nothing"),
        (f"{file}:build", ("--cls-index", "3"), "without a schedule prunes nothing"),
        (f"{file}:build", ("--ema",), "without a checkpoint"),
    ):
        code, text = cli("export-module", target, *further, "-o", str(tmp_path / "out")), cli.out
        assert (code, message in text) == (2, True), (target, text)
    (repository / "nets" / "needs.py").write_text("import absent_package\n")
    nets = repository / "nets"
    (nets / "breaks.py").write_text("import torch\n\ntorch.no_such_thing\n")
    (nets / "faulty.py").write_text("def build():\n    raise RuntimeError('no GPU')\n")
    (nets / "deep.py").write_text("def build(width=1):\n    return len(width)\n")
    for target, further, message in (
        (f"{nets / 'deep.py'}:build", (), "TypeError: object of type 'int' has no len() ("),
        (f"{nets / 'deep.py'}:build", ("--set", "depth=1"), "give its arguments"),
        (f"{nets / 'breaks.py'}:f", (), "AttributeError: module 'torch' has no attribute"),
        (f"{nets / 'faulty.py'}:build", (), "RuntimeError: no GPU"),
        (f"{file}:build", ("--input", "1x5x24x24"), "give the input that it is made for"),
    ):
        code, text = cli("export-module", target, *further, "-o", str(tmp_path / "out")), cli.out
        assert (code, message in text) == (2, True), (target, text)
    (repository / "json.py").write_text("def build():\n    pass\n")
    assert cli("export-module", f"{repository / 'json.py'}:build", "-o", str(tmp_path / "o")) == 2
    assert "already imported from" in cli.out
    needs = f"{repository / 'nets' / 'needs.py'}:f"
    assert cli("export-module", needs, "-o", str(tmp_path / "out")) == 2
    assert "'absent_package', which is not found" in cli.out
    (repository / "nets" / "named.py").write_text("from einops import rearrange\n")
    monkeypatch.setitem(sys.modules, "einops", None)  # as if it were not installed
    named = f"{repository / 'nets' / 'named.py'}:f"
    assert cli("export-module", named, "-o", str(tmp_path / "out")) == 2
    assert "package=einops is not installed" in cli.out
    assert 'pip install "vssm[compat]"' in cli.out
    _forget("nets")


def _forget(root: str) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == root]:
        del sys.modules[name]
