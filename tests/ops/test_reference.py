"""The oracle, against mamba's own reference scan and against loops written out here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import gather_case, scan_case
from official_data import fixture
from tolerances import relative_error

from vssm.ops import reference

# Of the largest value, float64. Measured: 6e-16 against the loops, 4e-16 against mamba's numbers.
EXACT = 1e-13
STREAMS = ("u", "delta", "A", "B", "C")
SHARED = ("", "u", "udABCD", "dBC", "AD")
OFFICIAL_CASES = (
    *("full_g0", "noz_g0", "noD_z_g1", "grouped4", "grouped2_z", "nobias_nosp", "bias_nosp_z"),
    *("constBC", "L1", "long"),
)


def _scan(case, **attributes):
    operands = {k: v for k, v in case.items() if k not in STREAMS}
    return reference.selective_scan(*(case[k] for k in STREAMS), **operands, **attributes)


def _double(case):
    return {k: v.double() if v.is_floating_point() else v for k, v in case.items()}


def _loop(case, *, delta_softplus=True, params_by_step=False, scale=1.0):
    """The contract's recurrence, one image, direction, channel and step at a time."""
    n = {k: v.double().numpy() if v.is_floating_point() else v.numpy() for k, v in case.items()}
    batch, seqlen, _, d_inner = n["u"].shape
    y = np.zeros((batch, seqlen, d_inner))

    def stream(name, b, token, k):
        return n[name][b, token, k % n[name].shape[2]]

    def weight(name, k):
        return n[name][k % len(n[name])]

    directions = range(n["order"].shape[1])
    for b, k, d in itertools.product(range(batch), directions, range(d_inner)):
        h = np.zeros(n["A"].shape[2])
        for t in range(seqlen):
            token = n["order"][b % len(n["order"]), k, t]
            step = t if params_by_step else token
            dt = stream("delta", b, step, k)[d] + weight("delta_bias", k)[d]
            dt = math.log1p(math.exp(dt)) if delta_softplus else dt
            gap = n["gap"][b % len(n["gap"]), k, t] if t else 1
            span = dt + (gap - 1) * weight("delta0", k)[d] if "delta0" in n else gap * dt
            u = stream("u", b, token, k)[d]
            h = np.exp(span * weight("A", k)[d]) * h + dt * stream("B", b, step, k) * u
            y[b, token, d] += scale * (h @ stream("C", b, step, k) + weight("D", k)[d] * u)
    return y * n["z"] / (1 + np.exp(-n["z"])) if "z" in n else y


@pytest.mark.parametrize("name", OFFICIAL_CASES)
def test_official_scan(name):
    """Each group of channels is a call of its own; a B or C by channel makes every channel one."""
    prefix = name + "/"
    given = {
        k.removeprefix(prefix): v
        for k, v in fixture("selective_scan_ref").items()
        if k.startswith(prefix)
    }
    case = {k: torch.from_numpy(v) for k, v in given.items()}
    batch, d_inner, seqlen = case["u"].shape
    by_group = {}
    for matrix in "BC":
        x = case[matrix]
        if x.dim() == 2:
            x = x[None, :, :, None].expand(batch, -1, -1, seqlen)
        by_group[matrix] = x[:, None] if x.dim() == 3 else x
    groups = by_group["B"].shape[1]
    line = torch.arange(seqlen)[None, None]

    def last(x):
        return x.transpose(1, 2)

    parts = []
    for g, channels in enumerate(torch.arange(d_inner).chunk(groups)):
        parts.append(
            reference.selective_scan(
                last(case["u"][:, channels])[:, :, None],
                last(case["delta"][:, channels])[:, :, None],
                case["A"][None, channels],
                last(by_group["B"][:, g])[:, :, None],
                last(by_group["C"][:, g])[:, :, None],
                D=case.get("D", torch.zeros(d_inner).double())[None, channels],
                delta_bias=case.get("delta_bias", torch.zeros(d_inner).double())[None, channels],
                order=line,
                gap=torch.ones_like(line),
                z=last(case["z"][:, channels]) if "z" in case else None,
                delta_softplus=bool(given["delta_softplus"]),
            )
        )
    assert relative_error(last(torch.cat(parts, dim=2)), given["out"]) < EXACT


def test_every_official_scan_is_tested():
    assert set(fixture("selective_scan_ref")["cases"]) == set(OFFICIAL_CASES)


@pytest.mark.parametrize("params_by_step", [False, True])
@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("extra", ["", "z", "delta0"])
@pytest.mark.parametrize("shared", SHARED)
def test_scan_is_the_recurrence(shared, extra, directions, params_by_step):
    case = _double(
        scan_case(
            seqlen=7,
            d_inner=3,
            d_state=4,
            directions=directions,
            batch=2,
            shared=shared,
            extra=extra,
            per_image=params_by_step,
            seed=directions,
        )
    )
    for delta_softplus, scale in ((True, 1.0), (False, -0.5)):
        if not delta_softplus:
            case["delta_bias"] = case["delta_bias"].abs() + 4.0  # a negative step would explode
        options = {"delta_softplus": delta_softplus, "params_by_step": params_by_step}
        got = _scan(case, scale=scale, **options)
        assert relative_error(got, _loop(case, scale=scale, **options)) < EXACT


@pytest.mark.parametrize("seqlen", [1, 2, 64, 65, 129])  # 64 steps are computed at once
@pytest.mark.parametrize("extra", ["", "delta0"])
def test_scan_over_chunk_edges(seqlen, extra):
    case = _double(scan_case(seqlen=seqlen, d_inner=2, d_state=1, gap="large", extra=extra))
    assert relative_error(_scan(case), _loop(case)) < EXACT


