"""Schedules: which blocks prune or merge tokens, how many, by which rules, and the counts.

No tensors here. Sources: Zhan et al., "Exploring Token Pruning in Vision State Space Models",
NeurIPS 2024, arXiv:2409.18962 (as_released follows the authors' published code instead); Shi et
al., "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training", arXiv:2412.12496, and
the numbers of its public code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Final, overload

from vssm.errors import UnsupportedError, check_choice, did_you_mean

ALIGNMENTS: Final = ("gap", "constant", "none", "masked")
IMPORTANCES: Final = ("clip", "sum", "l1", "l2", "as_released", "random")
SCORE_DIRECTIONS: Final = ("sum", "forward", "backward")
CONVS: Final = ("compact", "position")
STEP_PARAMETERS: Final = ("rank", "full")
MERGE_ALIGNMENTS: Final = ("none", "gap", "size")
METRICS: Final = ("hidden", "B", "C", "delta")
DISTANCES: Final = ("cosine", "l1", "l2")
MODES: Final = ("sum", "mean", "amax", "amin", "drop")
CLASS_TOKENS: Final = ("proportional", "true")
RESTORES: Final = ("frozen", "zero", "nearest")
MERGE_RESTORES: Final = ("group", *RESTORES)

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
        conv: the convolution before the scan reads the neighbours by position, nothing where one
            was pruned ("position"), or along the list of kept tokens ("compact"). None, the
            default, becomes "position", or "compact" for importance "as_released", whose code has
            it so.
        step_parameters: PlainMamba's choice of delta, B, C for a kept step: "rank" or "full".
        restore: what a dense head sees at a pruned position: "frozen" (the token as it was when it
            left), "zero", or "nearest" (the nearest kept token; of two, the one before).
        seed: for importance "random".
    """

    ratios: Mapping[int, Decimal]
    alignment: str
    importance: str
    score_direction: str
    gated: bool
    conv: str
    step_parameters: str
    restore: str
    seed: int

    def __init__(
        self,
        ratios: Mapping[int, Ratio],
        *,
        alignment: str = "gap",
        importance: str = "clip",
        score_direction: str = "sum",
        gated: bool = False,
        conv: str | None = None,
        step_parameters: str = "rank",
        restore: str = "frozen",
        seed: int = 0,
    ) -> None:
        check_choice("alignment", alignment, ALIGNMENTS)
        check_choice("importance", importance, IMPORTANCES)
        check_choice("score_direction", score_direction, SCORE_DIRECTIONS)
        conv = conv or ("compact" if importance == "as_released" else "position")
        check_choice("conv", conv, CONVS)
        check_choice("step_parameters", step_parameters, STEP_PARAMETERS)
        check_choice("restore", restore, RESTORES)
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
            "restore": restore,
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
        conv: str | None = None,
        step_parameters: str = "rank",
        restore: str = "frozen",
        seed: int = 0,
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
            restore=restore,
            seed=seed,
        )

    def changed(self, **rules: Any) -> PruneSchedule:
        """This schedule with other rules, such as alignment="none", or other `ratios`."""
        # Through __init__ again, so that a changed rule is checked against all the others.
        values = {**vars(self), **rules}
        return PruneSchedule(values.pop("ratios"), **values)

    def describe(self) -> str:
        """What it does, in words, for reports."""
        return ", ".join(f"{ratio} after block {block}" for block, ratio in self.ratios.items())

    @staticmethod
    def num_keep(ratio: Ratio, layout: TokenLayout, seqlen: int) -> int:
        """Tokens kept of `seqlen` at `ratio`, class token included; exact decimal arithmetic.

        ceil(ratio * patches) as the paper's code counts, plus one if that is even where the
        layout asks for odd counts (Vim: the class token is among them), at most all; ratio 1
        keeps everything.

        Raises:
            ValueError: `ratio` is not in (0, 1].
        """
        exact = checked_ratio(ratio)
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
class MergeSchedule:
    """Which blocks merge tokens, how many, and by which rules; the defaults are R-MeeTo's.

    Every other token but the class token may join the most similar of the tokens between. The `r`
    that are most similar do; a token that others have joined is their mean over all the original
    tokens it stands for.

    Attributes:
        r: tokens that a merge takes away, at most half of those that are no class token; 0 merges
            nothing.
        every: blocks from one merge to the next.
        start: the first block, 1-based, after which tokens merge.
        metric: what is compared: "hidden" (the block's output), or the scan's "B", "C" or "delta",
            both directions together.
        distance: "cosine", or "l1" or "l2" between normalised rows.
        order: whether the tokens that are left keep their order; False puts the tokens that might
            have joined another, most similar first, before the others, as the published code does.
        final_tokens: tokens after the last merge, which takes as many as that needs, at most half
            of those that are no class token; None for `r` there too.
        class_token: where a merge leaves the class token: "proportional" (int(p * left / before),
            as published, which is not quite its place in the order) or "true" (its own place).
        choose: which of the others a token joins: 1 the most similar, 3 the third.
        mode: how values join: "sum" (the size-weighted mean), "mean", "amax" or "amin" (the
            published code's other reductions, in PyTorch alone) or "drop" (the tokens go).
        alignment: what a step of the scan stands for: "none" (one token, as published), "gap" (the
            distance to the token before it, as in pruning) or "size" (the tokens in it).
        restore: what a dense head sees at the position of a token that has joined another: "group"
            (that other token), or one of `PruneSchedule`'s.
        prune: stages of pruning between the merges; None for merging alone.

    Raises:
        ValueError: an option is unknown or out of its range, or two contradict each other.
    """

    r: int = 5
    every: int = 2
    start: int = 2
    metric: str = "hidden"
    distance: str = "cosine"
    order: bool = True
    final_tokens: int | None = None
    class_token: str = "proportional"
    choose: int = 1
    mode: str = "sum"
    alignment: str = "none"
    restore: str = "group"
    prune: PruneSchedule | None = None

    def __post_init__(self) -> None:
        lowest = {"r": 0, "every": 1, "start": 1, "choose": 1, "final_tokens": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if name == "final_tokens" and value is None:
                continue
            # bool is a subclass of int, and True would pass as 1.
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not an integer from {least}; give one")
        check_choice("metric", self.metric, METRICS)
        check_choice("distance", self.distance, DISTANCES)
        check_choice("class_token", self.class_token, CLASS_TOKENS)
        check_choice("mode", self.mode, MODES)
        check_choice("alignment", self.alignment, MERGE_ALIGNMENTS)
        check_choice("restore", self.restore, MERGE_RESTORES)
        if not isinstance(self.order, bool):
            raise TypeError(f"order={self.order!r} is not true or false; give one of these")
        if self.final_tokens is not None and self.r == 0:
            raise ValueError(
                f"final_tokens={self.final_tokens} with r=0, which merges nothing; leave it out"
            )
        if not self.order and (self.class_token, self.alignment) != ("proportional", "none"):
            raise ValueError(
                f"order=False with class_token={self.class_token!r}, alignment={self.alignment!r}: "
                "tokens out of their order have neither places nor distances; use the defaults"
            )
        if self.alignment == "gap" and self.class_token != "true":
            raise ValueError(
                "alignment='gap' with class_token='proportional', which moves the class token and "
                "makes distances meaningless; use class_token='true', or alignment='size'"
            )
        if self.alignment == "size" and self.mode != "sum":
            raise ValueError(
                f"alignment='size' with mode={self.mode!r}, whose sizes count no tokens; use "
                "mode='sum'"
            )
        if self.prune is not None:
            self._check_prune(self.prune)

    def _check_prune(self, prune: PruneSchedule) -> None:
        if self.class_token != "true":
            raise ValueError(
                "prune with class_token='proportional': where pruning leaves the class token "
                "differs from image to image; use class_token='true'"
            )
        if prune.alignment != self.alignment or self.alignment == "size":
            raise ValueError(
                f"alignment={self.alignment!r} with prune.alignment={prune.alignment!r}: one scan "
                "counts its missing positions in one way; use 'gap' for both, or 'none' for both"
            )
        if prune.importance == "as_released":
            raise ValueError(
                "prune with importance='as_released', which moves the class token; use another "
                "importance"
            )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        alignment: str = "none",
        restore: str = "group",
        prune: PruneSchedule | None = None,
    ) -> MergeSchedule:
        """Read "5", or "5,final_tokens=76,class_token=true", as the command line takes them.

        Raises:
            ValueError: it is malformed, or a value does not fit.
        """
        r, *pairs = text.split(",")
        if not r.strip().isdecimal():
            raise ValueError(f"merge={text!r}: {r!r} is not a number of tokens; write 5")
        kinds = {"every": int, "start": int, "final_tokens": int, "choose": int, "order": bool}
        kinds |= dict.fromkeys(("metric", "distance", "class_token", "mode"), str)
        given: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or key not in kinds or key in given:
                hint = did_you_mean(key, kinds) or f"; the options are {', '.join(kinds)}"
                raise ValueError(f"merge={text!r}: {pair!r} is not KEY=VALUE, each once{hint}")
            given[key] = _option(f"merge={text!r}: {key}", value, kinds[key])
        return cls(int(r), alignment=alignment, restore=restore, prune=prune, **given)

    def changed(self, **rules: Any) -> MergeSchedule:
        """This schedule with other rules, such as alignment="size"."""
        return replace(self, **rules)

    def blocks(self, depth: int) -> range:
        """The blocks, 1-based, after which a model of `depth` blocks merges."""
        return range(self.start, depth if self.r else 0, self.every)

    def describe(self) -> str:
        """What it does, in words, for reports."""
        merged = (
            f"{self.r} merged after every block"
            if self.every == 1
            else (f"{self.r} merged after every {self.every} blocks from block {self.start}")
        )
        last = "" if self.final_tokens is None else f", {self.final_tokens} left at the end"
        return merged + last + ("" if self.prune is None else f"; {self.prune.describe()}")


