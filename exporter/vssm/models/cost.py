"""Multiply-adds of a model, dense or pruned, by the rule that gives the published figures.

Linear and convolution layers count one multiply-add once; a scan counts
9 * seqlen * d_inner * d_state plus one each for the skip and the gate; alignment adds
2 * d_inner * d_state for every pruned position and layer. The published figures of Vim count one of
its two directions, those of PlainMamba all four, and both the alignment once a layer; the true ones
count every direction in everything. step_parameters "full", a reference, counts as "rank". Source:
Zhan et al., arXiv:2409.18962, checked against its tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from vssm.models.base import VisionModel


@dataclass(frozen=True)
class Cost:
    """What one image costs. FLOPs in multiply-adds; `exps` are the scans' exponentials.

    Attributes:
        published: by the published rule (one direction for Vim), alignment included.
        true: with every direction counted, alignment included.
        alignment: the part of `true` that hidden-state alignment adds.
        gemm: multiply-adds in matrix products and convolutions.
        exps: evaluations of exp in the scans, all directions.
    """

    published: int
    true: int
    alignment: int
    gemm: int
    exps: int


def count(model: VisionModel) -> Cost:
    """The work of one image through `model`, its schedule included."""
    fixed = model.fixed_cost()
    total = {"published": fixed, "true": fixed, "alignment": 0, "gemm": fixed, "exps": 0}
    left: int | None = None  # tokens after the last stage
    aligned = model.schedule is not None and model.schedule.alignment in {"gap", "constant"}
    masked = model.schedule is not None and model.schedule.alignment == "masked"
    by_position = model.schedule is not None and model.schedule.conv == "position"
    for block, (full, cost) in enumerate(model.block_costs(), start=1):
        seqlen = full if left is None else left
        scan = 9 * seqlen * cost.states + seqlen * cost.per_token
        # Every pruned position costs its decay in every later layer,
        # not only in the stage that took it.
        once = 2 * cost.states * (full - seqlen) if aligned else 0
        branch = (
            seqlen * cost.branch
            + (full if by_position or cost.on_grid else seqlen) * cost.convolution
        )
        linear = seqlen * cost.shared + cost.branches * branch
        gate = seqlen * cost.gate
        # For Vim the published figures leave out the whole second branch, its projections included.
        counted = model.published_directions
        total["published"] += seqlen * cost.shared + min(counted, cost.branches) * branch
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
    return Cost(**total)
