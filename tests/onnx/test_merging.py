"""Merged models: their files, model.json, and the parity check that puts pairs in their place."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import MODEL, Run
from exports import exported, images, micro
from onnx import numpy_helper

import vssm
from vssm import MergeSchedule, PruneSchedule
from vssm.artifact.directory import Artifact, open_artifact
from vssm.artifact.manifest import MergeInfo, manifest_from_json, manifest_to_json, write_manifest
from vssm.artifact.reference import OracleMerge
from vssm.bench.kinds import count_graph
from vssm.errors import UnsupportedError
from vssm.files.atomic import sha256_of
from vssm.models.cost import count
from vssm.parity.compare import _merged_otherwise
from vssm.runtimes.torch import schedule_of

# Pruning, two merges and the sizes as gaps cannot all be in one; two exports have everything.
SCHEDULE = MergeSchedule(5, start=1, every=1, final_tokens=20, alignment="size")
BOTH = MergeSchedule(
    5, class_token="true", alignment="gap", prune=PruneSchedule({1: 0.7}, alignment="gap")
)
# Largest error over the largest logit, measured 7e-7.
FLOAT32 = 2e-6


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("merged"), micro(SCHEDULE))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("both"), micro(BOTH))


@pytest.mark.parametrize("batch", [1, 3])
def test_bodies_give_the_oracles_numbers_at_any_batch(merged: Artifact, batch: int) -> None:
    """In plain ONNX Runtime: what a user without this package gets."""
    model = micro(SCHEDULE).double()
    x = images(model, batch)
    session = onnxruntime.InferenceSession(
        str(merged.model_path), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(None, {"images": x}), strict=True))
    with torch.no_grad():
        want = copy.deepcopy(model).forward_details(torch.from_numpy(x).double())
    assert np.abs(got["logits"] - want.logits.numpy()).max() <= FLOAT32 * want.logits.abs().max()
    for i, merge in enumerate(want.merges):
        np.testing.assert_array_equal(got[f"merged_pairs_{i}"], merge.pairs.numpy())
        np.testing.assert_array_equal(got[f"kept_positions_{i}"], want.kept_positions[i].numpy())


@pytest.mark.parametrize("backend", ["kernel", "body"])
@pytest.mark.parametrize("name", ["merged", "both"])
def test_a_right_export_passes(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    report = vssm.check_parity(None, request.getfixturevalue(name), backend=backend, per_block=True)
    assert report.passed
    assert report.kept_agreement == [1.0, 1.0]
    assert report.images_alike == 4
    assert report.forced.relative <= FLOAT32


def test_graph_has_static_shapes_and_no_control_flow(merged: Artifact) -> None:
    graph = onnx.load(merged.model_path).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Loop", "Scan", "If", "NonZero", "ScatterElements", "ScatterND"}
    # Everything but the batch is known: what is not would stop an engine.
    for value in graph.value_info:
        sizes = [d.dim_param for d in value.type.tensor_type.shape.dim if d.dim_param]
        assert all("batch" in size for size in sizes), (value.name, sizes)


@pytest.mark.slow
def test_half_precision_chooses_in_float32(tmp_path: Path) -> None:
    artifact = exported(tmp_path, micro(SCHEDULE), dtype="float16")
    graph = onnx.load(artifact.model_path).graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    norms = [node for node in graph.node if node.op_type == "ReduceL2"]
    assert len(norms) == 2
    assert {types[node.input[0]] for node in norms} == {onnx.TensorProto.FLOAT}
    assert vssm.check_parity(None, artifact).passed


def test_model_json_has_the_schedule(merged: Artifact, both: Artifact) -> None:
    opened = open_artifact(merged.directory)
    assert opened.manifest.merge == MergeInfo(
        blocks=(1, 2),
        num_keep=(32, 20),
        r=5,
        every=1,
        start=1,
        metric="hidden",
        distance="cosine",
        order=True,
        class_token="proportional",
        choose=1,
        mode="sum",
        alignment="size",
        final_tokens=20,
    )
    assert not opened.manifest.dense
    assert opened.manifest.schedule is None
    assert opened.manifest.tokens == "5 merged after 1, 2, size"
    assert schedule_of(opened) == SCHEDULE
    assert schedule_of(open_artifact(both.directory)) == BOTH
    assert both.manifest.tokens == "1:0.7 gap; 5 merged after 2, gap"
    assert manifest_from_json(manifest_to_json(both.manifest)) == both.manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1]}, r"merge\.num_keep"),
        ({"blocks": [2, 1]}, r"merge\.blocks: merges follow"),
        ({"num_keep": [20, 32]}, r"merge\.num_keep: .* each takes tokens away"),
        ({"r": -1}, r"merge\.r"),
        ({"order": "yes"}, r"merge\.order"),
        ({"final_tokens": 0}, r"merge\.final_tokens"),
    ],
    ids=str,
)
def test_damaged_fields_are_refused_by_name(
    merged: Artifact, changes: dict[str, object], message: str
) -> None:
    document = json.loads(manifest_to_json(merged.manifest))
    document["merge"] |= changes
    with pytest.raises(ValueError, match=message):
        manifest_from_json(json.dumps(document))


def test_sessions_in_torch_have_the_same_outputs(merged: Artifact) -> None:
    x = images(micro(SCHEDULE))
    with (
        vssm.open_session(merged, "torch", backend="reference") as torch_session,
        vssm.open_session(merged, "ort-cpu") as session,
    ):
        want, got = torch_session.run(x), session.run(x)
    assert list(got) == list(want)
    np.testing.assert_array_equal(got["merged_pairs_1"], want["merged_pairs_1"])


def test_the_check_names_another_schedule(merged: Artifact) -> None:
    other = micro(SCHEDULE.changed(alignment="none"))
    with pytest.raises(ValueError, match="is not the model of this export"):
        vssm.check_parity(other, merged)


def _edited(merged: Artifact, tmp_path: Path, edit) -> Artifact:
    model = onnx.load(merged.model_path)
    edit(model.graph)
    for file in merged.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    manifest = merged.manifest
    files = {**manifest.files, "model.onnx": sha256_of(path)}
    write_manifest(tmp_path, type(manifest)(**{**vars(manifest), "files": files}))
    return open_artifact(tmp_path)


def test_a_wrong_choice_fails_and_wrong_sums_fail(merged: Artifact, tmp_path: Path) -> None:
    def joins_the_least_similar(graph: onnx.GraphProto) -> None:
        top = next(n for n in graph.node if n.op_type == "TopK" and n.attribute[1].i in {0, 1})
        for attribute in top.attribute:
            if attribute.name == "largest":
                attribute.i = 1 - attribute.i

    bad = _edited(merged, tmp_path, joins_the_least_similar)
    report = vssm.check_parity(None, bad)
    assert not report.passed
    assert report.forced.passed  # given the pairs, the file is right
    assert any("chosen otherwise" in failure for failure in report.failures)


def test_wrong_sums_fail_with_the_pairs_given(merged: Artifact, tmp_path: Path) -> None:
    def forgets_sizes(graph: onnx.GraphProto) -> None:
        division = [n for n in graph.node if n.op_type == "Div"]
        sizes = [n for n in division if n.input[1] in {m.input[1] for m in division if m != n}]
        one = numpy_helper.from_array(np.ones((1, 1, 1), np.float32), "one")
        graph.initializer.append(one)
        sizes[0].input[1] = "one"

    report = vssm.check_parity(None, _edited(merged, tmp_path, forgets_sizes))
    assert not report.forced.passed


def test_margins_of_merges() -> None:
    similarity = np.array([[[0.9, 0.8], [0.5, 0.4], [0.3, 0.2]]])
    oracle = OracleMerge(
        np.array([[[0, 1], [2, 1]]]), similarity, np.array([[0, 2, 4]]), np.array([[1, 3]])
    )
    assert _merged_otherwise(oracle, np.array([[2, 1], [0, 1]]), 0) == {}
    # Token 0 joined the second best; token 4 joined in place of token 2.
    found = _merged_otherwise(oracle, np.array([[0, 3], [4, 1]]), 0)
    assert found == pytest.approx({0: 0.1 / 0.9, 2: 0.2 / 0.9})
    # A pair that cannot be is no near choice.
    assert _merged_otherwise(oracle, np.array([[0, 1], [3, 1]]), 0) == {2: float("inf")}
    assert _merged_otherwise(oracle, np.array([[0, 2], [2, 1]]), 0) == {0: float("inf")}


@pytest.mark.parametrize("rules", [{"mode": "mean"}, {"mode": "amax"}, {"order": False}], ids=str)
def test_switches_without_an_exported_form(tmp_path: Path, rules: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="a PyTorch reference only; export with mode='sum'"):
        exported(tmp_path, micro(MergeSchedule(5, **rules)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        {"mode": "drop"},
        {"metric": "B"},
        {"metric": "delta", "choose": 3},
        {"distance": "l1"},
        {"distance": "l2"},
        {"class_token": "true"},
    ],
    ids=str,
)
def test_every_rule_exports(tmp_path: Path, rules: dict[str, object]) -> None:
    assert vssm.check_parity(None, exported(tmp_path, micro(MergeSchedule(5, **rules)))).passed


def test_cost_of_the_graph_is_that_of_the_model(merged: Artifact) -> None:
    work = count(micro(SCHEDULE))
    found = count_graph(merged.model_path)
    assert (found.exps, found.macs, found.products) == (work.exps, work.gemm, 0)


def test_command_line(cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [word.replace("depth=3", "depth=2") for word in MODEL]
    assert cli("export", *words, "--merge=6,class_token=true,start=1", "-o", out) == 0
    assert "tokens left by each merge: [31]" in cli.out
    artifact = open_artifact(out)
    assert schedule_of(artifact) == MergeSchedule(6, start=1, class_token="true")
    assert cli("bundle", out, "-o", tmp_path / "bundle") == 0
    copied = open_artifact(tmp_path / "bundle" / "model").manifest
    assert copied.merge == artifact.manifest.merge
