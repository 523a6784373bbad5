"""Fallback bodies, in ONNX Runtime without any library and in onnx's own, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnxruntime
import pytest
import torch
from cases import CONV_SIZES, GRID_SIZES, SCATTER_SIZES, conv_case, grid_case, scatter_case
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from vssm.onnx.bodies import build_functions
from vssm.ops import reference
from vssm.ops.spec import (
    DOMAIN,
    GATHER_OPERATORS,
    OPERATORS,
    PLUGIN_ATTRIBUTES,
    SCAN_OPERATORS,
    axes_of,
)

# Largest error over max(1, largest output). Measured in ONNX Runtime, 400 random cases an operator:
# float32 6.7e-7, float16 4.8e-4, bfloat16 3.8e-3; rounding the output alone costs up to 4.9e-4 and
# 3.9e-3.
TOLERANCE = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
SCANS = [spec.name for spec in SCAN_OPERATORS]
GATHERS = [spec.name for spec in GATHER_OPERATORS]
_ONNX = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}
SCORES = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.0, 3.0e38]


@dataclass
class _Case:
    """One node: its attributes, and float32 (already rounded to `types`) or int32 arrays."""

    name: str
    arrays: dict[str, np.ndarray]
    attributes: dict[str, int | float]
    types: dict[str, str] = field(default_factory=dict)  # type variable -> dtype
    symbolic: tuple[str, ...] = ()  # symbols of the table that stay symbolic in the model

    def dtype(self, operand):
        return self.types.get(operand.dtype, operand.dtype)


def _rounded(array, dtype):
    return torch.tensor(array, dtype=getattr(torch, dtype)).float().numpy()


def _model(case, opset=18):
    """Half operands enter and leave as float32 beside Cast nodes: numpy has no bfloat16."""
    spec = OPERATORS[case.name]
    shapes = {
        o.name: [
            s if s in case.symbolic and n != 1 else n for s, n in zip(o.shape, shape, strict=True)
        ]
        for o, shape in zip(spec.inputs, (a.shape for a in case.arrays.values()), strict=True)
    }
    shapes |= {o.name: [f"{o.name}_{s}" for s in o.shape] for o in spec.outputs}
    inner = {o.name: _ONNX[case.dtype(o)] for o in (*spec.inputs, *spec.outputs)}
    outer = {n: t if t == TensorProto.INT32 else TensorProto.FLOAT for n, t in inner.items()}

    def values(operands, types, suffix=""):
        return [
            helper.make_tensor_value_info(o.name + suffix, types[o.name], shapes[o.name])
            for o in operands
        ]

    node = helper.make_node(
        case.name,
        [o.name + "_T" for o in spec.inputs],
        [o.name + "_T" for o in spec.outputs],
        domain=DOMAIN,
        **case.attributes,
        **PLUGIN_ATTRIBUTES,
    )
    casts = [("", "_T", o.name, inner) for o in spec.inputs]
    casts += [("_T", "", o.name, outer) for o in spec.outputs]
    nodes = [helper.make_node("Cast", [n + a], [n + b], to=t[n]) for a, b, n, t in casts]
    nodes.insert(len(spec.inputs), node)
    graph = helper.make_graph(
        nodes,
        "graph",
        values(spec.inputs, outer),
        values(spec.outputs, outer),
        value_info=values(spec.outputs, inner, "_T"),  # a body of another type does not load
    )
    return helper.make_model(
        graph,
        functions=build_functions([case.name], opset),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=9,
    )


def _ort(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _scan_case(name, seed, dtype="float32", **fixed):
    """A random scan; `fixed` sets sizes and attributes, the shared axes are drawn."""
    rng = np.random.default_rng(seed)
    pick = {
        "batch": int(rng.integers(1, 4)),
        "seqlen": (1, 2, 7, 33, 65)[seed % 5],
        "K": (1, 2, 4)[seed % 3],
        "d_inner": int(rng.choice([1, 3, 8, 13])),
        "d_state": int(rng.choice([1, 2, 5, 16])),
        "delta_softplus": int(rng.integers(2)),
        "params_by_step": int(rng.integers(2)),
        "scale": float(rng.choice([1.0, 0.5, -0.3])),
        "direction_axis": 2 - seed // 2 % 2,
        **fixed,
    }
    K, batch, seqlen = pick["K"], pick["batch"], pick["seqlen"]
    sizes = pick | {x: int(rng.choice([1, K])) for x in ("Ku", "Kd", "Ka", "Kb", "Kc", "Ks")}
    sizes["1|d_state"] = (1, pick["d_state"])[seed % 2]
    inputs = OPERATORS[name].inputs
    floats = [o for o in inputs if o.dtype != "int32"]
    axes = {o.name: axes_of(o, pick["direction_axis"]) for o in floats}
    draws = {name: rng.normal(size=[sizes[s] for s in axes[name]]) for name in axes}
    draws["delta_bias"] -= 2
    draws["A"] = -np.abs(draws["A"])
    for operand in ("delta0",) if pick["delta_softplus"] else ("delta0", "delta", "delta_bias"):
        draws[operand] = np.abs(draws.get(operand, 0.0))  # step sizes are positive
    images = [int(rng.choice([1, batch])) for _ in range(2)]
    draws["order"] = rng.permuted(np.zeros((images[0], K, 1), int) + np.arange(seqlen), axis=2)
    draws["gap"] = rng.integers(1, 6, (images[1], K, seqlen))
    arrays = {
        o.name: draws[o.name].astype(np.int32)
        if o.dtype == "int32"
        else _rounded(draws[o.name], dtype if o.dtype == "T" else o.dtype)
        for o in inputs
    }
    attributes = {a.name: pick[a.name] for a in OPERATORS[name].attributes}
    return _Case(name, arrays, attributes, {"T": dtype})


def _gather_case(name, seed, types=("float32", "float32"), batch=None, **fixed):
    rng = np.random.default_rng(seed)
    seqlen = (1, 2, 7, 33)[seed % 4]
    batch = batch or int(rng.integers(1, 4))
    images = int(rng.choice([1, batch]))
    place = [np.sort(rng.choice(3 * seqlen, seqlen, replace=False)) for _ in range(images)]
    if rng.integers(2):  # as_released lists the tokens by score
        place = [rng.permutation(p) for p in place]
    arrays = {
        "score": rng.choice(SCORES, (batch, seqlen)).astype(np.float32),
        "position": np.array(place, np.int32),
        "x0": _rounded(rng.normal(size=(batch, seqlen, 3)), types[0]),
        "x1": _rounded(rng.normal(size=(batch, seqlen, 5)), types[1]),
    }
    arrays = {o.name: arrays[o.name] for o in OPERATORS[name].inputs}
    attributes = {
        "num_keep": int(rng.integers(1, seqlen + 1)),
        "protected_position": int(rng.choice([-1, place[0][seqlen // 2], 3 * seqlen])),
        **fixed,
    }
    return _Case(name, arrays, attributes, {"T0": types[0], "T1": types[1]})


def _conv_case(name, seed, dtype="float32", **fixed):
    """One of CONV_SIZES, or what `fixed` says of it."""
    sizes = CONV_SIZES[seed % len(CONV_SIZES)] | fixed
    case = conv_case(**sizes, dtype=getattr(torch, dtype), seed=seed)
    arrays = {n: (t if t.dtype == torch.int32 else t.float()).numpy() for n, t in case.items()}
    attributes = {"by_position": seed // 2 % 2, "activation": seed % 2}
    return _Case(name, arrays, attributes, {"T": dtype})


def _grid_case(name, seed, dtype="float32", **fixed):
    """One of GRID_SIZES, or what `fixed` says of it."""
    sizes = GRID_SIZES[seed % len(GRID_SIZES)] | fixed
    case, attributes = grid_case(**sizes, dtype=getattr(torch, dtype), seed=seed)
    arrays = {n: (t if t.dtype == torch.int32 else t.float()).numpy() for n, t in case.items()}
    return _Case(name, arrays, attributes | {"activation": seed % 2}, {"T": dtype})


def _scatter_case(name, seed, dtype="float32", **fixed):
    """One of SCATTER_SIZES, or what `fixed` says of it."""
    sizes = SCATTER_SIZES[seed % len(SCATTER_SIZES)] | fixed
    case = scatter_case(**sizes, dtype=getattr(torch, dtype), seed=seed)
    arrays = {n: (t if t.dtype == torch.int32 else t.float()).numpy() for n, t in case.items()}
    return _Case(name, arrays, {}, {"T": dtype})


_BUILDERS = {
    **dict.fromkeys(SCANS, _scan_case),
    **dict.fromkeys(GATHERS, _gather_case),
    "TokenConv": _conv_case,
    "TokenConv2D": _grid_case,
    "TokenScatter": _scatter_case,
}


def _oracle(case):
    """Outputs of the oracle, float64 for the scans and as given for what moves rows."""
    tensors = {name: torch.from_numpy(array) for name, array in case.arrays.items()}
    if case.name == "TokenScatter":
        return [reference.token_scatter(**tensors).numpy()]
    if case.name in SCANS:
        tensors = {n: t if n in ("order", "gap") else t.double() for n, t in tensors.items()}
        return [reference.selective_scan(**tensors, **case.attributes).numpy()]
    if case.name in ("TokenConv", "TokenConv2D"):
        tensors = {n: t if n == "position" else t.double() for n, t in tensors.items()}
        run = reference.token_conv if case.name == "TokenConv" else reference.token_conv2d
        return [run(**tensors, **case.attributes).numpy()]
    score, position, *xs = tensors.values()
    kept, rows = reference.token_gather(score, position, xs, **case.attributes)
    return [kept.numpy(), *(row.numpy() for row in rows)]


def _assert_close(case, got):
    want = _oracle(case)
    if case.name in (*GATHERS, "TokenScatter"):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        return
    assert got[0].shape == want[0].shape
    error = np.abs(got[0] - want[0]).max() / max(1.0, np.abs(want[0]).max())
    assert error <= TOLERANCE[case.types["T"]]


def _assert_runs(case, opset):
    _assert_close(case, _ort(_model(case, opset)).run(None, case.arrays))


# A half type is a Cast at either end of what float32 computes: not every case again.
SEEDS = [
    pytest.param(dtype, seed, marks=[pytest.mark.slow] * (dtype != "float32" and seed % 3 != 0))
    for dtype in TOLERANCE
    for seed in range(30)
]


@pytest.mark.parametrize(("dtype", "seed"), SEEDS)
@pytest.mark.parametrize("name", SCANS)
def test_scan_body_matches_oracle_in_onnxruntime(name, dtype, seed):
    _assert_runs(_scan_case(name, seed, dtype), opset=18 + seed % 3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conv_body_matches_oracle_in_onnxruntime(dtype, seed):
    _assert_runs(_conv_case("TokenConv", seed, dtype), opset=18 + seed % 3)


@pytest.mark.parametrize("seed", range(len(GRID_SIZES)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_grid_body_matches_oracle_in_onnxruntime(dtype, seed):
    _assert_runs(_grid_case("TokenConv2D", seed, dtype), opset=18 + seed % 3)


@pytest.mark.parametrize("seed", range(len(SCATTER_SIZES)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scatter_body_is_the_oracle_in_onnxruntime(dtype, seed):
    _assert_runs(_scatter_case("TokenScatter", seed, dtype), opset=18 + seed % 3)


@pytest.mark.parametrize("place", [-1, -7, 7, -(2**31), 2**31 - 1])
def test_scatter_body_refuses_positions_outside(place):
    """Also in an image that is not the last, whose neighbour has rows there."""
    case = _scatter_case("TokenScatter", 0, full_seqlen=7, seqlen=3, batch=2)
    case.arrays["position"] = case.arrays["position"].copy()
    case.arrays["position"][0, 1] = place
    with pytest.raises(Exception, match="indice"):
        _ort(_model(case)).run(None, case.arrays)


@pytest.mark.parametrize("types", OPERATORS["TokenGather"].types, ids="-".join)
def test_gather_body_keeps_types_in_onnxruntime(types):
    for opset in (18, 19, 20):
        _assert_runs(_gather_case("TokenGather", opset, types), opset)
        _assert_runs(_gather_case("TokenGather1", opset, (types[0], "float32")), opset)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", GATHERS)
def test_gather_body_orders_as_the_oracle(name, seed):
    _assert_runs(_gather_case(name, seed), opset=18 + seed % 3)


@pytest.mark.parametrize("opset", [18, 19, 20])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPERATORS)
def test_body_matches_oracle_in_onnx_reference(name, dtype, opset):
    if name in SCANS:
        case = _scan_case(name, opset, dtype, seqlen=5, K=2, d_inner=3, d_state=2)
    elif name in GATHERS:
        case = _gather_case(name, opset, (dtype, dtype))
    else:
        case = _BUILDERS[name](name, opset, dtype)
    _assert_close(case, ReferenceEvaluator(_model(case, opset)).run(None, case.arrays))


@pytest.mark.parametrize("name", SCANS)
def test_gap_of_a_first_step_is_ignored(name):
    case = _scan_case(name, 3, seqlen=7, K=2, delta_softplus=1)
    if "delta0" in case.arrays:
        case.arrays["delta0"] *= 1e4  # exp(-(gap - 1) * delta0 * A) * 0 would be inf * 0
    session = _ort(_model(case))
    want = session.run(None, case.arrays)[0]
    for first in (0, 2**31 - 1):
        case.arrays["gap"][:, :, 0] = first
        np.testing.assert_array_equal(session.run(None, case.arrays)[0], want)


@pytest.mark.parametrize("name", SCANS)
def test_scan_body_survives_large_gaps_and_delta_spikes(name):
    case = _scan_case(name, 4, batch=2, seqlen=65, K=4, delta_softplus=1)
    rng = np.random.default_rng(0)
    case.arrays["gap"][:] = rng.choice([1, 196, 2**31 - 1], case.arrays["gap"].shape)
    spikes = [-1e4, -90.0, -20.0, -13.0, 0.0, 30.0, 1e4]
    case.arrays["delta"][:] = rng.choice(spikes, case.arrays["delta"].shape)
    _assert_runs(case, opset=18)


def test_softplus_of_the_body_is_exact_over_the_whole_range():
    # One step, A and D and C chosen so that y = softplus(delta).
    case = _scan_case("SelectiveScan", 0, batch=1, seqlen=1, K=1, d_state=1, d_inner=4001)
    delta = np.linspace(-100, 100, 4001, dtype=np.float32)
    for name, value in {"u": 1, "B": 1, "C": 1, "D": 0, "delta_bias": 0}.items():
        case.arrays[name][:] = value
    case.arrays["delta"][0, 0, 0] = delta
    case.attributes |= {"delta_softplus": 1, "scale": 1.0}
    got = _ort(_model(case)).run(None, case.arrays)[0][0, 0]
    want = np.logaddexp(0.0, delta.astype(np.float64))
    normal = want > 1e-37
    assert np.abs(got / want - 1)[normal].max() <= 8e-7  # measured 5.2e-7
    assert np.abs(got - want)[~normal].max() <= 1e-37


@pytest.mark.parametrize("name", OPERATORS)
def test_one_session_serves_every_batch_size(name):
    def case_of(batch):
        fixed = {"num_keep": 5, "protected_position": 4} if name in GATHERS else {}
        case = _BUILDERS[name](name, 7, batch=batch, **fixed)
        for key in {"order", "gap", "position"} & case.arrays.keys():
            case.arrays[key] = case.arrays[key][:1]  # shared by the images
        case.symbolic = ("batch",)
        return case

    session = _ort(_model(case_of(3)))
    for batch in (1, 3, 2):
        _assert_close(case_of(batch), session.run(None, case_of(batch).arrays))


TIES = [
    [1, 1, 1, 1, 1],
    [-0.0, 0.0, -0.0, 0.0, -0.0],
    [5, 4, 3, np.nan, 2],  # the protected slot 3 is the worst
    [5, 4, 3, -np.inf, 2],
    [np.inf, np.inf, np.inf, -np.inf, np.inf],
    [np.nan, -np.inf, np.nan, -np.inf, np.nan],
    [np.nan] * 5,
    [-np.inf] * 5,
    [np.inf, np.nan, 0, np.inf, -np.inf],
    [1e-45, 0, -1e-45, -0.0, 1e-45],
]


@pytest.mark.parametrize("num_keep", [1, 2, 3, 5])
@pytest.mark.parametrize("protected", [-1, 30, 99])
def test_gather_body_on_every_kind_of_tie(protected, num_keep):
    """Each an image and, turned round, another."""
    score = [row[::step] for row in TIES for step in (1, -1)]
    case = _gather_case("TokenGather1", 0)
    case.arrays = {
        "score": np.array(score, np.float32),
        "position": np.array([[-1, 7, 11, 30, 31]], np.int32),  # -1 still means none
        "x0": np.arange(10.0 * len(score), dtype=np.float32).reshape(-1, 5, 2),
    }
    case.attributes = {"num_keep": num_keep, "protected_position": protected}
    _assert_runs(case, opset=18)
