"""PlainMamba exported: its numbers in every runtime here, and what its graph may hold."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command import Run
from exports import MICRO_PLAIN, SCHEDULE, exported, images, micro_plain
from tolerances import relative_error

import vssm
from vssm.artifact.directory import Artifact
from vssm.errors import UnsupportedError
from vssm.models.base import VisionModel
from vssm.models.schedules import default_schedule
from vssm.onnx.export import _cast_copy, build_proto
from vssm.ops.spec import DOMAIN
from vssm.parity.compare import TOLERANCES

# Largest error over the largest logit of a micro export, measured (float32 9e-7); twice of that.
FLOAT32 = 2e-6
ROWS = {"Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "TokenScatter"}


def oracle(model: torch.nn.Module, x: np.ndarray) -> vssm.ForwardDetails:
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        return exact.forward_details(torch.from_numpy(x).double())


@pytest.fixture(scope="module", params=[None, SCHEDULE], ids=["dense", "pruned"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("plain"), micro_plain(request.param))


def model_of(artifact: Artifact) -> VisionModel:
    return micro_plain(SCHEDULE if artifact.manifest.schedule else None)


@pytest.mark.parametrize("backend", ["kernel", "body"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sessions_give_the_oracles_numbers(artifact: Artifact, backend: str, batch: int) -> None:
    x = images(model_of(artifact), batch)
    with vssm.open_session(artifact, backend=backend) as session:
        outputs = session.run(x)
    want = oracle(model_of(artifact), x)
    assert relative_error(outputs["logits"], want.logits.numpy()) <= FLOAT32
    for stage, kept in enumerate(want.kept_positions):
        np.testing.assert_array_equal(outputs[f"kept_positions_{stage}"], kept.numpy())


@pytest.mark.parametrize("backend", ["kernel", "body"])
def test_parity_compares_the_one_stream_of_every_block(artifact: Artifact, backend: str) -> None:
    report = vssm.check_parity(None, artifact, backend=backend, per_block=True)
    assert report.passed, report.failures
    assert [b.name for b in report.blocks] == [f"block_{b}.hidden" for b in (1, 2, 3, 4)]
    assert [b.residual for b in artifact.manifest.block_outputs] == [None] * 4
    with vssm.open_session(artifact, "torch") as session:
        assert session.run(images(model_of(artifact)))["logits"].shape == (2, 7)


# Every value once; a rule of pruning and a convolution do not touch each other.
RULES = [
    {"alignment": "none", "importance": "l2", "gated": True, "image_size": (13, 22)},
    {"step_parameters": "full", "alignment": "constant", "layers_with_dwconv": (0, 1)},
    pytest.param({"alignment": "constant"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_every_rule_exports(tmp_path: Path, rules: dict[str, object]) -> None:
    options = {k: rules[k] for k in ("layers_with_dwconv", "image_size") if k in rules}
    rules = {k: v for k, v in rules.items() if k not in options}
    model = micro_plain("1:0.7", rules=rules, depth=2, **{"layers_with_dwconv": (), **options})
    x = images(model, 3)
    with vssm.open_session(exported(tmp_path, model), backend="body") as session:
        logits = session.run(x)["logits"]
    assert relative_error(logits, oracle(model, x).logits.numpy()) <= FLOAT32


def test_float16_is_as_good_as_torch_in_float16(tmp_path: Path) -> None:
    model = micro_plain("1:0.7", depth=2)
    artifact = exported(tmp_path, model, dtype="float16")
    x = images(model, 4)
    want = oracle(model, x).logits.numpy()
    with torch.no_grad():
        half = _cast_copy(model, torch.float16)(torch.from_numpy(x)).numpy()
    for backend in ("kernel", "body"):
        with vssm.open_session(artifact, backend=backend) as session:
            logits = session.run(x)["logits"]
        assert logits.dtype == np.float32
        error = relative_error(logits, want)
        assert error <= 2 * relative_error(half, want)
        assert TOLERANCES["float32"].logits < error < TOLERANCES["float16"].logits
    assert_islands(onnx.load(artifact.model_path), onnx.TensorProto.FLOAT16)


def test_islands_stay_float32_in_bfloat16() -> None:
    proto = build_proto(micro_plain("1:0.7", depth=2), dtype="bfloat16", opset=18)
    assert_islands(proto, onnx.TensorProto.BFLOAT16)


def assert_islands(proto: onnx.ModelProto, half: int) -> None:
    """Norms, stream, A, D, step-size bias, input and logits are float32 in every export."""
    graph = proto.graph
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in [*graph.value_info, *graph.input, *graph.output]
    }
    types |= {i.name: i.data_type for i in graph.initializer}
    assert types["images"] == types["logits"] == onnx.TensorProto.FLOAT
    for node in graph.node:
        if "SelectiveScan" in node.op_type:
            assert {types[node.input[i]] for i in (2, 5, 6)} == {onnx.TensorProto.FLOAT}
            assert {types[node.input[i]] for i in (0, 1, 3, 4)} == {half}
        if node.op_type in {"MatMul", "Gemm"}:
            assert types[node.input[1]] == half
        if node.op_type in {"LayerNormalization", "TokenGather1", "ReduceMean"}:
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
    assert {types[f"block_{b}.hidden"] for b in (1, 2)} == {onnx.TensorProto.FLOAT}


class Graph:
    """A graph to walk in: who makes a value, who reads it, how wide it is."""

    def __init__(self, artifact: Artifact) -> None:
        proto = onnx.load(artifact.model_path)
        self.d_inner = model_of(artifact).config.d_inner
        self.nodes = proto.graph.node
        self.shapes = {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in proto.graph.value_info
        }
        self.weights = {i.name for i in proto.graph.initializer}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.scans = [n for n in self.nodes if "SelectiveScan" in n.op_type]

    def chain(self, value: str, end: str) -> list[str]:
        """Operators that made `value` by its rows, back to the first `end`."""
        found: list[str] = []
        while not found or found[-1] != end:
            node = self.maker[value]
            found.append(node.op_type)
            value = next(i for i in node.input if i in self.maker)
        return found

    def readers(self, value: str) -> list[str]:
        return [n.op_type for n in self.nodes if value in n.input]

    def wide(self, kinds: set[str]) -> Counter[str]:
        """How many nodes of these kinds make rows of d_inner values."""
        return Counter(
            n.op_type
            for n in self.nodes
            if n.op_type in kinds and self.shapes[n.output[0]][-1:] == [self.d_inner]
        )


def test_the_convolution_moves_no_tokens(artifact: Artifact) -> None:
    """Dense or pruned: it reads what the projection made, and the scan reads what it made."""
    graph, pruned = Graph(artifact), artifact.manifest.schedule is not None
    for scan in graph.scans:
        chain = graph.chain(scan.input[0], "MatMul")
        assert chain == ["Unsqueeze", "TokenConv2D", "Add", "MatMul"]
    moves = {"Tile", "Expand", "Concat", "Slice", "Split", "Pad", "Transpose"}
    assert not graph.wide(ROWS | moves)
    kinds = Counter(n.op_type for n in graph.nodes)
    assert kinds["ConstantOfShape"] == 0
    assert not set(kinds) & {"Loop", "Scan", "If", "ReverseSequence", "Pad", "BatchNormalization"}
    assert kinds["Conv"] == 3  # stem and projection
    convolutions = [n for n in graph.nodes if n.op_type == "TokenConv2D"]
    assert len(convolutions) == 4 + 1  # one a layer, L1's extra one
    by_position = [a.i for n in convolutions for a in n.attribute if a.name == "by_position"]
    assert by_position == ([0, 0, 1, 1, 1] if pruned else [0] * 5)


def test_nothing_stands_between_scan_and_output_projection(artifact: Artifact) -> None:
    graph = Graph(artifact)
    scored = {1, 2} if artifact.manifest.schedule else set()
    for layer, scan in enumerate(graph.scans, start=1):
        gated = layer not in scored  # else y is scored before the gate
        assert scan.op_type == ("GatedSelectiveScan" if gated else "SelectiveScan")
        assert graph.readers(scan.output[0]) == (["MatMul"] if gated else ["Relu", "Mul"])


def test_graph_is_lean(artifact: Artifact) -> None:
    """At most 40 nodes a block, even with two stages."""
    graph = Graph(artifact)
    outside = 20  # stem, head and L1's extra convolution
    assert len(graph.nodes) - outside <= (25 if artifact.manifest.schedule is None else 40) * 4
    ours = Counter(n.op_type for n in graph.nodes if n.domain == DOMAIN)
    stages = 0 if artifact.manifest.schedule is None else 2
    assert +ours == +Counter(
        {
            "GatedSelectiveScan": 4 - stages,
            "SelectiveScan": stages,
            "TokenGather1": stages,
            "TokenConv2D": 5,
        }
    )
    assert sum(n.op_type == "TopK" for n in graph.nodes) == stages
    for scan in graph.scans:
        flags = {a.name: a.i for a in scan.attribute}
        assert flags["params_by_step"] == flags["delta_softplus"] == 1
        assert [graph.shapes[scan.input[i]][2] for i in (0, 1, 3, 4)] == [1, 1, 4, 1]
        assert {scan.input[i] for i in (2, 5, 6)} <= graph.weights


def test_default_schedule_on_the_command_line(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is exported has it, with the rules that were asked for."""
    exports: list[VisionModel] = []

    def export(model: VisionModel, directory: Path, **options: object) -> None:
        exports.append(model)
        raise UnsupportedError("enough")

    monkeypatch.setattr("vssm.onnx.export.export", export)
    sizes = {**MICRO_PLAIN, "depth": 24}
    given = [f"--num-classes={sizes.pop('num_classes')}"]
    given += [f"--set={key}={json.dumps(value)}" for key, value in sizes.items()]
    rules = ["--schedule=default", "--alignment=none", "-o", tmp_path / "out"]
    assert cli("export", "plain_mamba_l2", *given, *rules) == 2
    assert exports[0].schedule == default_schedule("plain_mamba_l2", alignment="none")
    assert [s.num_keep for s in exports[0].stages.values()] == [24, 20, 16, 13, 11, 9, 8, 7]
    assert cli("export", "vim_base", *rules) == 2
    assert "name='vim_base' has no default schedule" in cli.out


def test_preprocessing_is_the_official_one(artifact: Artifact) -> None:
    preprocessing = artifact.manifest.preprocessing
    assert preprocessing is not None
    # (123.675, 116.28, 103.53) and (58.395, 57.12, 57.375) on 0-255.
    assert tuple(255 * m for m in preprocessing.mean) == pytest.approx((123.675, 116.28, 103.53))
    assert tuple(255 * s for s in preprocessing.std) == pytest.approx((58.395, 57.12, 57.375))
    assert preprocessing.interpolation == "bicubic"
    assert type(preprocessing).for_image_size((224, 224)).resize == 256
