"""Pruned segmenters: kept positions and levels against the oracle, and the rules by hand."""

from __future__ import annotations

import fill
import numpy as np
import pytest
import torch
from official_data import filled_model, fixture, manifest
from official_dense import OTHERS, case_images, errors, micro_segmenter

import vssm
from vssm import MergeSchedule, PruneSchedule
from vssm.errors import UnsupportedError
from vssm.pruning.restore import Restoration
from vssm.pruning.schedule import MERGE_RESTORES, RESTORES
from vssm.pruning.select import Tokens
from vssm.pruning.walks import LineWalks

EXACT = 1e-9  # measured 6.8e-15
SCHEDULE = {1: 0.8, 2: 0.75, 3: 0.7}
PRUNED = {
    key: case
    for key, case in manifest("dense/pruned_dense")["cases"].items()
    if f"{key}/kept0" in fixture("dense/pruned_dense") and case.get("case") not in OTHERS
}
SMALL = {key: case for key, case in PRUNED.items() if "manifest" in case}
RUN = (("vim", "mixer_taps_64"), ("vim", "deep_taps_64"), ("plain_mamba", "odd_50x71"))


def _schedule(case):
    ratios = {int(block): ratio for block, ratio in case["schedule"].items()}
    return PruneSchedule(ratios, restore=case["restore"])


def _same_positions(found, prefix):
    numbers = fixture("dense/pruned_dense")
    return all(
        np.array_equal(kept, numbers[f"{prefix}kept{stage}"])
        for stage, kept in enumerate(found.kept_positions)
    )


@pytest.mark.parametrize("key", SMALL)
def test_oracle(key):
    family, case = key.split("/")[0], SMALL[key]
    model = micro_segmenter(family, case["case"], _schedule(case)).double()
    with torch.no_grad():
        found = model.forward_details(case_images(family, case["case"]).double())
    assert _same_positions(found, f"{key}/")
    worst = errors("dense/pruned_dense", f"{key}/", found.tensors)
    assert len(worst) == 5
    assert max(worst.values()) < EXACT


def test_oracle_covers_every_rule():
    assert {case["restore"] for case in SMALL.values()} == set(RESTORES)


@pytest.mark.slow
def test_oracle_of_vim_tiny():
    prefix = "vim_tiny/512x512/frozen/"
    schedule = PruneSchedule({6: 0.8, 12: 0.8, 18: 0.8})
    model = filled_model("vim_tiny_upernet_ade20k", schedule=schedule).double()
    asked = manifest("dense/vim_tiny_upernet_ade20k")["inputs"][0]
    x = torch.from_numpy(fill.make_input(tuple(asked["shape"]), key=asked["key"])).double()
    with torch.no_grad():
        found = model.forward_details(x)
    assert _same_positions(found, prefix)
    assert max(errors("dense/pruned_dense", prefix, found.tensors).values()) < EXACT


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize(("family", "case"), RUN)
def test_ratio_one_is_the_dense_model(family, case, restore):
    x = case_images(family, case).double()
    schedule = PruneSchedule({2: 1, 3: "1.0"}, restore=restore)
    with torch.no_grad():
        pruned = micro_segmenter(family, case, schedule).double()(x)
        dense = micro_segmenter(family, case).double()(x)
    torch.testing.assert_close(pruned, dense, rtol=0, atol=1e-12 * float(dense.abs().max()))


