"""Draw the scan orders of VMamba and GroupMamba: `python docs/scan_orders_hierarchical.py`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from vssm.models.cross_scan import WALKS, walk_order

GRID = (4, 5)
FIGURES = {
    "vmamba": "direction {}: {}",
    "groupmamba": "channels of group {}: {}",
}
WORDS = dict(zip(WALKS, ("rows", "columns", "rows, backwards", "columns, backwards"), strict=True))


def draw(axes: plt.Axes, walk: str, title: str) -> None:
    """One walk: the token's number in its cell, the path in colours from first to last."""
    order = walk_order(GRID, [walk])[0, 0].tolist()
    colours = mpl.colormaps["viridis"]
    places = [(token % GRID[1], token // GRID[1]) for token in order]
    for step, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(places)):
        axes.annotate(
            "",
            (x1, y1),
            (x0, y0),
            arrowprops={
                "arrowstyle": "-|>",
                "color": colours(step / len(order)),
                "linestyle": "-" if abs(x1 - x0) + abs(y1 - y0) == 1 else ":",
                "shrinkA": 8,
                "shrinkB": 8,
            },
        )
    for token in range(math.prod(GRID)):
        axes.text(token % GRID[1], token // GRID[1], str(token), ha="center", va="center", size=8)
    axes.set(xlim=(-0.5, GRID[1] - 0.5), ylim=(GRID[0] - 0.5, -0.5), aspect="equal")
    axes.set_xticks([x - 0.5 for x in range(1, GRID[1])], [])
    axes.set_yticks([y - 0.5 for y in range(1, GRID[0])], [])
    axes.grid(color="0.85")
    axes.tick_params(length=0)
    axes.set_title(title, size=9)


def main() -> None:
    """Write one figure a family beside this file."""
    for family, title in FIGURES.items():
        figure, row = plt.subplots(1, len(WALKS), figsize=(11, 2.6), layout="constrained")
        for number, (axes, walk) in enumerate(zip(row, WALKS, strict=True), start=1):
            draw(axes, walk, title.format(number, WORDS[walk]))
        path = Path(__file__).with_name(f"{family}_scan_orders.png")
        figure.savefig(path, dpi=90, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
