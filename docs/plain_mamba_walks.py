"""Draws docs/plain_mamba_walks.svg: PlainMamba's walks, dense and among kept tokens.

Run from the checkout: `python docs/plain_mamba_walks.py`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vssm.models.plain_mamba import GridWalks

SIDE, KEPT = 5, 15
NAMES = ("rows", "rows, reversed", "columns", "columns, reversed")


def draw(axes: Axes, places: list[int], gaps: list[int], kept: set[int]) -> None:
    """One walk: arrows from place to place, with the gap where it passes pruned ones."""
    rows, columns = divmod(np.arange(SIDE * SIDE), SIDE)
    colours = ["tab:blue" if place in kept else "lightgrey" for place in range(SIDE * SIDE)]
    axes.scatter(columns, rows, s=14, c=colours)
    row, column = divmod(np.array(places), SIDE)
    axes.scatter(column[:1], row[:1], s=50, marker="s", c="tab:green")
    passing = np.array(gaps[1:]) > 1
    axes.quiver(
        *(column[:-1], row[:-1], np.diff(column), np.diff(row)),
        color=np.where(passing, "tab:red", "black"),
        **{"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008},
    )
    for step in np.flatnonzero(passing):
        middle = (column[step : step + 2].mean() + 0.12, row[step : step + 2].mean() - 0.12)
        axes.annotate(str(gaps[step + 1]), middle, color="tab:red", fontsize=8)
    axes.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])


def main() -> None:
    """Write the figure; the same code gives the same bytes."""
    mpl.rcParams.update({"svg.hashsalt": "vssm", "svg.fonttype": "none"})
    walks = GridWalks((SIDE, SIDE))
    generator = torch.Generator().manual_seed(1)
    some = torch.randperm(SIDE * SIDE, generator=generator)[:KEPT].sort().values
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    grid = figure.subplots(2, 4)
    for row, kept in enumerate((torch.arange(SIDE * SIDE), some)):
        steps = walks.among(kept.int()[None])
        for k, name in enumerate(NAMES):
            axes = grid[row, k]
            draw(
                axes,
                kept[steps.order[0, k].long()].tolist(),
                steps.gap[0, k].tolist(),
                set(kept.tolist()),
            )
            axes.set_title(name if row == 0 else f"{KEPT} of {SIDE * SIDE} kept", fontsize=9)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    text = target.read_text(encoding="utf-8")
    target.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")


if __name__ == "__main__":
    main()