Schedule = PruneSchedule | MergeSchedule


def _option(name: str, text: str, kind: type) -> Any:
    if kind is int and not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not an integer; write one, such as 2")
    if kind is bool:
        if text not in {"true", "false"}:
            raise ValueError(f"{name}={text!r} is not true or false; write one of these")
        return text == "true"
    return kind(text)


@dataclass(frozen=True)
class TokenLayout:
    """A model's tokens before pruning: how many, where the class token is, the counting rule.

    `directional` models have a forward and a backward scan to take scores from; `restores` says
    that heads read every position, `full_parameters` that a kept step may have delta, B and C of
    its number in the full list.
    """

    seqlen: int
    cls_index: int | None
    keep_odd: bool
    directional: bool = True
    restores: bool = False
    full_parameters: bool = False


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

    @property
    def next_cls_index(self) -> int | None:
        """The class token's index after the stage, where that is static."""
        # After a choice it depends on how many tokens before it stayed, image by image; only the
        # released code puts it where it is known.
        return self.num_keep // 2 if self.schedule.importance == "as_released" else None


@dataclass(frozen=True)
class MergeStage:
    """One merge with its static counts.

    `cls_index` is the class token's index before the merge where that is the same for all images,
    else None; `layout.cls_index` says whether there is one.
    """

    index: int
    block: int
    seqlen: int
    num_keep: int
    layout: TokenLayout
    schedule: MergeSchedule
    cls_index: int | None

    @property
    def next_cls_index(self) -> int | None:
        """The class token's index after the merge, where that is the same for all images."""
        if self.cls_index is None or self.schedule.class_token == "true":
            return None
        # The published code measures by the list without the others where it puts them last.
        before = self.seqlen if self.schedule.order else self.seqlen // 2
        return self.cls_index * (before - self.seqlen + self.num_keep) // before


