"""Operators without a translation: written with others where they stand, or by a second trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from exports import micro, micro_plain
from hierarchical_cases import small
from official_dense import micro_detector
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import interpolate

from vssm.errors import UnsupportedError
from vssm.models.base import VisionModel
from vssm.onnx.export import build_proto
from vssm.onnx.program import program_to_proto


class Calls(nn.Module):
    """Functions of images (batch, 3, 4, 6), as a model of as many outputs."""

    def __init__(self, functions: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(images) for function in self.functions)


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] += x[:, 1]
    return y


def many_results(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, dim=1)
    d, e = x.split([1, 2], dim=1)
    return torch.cat([a - b, c * d, e.movedim(1, 2).swapaxes(1, 2)], dim=1)


def constant(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0]).square().view(3, 1, 1)


def pooled(x: Tensor) -> Tensor:
    """Of channels-last maps, whose pooling ends in as_strided_."""
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return torch.nn.functional.adaptive_avg_pool2d(last, 1)


def resized(x: Tensor) -> Tensor:
    """As segmenters do, by a factor and to a size."""
    grown = interpolate(x, scale_factor=(2, 2), mode="bilinear", align_corners=True)
    near = interpolate(x, scale_factor=2, mode="nearest")
    return grown + near + interpolate(x, size=(8, 12), mode="bilinear", align_corners=False)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "no translation": lambda x: 2 - x.square(),
    "no tensor in it": lambda x: x @ torch.eye(6),
    "an open size": lambda x: x.transpose(1, 2).reshape(-1, 6).reshape(-1, 4, 3, 6),
    "axes made one": lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)).narrow(3, 1, 4),
    "by the batch": lambda x: x.transpose(0, 1).reshape(3, x.shape[0] * 4, 6).sum(0),
    "one size open, one to infer": lambda x: x.reshape(x.shape[0], 2, -1),
    "several results": many_results,
    "types": lambda x: (x.to(torch.float64).to(torch.float64) / 3).type_as(x).contiguous(),
    "a constant": constant,
    "pooled": pooled,
    "resized": resized,
    "named results": lambda x: torch.nn.functional.adaptive_max_pool2d(x, 1),
    "checks of values": lambda x: torch.nn.functional.one_hot(x.argmax(1), 3).float(),
    "an output that is an input": lambda x: x.to(torch.float32).reshape(x.shape),
}


@pytest.fixture
def second_traces(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """Programs that were traced a second time."""
    seen: list[ExportedProgram] = []
    run = ExportedProgram.run_decompositions

    def noting(self: ExportedProgram, *args: Any, **options: Any) -> ExportedProgram:
        seen.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noting)
    return seen


@pytest.mark.parametrize(
    ("functions", "again"),
    [(FUNCTIONS, False), ({"in place": in_place}, True)],
    ids=["once", "in place"],
)
def test_the_file_computes_the_function(
    functions: dict[str, Callable[[Tensor], Tensor]],
    again: bool,
    second_traces: list[ExportedProgram],
) -> None:
    model = Calls(list(functions.values())).eval()
    shapes = {"images": {0: Dim("batch")}}
    program = torch.export.export(model, (torch.zeros(2, 3, 4, 6),), dynamic_shapes=shapes)
    names = list(functions)
    proto = program_to_proto(program, 18, inputs=["images"], names=names, public=len(names))
    operators = Counter(node.op_type for node in proto.graph.node)
    assert (operators["Resize"], operators["GatherND"]) == ((0, 0) if again else (3, 0))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    rng = np.random.default_rng(7)
    for batch in (1, 5):
        images = rng.normal(size=(batch, 3, 4, 6)).astype(np.float32)
        wanted = [y.numpy() for y in model(torch.from_numpy(images))]
        for name, got, want in zip(
            names, session.run(None, {"images": images}), wanted, strict=True
        ):
            np.testing.assert_allclose(got, want, 1e-6, 1e-6, err_msg=name)
    assert bool(second_traces) == again


def test_operators_without_a_form_are_refused_by_name() -> None:
    model = Calls([lambda x: x.cummax(2)[0], lambda x: x.median(3)[0]]).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, 4, 6),))
    with pytest.raises(
        UnsupportedError, match=r"aten\.cummax\.default.*aten\.median\.dim.*forward"
    ):
        program_to_proto(program, 18, inputs=["images"], names=["a", "b"], public=2)


def test_two_sizes_are_open(second_traces: list[ExportedProgram]) -> None:
    """One of a view's sizes is the images' own, and one is left to infer."""
    model = Calls([lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], 3, -1)]).eval()
    shapes = {"images": {0: Dim("batch"), 2: Dim.DYNAMIC}}
    program = torch.export.export(model, (torch.zeros(2, 3, 4, 6),), dynamic_shapes=shapes)
    free = {0: "batch", 2: "rows"}
    proto = program_to_proto(program, 18, inputs=["images"], names=["y"], public=1, free=free)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    images = np.random.default_rng(7).normal(size=(5, 3, 7, 6)).astype(np.float32)
    (got,) = session.run(None, {"images": images})
    np.testing.assert_array_equal(got, model(torch.from_numpy(images))[0].numpy())
    assert not second_traces


def test_a_graph_in_which_no_pass_has_a_rule() -> None:
    model = Calls([lambda x: interpolate(x, scale_factor=2, mode="nearest")]).eval()
    program = torch.export.export(model, (torch.zeros(1, 3, 4, 6),))
    proto = program_to_proto(program, 18, inputs=["images"], names=["y"], public=1, free={})
    assert [node.op_type for node in proto.graph.node] == ["Resize"]


def detector() -> VisionModel:
    return micro_detector("plain_mamba", "maskrcnn_64x96", injector="kept")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: micro("1:0.7", depth=2), id="vim"),
        pytest.param(micro_plain, id="plain_mamba", marks=pytest.mark.slow),
        pytest.param(lambda: small("vmamba_tiny_s1l8"), id="vmamba", marks=pytest.mark.slow),
        pytest.param(lambda: small("groupmamba_tiny"), id="groupmamba", marks=pytest.mark.slow),
        pytest.param(detector, id="detector", marks=pytest.mark.slow),
    ],
)
def test_no_model_is_traced_twice(
    make: Callable[[], VisionModel], second_traces: list[ExportedProgram]
) -> None:
    build_proto(make(), dtype="float32", opset=18)
    assert not second_traces
