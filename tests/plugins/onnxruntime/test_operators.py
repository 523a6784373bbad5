"""Every operator, type and instruction set in ONNX Runtime with the native library."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    EXTRA,
    GATHERS,
    SCAN_SIZES,
    TOGETHER_SIZES,
    gather_case,
    scan_case,
    scan_reference_arguments,
    small_case,
)
from native import ONNX_TYPES, isa_parameters, make_session, run_operator
from tolerances import HALF_FACTOR, SCAN_TOLERANCE, relative_error

from vssm.ops import reference
from vssm.ops.spec import OPERATORS, SCAN_OPERATORS
from vssm.runtimes.library import kernel_calls

ISAS = isa_parameters()
SCANS = [spec.name for spec in SCAN_OPERATORS]
SHAPES = SCAN_SIZES + TOGETHER_SIZES
TOGETHER = {"directions": 4, "shared": "udACD"}


@functools.lru_cache(maxsize=256)
def _case(index, extra, dtype):
    return scan_case(**SHAPES[index], extra=extra, dtype=dtype, seed=index)


@functools.lru_cache(maxsize=256)
def _oracle(index, extra, dtype, attributes):
    case = scan_reference_arguments(_case(index, extra, dtype))
    return reference.selective_scan(**case, **dict(attributes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_scan_matches_oracle(index, name, dtype, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = _case(index, EXTRA[name], dtype)
    by_step = index % 2 if index < len(SCAN_SIZES) else 1
    attributes = (("params_by_step", by_step), ("scale", 0.5 if index % 3 == 0 else 1.0))
    expected = _oracle(index, EXTRA[name], dtype, attributes)
    error = relative_error(run_operator(name, case, **dict(attributes))["y"], expected)
    assert error <= SCAN_TOLERANCE[dtype]
    if dtype != torch.float32:
        by_torch = reference.selective_scan(**case, **dict(attributes))
        assert error <= HALF_FACTOR * relative_error(by_torch, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("together", [False, True])
def test_scan_without_softplus_and_with_growing_states(together, name, isa, monkeypatch):
    """Negative steps and positive A: arguments that the fast exp2 does not take."""
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    shared = TOGETHER if together else {}
    case = scan_case(seqlen=40, d_inner=20, extra=EXTRA[name], gap="ones", **shared)
    case["delta"], case["delta_bias"] = case["delta"] * 0.01, case["delta_bias"] * 0
    case["A"][:, ::3] *= -1
    attributes = {"delta_softplus": 0, "params_by_step": int(together)}
    got = run_operator(name, case, **attributes)["y"]
    expected = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    assert relative_error(got, expected) <= SCAN_TOLERANCE[torch.float32]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spike", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("together", [False, True])
def test_scan_survives_spikes_of_delta(together, spike, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=100, d_inner=20, d_state=16, **(TOGETHER if together else {}))
    case["delta"][:, ::7] += spike
    attributes = {"params_by_step": int(together)}
    expected = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    assert relative_error(run_operator("SelectiveScan", case, **attributes)["y"], expected) <= 2e-6


@pytest.mark.parametrize("isa", ISAS)
def test_scan_of_denormals_is_zero_or_right(isa, monkeypatch):
    """They count as zero inside the kernel, and the host's own mode is restored."""
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=64, d_inner=20)
    case["u"] *= 1e-39
    case["B"] *= 1e-3
    expected = reference.selective_scan(**scan_reference_arguments(case))
    got = run_operator("SelectiveScan", case)["y"].double()
    assert (got - expected).abs().max() <= 1e-37
    assert (torch.tensor([1e-39]) * 1.0).item() > 0
    case = scan_case(seqlen=64, d_inner=20, dtype=torch.float16)  # these are normal as float32
    case["u"] *= 2e-7
    expected = reference.selective_scan(**scan_reference_arguments(case))
    got = run_operator("SelectiveScan", case)["y"].double()
    assert (got - expected).abs().max() <= 2.0**-24


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("where", ["u", "delta", "B", "C", "A", "D", "delta_bias"])
def test_scan_passes_nan_on(where, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=20, d_inner=18, directions=1, order="ends")
    case[where].view(-1)[-1] = float("nan")
    expected = reference.selective_scan(**scan_reference_arguments(case))
    got = run_operator("SelectiveScan", case)["y"]
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SCANS)
def test_scan_is_the_same_on_two_threads_and_again(name, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=100, d_inner=70, batch=3, extra=EXTRA[name])
    first = run_operator(name, case)["y"]
    for threads in (1, 2):
        assert torch.equal(run_operator(name, case, threads=threads)["y"], first)