@overload
def plan_stages(
    schedule: PruneSchedule | None, layout: TokenLayout, depth: int
) -> dict[int, Stage]: ...
@overload
def plan_stages(
    schedule: Schedule | None, layout: TokenLayout, depth: int
) -> Mapping[int, Stage | MergeStage]: ...
def plan_stages(
    schedule: Schedule | None, layout: TokenLayout, depth: int
) -> Mapping[int, Stage | MergeStage]:
    """The stages by block (1-based), with their static token counts.

    Raises:
        ValueError: a block lies outside the model or has two stages, or the last merge does not
            find `final_tokens`.
        UnsupportedError: the model has no such scan direction, step parameters or head that reads
            pruned positions, or as_released finds no class token to re-centre or keeps no patch
            beside it.
    """
    if schedule is None:
        return {}
    merging = schedule if isinstance(schedule, MergeSchedule) else None
    pruning = schedule.prune if isinstance(schedule, MergeSchedule) else schedule
    merges = range(0) if merging is None else _merging_blocks(merging, layout, depth)
    ratios = {} if pruning is None else _pruning_blocks(pruning, layout, depth)
    if both := sorted(set(ratios) & set(merges)):
        raise ValueError(
            f"block={both[0]} both prunes and merges; prune after another block, or move the "
            "merges with start and every"
        )
    stages: dict[int, Stage | MergeStage] = {}
    seqlen, cls_index = layout.seqlen, layout.cls_index
    # In the order of the blocks: each stage counts on what the one before it has left.
    for block in sorted({*ratios, *merges}):
        stage: Stage | MergeStage
        if pruning is not None and block in ratios:
            keep = _num_keep(pruning, layout, seqlen, block)
            stage = Stage(len(stages), block, seqlen, keep, layout, pruning, cls_index)
        else:
            assert merging is not None
            left = _left(merging, layout, seqlen, last=block == merges[-1])
            if left == seqlen:
                continue  # as published: one token beside the class token joins nothing
            stage = MergeStage(len(stages), block, seqlen, left, layout, merging, cls_index)
        stages[block] = stage
        if stage.num_keep < seqlen:  # else nothing moves
            cls_index = stage.next_cls_index
        seqlen = stage.num_keep
    return stages


