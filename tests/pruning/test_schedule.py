"""Prune schedules: exact counts, and what is refused with which remedy."""

from __future__ import annotations

import copy
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from vssm import PruneSchedule
from vssm.errors import UnsupportedError
from vssm.models.vim import Vim, VimConfig
from vssm.pruning.schedule import TokenLayout, plan_stages

VIM = TokenLayout(seqlen=197, cls_index=98, keep_odd=True)
PLAIN = TokenLayout(seqlen=196, cls_index=None, keep_odd=False, directional=False)
MICRO = {"image_size": 32, "patch_size": 8, "stride": 8, "depth": 2, "d_model": 8, "d_state": 2}


def _counts(ratios, layout=VIM, depth=24, **options):
    stages = plan_stages(PruneSchedule(ratios, **options), layout, depth)
    return [(s.seqlen, s.num_keep) for s in stages.values()]


def test_published_counts():
    assert _counts({5: 0.8, 10: 0.8, 15: 0.8}) == [(197, 157), (157, 125), (125, 101)]
    # PlainMamba's rule: ceil, no class token, no odd numbers.
    assert _counts({6: 0.8, 12: 0.8, 18: 0.8}, PLAIN) == [(196, 157), (157, 126), (126, 101)]


@pytest.mark.parametrize("ratio", [0.55, "0.55", Decimal("0.55"), np.float64(0.55)])
def test_counts_are_exact_decimals(ratio):
    """Binary fractions round up what the decimals do not."""
    assert math.ceil(0.55 * 100) == 56
    assert math.ceil(np.float32(0.6) * np.float32(25)) == 16
    assert PruneSchedule.num_keep(ratio, TokenLayout(100, None, keep_odd=False), 100) == 55
    assert PruneSchedule.num_keep("0.6", TokenLayout(25, None, keep_odd=False), 25) == 15


@pytest.mark.parametrize("layout", [VIM, PLAIN, TokenLayout(196, None, keep_odd=True)])
def test_num_keep_is_the_formula(layout):
    for percent in range(1, 100):
        for seqlen in (1, 2, 3, 10, 100, layout.seqlen):
            patches = seqlen - (layout.cls_index is not None)
            count = math.ceil(Fraction(percent, 100) * patches)
            count += layout.keep_odd and count % 2 == 0
            wanted = min(count, seqlen) if patches else seqlen
            got = PruneSchedule.num_keep(Decimal(percent) / 100, layout, seqlen)
            assert got == wanted
            assert 1 <= got <= seqlen


@pytest.mark.parametrize("layout", [VIM, PLAIN])
@pytest.mark.parametrize("ratio", [1, 1.0, "1", "1.000"])
def test_ratio_one_keeps_everything_odd_or_not(layout, ratio):
    for seqlen in (1, 2, 100, 101):
        assert PruneSchedule.num_keep(ratio, layout, seqlen) == seqlen


@pytest.mark.parametrize("ratio", [0, -0.5, 1.0001, "2", float("nan"), float("inf"), "-1"])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"ratio=.* after block 3 is outside \(0, 1\]; .*share"):
        PruneSchedule({3: ratio})
    with pytest.raises(ValueError, match=r"ratio=.* is outside \(0, 1\]"):
        PruneSchedule.num_keep(ratio, VIM, 197)


@pytest.mark.parametrize("ratio", ["half", "", None, True, [0.5], "0,8"])
def test_ratio_that_is_no_number(ratio):
    with pytest.raises(ValueError, match=r"ratio=.* after block 3 is not a number; .*0\.8"):
        PruneSchedule({3: ratio})


@pytest.mark.parametrize("block", [0, -1, True, "5", 1.0, None])
def test_block_that_is_no_block(block):
    with pytest.raises(ValueError, match=r"block=.* is not an integer from 1"):
        PruneSchedule({block: 0.8})


def test_empty_schedule():
    with pytest.raises(ValueError, match=r"ratios=\{\}.*empty schedule.*None for a dense model"):
        PruneSchedule({})
    with pytest.raises(ValueError, match=r"schedule='': '' is not BLOCK:RATIO"):
        PruneSchedule.parse("")
    assert plan_stages(None, VIM, 24) == {}


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("alignment", "gap, constant, none, masked"),
        ("importance", "clip, sum, l1, l2, as_released, random"),
        ("score_direction", "sum, forward, backward"),
        ("conv", "compact, position"),
        ("step_parameters", "rank, full"),
    ],
)
def test_unknown_choice(option, known):
    with pytest.raises(ValueError, match=f"{option}='GAP' is not one of {known}"):
        PruneSchedule({5: 0.8}, **{option: "GAP"})


@pytest.mark.parametrize("alignment", ["gap", "constant", "masked"])
def test_as_released_has_no_alignment(alignment):
    with pytest.raises(ValueError, match=rf"as_released.*{alignment}.*use alignment='none'"):
        PruneSchedule({5: 0.8}, importance="as_released", alignment=alignment)


@pytest.mark.parametrize("option", [{"score_direction": "forward"}, {"gated": True}])
def test_as_released_has_its_own_source(option):
    with pytest.raises(ValueError, match=r"as_released.*gated backward scan.*leave both out"):
        PruneSchedule({5: 0.8}, importance="as_released", alignment="none", **option)