@pytest.mark.parametrize(("family", "case"), RUN)
def test_rules_change_pruned_positions_alone(family, case):
    """Kept positions agree whatever the rule, and pruned ones show what they should."""
    taps = {}
    name = "tap{}" if family == "vim" else "level{}"
    for restore in RESTORES:
        model = micro_segmenter(family, case, PruneSchedule({2: 0.6}, restore=restore)).double()
        with torch.no_grad():
            found = model.forward_details(case_images(family, case).double())
        taps[restore] = [found.tensors[name.format(i)].flatten(2) for i in range(4)]
        kept = found.kept_positions[0]
    first = 1 if case == "deep_taps_64" else 0
    read_after = range(first if case == "deep_taps_64" else 2, 4)
    for i in read_after:
        frozen, zero = taps["frozen"][i], taps["zero"][i]
        index = kept[:, None].expand(-1, frozen.shape[1], -1)
        # A turned or normed zero is a constant, so only Vim's own taps are zeros there.
        assert torch.equal(frozen.gather(2, index), zero.gather(2, index))
        assert torch.equal(frozen.gather(2, index), taps["nearest"][i].gather(2, index))
        assert not torch.equal(frozen, zero)
        if family == "vim":
            gone = torch.ones_like(zero, dtype=torch.bool).scatter(2, index, False)
            assert not zero[gone].any()


def test_nearest_by_hand():
    """Positions 1, 2 and 5 of 7 stay: 0 shows 1, 3 shows 2; 4 and 6 show 5."""
    position = torch.tensor([[1, 2, 5], [0, 4, 6]], dtype=torch.int32)
    walks = LineWalks(7, 2, torch.device("cpu"))
    tokens = Tokens(position, walks, walks.among(position), 7)
    x = torch.arange(6.0).reshape(2, 3, 1)
    (full,) = Restoration("nearest").full([x], tokens)
    # Of two that are equally near, the one before: position 2 lies between 0 and 4, 5 between 4, 6.
    assert full[..., 0].tolist() == [[0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4, 5]]


@pytest.mark.parametrize("restore", ["frozen", "zero"])
@pytest.mark.parametrize(("family", "case"), RUN)
def test_the_models_backend_moves_the_tokens(family, case, restore):
    model = micro_segmenter(family, case, PruneSchedule({2: 0.6, 3: 0.8}, restore=restore))
    x = case_images(family, case)
    for backend, runs in (("reference", "reference"), ("auto", "kernel")):
        with torch.no_grad(), vssm.record_backends() as ran:
            model.use_backend(backend)(x)
        assert {by for _, by in ran} == {runs}
        assert ran["TokenScatter", runs] > 0


def test_frozen_keeps_what_was_last_there():
    walks = LineWalks(4, 2, torch.device("cpu"))
    dense = Tokens.dense(walks, 4, torch.device("cpu"))
    kept = torch.tensor([[0, 2, 3]], dtype=torch.int32)
    fewer = torch.tensor([[0, 3]], dtype=torch.int32)
    once = Tokens(kept, walks, walks.among(kept), 4)
    twice = Tokens(fewer, walks, walks.among(fewer), 4)
    restoration = Restoration("frozen")
    restoration.before_stage([torch.tensor([[[1.0], [2], [3], [4]]])], dense)
    restoration.before_stage([torch.tensor([[[10.0], [30], [40]]])], once)
    (full,) = restoration.full([torch.tensor([[[100.0], [400]]])], twice)
    assert full.flatten().tolist() == [100, 2, 30, 400]


def _groups(found, image, merges, seqlen):
    """The members of each token, in original positions, after so many merges."""
    groups = [[position] for position in range(seqlen)]
    for sources, joined in found.merged[:merges]:
        for source, other in zip(sources[image].tolist(), joined[image].tolist(), strict=True):
            groups[other] = groups[other] + groups[source]
        gone = set(sources[image].tolist())
        groups = [group for i, group in enumerate(groups) if i not in gone]
    return groups


def test_a_merged_position_shows_its_group():
    model = micro_segmenter("vim", "mixer_taps_64", MergeSchedule(3, start=1, every=1)).double()
    x = case_images("vim", "mixer_taps_64").double()
    with torch.no_grad():
        found = model.forward_details(x, with_blocks=True)
    seqlen = found.blocks[0][0].shape[1]
    for level, block in enumerate(model.config.taps):
        tap = found.tensors[f"tap{level}"].flatten(2).transpose(1, 2)
        for image, hidden in enumerate(found.blocks[block - 1][0]):
            groups = _groups(found, image, min(block - 1, len(found.merged)), seqlen)
            assert sum(map(len, groups)) == seqlen
            for group, value in zip(groups, hidden, strict=True):
                assert torch.equal(tap[image, group], value.expand(len(group), -1))


