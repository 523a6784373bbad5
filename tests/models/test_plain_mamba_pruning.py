"""Pruned PlainMamba, against the official oracle's numbers and against `plain_mamba_by_hand`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from official_data import filled_model, fixture, images, micro_plain_mamba
from plain_mamba_by_hand import PlainMambaByHand
from tolerances import relative_error

import vssm
from vssm import PruneSchedule
from vssm.errors import UnsupportedError
from vssm.models.cost import count
from vssm.models.plain_mamba import GridWalks, grid_walks
from vssm.models.schedules import default_schedule, default_schedules

# Of the largest value. Measured in float64: 1.1e-14 on plain_mamba_l1, 1.1e-15 on micro models;
# float32, absolute as the oracle's README asks.
EXACT = 1e-9
MICRO = 1e-13
FLOAT32 = 2e-4
ROUNDING = 2e-6  # float32 against float32
RATIOS = {1: 0.7, 2: 0.65}
ALIGNMENTS = ("gap", "constant", "none")
# Case, image size, layers with a depthwise convolution: odd, even and uneven grids.
GRIDS = {
    "6x5": {"image_size": (96, 80), "layers_with_dwconv": (0, 1, 2)},
    "4x7": {"image_size": (64, 112), "layers_with_dwconv": ()},
    "1x9": {"image_size": (16, 144), "layers_with_dwconv": (0,)},
}


def _micro(grid="6x5", ratios=None, dtype=torch.float64, **options):
    schedule = PruneSchedule(ratios or RATIOS, **options)
    return micro_plain_mamba(schedule=schedule, d_model=16, d_state=4, **GRIDS[grid]).to(dtype)


def _images(model, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shape = (batch, 3, *model.image_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _details(model, inputs, **options):
    with torch.no_grad():
        return model.forward_details(inputs, **options)


def _assert_as_by_hand(model):
    inputs = _images(model)
    found = _details(model, inputs)
    hand = PlainMambaByHand(model.config, model.state_dict(), model.schedule)
    with torch.no_grad():
        wanted = [hand.run(tokens) for tokens in model.backbone.patch_embed(inputs)]
    assert relative_error(found.logits, torch.stack([w.logits for w in wanted])) < MICRO
    for stage, kept in enumerate(found.kept_positions):
        assert kept.tolist() == [w.kept[stage] for w in wanted]
        scores = np.array([w.scores[stage] for w in wanted])
        assert relative_error(found.scores[stage], scores) < MICRO


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_official_numbers(dtype):
    wanted = fixture("pruned/plain_mamba_l1_gap_rank")
    ratios = dict(zip(wanted["prune_after_block"].tolist(), wanted["keep_ratio"], strict=True))
    model = filled_model("plain_mamba_l1", schedule=PruneSchedule(ratios)).to(dtype)
    batch = 2 if dtype == torch.float32 else 1  # the reference takes seconds an image
    inputs = images("plain_mamba_l1", seed=int(wanted["input_seed"]))[:batch]
    found = _details(model, inputs.to(dtype))
    for stage, kept in enumerate(found.kept_positions):
        assert np.array_equal(kept.numpy(), wanted[f"kept{stage}"][:batch])
    if dtype == torch.float32:
        assert np.abs(found.logits.numpy() - wanted["logits"]).max() < FLOAT32
        return
    assert relative_error(found.logits, wanted["logits"][:batch]) < EXACT
    for stage, score in enumerate(found.scores):
        stored = wanted[f"score{stage}"][:batch]
        assert relative_error(score / score.max(), stored / stored.max()) < EXACT


@pytest.mark.parametrize("step_parameters", ["rank", "full"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_two_stages_equal_the_walks_over_every_place(grid, alignment, step_parameters):
    _assert_as_by_hand(_micro(grid, alignment=alignment, step_parameters=step_parameters))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("importance", ["clip", "sum", "l1", "l2"])
def test_every_score(importance, gated):
    _assert_as_by_hand(_micro("4x7", importance=importance, gated=gated))


def test_one_kept_token():
    _assert_as_by_hand(_micro(ratios={1: 0.01}))


def test_readings_differ_and_the_inert_option_does_not():
    options = list(itertools.product(ALIGNMENTS, ["rank", "full"]))
    logits = []
    for alignment, parameters in options:
        model = _micro(alignment=alignment, step_parameters=parameters)
        logits.append(_details(model, _images(model)).logits)
        grid = _micro(alignment=alignment, step_parameters=parameters, conv="position")
        assert torch.equal(_details(grid, _images(model)).logits, logits[-1])
    for one, other in itertools.combinations(logits, 2):
        assert relative_error(one, other) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("step_parameters", ["rank", "full"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_ratio_one_is_the_dense_model_bit_for_bit(alignment, step_parameters, dtype):
    rules = {"alignment": alignment, "step_parameters": step_parameters}
    model = _micro("6x5", {1: 1, 3: "1.0"}, dtype, **rules)
    dense = micro_plain_mamba(d_model=16, d_state=4, **GRIDS["6x5"]).to(dtype)
    inputs = _images(model, dtype=dtype)
    # The kernels take the gate into the scan where nothing needs y before it: one rounding less.
    assert relative_error(_details(model, inputs).logits, _details(dense, inputs).logits) < ROUNDING
    found = _details(model.use_backend("reference"), inputs)
    assert torch.equal(found.logits, _details(dense.use_backend("reference"), inputs).logits)
    assert [k.tolist() for k in found.kept_positions] == [[list(range(30))] * 2] * 2


@pytest.mark.parametrize("importance", ["clip", "random"])
@pytest.mark.parametrize("step_parameters", ["rank", "full"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_an_image_does_not_depend_on_its_neighbours(alignment, step_parameters, importance):
    model = _micro(alignment=alignment, step_parameters=step_parameters, importance=importance)
    inputs = _images(model, 3)
    together = _details(model, inputs)
    for i in range(len(inputs)):
        alone = _details(model, inputs[i : i + 1])
        assert relative_error(alone.logits[0], together.logits[i]) < MICRO
        for kept, batch in zip(alone.kept_positions, together.kept_positions, strict=True):
            assert torch.equal(kept[0], batch[i])


def test_kept_positions():
    """ceil(ratio * tokens), even or odd, ascending, and never back."""
    model = _micro("4x7", {1: 0.7, 2: 1.0, 3: 0.4})
    found = _details(model, _images(model, 3))
    assert [tuple(k.shape) for k in found.kept_positions] == [(3, n) for n in (20, 20, 8)]
    assert [tuple(s.shape) for s in found.scores] == [(3, n) for n in (28, 20, 20)]
    for kept in found.kept_positions:
        assert kept.dtype == torch.int64
        assert (kept.diff() > 0).all()
    for first, second in itertools.pairwise(found.kept_positions):
        assert all(set(b) <= set(a) for a, b in zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (3, 4), (4, 3), (5, 5)])
def test_steps_among_kept_places(size):
    """Order, gaps and moves of the kept places, picked out of the full walks one by one."""
    walks, (order, move) = GridWalks(size), grid_walks(*size)
    places = size[0] * size[1]
    generator = torch.Generator().manual_seed(places)
    for keep in {1, (places + 1) // 2, places}:
        kept = torch.stack([torch.randperm(places, generator=generator)[:keep] for _ in range(3)])
        kept = kept.sort(1).values
        steps = walks.among(kept.int())
        for image, k in itertools.product(range(3), range(4)):
            slots = {place: slot for slot, place in enumerate(kept[image].tolist())}
            walked = [s for s, place in enumerate(order[k].tolist()) if place in slots]
            assert steps.order[image, k].tolist() == [slots[int(order[k, s])] for s in walked]
            gaps = [b - a for a, b in itertools.pairwise(walked)]
            assert steps.gap[image, k].tolist() == [0, *gaps]
            assert steps.code[image, :, k].tolist() == [int(move[k, s]) for s in walked]
            assert steps.walked[image, :, k].tolist() == walked
        assert steps.order.dtype == steps.gap.dtype == torch.int32


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"alignment": "masked"}, r"alignment='masked' is how Vim was trained; .* use"),
        (
            {"score_direction": "forward"},
            r"score_direction='forward': this model has no forward and backward scan",
        ),
        ({"score_direction": "backward"}, r"score_direction='backward': this model has no forward"),
        (
            {"alignment": "none", "importance": "as_released"},
            r"importance='as_released' re-centres the class token, and this model has none",
        ),
    ],
)
def test_what_needs_a_class_token_or_two_directions_is_refused(rules, message):
    with pytest.raises(UnsupportedError, match=message):
        _micro(**rules)


def test_scores_carry_no_gradient_and_logits_do():
    model = _micro(alignment="constant")
    found = model.forward_details(_images(model))
    assert not any(s.requires_grad for s in found.scores)
    found.logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# GFLOPs: printed in the papers (None: not printed); counted dense, at the default schedule
# without the alignment term, and with it.
COSTS = {
    "plain_mamba_l1": (3.0, None, (3.015, 1.988, 2.015)),
    "plain_mamba_l2": (8.1, None, (8.078, 5.008, 5.062)),
    "plain_mamba_l3": (14.4, 8.44, (14.439, 8.458, 8.553)),
}


@pytest.mark.parametrize("name", COSTS)
def test_default_schedules_cost_what_is_published(name):
    schedules = [None, default_schedule(name, alignment="none"), default_schedule(name)]
    with torch.device("meta"):
        works = [count(vssm.create_model(name, schedule=s)) for s in schedules]
    dense, pruned, counted = COSTS[name]
    assert tuple(round(work.published / 1e9, 3) for work in works) == counted
    assert works[0].published / 1e9 == pytest.approx(dense, rel=6e-3)
    assert works[1].published / 1e9 == pytest.approx(pruned or counted[1], rel=3e-3)
    assert works[0].true == works[0].published
    # The published rule counts alignment once a layer; every walk has it.
    assert works[2].alignment == 4 * (works[2].published - works[1].published)
    assert works[2].true - works[1].true == works[2].alignment


def test_a_layer_costs_what_its_parts_do():
    model = _micro("6x5", {2: 0.5}, alignment="none")
    D, E, N, R, places, kept = 16, 32, 4, 1, 30, 15

    def layer(tokens):
        linear = tokens * (D * 2 * E + E * (R + 2 * N) + R * E + E * D + E * 49)
        return linear, 4 * tokens * (9 * E * N + E) + tokens * E

    pixels = 48 * 40
    stem = pixels * 64 * (3 * 49 + 64 * 9) + places * D * 64 * 64 + D * 10
    gemm = stem + 3 * places * D * 9 + sum(layer(n)[0] for n in (places, places, kept))
    work = count(model)
    assert work.gemm == gemm
    assert work.true == gemm + sum(layer(n)[1] for n in (places, places, kept))
    # The published rule has the convolution at every place.
    counted = work.published - work.true
    assert counted == (places - kept) * E * 49
    assert work.exps == 4 * E * N * (2 * places + kept)


@pytest.mark.parametrize("name", default_schedules())
def test_default_schedules_fit_their_models(name):
    with torch.device("meta"):
        model = vssm.create_model(name, schedule=default_schedule(name, importance="l2"))
    assert model.schedule.importance == "l2"
    assert all(stage.num_keep < stage.seqlen for stage in model.stages.values())


def test_no_default_schedule():
    with pytest.raises(ValueError, match=r"name='vim_base' has no default schedule, only vim_tiny"):
        default_schedule("vim_base")
