"""An ablation with fewer plots, which take most of a small one's time."""

from __future__ import annotations

from typing import Any

import pytest

from vssm.studies import plot


def leave_plots_out(patch: pytest.MonkeyPatch) -> None:
    """`vssm ablate` draws nothing; tests/studies/test_ablate.py looks at its plots."""
    for name, made in (("draw", None), ("picture", b""), ("element", "")):
        patch.setattr(plot, name, lambda *_, made=made, **__: made)


def draw_one_plot(patch: pytest.MonkeyPatch) -> None:
    """It draws accuracy_flops.png alone, the one file that times do not change."""
    drawn = plot.picture

    def picture(figure: Any, kind: str) -> bytes:
        return drawn(figure, kind) if kind == "png" else b"<svg"

    patch.setattr("vssm.studies.ablate.PLOTS", {"accuracy_flops": "flops"})
    patch.setattr(plot, "picture", picture)
