"""What is read from an ONNX file without the package onnx, against that package."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import onnx
import pytest
from exports import exported, micro, micro_plain
from onnx import TensorProto, helper, numpy_helper

from vssm.artifact.model_file import read_facts
from vssm.errors import ArtifactError
from vssm.onnx.describe import describe_tensor, used_operators


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    made = []
    for name, model, options in (
        ("pruned", micro(), {}),
        ("half", micro(), {"dtype": "float16"}),
        ("wide", micro(None, depth=1), {"dtype": "bfloat16", "opset": 20, "inline": True}),
        ("plain", micro_plain(), {"inline": True}),
    ):
        out = exported(folder / name, model, **options)
        made += sorted(out.directory.glob("*.onnx"))
    return made


def test_the_same_as_onnx_reads(files):
    assert len(files) == 6
    for path in files:
        model, facts = onnx.load(path), read_facts(path.read_bytes())
        assert facts.inputs == tuple(map(describe_tensor, model.graph.input))
        assert facts.outputs == tuple(map(describe_tensor, model.graph.output))
        assert sorted(facts.operators) == used_operators(model)
        assert facts.opsets == {o.domain: o.version for o in model.opset_import}
        kinds = {t.data_type for t in model.graph.initializer}
        known = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
        assert facts.halves == {known[kind] for kind in kinds & known.keys()}
        assert facts.external == frozenset()


def _tensor(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def _graph(nodes=(), **fields) -> onnx.GraphProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    return helper.make_graph(list(nodes), "g", [value], [value], **fields)


def _inside(graph: onnx.GraphProto) -> onnx.GraphProto:
    """`graph` two graphs deep."""
    for _ in range(2):
        graph = _graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)])
    return graph


def test_external_files_wherever_a_tensor_stands():
    constant = helper.make_node("Constant", [], ["y"], value=_tensor("constant"))
    many = helper.make_node("Any", [], ["y"], tensors=[_tensor("list")])
    sparse = onnx.SparseTensorProto(values=_tensor("values"), indices=_tensor("indices"))
    other = helper.make_node("Constant", [], ["y"], sparse_value=sparse)
    graph = _graph(
        [constant, many, other, _inside(_graph(initializer=[_tensor("inner")])).node[0]],
        initializer=[_tensor("../outside")],
        sparse_initializer=[sparse],
    )
    function = helper.make_function(
        "d", "F", [], [], [helper.make_node("Constant", [], ["y"], value=_tensor("function"))], []
    )
    deep = _inside(_graph([helper.make_node("C", [], ["y"], value=_tensor("deep"))]))
    function.node.append(deep.node[0])
    function.attribute_proto.append(helper.make_attribute("a", _tensor("default")))
    model = helper.make_model(graph, functions=[function])
    twice = model.graph.initializer.add()
    twice.CopyFrom(_tensor("first"))
    twice.external_data.add(key="location", value="second")
    assert read_facts(model.SerializeToString()).external == {
        *("constant", "list", "values", "indices", "inner", "../outside", "function", "deep"),
        *("default", "first", "second"),
    }


def test_operators_and_halves_inside_graphs():
    node = helper.make_node("SelectiveScan", [], ["y"], domain="vssm")
    half = numpy_helper.from_array(np.zeros(2, np.float16), "w")
    graph = _inside(_graph([node]))
    graph.initializer.append(half)
    facts = read_facts(helper.make_model(graph).SerializeToString())
    assert facts.operators == {"SelectiveScan"}
    assert facts.halves == {"float16"}


def test_a_graph_that_comes_in_two_parts_is_one():
    """Protobuf merges them, and so does every runtime."""
    first = helper.make_model(_graph())
    second = onnx.ModelProto()
    second.graph.node.add(op_type="SelectiveScan", domain="vssm")
    facts = read_facts(first.SerializeToString() + second.SerializeToString())
    assert facts.operators == {"SelectiveScan"}
    assert facts.inputs[0].name == "x"


def test_two_versions_of_one_domain():
    model = helper.make_model(_graph(), opset_imports=[helper.make_opsetid("", 18)])
    model.opset_import.append(helper.make_opsetid("ai.onnx", 20))
    with pytest.raises(ArtifactError, match="the standard operators in the versions 18 and 20"):
        read_facts(model.SerializeToString())


def test_damaged_bytes_are_refused_or_read(files):
    """Every prefix, and flipped bits: an ArtifactError or facts, nothing else."""
    data = files[0].read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        spoiled = bytearray(data[: generator.randrange(len(data))])
        for _ in range(generator.randrange(4)):
            if spoiled:
                spoiled[generator.randrange(len(spoiled))] ^= 1 << generator.randrange(8)
        with contextlib.suppress(ArtifactError):
            read_facts(bytes(spoiled))
    with pytest.raises(ArtifactError, match="no ONNX model"):
        read_facts(b"\xff" * 100)
