"""Modules of several inputs: two images and a mask, volumes and a step, lists and mappings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Run
from compat_cases import SlowPath, VimLike, built
from torch import Tensor, nn

import vssm
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import Preprocessing
from vssm.bench.subjects import inputs_of
from vssm.commands.user_module import InputRequest, read_inputs
from vssm.compat.export import dry_run
from vssm.compat.inputs import Inputs, nested
from vssm.errors import UnsupportedError


class _Change(nn.Module):
    """Two images of one place, and which of its parts count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.mixer = built(SlowPath)

    def forward(self, before: Tensor, after: Tensor, mask: Tensor | None = None) -> Any:
        tokens = (self.stem(after) - self.stem(before)).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask.flatten(1)[..., None], tokens, 0)
        return {"logits": self.mixer(tokens).mean(1), "after": tokens}


class _Volumes(nn.Module):
    """A volume, its step in time, and a mapping with a pair, a number and a table without batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 12, 2, 2)
        self.steps = nn.Embedding(10, 12)
        self.mixer = built(SlowPath)

    def forward(self, volume: Tensor, *further: Tensor, step: Tensor, **sample: Any) -> Tensor:
        assert type(sample["views"]) is tuple
        assert type(sample["parts"]) is list
        first, second = sample["views"]
        tokens = self.stem(volume).flatten(2).transpose(1, 2) + self.steps(step)[:, None]
        tokens = tokens + first * sample["parts"][0]["scale"] + second.mean(1, keepdim=True)
        return self.mixer(tokens + sample["table"] + further[0][:, None])


def _images(batch: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, batch, 3, 8, 12, generator=draw)
    return {"mask": torch.rand(batch, 2, 3, generator=draw) > 0.3, "after": after, "before": before}


def _volumes(batch: int) -> dict[str, Any]:
    return {
        "step": torch.arange(batch) % 10,
        "volume": torch.randn(batch, 1, 4, 2, 4),
        "table": torch.randn(4, 12),
        "views": (torch.randn(batch, 4, 12), torch.randn(batch, 3, 12)),
        "parts": [{"scale": torch.tensor(0.5)}],
    }


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


RENAMED = ["logits", "difference=after"]


@pytest.fixture(scope="module")
def change() -> nn.Module:
    return _Change().eval()


@pytest.fixture(scope="module")
def two_images(change: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("change") / "out"
    return vssm.export_module(change, _images(1), out, outputs=RENAMED)


def test_inputs_are_called_as_parameters(two_images: Artifact, change: nn.Module) -> None:
    found = [(spec.name, spec.dtype, spec.shape) for spec in two_images.manifest.inputs]
    image = ("batch", 3, 8, 12)
    assert found == [
        ("before", "float32", image),
        ("after", "float32", image),
        ("mask", "bool", ("batch", 2, 3)),
    ]
    report = vssm.check_parity(None, two_images)
    assert report.passed, report.failures
    assert report.images == 2
    more = vssm.check_parity(change, two_images, images=_arrays(_images(3, seed=1)))
    assert more.passed, more.failures
    body = vssm.check_parity(None, two_images, backend="body")
    assert body.passed, body.failures


def test_session_takes_every_input_by_name(two_images: Artifact, change: nn.Module) -> None:
    x = _images(3, seed=2)
    given = _arrays(x)
    with vssm.open_session(two_images) as session:
        got = session.run(given)["logits"]
        with pytest.raises(TypeError, match=r"has the inputs before, after, mask; give a mapping"):
            session.run(given["before"])
        with pytest.raises(ValueError, match=r"has after, before, but the inputs .* after, mask"):
            session.run({name: given[name] for name in ("before", "after")})
        with pytest.raises(ValueError, match=r"before has 3, after has 2, mask has 3 in its first"):
            session.run({**given, "after": given["after"][:2]})
        with pytest.raises(TypeError, match=r"mask=ndarray of float32 is no NumPy array of bool"):
            session.run({**given, "mask": given["mask"].astype(np.float32)})
        with pytest.raises(ValueError, match="has no such input"):
            session.run(given, sizes=np.array([[8, 12]]))
    with torch.no_grad():
        want = change(**x)["logits"]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
    again = inputs_of(two_images)(5)
    assert {name: len(array) for name, array in again.items()} == dict.fromkeys(x, 5)


def test_lists_mappings_and_inputs_without_a_batch(tmp_path: Path) -> None:
    model, x = _Volumes().eval(), _volumes(1)
    example = Inputs.of(model, {**x, "step": x["step"]})
    assert list(example.tensors) == [
        *("volume", "step", "table", "views.0", "views.1", "parts.0.scale"),
    ]
    # What stands in the parentheses has no keyword: by place.
    with pytest.raises(UnsupportedError, match="missing a required argument: 'step'"):
        Inputs.of(model, (x["volume"], torch.randn(1, 12)))
    model = _Placed(model).eval()
    example = (x["volume"], torch.randn(1, 12), {k: v for k, v in x.items() if k != "volume"})
    artifact = vssm.export_module(model, example, tmp_path / "out")
    shapes = {spec.name: spec.shape for spec in artifact.manifest.inputs}
    assert shapes == {
        "args.0": ("batch", 1, 4, 2, 4),
        "args.1": ("batch", 12),
        "args.2.step": ("batch",),
        "args.2.table": (4, 12),
        "args.2.views.0": ("batch", 4, 12),
        "args.2.views.1": ("batch", 3, 12),
        "args.2.parts.0.scale": (),
    }
    assert vssm.check_parity(None, artifact).passed
    y = _volumes(3)
    more = (y["volume"], torch.randn(3, 12), {k: v for k, v in y.items() if k != "volume"})
    given = _arrays(Inputs.of(model, more).tensors)
    report = vssm.check_parity(model, artifact, images=given)
    assert report.passed, report.failures
    with vssm.open_session(artifact) as session:
        wrong = {**given, "args.2.table": np.zeros((5, 12), np.float32)}
        with pytest.raises(ValueError, match=r"args.2.table.shape=\(5, 12\) is not \(4, 12\)"):
            session.run(wrong)


class _Placed(nn.Module):
    """Hands on what it gets, whatever that is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        volume, further, sample = args
        return self.model(volume, further, **sample)