def test_session_is_safe_from_several_threads():
    case = scan_case(seqlen=100, d_inner=70)
    types = {n: ONNX_TYPES[t.dtype] for n, t in case.items()} | {"y": ONNX_TYPES[torch.float32]}
    session = make_session("SelectiveScan", types, threads=2)
    feeds = {n: t.numpy() for n, t in case.items()}
    expected = session.run(None, feeds)[0]
    same = []

    def work():
        same.extend(np.array_equal(session.run(None, feeds)[0], expected) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(same) == 80
    assert all(same)


def test_runs_of_kernels_are_counted():
    before = kernel_calls()
    run_operator("SelectiveScan", scan_case(seqlen=2))
    run_operator("TokenGather", gather_case(seqlen=4), num_keep=2)
    assert kernel_calls() == before + 2


@pytest.mark.parametrize("name", OPERATORS)
def test_empty_batch_gives_empty_outputs(name):
    case, attributes = small_case(name, batch=1)
    batched = {o.name for o in OPERATORS[name].inputs if o.shape[0] == "batch"}
    case = {n: t[:0] if n in batched else t for n, t in case.items()}
    for output in run_operator(name, case, **attributes).values():
        assert output.shape[0] == 0


@pytest.mark.parametrize("isa", ["avx1024", "AVX2"])
def test_unknown_instruction_set_is_refused(isa, monkeypatch):
    case = scan_case(seqlen=2)
    run_operator("SelectiveScan", case)
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    with pytest.raises(Exception, match=f"VSSM_CPU_ISA={isa} is none of avx512, avx2, baseline"):
        run_operator("SelectiveScan", case)


@pytest.mark.parametrize(("name", "dtypes"), GATHERS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"seqlen": 1, "batch": 1},
        {"seqlen": 197, "batch": 3},
        {"seqlen": 64, "batch": 2, "ties": True},
        {"seqlen": 65, "batch": 4, "special": True},
        {"seqlen": 63, "batch": 3, "ties": True, "special": True, "shared_position": True},
    ],
    ids=str,
)
def test_gather_equals_oracle(options, name, dtypes):
    case = gather_case(**options, widths=(17, 5)[: len(dtypes)], dtypes=dtypes)
    xs = [case[f"x{i}"] for i in range(len(dtypes))]
    seqlen = options["seqlen"]
    present = int(case["position"][0, seqlen // 2])
    for num_keep in sorted({1, seqlen // 3 or 1, max(1, seqlen - 1), seqlen}):
        for protected in (-1, present, 10 * seqlen):
            attributes = {"num_keep": num_keep, "protected_position": protected}
            kept, rows = reference.token_gather(case["score"], case["position"], xs, **attributes)
            got = run_operator(name, case, **attributes)
            assert torch.equal(got["kept_position"], kept)
            for i, expected in enumerate(rows):
                assert torch.equal(got[f"y{i}"], expected)


def test_gather_ranks_special_scores():
    score = [float("nan"), float("-inf"), -0.0, 0.0, 1e-42, float("inf"), float("nan"), -1e-42]
    case = gather_case(seqlen=8, batch=1, widths=(4,), dtypes=(torch.float32,))
    case["score"] = torch.tensor([score])
    case["position"] = torch.arange(8, dtype=torch.int32)[None]
    by_rank = [6, 5, 4, 2, 3, 7, 1, 0]  # the protected one first, NaN last
    for num_keep in range(1, 9):
        kept = run_operator("TokenGather1", case, num_keep=num_keep, protected_position=6)
        assert kept["kept_position"][0].tolist() == sorted(by_rank[:num_keep])


def test_gather_survives_positions_that_are_not_distinct():
    case = gather_case(seqlen=30, batch=2)
    case["position"] = torch.full((2, 30), -(2**31), dtype=torch.int32)
    for protected in (-1, 5):
        got = run_operator("TokenGather", case, num_keep=7, protected_position=protected)
        assert got["kept_position"].unique().tolist() == [-(2**31)]
    case["position"] = torch.full((2, 30), 5, dtype=torch.int32)  # all protected
    got = run_operator("TokenGather", case, num_keep=7, protected_position=5)
    assert torch.equal(got["y0"], case["x0"][:, :7])


def test_gather_of_rows_without_width():
    case = gather_case(seqlen=9, batch=2, widths=(0, 3))
    got = run_operator("TokenGather", case, num_keep=4)
    assert got["y0"].shape == (2, 4, 0)
    assert got["y1"].shape == (2, 4, 3)
