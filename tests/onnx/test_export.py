"""The exported file: its numbers, its graph, its size, and what is refused."""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import AS_RELEASED, exported, images, micro, shared_traces
from tolerances import relative_error

import vssm
from vssm.artifact.directory import Artifact, open_artifact
from vssm.artifact.manifest import Preprocessing
from vssm.errors import ArtifactError, UnsupportedError
from vssm.onnx.export import DTYPES, _cast_copy
from vssm.ops.spec import DOMAIN, PLUGIN_ATTRIBUTES

# Largest error over the largest logit of a micro export, measured (float32 1.1e-6); twice of that.
FLOAT32 = 2e-6


def run_bodies(path: Path, x: np.ndarray) -> list[np.ndarray]:
    """Outputs of a file in plain ONNX Runtime: what a user without this package gets."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x})


def oracle(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.from_numpy(x).double()).numpy()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("pruned"), micro(), inline=True)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_bodies_give_the_oracles_numbers_at_any_batch(pruned: Artifact, batch: int) -> None:
    model = micro()
    x = images(model, batch)
    logits, *kept = run_bodies(pruned.model_path, x)
    assert relative_error(logits, oracle(model, x)) <= FLOAT32
    with torch.no_grad():
        details = copy.deepcopy(model).double().forward_details(torch.from_numpy(x).double())
    for got, want in zip(kept, details.kept_positions, strict=True):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, want.numpy())


def test_inlined_file_has_no_functions_and_the_same_numbers(pruned: Artifact) -> None:
    path = pruned.directory / "model.inlined.onnx"
    model = onnx.load(path)
    assert not model.functions
    assert all(node.domain == "" for node in model.graph.node)
    x = images(micro())
    for got, want in zip(run_bodies(path, x), run_bodies(pruned.model_path, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# Every value once: a rule of pruning and a configuration do not touch each other, and an export
# takes seconds. How stages follow one another has to do with alignment and places.
CASES: list[tuple[dict[str, object], dict[str, object]]] = [
    (AS_RELEASED, {"schedule": "1:1.0,2:0.6", "class_token": "head"}),
    (
        {"alignment": "constant", "score_direction": "backward"},
        {"class_token": "none", "pool": "mean", "bimamba": "v1"},
    ),
    (
        {"importance": "random", "seed": 3, "conv": "position"},
        {"class_token": "none", "pool": "max", "image_size": [40, 56], "layer_scale": 0.1},
    ),
    (
        {"importance": "l2", "gated": True, "score_direction": "forward"},
        {"class_token": "none", "pool": "last", "rope": True, "rope_residual": True}
        | {"rope_grid": 6, "schedule": "1:0.7", "depth": 2},
    ),
    (
        {"alignment": "none"},
        {"bimamba": "none", "rms_norm": False, "schedule": "1:0.7", "depth": 2},
    ),
]


@pytest.mark.parametrize(("rules", "config"), CASES, ids=str)
def test_every_rule_and_configuration_exports(
    tmp_path: Path, rules: dict[str, object], config: dict[str, object]
) -> None:
    model = micro(rules=rules, **config)
    artifact = exported(tmp_path, model)
    x = images(model, 3)
    assert relative_error(run_bodies(artifact.model_path, x)[0], oracle(model, x)) <= FLOAT32


@pytest.mark.parametrize(
    "config",
    [
        {"class_token": "double", "depth": 1},
        {"bimamba": "none", "bidirectional_layers": True, "depth": 2},
    ],
    ids=str,
)
def test_configurations_that_cannot_prune_export_dense(
    tmp_path: Path, config: dict[str, object]
) -> None:
    model = micro(None, **config)
    artifact = exported(tmp_path, model)
    x = images(model, 3)
    assert relative_error(run_bodies(artifact.model_path, x)[0], oracle(model, x)) <= FLOAT32


@pytest.mark.parametrize("opset", [18, 20, pytest.param(19, marks=pytest.mark.slow)])
def test_opsets(tmp_path: Path, opset: int) -> None:
    model = micro("1:0.7", depth=2)
    artifact = exported(tmp_path, model, opset=opset)
    imports = {o.domain: o.version for o in onnx.load(artifact.model_path).opset_import}
    assert imports == {"": opset, DOMAIN: 1}
    x = images(model)
    assert relative_error(run_bodies(artifact.model_path, x)[0], oracle(model, x)) <= FLOAT32


def test_float16_is_as_good_as_torch_in_float16(tmp_path: Path) -> None:
    model = micro()
    artifact = exported(tmp_path, model, dtype="float16")
    x = images(model, 4)
    want = oracle(model, x)
    with torch.no_grad():
        half = _cast_copy(model, torch.float16)(torch.from_numpy(x)).numpy()
    logits = run_bodies(artifact.model_path, x)[0]
    assert logits.dtype == np.float32
    assert relative_error(logits, want) <= 2 * relative_error(half, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_islands_stay_float32(tmp_path: Path, dtype: str) -> None:
    """Norms, residual, A, D, step-size bias, input and logits are float32 in every export."""
    graph = onnx.load(exported(tmp_path, micro(), dtype=dtype).model_path).graph
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in [*graph.value_info, *graph.input, *graph.output]
    }
    types |= {i.name: i.data_type for i in graph.initializer}
    half = {
        "float32": onnx.TensorProto.FLOAT,
        "float16": onnx.TensorProto.FLOAT16,
        "bfloat16": onnx.TensorProto.BFLOAT16,
    }[dtype]
    assert types["images"] == types["logits"] == onnx.TensorProto.FLOAT
    scans = [n for n in graph.node if "SelectiveScan" in n.op_type]
    for node in scans:
        wide = {node.input[i] for i in (2, 5, 6)}
        assert {types[name] for name in wide} == {onnx.TensorProto.FLOAT}
        assert {types[node.input[i]] for i in (0, 1, 3, 4)} == {half}
    norms = [n for n in graph.node if n.op_type == "ReduceMean"]
    assert {types[n.input[0]] for n in norms} == {onnx.TensorProto.FLOAT}
    assert {types[f"block_{b}.residual"] for b in (1, 2, 3)} == {onnx.TensorProto.FLOAT}
    assert {types[n.input[1]] for n in graph.node if n.op_type == "MatMul"} == {half}


def test_graph_is_lean(tmp_path: Path) -> None:
    """At most 18 nodes a block, which move no tokens; nothing flipped, our nodes on top."""
    artifact = exported(tmp_path, micro(None))
    graph = onnx.load(artifact.model_path).graph
    kinds = Counter(node.op_type for node in graph.node)
    inside = [node for node in graph.node if node.name.startswith("/layers.")]
    assert len(inside) <= 18 * 3
    assert not {node.op_type for node in inside} & {"Transpose", "Concat", "Slice", "Reshape"}
    splits = [node for node in inside if node.op_type == "Split"]
    assert len(splits) == 3  # of the step's low rank, B and C, which are narrow
    assert kinds["GatedSelectiveScan"] == kinds["TokenConv"] == 3
    assert kinds["Conv"] == 1
    assert not set(kinds) & {"Loop", "Scan", "If", "ReverseSequence", "GatherElements", "Pad"}
    initializers = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Slice" and len(node.input) > 4:
            assert (initializers[node.input[4]] > 0).all(), "a flip is left"
        if node.domain == DOMAIN:
            strings = {a.name: a.s.decode() for a in node.attribute if a.s}
            assert strings == PLUGIN_ATTRIBUTES
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)


def test_file_is_its_weights(tmp_path: Path) -> None:
    artifact = vssm.export(vssm.create_model("vim_tiny", depth=1), tmp_path / "out")
    size, weights = (
        os.path.getsize(artifact.directory / n) for n in ("model.onnx", "weights.safetensors")
    )
    assert size <= 1.05 * weights + 200_000


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = micro("1:0.7", depth=1).double().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    vssm.export(model, tmp_path / "out", dtype="float16")
    assert model.training
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])


def test_directory_may_move_and_says_everything(tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    artifact = exported(tmp_path, micro(), labels=list("abcdefg"))
    artifact.directory.rename(moved)
    manifest = open_artifact(moved).manifest
    assert manifest.schedule is not None
    assert manifest.schedule.num_keep == (27, 21)
    assert manifest.schedule.cls_position == 18
    assert manifest.weights == "custom"
    assert manifest.labels == tuple("abcdefg")
    assert [o.name for o in manifest.outputs] == ["logits", "kept_positions_0", "kept_positions_1"]
    assert manifest.inputs[0].shape == ("batch", 3, 48, 48)
    known = {v.name for v in onnx.load(moved / "model.onnx").graph.value_info}
    assert {b.hidden for b in manifest.block_outputs} <= known
    assert {b.residual for b in manifest.block_outputs} <= known


def test_refusals(tmp_path: Path) -> None:
    model = micro()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"dtype='int8': an export holds floating-point weights"):
        vssm.export(model, out, dtype="int8")
    with pytest.raises(ValueError, match=r"opset=17 is outside 18 to 20"):
        vssm.export(model, out, opset=17)
    with pytest.raises(ValueError, match=r"labels=2 for 7 classes"):
        vssm.export(model, out, labels=["a", "b"])
    for spec, message in (
        (
            Preprocessing.for_image_size(32),
            r"crop=\[32, 32\] makes .* of 3 x 48 x 48; give the crop",
        ),
        (Preprocessing(40, (48, 48)), r"preprocessing\.resize=40 must be in \[48, 8192\]"),
    ):
        with pytest.raises(ValueError, match=message):
            vssm.export(model, out, preprocessing=spec)
    with pytest.raises(TypeError, match=r"Linear is not a model of this package"):
        vssm.export(torch.nn.Linear(1, 1), out)
    with pytest.raises(UnsupportedError, match=r"alignment='masked' .* PyTorch reference"):
        vssm.export(micro(rules={"alignment": "masked"}), out)
    assert not out.exists()


def test_an_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    first = exported(tmp_path, micro())
    other = micro(None)
    with shared_traces():
        with pytest.raises(ArtifactError, match=r"force"):
            vssm.export(other, tmp_path / "out")
        assert open_artifact(first).manifest == first.manifest
        second = vssm.export(other, tmp_path / "out", force=True)
    assert open_artifact(tmp_path / "out").manifest == second.manifest != first.manifest


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vssm.onnx.export.write_manifest", _fail)
    with shared_traces(), pytest.raises(RuntimeError, match=r"disk gone"):
        vssm.export(micro(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _fail(*_: object) -> None:
    raise RuntimeError("disk gone")
