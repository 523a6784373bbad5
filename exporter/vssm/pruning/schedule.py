"""Prune schedules: which blocks prune, how much, by which rules, and the counts that follow.

No tensors here. Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models",
NeurIPS 2024, arXiv:2409.18962; as_released follows the authors' published code instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from vssm.errors import UnsupportedError, check_choice

ALIGNMENTS: Final = ("gap", "constant", "none", "masked")
IMPORTANCES: Final = ("clip", "sum", "l1", "l2", "as_released", "random")
SCORE_DIRECTIONS: Final = ("sum", "forward", "backward")
CONVS: Final = ("compact", "position")
STEP_PARAMETERS: Final = ("rank", "full")

Ratio = float | str | Decimal


# Its own __init__: rules are checked and ratios become exact before anything is stored.
@dataclass(frozen=True, init=False)
class PruneSchedule:
    """Which blocks prune, how much, and by which rules.

    Attributes:
        ratios: keep ratio in (0, 1] by block, 1-based: tokens go after that block returns.
        alignment: how the state decays over pruned positions: "gap" (the kept token's own step,
            once a position), "constant" (the step an all-zero token has), "none" (plain removal),
            "masked" (full length, tokens zeroed: a PyTorch reference that is not exported).
        importance: how a token is scored from the scan's output y: "clip" (mean of max(0, y)),
            "sum" (mean of y), "l1", "l2", "random" (by `seed`, the same for every image), or
            "as_released" (the authors' code; needs alignment "none").
        score_direction: the scan directions that y sums: "sum" (all), "forward" or "backward".
        gated: whether y is multiplied by silu(z) before it is scored.
        conv: the convolution before the scan runs over the kept tokens ("compact") or over the
            full list with zeros at pruned positions ("position").
        step_parameters: PlainMamba's choice of delta, B, C for a kept step: "rank" or "full".
        seed: for importance "random".
    """

    ratios: Mapping[int, Decimal]
    alignment: str
    importance: str
    score_direction: str
    gated: bool
    conv: str
    step_parameters: str
    seed: int

    def __init__(
        self,
        ratios: Mapping[int, Ratio],
        *,
        alignment: str = "gap",
        importance: str = "clip",
        score_direction: str = "sum",
        gated: bool = False,
        conv: str = "compact",
        step_parameters: str = "rank",
        seed: int = 0,
    ) -> None:
        check_choice("alignment", alignment, ALIGNMENTS)
        check_choice("importance", importance, IMPORTANCES)
        check_choice("score_direction", score_direction, SCORE_DIRECTIONS)
        check_choice("conv", conv, CONVS)
        check_choice("step_parameters", step_parameters, STEP_PARAMETERS)
        if importance == "as_released" and alignment != "none":
            raise ValueError(
                f"importance='as_released' with alignment={alignment!r}: the released code moves "
                "the class token, which makes gaps meaningless; use alignment='none'"
            )
        if importance == "as_released" and (score_direction != "sum" or gated):
            raise ValueError(
                f"importance='as_released' with score_direction={score_direction!r}, "
                f"gated={gated}: the released code scores by the gated backward "
                "scan and knows no other; leave both out"
            )
        values = {
            "ratios": _checked_ratios(ratios),
            "alignment": alignment,
            "importance": importance,
            "score_direction": score_direction,
            "gated": bool(gated),
            "conv": conv,
            "step_parameters": step_parameters,
            "seed": int(seed),
        }
        for name, value in values.items():
            # The way into a frozen dataclass.
            object.__setattr__(self, name, value)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        alignment: str = "gap",
        importance: str = "clip",
        score_direction: str = "sum",
        gated: bool = False,
        conv: str = "compact",
        step_parameters: str = "rank",
    ) -> PruneSchedule:
        """Read "5:0.8,10:0.8": block:ratio pairs, as the command line takes them.

        Raises:
            ValueError: a pair is malformed, out of range, or its block is named twice.
        """
        ratios: dict[int, Ratio] = {}
        for pair in text.split(","):
            block, colon, ratio = pair.partition(":")
            # isdecimal, as int() would also take "-5" and "1_0".
            if not colon or not block.strip().isdecimal():
                raise ValueError(
                    f"schedule={text!r}: {pair!r} is not BLOCK:RATIO; write 5:0.8,10:0.8"
                )
            if int(block) in ratios:
                raise ValueError(
                    f"schedule={text!r}: block {int(block)} is named twice; give one ratio"
                )
            # Still text: it becomes a Decimal without ever having been a binary float.
            ratios[int(block)] = ratio.strip()
        return cls(
            ratios,
            alignment=alignment,
            importance=importance,
            score_direction=score_direction,
            gated=gated,
            conv=conv,
            step_parameters=step_parameters,
        )

    def changed(self, **rules: Any) -> PruneSchedule:
        """This schedule with other rules, such as alignment="none", or other `ratios`."""
        # Through __init__ again, so that a changed rule is checked against all the others.
        values = {**vars(self), **rules}
        return PruneSchedule(values.pop("ratios"), **values)

    @staticmethod
    def num_keep(ratio: Ratio, layout: TokenLayout, seqlen: int) -> int:
        """Tokens kept of `seqlen` at `ratio`, class token included; exact decimal arithmetic.

        ceil(ratio * patches) as the paper's code counts, plus one if that is even where the
        layout asks for odd counts (Vim: the class token is among them), at most all; ratio 1
        keeps everything.

        Raises:
            ValueError: `ratio` is not in (0, 1].
        """
        exact = _checked_ratio(ratio)
        patches = seqlen - (0 if layout.cls_index is None else 1)
        # Apart, because the count below is of patches: ratio 1 of 49
        # patches and a class token would be 49 of 50.
        if exact == 1 or patches == 0:
            return seqlen
        # In floats 0.55 * 100 is 55.00000000000001, and ceil would keep one token too many.
        keep = math.ceil(exact * patches)
        if layout.keep_odd and keep % 2 == 0:
            keep += 1
        # Rounding up to an odd number can pass the tokens there are,
        # where none of them is a class token.
        return min(keep, seqlen)


@dataclass(frozen=True)
class TokenLayout:
    """A model's tokens before pruning: how many, where the class token is, the counting rule."""

    seqlen: int
    cls_index: int | None
    keep_odd: bool
    directional: bool = True  # has a forward and a backward scan to take scores from


@dataclass(frozen=True)
class Stage:
    """One pruning step with its static counts.

    `cls_keep_index` is the class token's index before the stage, where that is static (as_released
    and the first stage), else None.
    """

    index: int
    block: int
    seqlen: int
    num_keep: int
    layout: TokenLayout
    schedule: PruneSchedule
    cls_keep_index: int | None


def plan_stages(
    schedule: PruneSchedule | None, layout: TokenLayout, depth: int
) -> dict[int, Stage]:
    """The stages by block (1-based), with their static token counts.

    Raises:
        ValueError: a block lies outside the model.
        UnsupportedError: the model has no such scan direction, or as_released finds no class token
            to re-centre or keeps no patch beside it.
    """
    if schedule is None:
        return {}
    if schedule.score_direction != "sum" and not layout.directional:
        raise UnsupportedError(
            f"score_direction={schedule.score_direction!r}: this model has no forward and "
            "backward scan; use score_direction='sum'"
        )
    if schedule.importance == "as_released" and layout.cls_index is None:
        raise UnsupportedError(
            "importance='as_released' re-centres the class token, and this model has none; "
            "choose another importance"
        )
    stages: dict[int, Stage] = {}
    seqlen, cls_index = layout.seqlen, layout.cls_index
    # In the order of the blocks: each stage counts on what the one before it has left.
    for index, (block, ratio) in enumerate(schedule.ratios.items()):
        if block > depth:
            raise ValueError(
                f"block={block} of the schedule is outside the model's blocks 1 to {depth}; "
                "a schedule names the block after which tokens go, counted from 1"
            )
        keep = PruneSchedule.num_keep(ratio, layout, seqlen)
        recentred = schedule.importance == "as_released"
        # The gather chooses keep - 1 patches beside the class token, and at least one.
        if recentred and keep == 1 < seqlen:
            raise UnsupportedError(
                f"ratio={ratio} after block {block} keeps one of {seqlen} tokens, the class token; "
                "importance='as_released' keeps patches beside it: keep more"
            )
        stages[block] = Stage(index, block, seqlen, keep, layout, schedule, cls_index)
        # After a choice the class token's index depends on how many tokens before it stayed,
        # image by image; only the released code puts it where it is known.
        if keep < seqlen:  # else nothing moves
            cls_index = keep // 2 if recentred else None
        seqlen = keep
    return stages


def _checked_ratio(ratio: Ratio, where: str = "") -> Decimal:
    try:
        # By way of str: Decimal(0.8) would be the binary number, a little above 0.8.
        exact = Decimal(str(ratio))
    except InvalidOperation:
        raise ValueError(
            f"ratio={ratio!r}{where} is not a number; give the share of tokens kept, such as 0.8"
        ) from None
    # is_finite first: comparing a Decimal NaN raises an error of its own.
    if not (exact.is_finite() and 0 < exact <= 1):
        raise ValueError(
            f"ratio={ratio}{where} is outside (0, 1]; it is the share of tokens kept, 1 keeps all"
        )
    return exact


def _checked_ratios(ratios: Mapping[int, Ratio]) -> dict[int, Decimal]:
    if not ratios:
        raise ValueError(
            "ratios={}: an empty schedule prunes nothing; use schedule=None for a dense model"
        )
    checked: dict[int, Decimal] = {}
    for block, ratio in ratios.items():
        # bool is a subclass of int, and True would pass as block 1.
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block={block!r} is not an integer from 1; blocks are counted from 1")
        checked[block] = _checked_ratio(ratio, f" after block {block}")
    return dict(sorted(checked.items()))