@pytest.mark.parametrize("restore", MERGE_RESTORES)
def test_rules_of_merging_change_joined_positions_alone(restore):
    x = case_images("vim", "mixer_taps_64").double()
    taps = {}
    for rule in ("group", restore):
        schedule = MergeSchedule(4, start=1, restore=rule)
        model = micro_segmenter("vim", "mixer_taps_64", schedule).double()
        with torch.no_grad():
            found = model.forward_details(x)
        taps[rule] = found.tensors["tap3"].flatten(2)
    kept = found.kept_positions[-1][:, None].expand(-1, taps[restore].shape[1], -1)
    assert torch.equal(taps["group"].gather(2, kept), taps[restore].gather(2, kept))
    assert torch.equal(taps["group"], taps[restore]) == (restore == "group")


def test_no_merge_is_the_dense_model():
    x = case_images("vim", "deep_taps_64").double()
    with torch.no_grad():
        merged = micro_segmenter("vim", "deep_taps_64", MergeSchedule(0)).double()(x)
        dense = micro_segmenter("vim", "deep_taps_64").double()(x)
    torch.testing.assert_close(merged, dense, rtol=0, atol=0)


def test_a_classifier_restores_nothing():
    with pytest.raises(UnsupportedError, match="restore='zero' says what a dense head sees"):
        vssm.create_model("vim_tiny", depth=2, schedule=PruneSchedule({1: 0.5}, restore="zero"))
    with pytest.raises(UnsupportedError, match="restore='zero' says what a dense head sees"):
        vssm.create_model("vim_tiny", depth=3, schedule=MergeSchedule(restore="zero"))


def test_a_commands_rule_reaches_both_parts_of_a_schedule():
    name = "vim_tiny_upernet_ade20k"
    assert vssm.ModelSource(name, merge="57", restore="zero").checked().restore == "zero"
    assert vssm.ModelSource(name, merge="57").checked().restore == "group"
    text = "57,class_token=true"
    both = vssm.ModelSource(name, schedule="3:0.8", merge=text, alignment="gap", restore="zero")
    assert both.checked().restore == both.checked().prune.restore == "zero"


def test_what_dense_models_refuse():
    with pytest.raises(ValueError, match="restore='last' is not one of frozen, zero, nearest"):
        PruneSchedule({1: 0.5}, restore="last")
    with pytest.raises(ValueError, match="restore='last' is not one of group, frozen"):
        MergeSchedule(restore="last")
    with pytest.raises(UnsupportedError, match="place of every token in its grid"):
        micro_segmenter("plain_mamba", "square_64", MergeSchedule(3))
    prune = PruneSchedule({1: 0.8}, alignment="none")
    both = MergeSchedule(3, class_token="true", prune=prune)
    for alone in (both, MergeSchedule(3, mode="drop")):
        with pytest.raises(UnsupportedError, match="join no other, by prune or mode='drop'"):
            micro_segmenter("vim", "nodiv_64", alone)
    with pytest.raises(ValueError, match=r"with prune\.restore='frozen'"):
        micro_segmenter("vim", "nodiv_64", both.changed(restore="zero"))
    micro_segmenter("vim", "nodiv_64", both.changed(restore="frozen"))
    masked = PruneSchedule({1: 0.5}, alignment="masked")
    for family, case in (("vim", "nodiv_64"), ("plain_mamba", "square_64")):
        with pytest.raises(UnsupportedError, match="masked"):
            micro_segmenter(family, case, masked)
    # The layers are 0 and 2: a stage after block 1 comes before the second.
    with pytest.raises(UnsupportedError, match="convolution of layer 2"):
        micro_segmenter("plain_mamba", "dwconv_64x80", PruneSchedule({1: 0.5}))
    micro_segmenter("plain_mamba", "dwconv_64x80", PruneSchedule({3: 0.5}))