def test_as_released_class_slots():
    options = {"importance": "as_released", "alignment": "none"}
    schedule = PruneSchedule({5: 0.8, 10: 1, 15: 0.8}, **options)
    indices = [s.cls_keep_index for s in plan_stages(schedule, VIM, 24).values()]
    assert indices == [98, 78, 78]  # 157 // 2
    head = TokenLayout(197, 0, keep_odd=True)
    schedule = PruneSchedule({5: 1, 10: 0.8}, **options)
    assert [s.cls_keep_index for s in plan_stages(schedule, head, 24).values()] == [0, 0]
    with pytest.raises(UnsupportedError, match=r"has none; choose another"):
        plan_stages(schedule, TokenLayout(196, None, keep_odd=True), 24)
    with pytest.raises(UnsupportedError, match=r"0\.001 after block 5 keeps one of 197.*more"):
        _counts({5: 0.001}, **options)
    assert _counts({5: 0.001}) == [(197, 1)]


def test_block_outside_the_model():
    with pytest.raises(ValueError, match=r"block=25 .*outside the model's blocks 1 to 24.*from 1"):
        _counts({24: 0.8, 25: 0.8})
    assert _counts({24: 0.8}) == [(197, 157)]


@pytest.mark.parametrize("score_direction", ["forward", "backward"])
def test_model_without_directions(score_direction):
    with pytest.raises(
        UnsupportedError, match=rf"score_direction='{score_direction}'.*use score_direction='sum'"
    ):
        _counts({6: 0.8}, PLAIN, score_direction=score_direction)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"class_token": "double"}, {}, "class_token='double' cannot be pruned.*dense"),
        (
            {"bimamba": "none", "bidirectional_layers": True},
            {},
            "bidirectional_layers=True cannot be pruned.*dense",
        ),
        ({}, {"step_parameters": "full"}, "step_parameters='full' is PlainMamba's choice"),
        (
            {"bimamba": "none"},
            {"score_direction": "backward"},
            "bimamba='none' has no backward scan",
        ),
        (
            {"bimamba": "none"},
            {"importance": "as_released", "alignment": "none"},
            "bimamba='none' has no backward scan",
        ),
        (
            {"class_token": "none"},
            {"importance": "as_released", "alignment": "none"},
            "as_released.*this model has none",
        ),
    ],
)
def test_vim_that_cannot_be_pruned(config, options, message):
    with pytest.raises(UnsupportedError, match=message):
        Vim(VimConfig(**MICRO, **config), PruneSchedule({1: 0.5}, **options))


@pytest.mark.parametrize(
    ("class_token", "cls_index", "num_keep"),
    [("middle", 8, 9), ("head", 0, 9), ("none", None, 9)],  # 16 patches: ceil 8, odd 9
)
def test_vim_layouts(class_token, cls_index, num_keep):
    model = Vim(VimConfig(**MICRO, class_token=class_token), PruneSchedule({1: 0.5}))
    assert model.layout.cls_index == cls_index
    assert model.stages[1].num_keep == num_keep


def test_stages_are_in_block_order():
    schedule = PruneSchedule({15: 0.8, 5: 0.9})
    assert list(schedule.ratios.items()) == [(5, Decimal("0.9")), (15, Decimal("0.8"))]
    stages = plan_stages(schedule, VIM, 24)
    assert [(b, s.index, s.block) for b, s in stages.items()] == [(5, 0, 5), (15, 1, 15)]


def test_parse():
    parsed = PruneSchedule.parse("15:0.8, 5:.9", alignment="none", importance="l2", gated=True)
    assert parsed == PruneSchedule({5: 0.9, 15: 0.8}, alignment="none", importance="l2", gated=True)
    assert parsed != PruneSchedule({5: 0.9, 15: 0.8}, alignment="none", importance="l2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:0.8,5:0.7", "block 5 is named twice"),
        ("5:0.8,05:0.7", "block 5 is named twice"),
        ("5", "'5' is not BLOCK:RATIO"),
        ("five:0.8", "'five:0.8' is not BLOCK:RATIO"),
        ("-5:0.8", "'-5:0.8' is not BLOCK:RATIO"),
        ("5:0.8,", "'' is not BLOCK:RATIO"),
        ("5:", "ratio='' after block 5 is not a number"),
        ("5:1.5", r"ratio=1\.5 after block 5 is outside"),
        ("0:0.8", "block=0 is not an integer from 1"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        PruneSchedule.parse(text)


def test_schedules_copy_and_pickle_and_stay_as_they_are():
    schedule = PruneSchedule({5: 0.8}, seed=3)
    assert copy.deepcopy(schedule) == schedule == pickle.loads(pickle.dumps(schedule))
    with pytest.raises(AttributeError):
        schedule.alignment = "none"


def test_changed_replaces_rules_and_keeps_the_rest():
    schedule = PruneSchedule({2: "0.7"}, score_direction="forward", importance="l1")
    other = schedule.changed(alignment="none", ratios={1: "0.5"})
    assert (other.alignment, other.score_direction, other.importance) == ("none", "forward", "l1")
    assert list(other.ratios) == [1]
    assert list(schedule.ratios) == [2]
    with pytest.raises(ValueError, match=r"alignment='all' is not one of"):
        schedule.changed(alignment="all")


def test_the_released_code_convolves_the_list():
    released = {"alignment": "none", "importance": "as_released"}
    assert PruneSchedule({5: 0.8}).conv == PruneSchedule.parse("5:0.8").conv == "position"
    assert PruneSchedule({5: 0.8}, **released).conv == "compact"
    assert PruneSchedule({5: 0.8}, **released, conv="position").conv == "position"
