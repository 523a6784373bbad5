"""Outputs of a user's module keep their names, whatever object they come in."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compat_cases import SlowPath, built
from torch import Tensor, nn

import vssm
from vssm.compat.outputs import module_outputs
from vssm.errors import UnsupportedError

ONE, TWO, THREE = torch.zeros(2, 5), torch.ones(2, 5), torch.ones(2, 3)


class _Returns(nn.Module):
    """Returns what it is given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


def found(value: Any, asked: list[str] | None = None) -> dict[str, Tensor]:
    return module_outputs(asked)(_Returns(value), ONE)


@dataclasses.dataclass
class _Answer:
    aux: Tensor
    logits: Tensor
    loss: Tensor | None = None


class _ModelOutput(OrderedDict[str, Any]):
    """As transformers has it: a mapping whose entries are attributes too."""


class _Object:
    def __init__(self) -> None:
        self.logits, self.name = TWO, "x"


_Named = namedtuple("_Named", ["aux", "logits"])


@pytest.mark.parametrize(
    "value",
    [
        {"aux": ONE, "logits": TWO},
        {"aux": ONE, "loss": None, "logits": TWO},
        ({"aux": ONE, "logits": TWO},),
        {"aux": [ONE], "logits": (TWO,)},
        _Answer(ONE, TWO),
        _Named(ONE, TWO),
        _ModelOutput(aux=ONE, logits=TWO),
    ],
    ids=["dict", "none", "in a tuple", "of lists", "dataclass", "namedtuple", "mapping"],
)
def test_what_is_called_logits_is_logits(value: Any) -> None:
    got = found(value)
    assert list(got) == ["logits", "aux"]
    assert got["logits"] is TWO
    assert got["aux"] is ONE
    swapped = found(value, ["aux", "logits"])
    assert list(swapped) == ["aux", "logits"]
    assert swapped["logits"] is TWO
    assert found(value, ["logits=aux"])["logits"] is ONE


@pytest.mark.parametrize("value", [TWO, (TWO,), [TWO], ((TWO,),), (TWO, None), (None, TWO)])
def test_one_tensor_is_logits(value: Any) -> None:
    assert found(value)["logits"] is TWO
    assert found(value, ["boxes"])["boxes"] is TWO


def test_nested_values_have_names_of_their_way() -> None:
    got = found({"logits": ONE, "features": [TWO, {"deep": THREE}], "n": {"a": TWO}})
    assert list(got) == ["logits", "features.0", "features.1.deep", "n.a"]
    assert got["features.1.deep"] is THREE
    assert list(found((ONE, [TWO, THREE]), ["logits=1.0", "x=0"])) == ["logits", "x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"aux": ONE, "out": TWO}, r"returns dict of 2: aux \(2, 5\), out \(2, 5\), of which it"),
        ({"out": TWO}, r"returns dict of 1: out \(2, 5\), of which it is not certain"),
        ((ONE, THREE), r"returns tuple of 2: 0 \(2, 5\), 1 \(2, 3\), of which .* say outputs="),
        ((ONE, {"logits": TWO}), r"returns tuple of 2: 0 \(2, 5\), 1.logits \(2, 5\)"),
        ({"logits": [ONE, TWO]}, r"returns dict of 2: logits.0 .* it is not certain"),
        (None, r"returns NoneType of 0"),
        ("text", r"returns str, not tensors; wrap it in a module whose forward returns the logits"),
        (_Object(), r"returns _Object, not tensors, which has the tensors logits; wrap it"),
        ({"logits": ONE, "loss": 0.5}, r"returns float, not tensors as 'loss'; wrap it"),
        ({"logits": ONE, "a": {"b": ONE}, "a.b": TWO}, r"two values that are called 'a.b'"),
    ],
)
def test_what_is_not_certain_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        found(value)


