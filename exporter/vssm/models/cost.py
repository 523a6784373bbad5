"""Multiply-adds of a model, dense or pruned, by the rule that gives the published figures.

Linear and convolution layers count one multiply-add once; a scan counts
9 * seqlen * d_inner * d_state plus one each for the skip and the gate; alignment adds
2 * d_inner * d_state for every pruned position and layer. The published figures of Vim count one of
its two directions, those of PlainMamba all four, and both the alignment once a layer; the true ones
count every direction in everything. step_parameters "full", a reference, counts as "rank". Source:
Zhan et al., arXiv:2409.18962, checked against its tables.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vssm.models import create_model, list_models
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
        once = 2 * cost.states * (full - seqlen) if aligned else 0
        branch = (
            seqlen * cost.branch
            + (full if by_position or cost.on_grid else seqlen) * cost.convolution
        )
        linear = seqlen * cost.shared + cost.branches * branch
        gate = seqlen * cost.gate
        counted = model.published_directions
        total["published"] += seqlen * cost.shared + min(counted, cost.branches) * branch
        total["published"] += counted * scan + once + gate
        total["true"] += linear + cost.directions * (scan + once) + gate
        total["alignment"] += cost.directions * once
        total["gemm"] += linear
        total["exps"] += cost.directions * seqlen * cost.states
        stage = model.stages.get(block)
        if stage is not None and not masked:
            left = stage.num_keep
    return Cost(**total)


def describe_models() -> list[dict[str, Any]]:
    """Name, parameters, image size, tokens and cost of every model, without making its weights.

    "tokens" are those of the first block, "stage_tokens" those of all, repeats left out.
    """
    rows: list[dict[str, Any]] = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        work = count(model)
        tokens = [tokens for tokens, _ in model.block_costs()]
        rows.append(
            {
                "name": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "image_size": model.image_size,
                "tokens": tokens[0],
                "stage_tokens": [n for n, _ in itertools.groupby(tokens)],
                "flops_published": work.published,
                "flops_true": work.true,
            }
        )
    return rows


def standard_config(name: str) -> dict[str, Any]:
    """The configuration of a model without overrides, as `asdict` gives it."""
    with torch.device("meta"):
        return asdict(create_model(name).config)
