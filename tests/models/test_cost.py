"""Multiply-adds: the published figures, and sums written out by hand."""

from __future__ import annotations

import pytest
from official_data import micro_config

import vssm
from vssm import PruneSchedule
from vssm.models.cost import Cost, count
from vssm.models.vim import Vim

# GFLOPs: printed in the paper; by its rule (one direction); with both directions of the scan.
PUBLISHED = [
    ("vim_tiny", None, 1.45, 1.449, 1.823),
    ("vim_small", None, 5.08, 5.077, 5.912),
    ("vim_tiny", {10: 0.8}, 1.29, 1.288, None),
    ("vim_small", {5: 0.8, 10: 0.8, 15: 0.8}, 3.60, 3.600, None),
]


def _work(name, ratios, **options):
    schedule = PruneSchedule(ratios, **options) if ratios else None
    return count(vssm.create_model(name, schedule=schedule))


@pytest.mark.parametrize(("name", "ratios", "printed", "counted", "true"), PUBLISHED)
def test_published_figures(name, ratios, printed, counted, true):
    work = _work(name, ratios)
    assert work.published / 1e9 == pytest.approx(printed, rel=5e-3)
    assert work.published / 1e9 == pytest.approx(counted, abs=1e-3)
    if true is not None:
        assert work.true / 1e9 == pytest.approx(true, abs=1e-3)


def _by_hand(sizes, lengths, *, directions, branches, aligned=False):
    """One image: `lengths` are the tokens of each block; sizes as the paper names them."""
    D, E, N, R, taps, patch, patches, classes = sizes
    work = {"gemm": patches * D * 3 * patch * patch + D * classes, "scan": 0, "alignment": 0}
    exps = 0
    for tokens in lengths:
        work["gemm"] += tokens * (D * 2 * E + E * D)  # in_proj, out_proj
        work["gemm"] += branches * tokens * (E * (R + 2 * N) + R * E)  # x_proj, dt_proj
        work["gemm"] += branches * tokens * E * taps  # convolution
        work["scan"] += directions * tokens * (9 * E * N + E + E)  # recurrence, skip, gate
        work["alignment"] += directions * (lengths[0] - tokens) * 2 * E * N if aligned else 0
        exps += directions * tokens * E * N
    return sum(work.values()), work["alignment"], work["gemm"], exps


TINY = (192, 384, 16, 12, 4, 16, 196, 1000)


@pytest.mark.parametrize(
    ("ratios", "options", "lengths", "aligned"),
    [
        (None, {}, [197] * 24, False),
        ({10: 0.8}, {}, [197] * 10 + [157] * 14, True),
        ({10: 0.8}, {"alignment": "constant"}, [197] * 10 + [157] * 14, True),
        ({10: 0.8}, {"alignment": "none"}, [197] * 10 + [157] * 14, False),
        ({10: 0.8}, {"alignment": "masked"}, [197] * 24, False),
        ({10: 0.8, 24: 0.5}, {}, [197] * 10 + [157] * 14, True),
    ],
)
def test_vim_tiny_exactly(ratios, options, lengths, aligned):
    work = _work("vim_tiny", ratios, **options)
    one = _by_hand(TINY, lengths, directions=1, branches=1, aligned=aligned)
    two = _by_hand(TINY, lengths, directions=2, branches=2, aligned=aligned)
    assert work == Cost(one[0], two[0], *two[1:])


def test_a_convolution_by_position_runs_over_the_kept_tokens_alone():
    assert _work("vim_tiny", {10: 0.8}, conv="position") == _work("vim_tiny", {10: 0.8})


@pytest.mark.parametrize(("bimamba", "directions"), [("v1", 2), ("none", 1)])
def test_one_branch(bimamba, directions):
    """Version 1 scans one branch in both directions."""
    model = Vim(micro_config("mid_div2", bimamba=bimamba))
    sizes = (32, 64, 8, 2, 4, 8, 36, 10)
    wanted = _by_hand(sizes, [37] * 3, directions=directions, branches=1)
    work = count(model)
    assert (work.true, work.alignment, work.gemm, work.exps) == wanted
    assert work.published == _by_hand(sizes, [37] * 3, directions=1, branches=1)[0]


def test_ratio_one_costs_what_the_dense_model_does():
    assert _work("vim_tiny", {10: 1}) == _work("vim_tiny", None)