def test_outputs_name_and_choose() -> None:
    assert list(found((ONE, TWO), ["logits", "aux"])) == ["logits", "aux"]
    assert list(found((ONE, TWO), ["aux", "logits"])) == ["aux", "logits"]
    assert found((ONE, TWO), ["aux", "logits"])["logits"] is TWO
    assert found((ONE, TWO), ["logits=1"])["logits"] is TWO  # the other is left out
    both = {"out": ONE, "aux": TWO, "loss": 0.5}
    got = found(both, ["aux", "logits=out"])
    assert list(got) == ["aux", "logits"]
    assert got["logits"] is ONE
    assert list(found({"a": ONE, "b": TWO}, ["x", "y"])) == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "asked", "message"),
    [
        # By place, logits would be the tensor called aux.
        ({"aux": ONE, "out": TWO}, ["logits", "aux"], r"there is no 'logits'; say outputs="),
        ({"aux": ONE, "out": TWO}, ["logits"], r"there is no 'logits'"),
        ((ONE, TWO), ["a", "b", "c"], r"returns tuple of 2: .* there is no 'a'"),
        ((ONE, TWO), ["a=2", "b=0"], r"outputs=\['a=2', 'b=0'\]: .* there is no '2'"),
        ((ONE, TWO), ["a", "a"], r"'a' is there twice; name each once"),
        ((ONE, TWO), [], r"names nothing"),
        ((ONE, TWO), ["a b", "c"], r"'a b' is not up to 128 letters, digits and the signs"),
        ((ONE, TWO), ["", "c"], r"outputs: '' is not up to 128"),
        ((ONE, TWO), ["input", "c"], r"'input' is a name of the file itself"),
        ((ONE, TWO), ["kept_positions_3", "c"], r"'kept_positions_3' is a name of the file"),
        ({"logits": ONE, "input": TWO}, None, r"'input' is a name of the file itself; rename it"),
        ({"logits": ONE, "a b": TWO}, None, r"'a b' is not up to 128"),
    ],
)
def test_outputs_that_do_not_fit(value: Any, asked: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(value, asked)


def test_outputs_are_a_list() -> None:
    with pytest.raises(TypeError, match=r"outputs='logits' is one text; give a list"):
        module_outputs("logits")


class _Heads(nn.Module):
    """Heads of equal width, the auxiliary one first."""

    def __init__(self, names: tuple[str, ...] = ("aux_logits", "logits")) -> None:
        super().__init__()
        self.body, self.names = built(SlowPath), names
        self.aux, self.head = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = self.body(x).mean(1)
        heads = (self.head(i * f) for i in range(1, len(self.names)))
        return dict(zip(self.names, (self.aux(f), *heads), strict=True))


@pytest.fixture(scope="module")
def heads() -> _Heads:
    torch.manual_seed(0)
    return _Heads().eval()


def test_the_file_has_the_module_s_names(tmp_path, heads) -> None:
    x = torch.randn(2, 9, 12)
    artifact = vssm.export_module(heads, x, tmp_path / "out", labels=list("abcde"))
    assert [o.name for o in artifact.manifest.outputs] == ["logits", "aux_logits"]
    with vssm.open_session(artifact) as session:
        got = session.run(x.numpy())
    want = {name: value.detach().numpy() for name, value in heads(x).items()}
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5)
    assert not np.allclose(want["logits"], want["aux_logits"], atol=1e-3)
    for model in (None, heads):
        report = vssm.check_parity(model, artifact)
        assert report.passed, report.failures
        assert report.forced.name == "logits"
        assert [c.name for c in report.blocks] == ["aux_logits"]


def test_a_module_without_logits(tmp_path) -> None:
    """Exported as asked for, checked, and refused where classes are needed."""
    heads, x = _Heads(("boxes", "mask")).eval(), torch.randn(2, 9, 12)
    with pytest.raises(UnsupportedError, match=r"boxes \(1, 5\), mask \(1, 5\), of which"):
        vssm.export_module(heads, x, tmp_path / "out")
    artifact = vssm.export_module(heads, x, tmp_path / "out", outputs=["mask", "boxes"])
    assert [o.name for o in artifact.manifest.outputs] == ["mask", "boxes"]
    for model in (None, heads):
        report = vssm.check_parity(model, artifact)
        assert report.passed, report.failures
        assert (report.forced.name, report.top1_agreement) == ("mask", None)
    with pytest.raises(ValueError, match=r"outputs mask \['batch', 5\], boxes .* of which none is"):
        _ = artifact.manifest.num_classes
    renamed = vssm.export_module(
        heads, x, tmp_path / "out", outputs=["boxes", "logits=mask"], force=True
    )
    assert renamed.manifest.num_classes == 5
    assert vssm.check_parity(heads, renamed).passed


def test_names_that_the_graph_has_within(tmp_path) -> None:
    """An output may be called as a weight or a value inside is."""
    names = ("logits", "linear", "add", "head.weight", "MatMul_0", "body.A")
    heads, x = _Heads(names).eval(), torch.randn(2, 9, 12)
    artifact = vssm.export_module(heads, x, tmp_path / "out")
    onnx.checker.check_model(str(artifact.model_path), full_check=True)
    assert vssm.check_parity(heads, artifact).passed