def _merging_blocks(schedule: MergeSchedule, layout: TokenLayout, depth: int) -> range:
    _refuse_restoring(schedule.restore, layout, usual=MergeSchedule.restore)
    blocks = schedule.blocks(depth)
    if schedule.r and not blocks:
        raise ValueError(
            f"start={schedule.start} is not among the blocks 1 to {depth - 1} of this model, after "
            "which tokens can merge; give a lower one"
        )
    return blocks


def _pruning_blocks(
    schedule: PruneSchedule, layout: TokenLayout, depth: int
) -> Mapping[int, Decimal]:
    if schedule.score_direction != "sum" and not layout.directional:
        raise UnsupportedError(
            f"score_direction={schedule.score_direction!r}: this model has no forward and "
            "backward scan; use score_direction='sum'"
        )
    if schedule.step_parameters != "rank" and not layout.full_parameters:
        raise UnsupportedError(
            f"step_parameters={schedule.step_parameters!r} is PlainMamba's choice; this model's "
            "steps have the parameters of their own tokens: leave it out"
        )
    _refuse_restoring(schedule.restore, layout, usual="frozen")
    if schedule.importance == "as_released" and layout.cls_index is None:
        raise UnsupportedError(
            "importance='as_released' re-centres the class token, and this model has none; "
            "choose another importance"
        )
    if outside := [block for block in schedule.ratios if block > depth]:
        raise ValueError(
            f"block={outside[0]} of the schedule is outside the model's blocks 1 to {depth}; "
            "a schedule names the block after which tokens go, counted from 1"
        )
    return schedule.ratios


def _refuse_restoring(restore: str, layout: TokenLayout, *, usual: str) -> None:
    if restore != usual and not layout.restores:
        raise UnsupportedError(
            f"restore={restore!r} says what a dense head sees at positions whose tokens "
            "are gone, and this model has none; leave it out"
        )


def _num_keep(schedule: PruneSchedule, layout: TokenLayout, seqlen: int, block: int) -> int:
    ratio = schedule.ratios[block]
    keep = PruneSchedule.num_keep(ratio, layout, seqlen)
    # The gather chooses keep - 1 patches beside the class token, and at least one.
    if schedule.importance == "as_released" and keep == 1 < seqlen:
        raise UnsupportedError(
            f"ratio={ratio} after block {block} keeps one of {seqlen} tokens, the class token; "
            "importance='as_released' keeps patches beside it: keep more"
        )
    return keep


def _left(schedule: MergeSchedule, layout: TokenLayout, seqlen: int, *, last: bool) -> int:
    """Tokens after a merge of `seqlen`."""
    patches = seqlen - (layout.cls_index is not None)
    wanted = schedule.r
    if last and schedule.final_tokens is not None:
        wanted = seqlen - schedule.final_tokens
        if wanted < 0:
            raise ValueError(
                f"final_tokens={schedule.final_tokens} is more than the {seqlen} tokens before the "
                "last merge; give fewer, or a lower r"
            )
    # The published rule: every other token may go, and each needs another to join.
    left = seqlen - min(wanted, patches // 2)
    if left < seqlen and schedule.choose > patches // 2:
        raise ValueError(
            f"choose={schedule.choose} of the {patches // 2} tokens that can be joined among "
            f"{seqlen}; give a lower one, or end the merges sooner"
        )
    return left


def checked_ratio(ratio: Ratio, where: str = "") -> Decimal:
    """A keep ratio as the exact number that its text is.

    Args:
        ratio: in (0, 1].
        where: what errors say behind it.

    Raises:
        ValueError: it is no number, or outside.
    """
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
        checked[block] = checked_ratio(ratio, f" after block {block}")
    return dict(sorted(checked.items()))
