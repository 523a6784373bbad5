"""The CUDA gathers, in emulation and on a GPU, against the oracle: every result is exact."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cases import GATHERS, gather_case
from cuda_device import (
    DEVICES,
    EMULATED,
    SMALL_CARD,
    CGatherAttributes,
    CLaunch,
    CTensor,
    OperatorError,
    run_operator,
)

from vssm.ops import reference

HALF = (torch.float16, torch.float16)
# Tokens and images: 1, primes, the edges of a warp, of one key a thread, of four.
SIZES = [(1, 1), (2, 33), (31, 3), (32, 2), (33, 2), (197, 3), (256, 2), (257, 2)]
LONG = [(1024, 1), (1025, 1)]
pytestmark = pytest.mark.parametrize("backend", DEVICES, ids=str)


def slow(value):
    """A size more, of a kind that another one proves; in emulation each takes seconds."""
    return pytest.param(value, marks=pytest.mark.slow)


def check(backend, case, *, shift=0, **attributes):
    """Runs it and compares every output with the oracle's, bit for bit."""
    xs = [case[name] for name in ("x0", "x1") if name in case]
    name = "TokenGather" if len(xs) == 2 else "TokenGather1"
    kept, rows = reference.token_gather(case["score"], case["position"], xs, **attributes)
    got = run_operator(backend, name, case, shift=shift, **attributes)
    assert torch.equal(got["kept_position"], kept)
    for i, expected in enumerate(rows):
        assert torch.equal(got[f"y{i}"], expected), f"y{i}"


# Tokens are ranked before rows are copied: long lists once an operator, short ones in every type.
FIRST = dict(reversed(GATHERS))
CASES = [(*size, *gather) for size in SIZES for gather in GATHERS]
CASES += [
    pytest.param(*size, name, dtypes, marks=[pytest.mark.slow] * (dtypes != FIRST[name]))
    for size in LONG
    for name, dtypes in GATHERS
]


