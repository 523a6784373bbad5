"""The CUDA scans, in emulation and on a GPU, against the oracle."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re

import pytest
import torch
from cases import DTYPES, EXTRA, SCAN_SIZES, TOGETHER_SIZES, scan_case, scan_reference_arguments
from cuda_device import (
    DEVICES,
    EMULATED,
    H100,
    SMALL_CARD,
    VARIANTS,
    CLaunch,
    CScanAttributes,
    CTensor,
    OperatorError,
    prepare,
    run_operator,
)
from tolerances import GPU_SCAN_TOLERANCE, HALF_FACTOR, SCAN_TOLERANCE, relative_error

from vssm.ops import reference
from vssm.ops.spec import SCAN_OPERATORS

SCANS = [spec.name for spec in SCAN_OPERATORS]
SHAPES = SCAN_SIZES + TOGETHER_SIZES
THROUGHPUT, LATENCY = VARIANTS["throughput"], VARIANTS["latency"]
TOGETHER = {"directions": 4, "shared": "udACD"}
each_variant = pytest.mark.parametrize("variant", [THROUGHPUT, LATENCY], ids=["many", "few"])
pytestmark = pytest.mark.parametrize("backend", DEVICES, ids=str)


def tolerance(backend, dtype):
    return (SCAN_TOLERANCE if backend is EMULATED else GPU_SCAN_TOLERANCE)[dtype]


def check(backend, case, *, name="SelectiveScan", shift=0, **attributes):
    """Runs it, and holds its error to the tolerance; returns y."""
    known = {n: v for n, v in attributes.items() if n != "variant"}
    expected = reference.selective_scan(**scan_reference_arguments(case), **known)
    got = run_operator(backend, name, case, shift=shift, **attributes)["y"]
    assert relative_error(got, expected) <= tolerance(backend, case["u"].dtype)
    return got


@functools.lru_cache(maxsize=256)
def _known(index, extra, dtype, attributes):
    """A case with its oracle, and the error of PyTorch's own run in that type."""
    case = scan_case(**SHAPES[index], extra=extra, dtype=dtype, seed=index)
    expected = reference.selective_scan(**scan_reference_arguments(case), **dict(attributes))
    by_torch = reference.selective_scan(**case, **dict(attributes))
    return case, expected, relative_error(by_torch, expected)


@each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_scan_matches_oracle(backend, index, name, dtype, variant):
    by_step = index % 2 if index < len(SCAN_SIZES) else 1
    attributes = (("params_by_step", by_step), ("scale", 0.5 if index % 3 == 0 else 1.0))
    case, expected, by_torch = _known(index, EXTRA[name], dtype, attributes)
    got = run_operator(backend, name, case, variant=variant, **dict(attributes))["y"]
    error = relative_error(got, expected)
    assert error <= tolerance(backend, dtype)
    if dtype != torch.float32:
        assert error <= HALF_FACTOR * by_torch


# 1, primes, and around the steps taken at once (4, 8), a chunk (8 and up), a tile (8 to 128).
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 257]
WIDTHS = [1, 31, 33, 87, 96, 129, 160]
STATES = [1, 2, 3, 16, 17, 64, 256]


@each_variant
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize(("d_state", "decay"), [(1, "state"), (16, "state"), (20, "channel")])
def test_scan_of_every_length(backend, seqlen, d_state, decay, variant):
    sizes = {"seqlen": seqlen, "d_inner": 3, "d_state": d_state, "decay": decay}
    check(backend, scan_case(**sizes, dtype=torch.float16, seed=seqlen), variant=variant)


