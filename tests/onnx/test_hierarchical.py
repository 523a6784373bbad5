"""Exports of VMamba and GroupMamba: numbers, islands, node budgets, and what is never copied."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from exports import exported, images
from hierarchical_cases import SMALL, small
from tolerances import relative_error

import vssm
from vssm.artifact.directory import Artifact, open_artifact
from vssm.models.base import VisionModel
from vssm.models.groupmamba import GroupMamba
from vssm.onnx.export import _cast_copy, build_proto

NAMES = list(SMALL)
# Nodes a block, those outside the blocks shared out; measured 43.5, 26.5 and 111.7.
BUDGET = {"vmamba_tiny_s1l8": 50, "vanilla_vmamba_tiny": 50, "groupmamba_tiny": 130}
# Largest error over the largest logit, measured 3.1e-7, 4.7e-7 and 2.3e-6; about twice of that.
FLOAT32 = {"vmamba_tiny_s1l8": 1e-6, "vanilla_vmamba_tiny": 1e-6, "groupmamba_tiny": 5e-6}
# The same operators on a scan's inputs, whatever the model.
BEFORE_SCAN = {"Reshape", "Unsqueeze", "MatMul", "Split"}


@pytest.fixture(scope="module", params=NAMES)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VisionModel, Artifact]:
    model = small(request.param)
    return model, exported(tmp_path_factory.mktemp("whole"), model)


@pytest.fixture(
    scope="module",
    params=["vmamba_tiny_s1l8", pytest.param("groupmamba_tiny", marks=pytest.mark.slow)],
)
def half(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VisionModel, Artifact]:
    model = small(request.param)
    return model, exported(tmp_path_factory.mktemp("half"), model, dtype="float16")


def oracle(model: VisionModel, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.from_numpy(x).double()).numpy()


@pytest.mark.parametrize("backend", ["kernel", "body"])
def test_numbers_at_any_batch(whole: tuple[VisionModel, Artifact], backend: str) -> None:
    model, artifact = whole
    with vssm.open_session(artifact, "ort-cpu", backend=backend, threads=1) as session:
        for batch in (1, 2, 3):
            x = images(model, batch)
            assert relative_error(session.run(x)["logits"], oracle(model, x)) <= FLOAT32[model.name]


def test_every_block_is_checked(whole: tuple[VisionModel, Artifact]) -> None:
    """The model is rebuilt from model.json; each block has one stream, the class block too."""
    model, artifact = whole
    report = vssm.check_parity(None, artifact, per_block=True)
    assert report.passed
    streams = [f"block_{block}.hidden" for block in range(1, len(model.block_costs()) + 1)]
    assert [block.name for block in report.blocks] == streams
    assert {
        block.residual for block in open_artifact(artifact.directory).manifest.block_outputs
    } == {None}


def test_float16_is_as_good_as_torch_in_float16(half: tuple[VisionModel, Artifact]) -> None:
    model, artifact = half
    x = images(model, 3)
    want = oracle(model, x)
    with torch.no_grad():
        torch_half = _cast_copy(model, torch.float16)(torch.from_numpy(x)).numpy()
    for backend in ("kernel", "body"):
        with vssm.open_session(artifact, "ort-cpu", backend=backend, threads=1) as session:
            logits = session.run(x)["logits"]
        assert logits.dtype == np.float32
        assert relative_error(logits, want) <= 2 * relative_error(torch_half, want)


def _check_islands(graph: onnx.GraphProto, narrow: int) -> None:
    """Norms, streams, A, D and step-size bias in float32, projections and scan in `narrow`."""
    wide = onnx.TensorProto.FLOAT
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    types |= {i.name: i.data_type for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "TokenConv2D":
            assert types[node.input[0]] == narrow
            assert {types[node.input[i]] for i in (1, 2)} == {wide}
        if node.op_type == "SelectiveScan":
            assert {types[node.input[i]] for i in (2, 5, 6)} == {wide}
            assert {types[node.input[i]] for i in (0, 1, 3, 4)} == {narrow}
        if node.op_type == "LayerNormalization":
            assert types[node.input[0]] == wide
        if node.op_type == "MatMul":
            assert types[node.input[1]] == narrow
    streams = [name for name in types if name.startswith("block_")]
    assert streams
    assert {types[name] for name in (*streams, "images", "logits")} == {wide}


def test_islands_stay_float32(half: tuple[VisionModel, Artifact]) -> None:
    _check_islands(onnx.load(half[1].model_path).graph, onnx.TensorProto.FLOAT16)


@pytest.mark.parametrize(
    "name", ["vmamba_tiny_s1l8", pytest.param("groupmamba_tiny", marks=pytest.mark.slow)]
)
def test_bfloat16_keeps_its_convolutions_wide(name: str) -> None:
    lists = ("depths", "widths", "mlp_ratios")
    one_stage = {key: value[:1] for key, value in SMALL[name].items() if key in lists}
    graph = build_proto(small(name, **one_stage), dtype="bfloat16", opset=18).graph
    _check_islands(graph, onnx.TensorProto.BFLOAT16)
    types = {i.name: i.data_type for i in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert {types[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT}


def test_graph_is_lean(whole: tuple[VisionModel, Artifact]) -> None:
    model, artifact = whole
    graph = onnx.load(artifact.model_path).graph
    blocks = len(model.block_costs())
    kinds = Counter(node.op_type for node in graph.node)
    groups = 4 if isinstance(model, GroupMamba) else 1
    assert kinds["SelectiveScan"] == groups * blocks
    assert len(graph.node) <= BUDGET[model.name] * blocks
    forbidden = {"Gather", "GatherND", "GatherElements", "ScatterND", "Slice", "Expand", "Loop"}
    assert not set(kinds) & forbidden
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)


def _upstream(graph: onnx.GraphProto, node: onnx.NodeProto, stop: str) -> Iterator[onnx.NodeProto]:
    """Every node that feeds `node`, up to those of type `stop`."""
    makers = {output: maker for maker in graph.node for output in maker.output}
    queue, seen = [node], set()
    while queue:
        for name in queue.pop().input:
            maker = makers.get(name)
            if maker is not None and maker.name not in seen and maker.op_type != stop:
                seen.add(maker.name)
                queue.append(maker)
                yield maker


def test_nothing_is_copied_that_an_order_can_replace(whole: tuple[VisionModel, Artifact]) -> None:
    """No Transpose from in_proj to the scan, and from it to out_proj a norm and a gate."""
    _, artifact = whole
    graph = onnx.load(artifact.model_path).graph
    scans = [node for node in graph.node if node.op_type == "SelectiveScan"]
    makers = {output: maker for maker in graph.node for output in maker.output}
    for scan in scans:
        kinds = Counter(node.op_type for node in _upstream(graph, scan, "TokenConv2D"))
        assert set(kinds) <= BEFORE_SCAN
        convolution = next(
            n for n in _upstream(graph, scan, "MatMul") if n.op_type == "TokenConv2D"
        )
        assert makers[convolution.input[0]].op_type == "MatMul"
        value = scan.output[0]
        while True:
            (user,) = (node for node in graph.node if value in node.input)
            if user.op_type == "MatMul":
                break
            assert user.op_type in {"LayerNormalization", "Mul"}
            value = user.output[0]
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for scan in scans:
        order, gap = scan.input[7:9]
        assert shapes[order] == shapes[gap]
        assert shapes[order][0] == 1