@pytest.mark.parametrize(("seqlen", "batch", "name", "dtypes"), CASES, ids=str)
def test_gather_equals_oracle(backend, seqlen, batch, name, dtypes):
    widths = ((87, 3), (384, 1), (8, 6))[seqlen % 3][: len(dtypes)]
    case = gather_case(seqlen=seqlen, batch=batch, widths=widths, dtypes=dtypes, seed=seqlen)
    present = int(case["position"][0, seqlen // 2])
    third = seqlen // 3 or 1
    for num_keep in sorted({1, third, max(1, seqlen - 1), seqlen}):
        # A long list takes a tenth of a second in emulation.
        everything = seqlen < 1000 or num_keep == third
        for protected in (-1, present, 10 * seqlen) if everything else (present,):
            check(backend, case, num_keep=num_keep, protected_position=protected)


@pytest.mark.parametrize("seqlen", [63, 785, slow(197), slow(1500)])
@pytest.mark.parametrize("shared_position", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_gather_of_ties_and_special_scores(backend, seqlen, special, shared_position):
    case = gather_case(
        seqlen=seqlen, batch=3, ties=True, special=special, shared_position=shared_position
    )
    for num_keep in (1, seqlen // 2, seqlen - 1):
        check(backend, case, num_keep=num_keep, protected_position=int(case["position"][0, -1]))
    case["score"].fill_(-1.0)
    check(backend, case, num_keep=seqlen // 2)
    case["score"].fill_(float("nan"))
    check(backend, case, num_keep=seqlen // 2)


def test_gather_ranks_special_scores(backend):
    score = [float("nan"), float("-inf"), -0.0, 0.0, 1e-42, float("inf"), float("nan"), -1e-42]
    case = gather_case(seqlen=8, batch=1, widths=(4,), dtypes=(torch.float32,))
    case["score"] = torch.tensor([score])
    case["position"] = torch.arange(8, dtype=torch.int32)[None]
    by_rank = [6, 5, 4, 2, 3, 7, 1, 0]  # the protected one first, NaN last
    for num_keep in range(1, 9):
        attributes = {"num_keep": num_keep, "protected_position": 6}
        got = run_operator(backend, "TokenGather1", case, **attributes)
        assert got["kept_position"][0].tolist() == sorted(by_rank[:num_keep])


@pytest.mark.parametrize("num_keep", [12_001, slow(1), slow(16_384)])
@pytest.mark.parametrize("seqlen", [16_385, slow(16_384), slow(40_000)])
def test_gather_of_long_sequences(backend, seqlen, num_keep):
    case = gather_case(seqlen=seqlen, batch=2, widths=(3, 1), dtypes=HALF, special=True)
    check(backend, case, num_keep=num_keep, protected_position=int(case["position"][1, 7]))


# Rows of 16, 8, 4 and 2 bytes at a time, aligned and not; widths for both tensors.
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("widths", [(384, 8), (4, 12), (2, 6), (1, 87), (4096, 1)], ids=str)
@pytest.mark.parametrize("dtypes", [HALF, (torch.bfloat16, torch.float32)], ids=str)
def test_gather_of_unaligned_rows(backend, dtypes, widths, shift):
    case = gather_case(seqlen=37, batch=3, widths=widths, dtypes=dtypes)
    check(backend, case, num_keep=29, shift=shift)


@pytest.mark.parametrize("seed", [0, 1, *map(slow, range(2, 6))])
@pytest.mark.parametrize("seqlen", [197, 300, 1100])
def test_gather_does_not_depend_on_the_order_of_threads(backend, seqlen, seed):
    case = gather_case(seqlen=seqlen, batch=2, ties=True)
    with backend.seed(seed):
        check(backend, case, num_keep=seqlen // 2)


@pytest.mark.parametrize("sm_count", [1, 8, 132, 5000])
@pytest.mark.parametrize("batch", [1, 5])
def test_gather_is_shared_out_over_any_card(backend, batch, sm_count):
    case = gather_case(seqlen=61, batch=batch, widths=(5000, 7), dtypes=(torch.float32,) * 2)
    with backend.card(sm_count, SMALL_CARD["shared_bytes"]):
        for num_keep in (1, 60):
            check(backend, case, num_keep=num_keep)


def test_image_does_not_depend_on_its_place_in_the_batch(backend):
    case = gather_case(seqlen=150, batch=1, ties=True)
    batched = {name: t.expand(7, *t.shape[1:]) for name, t in case.items()}
    alone = run_operator(backend, "TokenGather", case, num_keep=33)
    together = run_operator(backend, "TokenGather", batched, num_keep=33)
    for name, tensor in together.items():
        assert torch.equal(tensor, alone[name].expand_as(tensor))


def test_gather_survives_positions_of_any_value(backend):
    case = gather_case(seqlen=300, batch=2)
    case["position"] = torch.full((2, 300), -(2**31), dtype=torch.int32)
    for protected in (-1, 5, 2**31 - 1, 2**40):
        got = run_operator(backend, "TokenGather", case, num_keep=7, protected_position=protected)
        assert got["kept_position"].unique().tolist() == [-(2**31)]
    case["position"] = torch.full((2, 300), 5, dtype=torch.int32)  # all protected
    got = run_operator(backend, "TokenGather", case, num_keep=7, protected_position=5)
    assert torch.equal(got["y0"], case["x0"][:, :7])


def test_gather_without_rows_or_images(backend):
    case = gather_case(seqlen=9, batch=2, widths=(0, 3))
    check(backend, case, num_keep=4)
    empty = {name: tensor[:0] for name, tensor in gather_case(seqlen=9).items()}
    assert run_operator(backend, "TokenGather", empty, num_keep=4)["y0"].shape == (0, 4, 16)


@pytest.mark.parametrize("num_keep", [0, 10])
def test_num_keep_outside_is_refused(backend, num_keep):
    case = gather_case(seqlen=9)
    with pytest.raises(OperatorError, match=rf"num_keep={num_keep} is outside \[1, 9\]"):
        run_operator(backend, "TokenGather", case, num_keep=num_keep)


@pytest.mark.parametrize(
    ("batch", "width", "message"),
    [
        (1, 2**29, r"a row of 2147483648 bytes is more than 1073741824; gather narrower tensors"),
        (2**31, 1, r"batch=2147483648 is more than 2147483647, .*; split the batch"),
    ],
)
def test_what_one_launch_cannot_take_is_refused(backend, batch, width, message):
    if backend is not EMULATED:
        pytest.skip("refused by host code, before the device is asked: the same on a GPU")

    def describe(dtype, *dims):  # nothing is read before it is refused
        return CTensor(4096, dtype, len(dims), (ctypes.c_int64 * 4)(*dims))

    inputs = (CTensor * 3)(
        describe(0, batch, 1), describe(3, batch, 1), describe(0, batch, 1, width)
    )
    outputs = (CTensor * 2)(describe(3, batch, 1), describe(0, batch, 1, width))
    attributes, launch = CGatherAttributes(1, -1), CLaunch()
    error = ctypes.create_string_buffer(512)
    failed = backend.load().vssm_token_gather(
        b"TokenGather1",
        inputs,
        3,
        outputs,
        2,
        ctypes.byref(attributes),
        ctypes.byref(launch),
        error,
        ctypes.c_size_t(512),
    )
    assert failed == 1
    assert re.search(message, error.value.decode())