@each_variant
@pytest.mark.parametrize("seqlen", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("gap", ["ones", "random", "large"])
def test_four_directions_at_once_of_every_length(backend, seqlen, gap, variant):
    case = scan_case(seqlen=seqlen, d_inner=70, gap=gap, seed=seqlen, **TOGETHER)
    check(backend, case, variant=variant, params_by_step=1)


@each_variant
@pytest.mark.parametrize("d_inner", WIDTHS)
@pytest.mark.parametrize("together", [False, True])
def test_scan_of_every_width(backend, d_inner, together, variant):
    case = scan_case(seqlen=11, d_inner=d_inner, **(TOGETHER if together else {}))
    check(backend, case, variant=variant, params_by_step=int(together))


@each_variant
@pytest.mark.parametrize("d_state", STATES)
@pytest.mark.parametrize("decay", ["state", "channel"])
@pytest.mark.parametrize("together", [False, True])
def test_scan_of_every_number_of_states(backend, d_state, together, decay, variant):
    sizes = {"seqlen": 18, "d_inner": 7, "d_state": d_state, "batch": 2, "decay": decay}
    case = scan_case(**sizes, **(TOGETHER if together else {}))
    check(backend, case, variant=variant, params_by_step=int(together))


@each_variant
@pytest.mark.parametrize("directions", [1, 2, 3, 4, 5, 9])
def test_scan_of_every_number_of_directions(backend, directions, variant):
    case = scan_case(seqlen=29, d_inner=9, directions=directions, batch=2, per_image=True)
    check(backend, case, variant=variant)


SHARED = ["".join(s) for n in range(7) for s in itertools.combinations("udABCD", n)]


@each_variant
@pytest.mark.parametrize("by_step", [0, 1])
@pytest.mark.parametrize("shared", SHARED, ids=lambda letters: letters or "none")
def test_scan_with_every_pattern_of_sharing(backend, shared, by_step, variant):
    case = scan_case(seqlen=10, d_inner=5, d_state=3, directions=4, shared=shared)
    check(backend, case, variant=variant, params_by_step=by_step)


@each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [1, 2])
def test_scan_of_unaligned_operands(backend, shift, dtype, variant):
    case = scan_case(seqlen=20, d_inner=33, batch=2, extra="z", dtype=dtype)
    check(backend, case, name="GatedSelectiveScan", shift=shift, variant=variant)
    case = scan_case(seqlen=20, d_inner=33, batch=2, dtype=dtype, **TOGETHER)
    check(backend, case, shift=shift, variant=variant, params_by_step=1)


@each_variant
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("together", [False, True])
def test_scan_without_softplus_and_with_growing_states(backend, together, name, variant):
    case = scan_case(
        seqlen=40, d_inner=20, extra=EXTRA[name], gap="ones", **(TOGETHER if together else {})
    )
    case["delta"], case["delta_bias"] = case["delta"] * 0.01, case["delta_bias"] * 0
    case["A"][:, ::3] *= -1
    attributes = {"delta_softplus": 0, "params_by_step": int(together)}
    check(backend, case, name=name, variant=variant, **attributes)


@each_variant
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("first", [0, 2**31 - 1])
def test_first_gap_is_ignored(backend, first, together, variant):
    """Even where the state would grow beyond every number over that many places."""
    case = scan_case(seqlen=40, d_inner=20, gap="pairs", batch=2, **(TOGETHER if together else {}))
    case["delta"], case["delta_bias"] = case["delta"] * 0.01, case["delta_bias"] * 0
    case["A"][:, ::3] *= -1
    case["gap"][..., 0] = first
    check(backend, case, variant=variant, delta_softplus=0, params_by_step=int(together))


