"""Exported files in NVIDIA's own parser: engines on the bodies, and what a plugin is given."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from exports import exported, micro, micro_plain
from hierarchical_cases import small
from tensorrt_build import ROOT, harness, rtx_path, run_python

import vssm
from vssm.models.base import VisionModel
from vssm.ops.spec import DOMAIN, OPERATORS, PLUGIN_ATTRIBUTES

SCRIPT = (ROOT / "tests/tensorrt_harness/parser.py").read_text(encoding="utf-8")
PRUNED = vssm.PruneSchedule({5: 0.8, 10: 0.8, 15: 0.8})
# The export that tests/onnx/test_merging.py makes too.
MERGED = vssm.MergeSchedule(5, start=1, every=1, final_tokens=20, alignment="size")
Make = Callable[[], VisionModel]
# Small models of every kind of node; the dtype of the export.
SMALL: dict[str, tuple[Make, str]] = {
    "vim dense": (lambda: micro(None), "float32"),
    "vim pruned": (lambda: micro("1:0.7", depth=2), "float32"),
    "vim pruned float16": (micro, "float16"),
    "vim merged": (lambda: micro(MERGED), "float32"),
    "plain mamba pruned": (micro_plain, "float32"),
    "vmamba": (lambda: small("vmamba_tiny_s1l8"), "float32"),
}
SMALL_SLOW: dict[str, tuple[Make, str]] = {
    "vim constant gap": (lambda: micro(rules={"alignment": "constant"}), "float32"),
    "vim no alignment": (lambda: micro(rules={"alignment": "none"}), "float32"),
    "vim as released": (
        lambda: micro(rules={"alignment": "none", "importance": "as_released"}),
        "float32",
    ),
    "vim bfloat16": (micro, "bfloat16"),
    "plain mamba float16": (micro_plain, "float16"),
    "vanilla vmamba float16": (lambda: small("vanilla_vmamba_tiny"), "float16"),
    "groupmamba": (lambda: small("groupmamba_tiny"), "float32"),
    "groupmamba float16": (lambda: small("groupmamba_tiny"), "float16"),
}
FAMILIES = {  # whether the family prunes
    "vim_tiny": True,
    "vim_small": True,
    "plain_mamba_l1": True,
    "vmamba_tiny_s1l8": False,
    "groupmamba_tiny": False,
}
WHOLE = {
    f"{name} {'pruned' if schedule else 'dense'} {dtype}": (
        lambda name=name, schedule=schedule: vssm.create_model(name, schedule=schedule),
        dtype,
    )
    for name, prunes in FAMILIES.items()
    for schedule in ((None, PRUNED) if prunes else (None,))
    for dtype in ("float32", "float16")
}
LONG = pytest.mark.slow
ENGINES = {"vim dense", "vim pruned float16"}  # test_engine builds them too
BUILT = [
    *(pytest.param(*v, id=n, marks=[LONG] * (n in ENGINES)) for n, v in SMALL.items()),
    *(pytest.param(*v, id=name, marks=LONG) for name, v in {**SMALL_SLOW, **WHOLE}.items()),
]
PROBED = [
    *(pytest.param(*SMALL[name], id=name) for name in ("vim pruned", "vim pruned float16")),
    *(pytest.param(*SMALL[n], id=n, marks=LONG) for n in ("plain mamba pruned", "vmamba")),
    *(pytest.param(*v, id=name, marks=LONG) for name, v in {**SMALL_SLOW, **WHOLE}.items()),
]


def _run(mode: str, *arguments: object, **variables: str) -> dict[str, Any]:
    shown = run_python(SCRIPT, mode, *map(str, arguments), path=rtx_path(), **variables)
    return dict(json.loads(shown.strip().splitlines()[-1]))


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.domain == DOMAIN]


def _nested(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Our operators inside subgraphs of these nodes."""
    graphs = [a.g for node in nodes for a in node.attribute if a.type == a.GRAPH]
    inner = [node for graph in graphs for node in graph.node]
    return [n for n in inner if n.domain == DOMAIN] + (_nested(inner) if inner else [])


@pytest.mark.parametrize(("make", "dtype"), BUILT)
def test_body_builds(make: Make, dtype: str, tmp_path: Path) -> None:
    rtx_path()
    artifact = exported(tmp_path, make(), dtype=dtype)
    built = _run("build", artifact.model_path)
    assert built["errors"] == []
    assert built["bytes"] > 0
    assert built["outputs"] == [o.name for o in artifact.manifest.outputs]


@pytest.mark.parametrize(("make", "dtype"), PROBED)
def test_every_node_asks_for_its_plugin(make: Make, dtype: str, tmp_path: Path) -> None:
    rtx_path()
    path = exported(tmp_path, make(), dtype=dtype).model_path
    record = tmp_path / "fields.txt"
    library = harness().stub.with_name("libvssm_tensorrt_probe.so")
    done = _run("probe", library, path, VSSM_PROBE_FILE=str(record))
    model = onnx.load(str(path))
    nodes = _nodes(model.graph)
    assert done["nodes"] == len(nodes) > 0
    assert len(done["refused"]) == len(nodes)
    assert record.read_text(encoding="utf-8").splitlines() == [_expected(node) for node in nodes]
    bodies = [node for function in model.functions for node in function.node]
    assert _nested(list(model.graph.node)) == []
    assert [n for n in bodies if n.domain == DOMAIN] + _nested(bodies) == []


def _expected(node: onnx.NodeProto) -> str:
    """The probe's line for a node: the operator's attributes with their types, no others."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert {n: v.decode() for n, v in given.items() if n in PLUGIN_ATTRIBUTES} == PLUGIN_ATTRIBUTES
    fields = [
        f"{a.name}=int32:{given[a.name]}"
        if a.kind is int
        else f"{a.name}=float32:{_nine_digits(given[a.name])}"
        for a in OPERATORS[node.op_type].attributes
    ]
    return "\t".join([node.op_type, node.name, *fields])


def _nine_digits(value: float) -> str:
    return f"{struct.unpack('f', struct.pack('f', value))[0]:.9g}"


def test_a_body_that_does_not_build_is_found(tmp_path: Path) -> None:
    """A file whose body asks for what TensorRT lacks: the check above would say so."""
    rtx_path()
    path = exported(tmp_path, micro(None)).model_path
    model = onnx.load(str(path))
    model.functions[0].node[0].op_type = "NoSuchOperator"
    onnx.save(model, str(path))
    built = _run("build", path)
    assert any("NoSuchOperator" in error for error in built["errors"])