@pytest.mark.parametrize("delta_softplus", [True, False])  # without it steps can be negative,
@pytest.mark.parametrize("extra", ["", "z", "delta0"])  # and a decay of inf would make h = 0 NaN
def test_first_gap_is_without_effect(extra, delta_softplus):
    case = scan_case(seqlen=9, d_inner=3, d_state=2, gap="ones", extra=extra)
    if not delta_softplus:
        case["delta"][:, 0] = -case["delta"][:, 0].abs()
        case["delta_bias"] = torch.zeros_like(case["delta_bias"])
    wanted = _scan(case, delta_softplus=delta_softplus)
    assert torch.isfinite(wanted).all()
    for first in (0, 1, 5, 2**31 - 1):
        case["gap"][..., 0] = first
        assert torch.equal(_scan(case, delta_softplus=delta_softplus), wanted)
    case["gap"][..., 1] += 1
    assert not torch.equal(_scan(case, delta_softplus=delta_softplus), wanted)


def test_gap_one_is_the_dense_scan_whatever_delta0():
    case = scan_case(seqlen=9, d_inner=3, d_state=2, gap="ones")
    assert torch.equal(_scan({**case, "delta0": torch.full((2, 3), 7.0)}), _scan(case))


def test_gap_and_constant_agree_where_every_step_is_delta0():
    case = _double(scan_case(seqlen=9, d_inner=3, d_state=2))
    case["delta"] = torch.zeros_like(case["delta"])
    delta0 = torch.nn.functional.softplus(case["delta_bias"])
    assert relative_error(_scan({**case, "delta0": delta0}), _scan(case)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", ["", "z", "delta0"])
def test_half_inputs_compute_in_float32(extra, dtype):
    case = scan_case(seqlen=33, d_inner=3, d_state=4, dtype=dtype, extra=extra)
    got = _scan(case)
    assert got.dtype == dtype
    wide = {k: v.float() if v.is_floating_point() else v for k, v in case.items()}
    assert torch.equal(got, _scan(wide).to(dtype))


def test_float64_stays_float64():
    case = _double(scan_case(seqlen=5))
    assert _scan(case).dtype == torch.float64
    rounded = _scan({k: v.float() if v.is_floating_point() else v for k, v in case.items()})
    assert 1e-10 < relative_error(rounded, _scan(case)) < 1e-4


def _kept_by_hand(score, position, num_keep, protected):
    rows = []
    for image, values in enumerate(score.tolist()):
        places = position[image % len(position)].tolist()

        def rank(slot, values=values, places=places):
            kind = 0 if protected >= 0 and places[slot] == protected else 1
            kind = 2 if kind and math.isnan(values[slot]) else kind
            return kind, 0.0 if kind != 1 else -values[slot], slot

        rows.append(sorted(sorted(range(len(values)), key=rank)[:num_keep]))
    return torch.tensor(rows)


@pytest.mark.parametrize("seed", range(20))
def test_gather_is_the_ranking(seed):
    case = gather_case(seqlen=13, ties=True, special=True, shared_position=seed % 2 == 0, seed=seed)
    score, position, xs = case["score"], case["position"], [case["x0"], case["x1"]]
    for num_keep, protected in itertools.product((1, 5, 12, 13), (-1, int(position[0, 6]), 10**6)):
        kept, rows = reference.token_gather(
            score, position, xs, num_keep=num_keep, protected_position=protected
        )
        slots = _kept_by_hand(score, position, num_keep, protected)
        assert torch.equal(kept.long(), position.expand(len(score), -1).gather(1, slots).long())
        assert kept.dtype == position.dtype
        for x, row in zip(xs, rows, strict=True):
            assert torch.equal(row, torch.stack([x[i, s] for i, s in enumerate(slots)]))


@pytest.mark.parametrize(
    ("score", "num_keep", "protected", "slots"),
    [
        ([1.0, 3.0, 3.0, 3.0], 2, -1, [1, 2]),
        ([-0.0, 0.0, -0.0, 0.0], 2, -1, [0, 1]),
        ([math.nan, -math.inf, math.nan, 0.0], 2, -1, [1, 3]),
        ([math.nan, -math.inf, math.nan, 0.0], 3, -1, [0, 1, 3]),
        ([math.inf, math.inf, math.inf, math.nan], 1, 30, [3]),
        ([math.inf, math.inf, -math.inf, math.inf], 2, 20, [0, 2]),
        ([4.0, 1.0, 2.0, 3.0], 2, 7, [0, 3]),
        ([math.nan] * 4, 2, -1, [0, 1]),
        ([1.0, 2.0, 3.0, 4.0], 4, 10, [0, 1, 2, 3]),
    ],
)
def test_gather_ranks(score, num_keep, protected, slots):
    kept, _ = reference.token_gather(
        torch.tensor([score]),
        torch.tensor([[0, 10, 20, 30]]),
        [],
        num_keep=num_keep,
        protected_position=protected,
    )
    assert kept.tolist() == [[10 * slot for slot in slots]]


@pytest.mark.parametrize("num_keep", [-1, 0, 6])
def test_gather_never_clamps(num_keep):
    with pytest.raises(ValueError, match=rf"num_keep={num_keep} is outside \[1, 5\].*derive"):
        reference.token_gather(torch.zeros(1, 5), torch.arange(5)[None], [], num_keep=num_keep)
