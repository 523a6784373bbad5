"""The operators as onnx sees them: checker, shape inference and refusals, form of the bodies."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import TensorProto, helper

from vssm.onnx.bodies import build_functions
from vssm.onnx.schemas import register_schemas
from vssm.ops.spec import DOMAIN, OPERATORS, PLUGIN_ATTRIBUTES, SCAN_OPERATORS

SCANS = [spec.name for spec in SCAN_OPERATORS]
SIZES = {
    **{"batch": "N", "1|batch": 1, "seqlen": 9, "d_inner": 5, "d_state": 3, "d0": 4, "d1": 6},
    "full_seqlen": 12,
    "d": 4,
    "1|d_state": 1,
    "width": 4,
    "side": 3,
    **{"K": 4, "Ku": 1, "Kd": 4, "Ka": 1, "Kb": 4, "Kc": 1, "Ks": 4},
}
ATTRIBUTES = {
    "delta_softplus": 1,
    "params_by_step": 0,
    "scale": 0.5,
    "direction_axis": 2,
    "num_keep": 2,
    "protected_position": 3,
    "by_position": 0,
    "activation": 1,
    **{"grid_height": 3, "grid_width": 3, "group": 5},
}
ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float64": TensorProto.DOUBLE,
}


@pytest.fixture(autouse=True)
def _schemas():
    register_schemas()


def _sizes(name):
    """A convolution has two directions at most."""
    return SIZES | ({"K": 2} if name == "TokenConv" else {})


def _graph(name, *, shapes=None, types=None, sizes=None, attributes=None, nodes=1):
    """Two nodes deep: the operator, then an Identity per output, so that value_info is needed.

    `shapes` and `types` (by operand or type variable) and `sizes` (by symbol) replace the defaults;
    an attribute of None is left out.
    """
    spec, sizes, types = OPERATORS[name], _sizes(name) | (sizes or {}), types or {}

    def value(operand):
        dtype = types.get(operand.name, types.get(operand.dtype, operand.dtype))
        shape = (shapes or {}).get(operand.name, [sizes[s] for s in operand.shape])
        element = ONNX_TYPES[dtype if dtype in ONNX_TYPES else "float32"]
        return helper.make_tensor_value_info(operand.name, element, shape)

    chosen = {a.name: ATTRIBUTES[a.name] for a in spec.attributes} | (attributes or {})
    chosen = {k: v for k, v in {**chosen, **PLUGIN_ATTRIBUTES}.items() if v is not None}
    made, outputs = [], []
    for i in range(nodes):
        inner = [f"{o.name}_{i}" for o in spec.outputs]
        inputs = [o.name for o in spec.inputs]
        made.append(helper.make_node(name, inputs, inner, f"node{i}", domain=DOMAIN, **chosen))
        for operand, source in zip(spec.outputs, inner, strict=True):
            made.append(helper.make_node("Identity", [source], [source + "_out"]))
            dtype = types.get(operand.dtype, operand.dtype)
            element = ONNX_TYPES[dtype if dtype in ONNX_TYPES else "float32"]
            shape = [None] * len(operand.shape)
            outputs.append(helper.make_tensor_value_info(source + "_out", element, shape))
    return helper.make_graph(made, "graph", [value(o) for o in spec.inputs], outputs)


def _model(name, *, opset=18, functions=False, **graph):
    return helper.make_model(
        _graph(name, **graph),
        functions=build_functions([name], opset) if functions else [],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=9,
    )


def _inferred(model, **options):
    inferred = onnx.shape_inference.infer_shapes(model, **options)
    return {
        info.name: (
            info.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim],
        )
        for info in inferred.graph.value_info
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_repeats_the_table(name):
    register_schemas()
    schema, spec = onnx.defs.get_schema(name, 1, DOMAIN), OPERATORS[name]
    assert [i.name for i in schema.inputs] == [o.name for o in spec.inputs]
    assert [o.name for o in schema.outputs] == [o.name for o in spec.outputs]
    assert set(schema.attributes) == {a.name for a in spec.attributes} | set(PLUGIN_ATTRIBUTES)
    for attribute in spec.attributes:
        declared = schema.attributes[attribute.name]
        assert declared.required == (attribute.default is None)
        if attribute.default is not None:
            assert helper.get_attribute_value(declared.default_value) == attribute.default


@pytest.mark.parametrize("functions", [False, True], ids=["alone", "with body"])
@pytest.mark.parametrize("opset", [18, 19, 20])
@pytest.mark.parametrize(
    ("name", "types"), [(name, t) for name, spec in OPERATORS.items() for t in spec.types]
)
def test_checker_passes_and_symbolic_batch_goes_through(name, types, opset, functions):
    bound = dict(zip(OPERATORS[name].type_variables, types, strict=True))
    model = _model(name, opset=opset, functions=functions, types=bound)
    onnx.checker.check_model(model, full_check=True)
    found = _inferred(model, strict_mode=True, check_type=True)
    for operand in OPERATORS[name].outputs:
        shape = [{**_sizes(name), "num_keep": 2}[s] for s in operand.shape]
        element = ONNX_TYPES[bound.get(operand.dtype, operand.dtype)]
        assert found[f"{operand.name}_0"] == (element, shape)


def test_a_known_batch_wins_over_a_symbolic_one():
    shapes = {"x0": ["N", 9, 4], "x1": [3, "L", None]}
    found = _inferred(_model("TokenGather", shapes=shapes))
    assert found["kept_position_0"][1] == [3, 2]
    assert found["y1_0"][1][:2] == [3, 2]
    assert isinstance(found["y1_0"][1][2], str)  # onnx names the unknown width


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("SelectiveScan", {"shapes": {"u": ["N", 9, 5]}}, r"u has shape \(N, 9, 5\) of rank 3"),
        ("SelectiveScan", {"sizes": {"Ku": 2}}, "Ku=2 of u must be 1"),
        ("SelectiveScan", {"sizes": {"Kb": 3}}, "Kb=3 of B must be 1 .* K=4"),
        ("SelectiveScan", {"sizes": {"Kc": 8}}, "Kc=8 of C must be 1 .* K=4"),
        ("SelectiveScan", {"sizes": {"Ka": 2}}, "Ka=2 of A"),
        ("SelectiveScan", {"sizes": {"Ks": 2}}, "Ks=2 of D"),
        ("SelectiveScan", {"shapes": {"delta_bias": [1, 5]}}, "delta_bias .*Kd=1 differs"),
        ("SelectiveScan", {"shapes": {"gap": [1, 2, 9]}}, "gap .*K=2 differs from K=4"),
        ("SelectiveScan", {"shapes": {"gap": [1, 4, 8]}}, "gap .*seqlen=8 differs"),
        ("SelectiveScan", {"shapes": {"C": ["N", 9, 1, 2]}}, "C .*d_state=2 differs"),
        ("SelectiveScan", {"sizes": {"d_state": 257}}, r"d_state=257 is outside \[1, 256\]"),
        ("SelectiveScan", {"sizes": {"d_state": 0}}, "d_state=0 of B must be at least 1"),
        ("SelectiveScan", {"sizes": {"batch": 2, "1|batch": 3}}, "order has batch 3, must be 1"),
        ("SelectiveScan", {"sizes": {"1|d_state": 2}}, "A has d_state 2, must be 1 .* d_state=3"),
        ("SelectiveScan", {"types": {"order": "int64"}}, "order is int64, must be int32"),
        ("SelectiveScan", {"types": {"A": "float16"}}, "A is float16, must be float32"),
        ("SelectiveScan", {"types": {"u": "float16"}}, "delta is float32"),
        ("SelectiveScan", {"types": {"T": "float64"}}, "u is double"),
        ("SelectiveScan", {"attributes": {"delta_softplus": 2}}, "delta_softplus=2 must be 0 or 1"),
        ("SelectiveScan", {"attributes": {"params_by_step": -1}}, "params_by_step=-1"),
        ("SelectiveScan", {"attributes": {"scale": math.nan}}, "scale=nan must be finite"),
        ("GatedSelectiveScan", {"shapes": {"z": ["N", 9, 4]}}, "z .*d_inner=4 differs"),
        ("SelectiveScanConstantGap", {"shapes": {"delta0": [2, 5]}}, "delta0 .*Kd=2 differs"),
        ("TokenGather", {"attributes": {"num_keep": 0}}, r"num_keep=0 is outside \[1, 9\]"),
        ("TokenGather", {"attributes": {"num_keep": 10}}, r"num_keep=10 is outside \[1, 9\]"),
        ("TokenGather1", {"attributes": {"num_keep": -1}, "sizes": {"seqlen": "L"}}, "num_keep=-1"),
        ("TokenGather1", {"attributes": {"num_keep": None}}, "num_keep is missing"),
        ("TokenGather1", {"attributes": {"protected_position": -2}}, "protected_position=-2"),
        ("TokenGather", {"shapes": {"x1": ["N", 8, 6]}}, "x1 .*seqlen=8 differs"),
        ("TokenGather", {"types": {"T0": "float32", "T1": "float16"}}, "x1 is float16"),
        ("TokenGather", {"sizes": {"batch": 3, "1|batch": 2}}, "position has batch 2"),
        ("TokenScatter", {"sizes": {"full_seqlen": 8}}, r"seqlen=9 is outside \[1, 8\]"),
        ("TokenScatter", {"types": {"x": "float16"}}, "x is float16"),
        ("TokenConv2D", {"attributes": {"grid_width": 0}}, "grid_width=0 must be at least 1"),
        ("TokenConv2D", {"attributes": {"grid_width": 2}}, "seqlen=9 must be 6, the places"),
        ("TokenConv2D", {"attributes": {"grid_width": None}}, "grid_width is missing"),
        ("TokenConv2D", {"attributes": {"group": 4}}, "group=4 must be d_inner=5"),
        ("TokenConv2D", {"sizes": {"side": 2}}, "side=2 is even"),
        ("TokenConv2D", {"sizes": {"side": 9}}, r"side=9 is outside \[1, 7\]"),
        ("TokenConv2D", {"shapes": {"weight": [5, 3, 5]}}, "side=5 differs"),
    ],
)
def test_shape_inference_refuses(name, change, message):
    model = _model(name, **change)
    for strict in (False, True):
        with pytest.raises(ValueError, match=f"vssm.{name} .*{message}"):
            onnx.shape_inference.infer_shapes(model, strict_mode=strict)


def test_checker_refuses_an_unknown_attribute():
    model = _model("TokenGather1", attributes={"num_kept": 3})
    with pytest.raises(onnx.checker.ValidationError, match="num_kept"):
        onnx.checker.check_model(model)


def _nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


@pytest.mark.parametrize("name", OPERATORS)
def test_form_of_a_body(name):
    [function] = build_functions([name], 18)
    nodes = list(_nodes(function))
    assert len(nodes) <= (165 if name in SCANS else 95)  # measured 148 to 159, 62 to 90
    assert function.ByteSize() <= 15_000  # measured up to 11,396 and 6,532
    assert {node.domain for node in nodes} == {""}
    assert "If" not in {node.op_type for node in nodes}
    names = [n for node in nodes for n in node.output]
    assert len(set(names)) == len(names)
    assert all(n.startswith("vssm.") for n in [*names, *function.input])
    node_names = [node.name for node in nodes]
    assert len(set(node_names)) == len(node_names)
    defaults = {a.name: helper.get_attribute_value(a) for a in function.attribute_proto}
    attributes = OPERATORS[name].attributes
    assert defaults == {a.name: a.default for a in attributes if a.default is not None}
    assert list(function.attribute) == [a.name for a in attributes if a.default is None]


@pytest.mark.parametrize("name", SCANS)
def test_scan_body_reads_no_outer_name(name):
    [function] = build_functions([name], 18)
    [scan] = [node for node in function.node if node.op_type == "Scan"]
    body = next(a.g for a in scan.attribute if a.name == "body")
    known = {value.name for value in body.input}
    for node in body.node:
        assert set(node.input) <= known
        known |= set(node.output)
    assert {value.name for value in body.output} <= known
    assert not body.initializer


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("name", OPERATORS)
def test_inlined_model_runs_and_gives_the_same_bits(name, opset):
    sizes = {"batch": 2, "seqlen": 9}
    model = _model(name, opset=opset, functions=True, sizes=sizes, nodes=2)
    inlined = onnx.inliner.inline_local_functions(model)
    onnx.checker.check_model(inlined, full_check=True)
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    feeds = _feeds(name, _sizes(name) | sizes)
    for want, got in zip(_run(model, feeds), _run(inlined, feeds), strict=True):
        np.testing.assert_array_equal(got, want)


def _feeds(name, sizes):
    rng = np.random.default_rng(0)
    feeds = {}
    for operand in OPERATORS[name].inputs:
        shape = [sizes[s] for s in operand.shape]
        feeds[operand.name] = rng.normal(size=shape).astype(np.float32)
        if operand.dtype == "int32":
            feeds[operand.name] = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    return feeds


def _run(model, feeds):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


@pytest.mark.parametrize("seqlen", [5, "L"], ids=["static", "symbolic"])
@pytest.mark.parametrize("num_keep", [0, 6, -1, -5, 2**31, -(2**63), 2**63 - 1])
def test_bad_num_keep_of_a_body_is_an_error_and_no_abort(num_keep, seqlen):
    sizes, attributes = {"batch": 2, "seqlen": seqlen}, {"num_keep": num_keep}
    model = _model("TokenGather", functions=True, sizes=sizes, attributes=attributes)
    feeds = _feeds("TokenGather", SIZES | {"batch": 2, "seqlen": 5})
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        _run(model, feeds)


def test_build_functions_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"names=\['Nope'\]"):
        build_functions(["TokenGather", "Nope"], 18)
    for opset in (17, 21):
        with pytest.raises(ValueError, match=f"opset={opset}"):
            build_functions(["TokenGather"], opset)
    twice = build_functions(["TokenGather1", "SelectiveScan", "TokenGather1"], 18)
    assert [f.name for f in twice] == ["SelectiveScan", "TokenGather1"]
