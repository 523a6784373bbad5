"""Multiply-adds of a model, dense or pruned, by the rule that gives the published figures.

Linear and convolution layers count one multiply-add once; a scan counts
9 * seqlen * d_inner * d_state plus one each for the skip and the gate; alignment adds
2 * d_inner * d_state for every pruned position and layer. The published figures of Vim count one of
its two directions, those of PlainMamba all four and its convolution at pruned positions too, and
both the alignment once a layer; the true ones count every direction in everything, and convolutions
at kept tokens alone. step_parameters "full", a reference, counts as "rank". A merge counts what it
compares and adds up; of merged models the published figures also have one patch more in the
embedding and 3 * d_model^2, as the counter that gives them does. Sources: Zhan et al.,
arXiv:2409.18962, and Shi et al., arXiv:2412.12496, checked against their tables.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch

from vssm.models import create_model
from vssm.models.base import VisionModel
from vssm.models.family import Figures
from vssm.pruning.schedule import (
    MergeSchedule,
    MergeStage,
    PruneSchedule,
    Schedule,
    plan_stages,
)


@dataclass(frozen=True)
class Cost:
    """What one image costs. FLOPs in multiply-adds; `exps` are the scans' exponentials.

    Attributes:
        published: by the published rule (one direction for Vim), alignment included.
        true: with every direction counted, alignment included.
        alignment: the part of `true` that hidden-state alignment adds.
        gemm: multiply-adds in matrix products and convolutions.
        exps: evaluations of exp in the scans, all directions.
        merging: the part of `true` that comparing tokens and adding them up takes.
        neck: the part of `true` between a dense model's backbone and its head.
        head: the part in that head; pruning changes neither.
    """

    published: int
    true: int
    alignment: int
    gemm: int
    exps: int
    merging: int = 0
    neck: int = 0
    head: int = 0


def count(model: VisionModel) -> Cost:
    """The work of one image through `model`, its schedule included."""
    fixed, schedule = model.fixed_cost(), model.schedule
    total = {"published": fixed, "true": fixed, "gemm": fixed, "exps": 0}
    total |= {"alignment": 0, "merging": 0}
    # Merged models with a dense head have no published figure.
    if isinstance(schedule, MergeSchedule) and model.task == "classification":
        total["published"] += _counted_beside(model)
    left: int | None = None  # tokens after the last stage
    aligned = schedule is not None and schedule.alignment in {"gap", "constant", "size"}
    masked = schedule is not None and schedule.alignment == "masked"
    for block, (full, cost) in enumerate(model.block_costs(), start=1):
        seqlen = full if left is None else left
        scan = 9 * seqlen * cost.states + seqlen * cost.per_token
        # Every pruned position costs its decay in every later layer,
        # not only in the stage that took it.
        once = 2 * cost.states * (full - seqlen) if aligned else 0
        branch = seqlen * (cost.branch + cost.convolution)
        beyond = (full - seqlen) * cost.convolution if cost.on_grid else 0
        linear = seqlen * cost.shared + cost.branches * branch
        gate = seqlen * cost.gate
        # For Vim the published figures leave out the whole second branch, its projections included.
        counted = model.published_directions
        total["published"] += seqlen * cost.shared + min(counted, cost.branches) * (branch + beyond)
        total["published"] += counted * scan + once + gate
        total["true"] += linear + cost.directions * (scan + once) + gate
        total["alignment"] += cost.directions * once
        total["gemm"] += linear
        total["exps"] += cost.directions * seqlen * cost.states
        stage = model.stages.get(block)
        if stage is not None and not masked:
            # After the counts above: a stage follows its block, which still ran at the old length.
            # Masked tokens stay in the sequence and cost what they did.
            left = stage.num_keep
        if isinstance(stage, MergeStage) and stage.num_keep < stage.seqlen:
            for part, work in _merge_cost(model, stage).items():
                total[part] += work
    return Cost(**total, neck=model.neck_cost(), head=model.head_cost())


def figures_of(name: str) -> Figures:
    """The figures of a model at its standard configuration, built without memory for weights."""
    with torch.device("meta"):
        model = create_model(name)
    cost = count(model)
    tokens = [seqlen for seqlen, _ in model.block_costs()]
    return Figures(
        sum(p.numel() for p in model.parameters()),
        tuple(seqlen for seqlen, _ in itertools.groupby(tokens)),
        cost.published,
        cost.true,
        model.image_size,
    )


def merging_of_equal_cost(model: VisionModel, schedule: PruneSchedule) -> MergeSchedule:
    """The merging, but for `r` at its defaults, whose true FLOPs come nearest to a pruning's.

    Args:
        model: a dense one of a family that merges; left as it is.
        schedule: what the model would be pruned by.
    """
    layout, depth = model.layout, model.config.depth
    if layout is None:
        raise AssertionError("families that merge have a list of tokens")
    twin = copy.copy(model)  # shares the weights; only what is counted differs

    def work(of: Schedule) -> int:
        twin.schedule, twin.stages = of, plan_stages(of, layout, depth)
        return count(twin).true

    wanted = work(schedule)
    # A model of two blocks has none but the first to merge after.
    first = min(MergeSchedule.start, max(1, depth - 1))
    choices = [MergeSchedule(r, start=first) for r in range(1, layout.seqlen // 2)]
    return min(choices, key=lambda choice: abs(work(choice) - wanted))


def _merge_cost(model: VisionModel, stage: MergeStage) -> dict[str, int]:
    config = model.config
    widths = {"B": config.d_state, "C": config.d_state, "delta": config.expand * config.d_model}
    width, gone = widths.get(stage.schedule.metric, config.d_model), stage.seqlen - stage.num_keep
    seqlen = stage.seqlen
    # The published rule: 6 N C for normalising, 2 C (N / 2)^2 for comparing, r C for adding.
    rule = 6 * seqlen * width + width * seqlen**2 // 2 + gone * config.d_model
    patches = seqlen - (stage.layout.cls_index is not None)
    compared = (patches + 1) // 2 * (patches // 2) * width
    # Both streams and the sizes, as products with 0/1 matrices.
    added = seqlen * gone * (2 * config.d_model + 1) if stage.schedule.mode == "sum" else 0
    return {"published": rule, "true": rule, "merging": rule, "gemm": compared + added}


def _counted_beside(model: VisionModel) -> int:
    """What the released counter of merged models has beside the blocks and their merges."""
    config = model.config
    patch: int = config.d_model * 3 * config.patch_size**2
    return patch + 3 * int(config.d_model) ** 2