@each_variant
@pytest.mark.parametrize("spike", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("together", [False, True])
def test_scan_survives_spikes_of_delta(backend, together, spike, variant):
    case = scan_case(seqlen=100, d_inner=20, **(TOGETHER if together else {}))
    case["delta"][:, ::7] += spike
    attributes = {"params_by_step": int(together)}
    expected = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    got = run_operator(backend, "SelectiveScan", case, variant=variant, **attributes)["y"]
    assert relative_error(got, expected) <= max(2e-6, tolerance(backend, torch.float32))


@each_variant
@pytest.mark.parametrize("where", ["u", "delta", "B", "C", "A", "D", "delta_bias"])
def test_scan_passes_nan_on(backend, where, variant):
    case = scan_case(seqlen=20, d_inner=18, directions=1, order="ends")
    case[where].view(-1)[-1] = float("nan")
    expected = reference.selective_scan(**scan_reference_arguments(case))
    got = run_operator(backend, "SelectiveScan", case, variant=variant)["y"]
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().any()


@each_variant
@pytest.mark.parametrize("together", [False, True])
def test_result_does_not_depend_on_the_order_of_threads(backend, together, variant):
    case = scan_case(
        seqlen=70, d_inner=70, batch=2, dtype=torch.float16, **(TOGETHER if together else {})
    )
    attributes = {"variant": variant, "params_by_step": int(together)}
    results = []
    for seed in range(5):
        with backend.seed(seed):
            results.append(run_operator(backend, "SelectiveScan", case, **attributes)["y"])
    assert not results[0].isnan().any()
    assert all(torch.equal(result, results[0]) for result in results)


@each_variant
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("batch", [2, 33])
def test_image_does_not_depend_on_its_place_in_the_batch(backend, batch, together, variant):
    case = scan_case(seqlen=40, d_inner=35, extra="z", **(TOGETHER if together else {}))
    shared = {"A", "D", "delta_bias", "order", "gap"}
    case = {n: t if n in shared else t.expand(batch, *t.shape[1:]) for n, t in case.items()}
    got = check(
        backend, case, name="GatedSelectiveScan", variant=variant, params_by_step=int(together)
    )
    assert torch.equal(got, got[:1].expand_as(got))


@each_variant
@pytest.mark.parametrize("together", [False, True])
def test_order_and_gap_of_any_value_touch_nothing_else(backend, together, variant):
    """The image with a proper order stays right; guards show writes beside the operands."""
    case = scan_case(
        seqlen=37, d_inner=20, batch=2, per_image=True, **(TOGETHER if together else {})
    )
    attributes = {"params_by_step": int(together)}
    expected = reference.selective_scan(**scan_reference_arguments(case), **attributes)[0]
    values = torch.tensor([-1, 37, 2**31 - 1, -(2**31), 1 << 20], dtype=torch.int32)
    case["order"][1] = values.repeat(8)[:37]
    case["gap"][1] = values.flip(0).repeat(8)[:37]
    for order in (case["order"][1], torch.zeros(37, dtype=torch.int32)):
        case["order"][1] = order
        got = run_operator(backend, "SelectiveScan", case, variant=variant, **attributes)["y"]
        assert relative_error(got[0], expected) <= tolerance(backend, torch.float32)


@each_variant
def test_a_token_out_of_range_is_read_as_zero(backend, variant):
    """Its step still decays the state: as if u, delta, B and C of that token were zero."""
    case = scan_case(seqlen=12, d_inner=6, directions=1, order="ends")
    zeroed = {n: t.clone() for n, t in case.items()}
    for name in ("u", "delta", "B", "C"):
        zeroed[name][:, 5] = 0
    expected = reference.selective_scan(**scan_reference_arguments(zeroed))
    case["order"][:, :, 5] = 12
    got = run_operator(backend, "SelectiveScan", case, variant=variant)["y"]
    keep = [t for t in range(12) if t != 5]
    limit = tolerance(backend, torch.float32)
    assert relative_error(got[:, keep], expected[:, keep]) <= limit


@pytest.mark.parametrize("card", [H100, SMALL_CARD, {"sm_count": 1, "shared_bytes": 48 << 10}])
@pytest.mark.parametrize(
    "size",
    [
        {"seqlen": 1500, "d_inner": 3, "d_state": 1, "directions": 4, "shared": "u"},
        {"seqlen": 700, "d_inner": 5, "d_state": 16},
        {"seqlen": 300, "d_inner": 40, "d_state": 40, "batch": 2},
        {"seqlen": 900, "d_inner": 3, "gap": "pairs", **TOGETHER},
    ],
    ids=str,
)
@each_variant
def test_long_sequences_on_any_card(backend, size, card, variant):
    """Sums in the workspace; tiles that carry the state on."""
    if backend is not EMULATED and card is not H100:
        pytest.skip("a GPU is as it is")
    case = scan_case(**size, dtype=torch.float16)
    with backend.card(**card):
        check(backend, case, variant=variant, params_by_step=int("C" in size.get("shared", "")))


@pytest.mark.parametrize("sm_count", [1, 3, 4, 100])
@pytest.mark.parametrize("together", [False, True])
def test_auto_takes_the_kernel_that_suits_the_card(backend, together, sm_count):
    if backend is not EMULATED:
        pytest.skip("needs cards of several sizes, which only the emulation has")
    size = {"seqlen": 33, "d_inner": 70, "batch": 10}  # 30 warps, one thread a channel
    case = scan_case(**size, **(TOGETHER if together else {}))
    attributes = {"params_by_step": int(together)}
    with backend.card(sm_count, H100["shared_bytes"]):
        auto, many, few = (
            run_operator(backend, "SelectiveScan", case, variant=v, **attributes)["y"]
            for v in VARIANTS.values()
        )
    assert not torch.equal(many, few)
    fills_the_card = sm_count * (4 if together else 8) <= 30
    assert torch.equal(auto, many if fills_the_card else few)


def test_scan_of_no_images(backend):
    case = scan_case(seqlen=5)
    shared = {"A", "D", "delta_bias", "order", "gap"}
    empty = {n: t if n in shared else t[:0] for n, t in case.items()}
    for variant in VARIANTS.values():
        got = run_operator(backend, "SelectiveScan", empty, variant=variant)["y"]
        assert got.shape == (0, 5, 16)


def test_workspace_grows_with_every_size(backend):
    if backend is not EMULATED:
        pytest.skip("host code: the same on a GPU")
    base = {"seqlen": 90, "d_inner": 20, "d_state": 1, "directions": 1, "batch": 1}
    larger = {"seqlen": 400, "d_inner": 90, "d_state": 40, "directions": 4, "batch": 9}
    for variant, dtype in itertools.product(VARIANTS.values(), DTYPES):
        for start in (base, base | {"directions": 2, "seqlen": 300}):
            for name, value in larger.items():
                grown = max(value, start[name])
                sizes = [start, start | {name: grown}]
                if name == "d_state":  # one state has kernels of its own, with their own rule
                    sizes[0] = start | {"d_state": 2}
                bytes_ = [
                    prepare(
                        backend, "SelectiveScan", scan_case(**s, dtype=dtype), variant=variant
                    ).workspace_bytes()
                    for s in sizes
                ]
                assert bytes_[0] <= bytes_[1], (name, variant, dtype)


def test_workspace_that_is_too_small_is_refused(backend):
    case = scan_case(seqlen=300, d_inner=40, directions=4, dtype=torch.float16)
    for variant in (THROUGHPUT, LATENCY):
        call = prepare(backend, "SelectiveScan", case, variant=variant)
        assert call.workspace_bytes() > 0
        call._launch = lambda stream: CLaunch(stream, 4096, 256)
        with pytest.raises(OperatorError, match="workspace of 256 bytes, but it must be"):
            call.enqueue()


@pytest.mark.parametrize(
    ("batch", "seqlen", "d_inner", "message"),
    [
        (
            1,
            1,
            2**29,
            r"directions \* d_inner=536870912 is more than .*; run it on the CPU, or split",
        ),
        (
            2**31,
            1,
            96,
            r"batch=2147483648 is more than .*, what one launch takes .*; split the batch",
        ),
        (
            1,
            2**30,
            1,
            r"seqlen=1073741824 is more than 1073741823, .*; run it on the CPU, or split",
        ),
    ],
)
@each_variant
def test_what_one_launch_cannot_take_is_refused(backend, batch, seqlen, d_inner, message, variant):
    if backend is not EMULATED:
        pytest.skip("refused by host code, before the device is asked: the same on a GPU")

    def describe(dtype, *dims):  # nothing is read before it is refused
        return CTensor(4096, dtype, len(dims), (ctypes.c_int64 * 4)(*dims))

    activation = [describe(0, batch, seqlen, 1, width) for width in (d_inner, d_inner, 1, 1)]
    parameters = [describe(0, 1, d_inner) for _ in range(2)]
    A = describe(0, 1, d_inner, 1)
    steps = [describe(3, 1, 1, seqlen) for _ in range(2)]
    inputs = (CTensor * 9)(*activation[:2], A, *activation[2:], *parameters, *steps)
    outputs = (CTensor * 1)(describe(0, batch, seqlen, d_inner))
    attributes, launch = CScanAttributes(1, 0, 1.0, variant), CLaunch()
    error = ctypes.create_string_buffer(512)
    failed = backend.load().vssm_selective_scan(
        b"SelectiveScan",
        inputs,
        9,
        outputs,
        ctypes.byref(attributes),
        ctypes.byref(launch),
        error,
        ctypes.c_size_t(512),
    )
    assert failed == 1
    assert re.search(message, error.value.decode())
