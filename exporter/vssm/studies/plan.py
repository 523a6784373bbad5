"""Which variants an ablation compares, the tables they stand in, and the published figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

from vssm.models.schedules import DEFAULT_SCHEDULES
from vssm.pruning.schedule import ALIGNMENTS, PruneSchedule

METRICS: Final = ("clip", "sum", "l1", "l2")
METHODS, ALIGNMENT, IMPORTANCE, RATIO = "methods", "alignment", "importance", "keep ratio"
CONV: Final = "convolution"
GRID: Final = "+grid"

_NAMES: Final = {"none": "plain removal", "gap": "aligned (gap)"}


@dataclass(frozen=True)
class Variant:
    """One model of the ablation: its schedule, and whether leftovers are fused (EViT-style)."""

    key: str
    schedule: PruneSchedule | None
    fused: bool = False

    @property
    def tokens(self) -> str:
        """What training does with its pruned tokens, as `Subject.tokens` names it."""
        return "fused" if self.fused else "gather"  # a masked schedule says so itself

    @property
    def baseline(self) -> str:
        """Key of the plain removal of the same ratio, which it is compared with."""
        _, at, ratio = self.key.partition("@")
        return f"none{at}{ratio}"


@dataclass(frozen=True)
class Run:
    """One model that is measured: a variant with some weights.

    Attributes:
        key: its name in the journal and in reports.
        variant: what runs.
        tuned: whether the weights were trained with that variant.
        number: of the checkpoint, from 0, or of the fine-tuning; equal numbers are compared.
        weights: their file; None for those of the checkpoint.
    """

    key: str
    variant: Variant
    tuned: bool
    number: int
    weights: Path | None = None

    @property
    def name(self) -> str:
        """The variant and whether it is trained, without the number."""
        return f"fine-tuned {self.variant.key}" if self.tuned else self.variant.key


@dataclass(frozen=True)
class Line:
    """A row of a table: one variant, or several seeds of one."""

    table: str
    label: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Variants, and the rows that show them, in the tables' order."""

    variants: tuple[Variant, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Published:
    """Figures that the paper prints: GFLOPs and top-1 in percent, None where it prints none."""

    gflops: float | None
    top1: float | None


# Zhan et al., arXiv:2409.18962. All of its pruned rows are fine-tuned.
PUBLISHED: Final = {
    "vim_tiny": {
        "dense": Published(1.45, 76.1),
        "evit": Published(None, 71.3),
        "gap": Published(1.29, 75.1),
    },
    "vim_small": {
        "dense": Published(5.08, 80.5),
        "evit": Published(None, 74.8),
        "none": Published(None, 75.4),
        "gap": Published(3.60, 78.8),
    },
    "plain_mamba_l1": {"dense": Published(3.0, 77.9)},
    "plain_mamba_l2": {"dense": Published(8.1, 81.6)},
    "plain_mamba_l3": {
        "dense": Published(14.4, 82.3),
        "none": Published(None, 79.3),
        "gap": Published(8.44, 81.7),
    },
}


def published(name: str, key: str, schedule: PruneSchedule) -> Published:
    """What the paper prints for a variant of a model of its size; nothing for other schedules."""
    if key != "dense":
        default = DEFAULT_SCHEDULES.get(name)
        if default is None or PruneSchedule.parse(default).ratios != schedule.ratios:
            return Published(None, None)
    return PUBLISHED.get(name, {}).get(key, Published(None, None))


def make_plan(
    schedule: PruneSchedule, *, seeds: int, ratios: Sequence[str], grid: bool = False
) -> Plan:
    """The paper's comparisons on one schedule.

    Args:
        schedule: its blocks and ratios; alignment "gap" and importance "clip" are the reference.
        seeds: of the random choice.
        ratios: keep ratios that replace every stage's own, one after the other.
        grid: compare with convolutions on the grid too; for models whose own run along the list
            of kept tokens.

    Raises:
        ValueError: there is no seed, or a ratio is not in (0, 1].
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds} is below 1; the random choice needs one at least")
    base = schedule.changed(alignment="gap", importance="clip", source="sum", gated=False)
    plain = base.changed(alignment="none")
    aligned = [Variant(a, base.changed(alignment=a)) for a in ALIGNMENTS]
    scored = [Variant(m, base.changed(importance=m)) for m in METRICS[1:]]
    drawn = [
        Variant(f"random-{s}", base.changed(importance="random", seed=s)) for s in range(seeds)
    ]
    gridded = [
        Variant(f"{v.alignment}{GRID}", v.changed(conv="grid")) for v in (plain, base) if grid
    ]
    swept = [v for ratio in ratios for v in _at_ratio(ratio, base, plain)]
    lines = [
        Line(METHODS, "dense", ("dense",)),
        Line(METHODS, "EViT-style, one fused leftover", ("evit",)),
        *(Line(METHODS, label, (key,)) for key, label in _NAMES.items()),
        *(Line(ALIGNMENT, a, (a,)) for a in ALIGNMENTS),
        *(Line(IMPORTANCE, m, ("gap" if m == "clip" else m,)) for m in METRICS),
        Line(IMPORTANCE, f"random, {seeds} seeds", tuple(v.key for v in drawn)),
        *(
            Line(CONV, f"{_NAMES[v.key.removesuffix(GRID)]}, on the grid", (v.key,))
            for v in gridded
        ),
        *(Line(RATIO, _ratio_label(v.key), (v.key,)) for v in swept),
    ]
    first = [Variant("dense", None), Variant("evit", plain, fused=True)]
    return Plan((*first, *aligned, *scored, *drawn, *gridded, *swept), tuple(lines))


def _at_ratio(ratio: str, base: PruneSchedule, plain: PruneSchedule) -> list[Variant]:
    return [
        Variant(f"{key}@{ratio}", s.changed(ratios=dict.fromkeys(s.ratios, Decimal(ratio))))
        for key, s in (("none", plain), ("gap", base))
    ]


def _ratio_label(key: str) -> str:
    name, _, ratio = key.partition("@")
    return f"{ratio}, {_NAMES[name]}"
