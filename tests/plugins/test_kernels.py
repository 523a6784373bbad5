"""The CPU kernels in pieces, for every instruction set: decay and softplus."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from native import isa_parameters
from tolerances import DECAY_TOLERANCE, ONE_MINUS_DECAY_TOLERANCE, SOFTPLUS_TOLERANCE

from vssm.native_library import find_library
from vssm.runtimes.library import ISA_NAMES, exp2_rate, product_rate, softplus_rate

_FLOATS = ctypes.POINTER(ctypes.c_float)
_TINY = np.finfo(np.float32).tiny


def _call(function, isa, *arrays):
    padded = [np.ascontiguousarray(np.resize(a, -(-a.size // 16) * 16), np.float32) for a in arrays]
    target = np.full(padded[0].shape, np.nan, np.float32)
    pointers = [a.ctypes.data_as(_FLOATS) for a in (*padded, target)]
    pieces = ctypes.CDLL(str(find_library("vssm_pieces")))
    call = getattr(pieces, function)
    call.argtypes = [ctypes.c_int, *[_FLOATS] * len(pointers), ctypes.c_int64]
    assert call(ISA_NAMES.index(isa), *pointers, target.size) == 0
    return target[: arrays[0].size]


def decay(isa, dt, a):
    return _call("vssm_decay", isa, dt, np.broadcast_to(np.float32(a), dt.shape))


def softplus(isa, x):
    return _call("vssm_softplus", isa, x)


@pytest.mark.parametrize("isa", isa_parameters())
@pytest.mark.parametrize("a", [-1.0, -0.37, -16.0])
def test_decay_is_accurate(isa, a):
    dt = np.geomspace(1e-6, 80 / -a, 200_000, dtype=np.float32)
    expected = np.exp(dt.astype(np.float64) * np.float32(a))
    # dt A log2(e) is rounded before it is raised: that much of the argument is lost in any case.
    allowed = DECAY_TOLERANCE + 1.2e-7 * np.abs(np.log(expected))
    assert np.max(np.abs(decay(isa, dt, a) / expected - 1) / allowed) < 1


@pytest.mark.parametrize("isa", isa_parameters())
def test_decay_near_one_keeps_its_distance_from_one(isa):
    dt = np.geomspace(1e-7, 2.0, 200_000, dtype=np.float32)
    distance = -np.expm1(-dt.astype(np.float64))
    error = np.abs((1 - decay(isa, dt, -1.0).astype(np.float64)) - distance)
    assert np.max((error - 2.0**-24) / distance) < ONE_MINUS_DECAY_TOLERANCE
    assert decay(isa, np.zeros(16, np.float32), -3.0).tolist() == [1.0] * 16


@pytest.mark.parametrize("isa", isa_parameters())
def test_decay_has_no_bias_near_one(isa):
    dt = np.random.default_rng(0).uniform(1e-4, 1e-2, 100_000).astype(np.float32)
    relative = (1 - decay(isa, dt, -1.0).astype(np.float64)) / -np.expm1(-dt.astype(np.float64))
    assert abs(np.mean(relative) - 1) < ONE_MINUS_DECAY_TOLERANCE


@pytest.mark.parametrize("isa", isa_parameters())
def test_decay_at_the_ends(isa):
    dt = np.float32([0, 1, 100, 1e3, 1e10, 1e30, np.inf, 3e38])
    assert decay(isa, dt, -1.0)[3:].max() <= _TINY
    grown = decay(isa, np.float32([-1, -80, -1e3, -np.inf]), -1.0)
    assert grown[:2] == pytest.approx(np.exp([1.0, 80.0]), rel=1e-5)
    assert np.isinf(grown[2:]).all()
    assert np.isnan(decay(isa, np.float32([np.nan] * 16), -1.0)).all()


@pytest.mark.parametrize("isa", isa_parameters())
def test_softplus_is_accurate_everywhere(isa):
    x = np.concatenate([np.linspace(-87, 87, 200_001), np.linspace(-2, 2, 100_000), [0.0, -0.0]])
    x = x.astype(np.float32)
    expected = np.logaddexp(0, x.astype(np.float64))
    assert np.max(np.abs(softplus(isa, x) / expected - 1)) < SOFTPLUS_TOLERANCE


@pytest.mark.parametrize("isa", isa_parameters())
def test_softplus_at_the_ends(isa):
    values = softplus(isa, np.float32([-np.inf, -1e30, -200, 200, 1e30, np.inf, np.nan]))
    assert values[:3].max() < 1e-37
    assert values[3:6].tolist() == [200, np.float32(1e30), np.inf]
    assert np.isnan(values[6])


def test_exp2_rate_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"isa='sse9' is not one of baseline, avx2, avx512"):
        exp2_rate("sse9")


@pytest.mark.parametrize("isa", isa_parameters())
@pytest.mark.parametrize("rate", [exp2_rate, product_rate, softplus_rate])
def test_rates_are_plausible(isa, rate):
    assert 1e7 < rate(isa, seconds=0.01) < 1e12