def test_dry_run_names_the_inputs(change: nn.Module) -> None:
    found = dry_run(change, _images(2), outputs=RENAMED)
    assert found.inputs["mask"] == ("batch", 2, 3)
    assert (found.outputs["logits"], found.scans) == ((1, 12), 1)
    fixed = dry_run(
        change, (*(torch.zeros(2, 3, 8, 12),) * 2,), outputs=RENAMED, dynamic_batch=False
    )
    assert fixed.inputs == dict.fromkeys(("before", "after"), (2, 3, 8, 12))


@pytest.mark.parametrize(
    ("example", "options", "error", "message"),
    [
        (
            torch.zeros(1, 3, 8, 12),
            {},
            UnsupportedError,
            r"_Change.forward\(before.*'after'.*mask=",
        ),
        ({"before": 1.0, "after": 2.0}, {}, TypeError, "before is float, and only tensors"),
        ({"before": [], "after": 1.0}, {}, ValueError, "before is empty"),
        ({"before": {"a.b": 1}, "after": 1}, {}, ValueError, r"key 'a.b' of before is not a text"),
        ({**_images(1), "extra": torch.zeros(1)}, {}, UnsupportedError, "unexpected keyword"),
        (
            {"before": torch.zeros(1, dtype=torch.float64), "after": torch.zeros(1)},
            {},
            TypeError,
            "before is torch.float64; inputs of a file are float32",
        ),
        (dict.fromkeys(("before", "after"), torch.tensor(1.0)), {}, ValueError, "has an axis"),
        (_images(1), {"dynamic": ["height=2"]}, UnsupportedError, "one input alone; leave it out"),
        (
            _images(1),
            {"preprocessing": Preprocessing(8, (8, 8))},
            ValueError,
            "one input of a file",
        ),
        (_images(1), {}, ValueError, r"'after' is the name of an input as well.*NEW=after"),
    ],
)
def test_refusals(
    change: nn.Module,
    tmp_path: Path,
    example: Any,
    options: Any,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        vssm.export_module(change, example, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_inputs_are_not_pruned() -> None:
    model = built(VimLike)
    with pytest.raises(UnsupportedError, match="only a model of one input"):
        vssm.prune(model, vssm.PruneSchedule({1: 0.5}), (torch.zeros(1, 3, 48, 48),) * 2)  # type: ignore[arg-type]


def test_what_the_options_say() -> None:
    assert read_inputs(["1x3x8x8"]) == (InputRequest(None, (1, 3, 8, 8)),)
    assert read_inputs(["1x9"], 50) == (InputRequest(None, (1, 9), below=50),)
    assert read_inputs(["a=1x3", "b.0=2:10", "c=2:bool", "d=scalar"]) == (
        InputRequest("a", (1, 3)),
        InputRequest("b.0", (2,), below=10),
        InputRequest("c", (2,), flags=True),
        InputRequest("d", ()),
    )
    for texts, tokens, message in (
        (["a=1x3", "1x3"], None, "has no name, and there are several"),
        (["a=1x3", "b=1x3"], 5, r"say it behind each, as in --input tokens=1x64:5"),
        (["1x3:bool"], 5, "say it behind each"),
        (["1x3:int"], None, r"is not \[NAME=\]SIZES"),
        (["=1x3"], None, r"is not \[NAME=\]SIZES"),
        (["a=1y3"], None, "is not sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            read_inputs(texts, tokens)


def test_names_make_arguments() -> None:
    names = {"x": 1, "y.1": 2, "y.0": 3, "z.a.b": 4}
    assert nested(names, frozenset({"y"})) == {"x": 1, "y": (3, 2), "z": {"a": {"b": 4}}}
    for wrong in (
        {"x": 1, "x.a": 2},
        {"x.a": 2, "x": 1},
        {"x.0": 1, "x.2": 2},
        {"x.0": 1, "x.a": 2},
    ):
        with pytest.raises(ValueError, match="input 'x"):
            nested(wrong)


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        from mamba_ssm import Mamba
        self.stem, self.steps = nn.Conv2d(3, 8, 4, 4), nn.Embedding(9, 8)
        self.mixer = Mamba(8, d_state=2)

    def forward(self, image, step, views=None):
        x = self.stem(image).flatten(2).transpose(1, 2) + self.steps(step)[:, None]
        return self.mixer(x if views is None else x + views[0] + views[1]).mean(1)
"""


def test_command(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "several_net.py").write_text(MODEL)
    target, out = f"{tmp_path}/several_net.py:Net", tmp_path / "out"
    image, step = ("--input", "image=1x3x8x8"), ("--input", "step=1:9")
    views = ("--input", "views.0=1x4x8", "--input", "views.1=1x4x8")
    assert cli("export-module", target, *image, *step, "--dry-run") == 0, cli.out
    assert "inputs: image batchx3x8x8, step batch" in cli.out
    assert cli("export-module", target, *image, *step, *views, "-o", str(out)) == 0, cli.out
    inputs = json.loads((out / "model.json").read_text())["inputs"]
    assert [one["name"] for one in inputs] == ["image", "step", "views.0", "views.1"]
    assert cli("check", str(out)) == 0, cli.out
    assert cli("bundle", str(out), "-o", str(tmp_path / "bundle")) == 2
    assert "has the inputs image, step, views.0, views.1; a bundle's server" in cli.out
    assert cli("export-module", target, *image, "--dry-run") == 2
    assert "missing a required argument: 'step'" in cli.out
    assert cli("export-module", target, *image, *step, "--imagenet", "--dry-run") == 2
    assert "it is for one input" in cli.out
