"""Figures of what a pruned model keeps, scores and attends to. Arrays in, PNG bytes out.

Colours: cividis, made for colour-blind readers, and the Okabe-Ito palette.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vssm.files.page import Illustration, Section, Table
from vssm.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "cividis"
_GONE = "#d9d9d9"  # of a pruned position in a map
_JUMP = "#d55e00"  # Okabe-Ito vermilion
_PRUNED = np.array([0.80, 0.47, 0.65])  # its reddish purple, which photos rarely have
_DPI = 110
_SIDE = 2.1  # inches of a panel
_ACROSS = 6  # maps in a row at most


def kept_figure(picture: Array, kept: Mapping[str, Sequence[tuple[str, Array]]]) -> bytes:
    """Patches that are left after every stage, a row for each variant.

    Args:
        picture: (height, width, 3) in [0, 1], as the model sees it.
        kept: by variant, each stage's title and map (rows, columns) of bool.
    """
    columns = 1 + max(map(len, kept.values()))
    figure, axes = _panels(len(kept), columns)
    for row, (variant, stages) in zip(axes, kept.items(), strict=True):
        row[0].imshow(picture)
        _label(row[0], variant)
        # Not strict: a variant may have fewer panels than the widest row, and the rest is hidden.
        for axis, (title, here) in zip(row[1:], stages, strict=False):
            axis.imshow(_faded(picture, here))
            axis.set_title(title, fontsize=9)
        for axis in row[1 + len(stages) :]:
            axis.set_visible(False)
    axes[0][0].set_title("image", fontsize=9)
    return _png(figure, "Patches kept after every stage (purple: pruned)")


def merged_figure(picture: Array, groups: Sequence[tuple[str, Array]]) -> bytes:
    """Which patches have become one, after some of the stages.

    Args:
        picture: (height, width, 3) in [0, 1], as the model sees it.
        groups: titles and maps (rows, columns) of integers: patches of one number are one token,
            those of a negative number gone.
    """
    figure, axes = _panels(1, 1 + len(groups))
    axes[0][0].imshow(picture)
    axes[0][0].set_title("image", fontsize=9)
    for axis, (title, group) in zip(axes[0][1:], groups, strict=True):
        axis.imshow(_joined(picture, group))
        axis.set_title(title, fontsize=9)
    return _png(figure, "Patches that have become one, outlined, in their mean colour")


def left_figure(picture: Array, left: Mapping[str, Array], *, shows: str) -> bytes:
    """After which block the token of each position left, a map for each variant.

    Args:
        picture: (height, width, 3) in [0, 1], as the model sees it.
        left: by variant, the block by position (rows, columns); NaN of what is kept to the end.
        shows: what a dense head reads at positions that were left.
    """
    figure, axes = _panels(1, 1 + len(left))
    axes[0][0].imshow(picture)
    axes[0][0].set_title("image", fontsize=9)
    blocks = sorted({int(b) for values in left.values() for b in values[np.isfinite(values)]})
    limits = (float(blocks[0]), float(max(blocks[-1], blocks[0] + 1))) if blocks else (0.0, 1.0)
    for axis, (variant, values) in zip(axes[0][1:], left.items(), strict=True):
        shown = _heat(axis, picture, values, limits=limits)
        axis.set_title(f"{variant}: {np.isfinite(values).mean():.0%} left", fontsize=9)
    bar = figure.colorbar(shown, ax=list(axes[0]), shrink=0.8, pad=0.01, ticks=blocks)
    bar.set_label("after block", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _png(figure, f"Positions whose token left; the head reads {shows}; grey: kept")


def importance_figure(picture: Array, maps: Sequence[tuple[str, Array]], *, variant: str) -> bytes:
    """Score maps of all blocks of a variant, each on its own scale; NaN where a token is gone."""
    panels = 1 + len(maps)
    rows = math.ceil(panels / _ACROSS)
    figure, axes = _panels(rows, math.ceil(panels / rows))
    flat = [axis for row in axes for axis in row]
    flat[0].imshow(picture)
    flat[0].set_title("image", fontsize=9)
    for axis, (title, values) in zip(flat[1:], maps, strict=False):
        shown = _heat(axis, picture, values, limits=_limits([values]))
        axis.set_title(title, fontsize=9)
    for axis in flat[1 + len(maps) :]:
        axis.set_visible(False)
    # Drawn for the last map; "least" and "most" are true of each.
    bar = figure.colorbar(shown, ax=flat, shrink=0.6, pad=0.01, ticks=_limits([values]))
    bar.ax.set_yticklabels(["least", "most"])
    inches = 0.6 * figure.get_size_inches()[1]
    bar.set_label(_wrapped("importance, each map on its own scale", inches, 9), fontsize=9)
    return _png(figure, f"Importance of every token, {variant}{_grey([m for _, m in maps])}")


def attention_figure(
    picture: Array, maps: Mapping[str, Mapping[str, Array]], *, unit: str, title: str
) -> bytes:
    """Attention maps: a row for each row's name, a column for each variant or direction.

    A row has one colour scale, so its panels can be compared.

    Args:
        picture: (height, width, 3) in [0, 1].
        maps: by row and column, values (rows, columns), NaN where a token is gone.
        unit: what the colour bar measures.
        title: above all.
    """
    columns = 1 + max(map(len, maps.values()))
    figure, axes = _panels(len(maps), columns)
    for row, (name, panels) in zip(axes, maps.items(), strict=True):
        row[0].imshow(picture)
        _label(row[0], name)
        limits = _limits(list(panels.values()))
        for axis, (column, values) in zip(row[1:], panels.items(), strict=False):
            shown = _heat(axis, picture, values, limits=limits)
            axis.set_title(column, fontsize=9)
        for axis in row[1 + len(panels) :]:
            axis.set_visible(False)
        # The arrow says that the brightest tokens lie above the scale's end.
        beyond = any(np.nanmax(values, initial=-np.inf) > limits[1] for values in panels.values())
        bar = figure.colorbar(
            shown, ax=list(row), shrink=0.8, pad=0.01, extend="max" if beyond else "neither"
        )
        bar.set_label(unit, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    axes[0][0].set_title("image", fontsize=9)
    everything = [values for panels in maps.values() for values in panels.values()]
    return _png(figure, f"{title}{_grey(everything)}")


@dataclass(frozen=True)
class Walk:
    """One direction of a scan: its title, the positions of its steps, and which of them jump.

    Attributes:
        title: above the panel.
        row: of each step, NaN at a class token.
        column: likewise.
        gap: original positions each step stands for; 1 is a neighbour.
    """

    title: str
    row: Array
    column: Array
    gap: Array


def walks_figure(picture: Array, walks: Sequence[Sequence[Walk]], grid: tuple[int, int]) -> bytes:
    """How scans walk the patches, dark to light; steps over pruned positions in vermilion."""
    figure, axes = _panels(len(walks), max(map(len, walks)), side=2.6)
    colours = _colour_map()
    for row, some in zip(axes, walks, strict=True):
        for axis in row[len(some) :]:
            axis.set_visible(False)
        for axis, walk in zip(row, some, strict=False):
            # Whole numbers are the middles of patches, and rows go down.
            extent = (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)
            # Pale, so that the lines stand out.
            axis.imshow(0.75 + 0.25 * picture, extent=extent)
            shade = np.linspace(0, 1, len(walk.row))
            for t in range(1, len(walk.row)):
                jump = walk.gap[t] > 1
                axis.plot(
                    walk.column[t - 1 : t + 1],
                    walk.row[t - 1 : t + 1],
                    color=_JUMP if jump else colours(shade[t]),
                    linewidth=1.0 if jump else 1.8,
                    linestyle=":" if jump else "-",
                )
            axis.scatter(walk.column, walk.row, c=shade, cmap=_MAP, s=7, zorder=3)
            axis.set_title(walk.title, fontsize=9)
    jumps = any(np.any(walk.gap[1:] > 1) for some in walks for walk in some)
    rest = "\n(dotted: over pruned positions)" if jumps else ""
    return _png(figure, f"How the scan walks, dark to light{rest}")


def _panels(rows: int, columns: int, *, side: float = _SIDE) -> tuple[Figure, list[list[Axes]]]:
    # The class itself: pyplot would keep every figure, and look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * columns + 0.9, (side + 0.25) * rows), layout="constrained")
    # `squeeze=False`: one panel is a grid of one by one too.
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, [list(row) for row in axes]


def _colour_map() -> Any:
    from matplotlib import colormaps

    return colormaps[_MAP]


def _label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=10)


def _heat(axis: Axes, picture: Array, values: Array, *, limits: tuple[float, float]) -> Any:
    """A map over the image's area; pruned places grey."""
    colours = _colour_map().with_extremes(bad=_GONE)
    height, width = picture.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    masked = np.ma.masked_invalid(values)
    return axis.imshow(masked, cmap=colours, vmin=limits[0], vmax=limits[1], extent=extent)


def _limits(maps: Sequence[Array]) -> tuple[float, float]:
    """The scale: up to the 99th percentile, so that one token does not darken the rest."""
    values = np.concatenate([m[np.isfinite(m)].ravel() for m in maps])
    if values.size == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    # A map of one value has no range, but a scale must have some.
    return low, high if high > low else low + 1e-12


def _faded(picture: Array, here: Array) -> Array:
    """The picture with the patches that are gone in purple, a little of them showing."""
    shown: Array = picture.copy()
    for top, bottom, left, right, there in _cells(picture, here):
        if not there:
            cell = shown[top:bottom, left:right].mean(axis=-1, keepdims=True)
            shown[top:bottom, left:right] = _PRUNED * (0.8 + 0.2 * cell)
    return shown


def _joined(picture: Array, group: Array) -> Array:
    """The picture with every group of patches in its mean colour and outlined in white."""
    shown = _faded(picture, group >= 0)
    cells = [cell[:4] for cell in _cells(picture, group >= 0)]
    numbers = group.ravel()
    # An edge where the neighbour, or what is beyond the border, is of another group.
    framed = np.pad(group, 1, constant_values=-2)
    for number in np.unique(numbers[numbers >= 0]):
        members = np.flatnonzero(numbers == number)
        if len(members) == 1:
            continue
        areas = [(slice(*cells[m][:2]), slice(*cells[m][2:])) for m in members]
        colour = np.concatenate([picture[area].reshape(-1, 3) for area in areas]).mean(0)
        for member, area in zip(members, areas, strict=True):
            shown[area] = colour
            row, column = np.unravel_index(member, group.shape)
            _outline(shown[area], framed[row : row + 3, column : column + 3])
    return shown


def _outline(cell: Array, around: Array) -> None:
    """White edges of a cell's pixels towards those of its four neighbours in another group."""
    own = around[1, 1]
    edges = {(0, 1): cell[:1], (2, 1): cell[-1:], (1, 0): cell[:, :1], (1, 2): cell[:, -1:]}
    for neighbour, pixels in edges.items():
        if around[neighbour] != own:
            pixels[:] = 1.0


def _cells(picture: Array, here: Array) -> Iterator[tuple[int, int, int, int, bool]]:
    """The pixels of every patch: top, bottom, left, right, and whether it is there."""
    height, width = picture.shape[:2]
    rows, columns = here.shape
    # Rounded, since patches that overlap do not divide the sides.
    down = np.linspace(0, height, rows + 1).round().astype(int)
    across = np.linspace(0, width, columns + 1).round().astype(int)
    for i in range(rows):
        for j in range(columns):
            yield down[i], down[i + 1], across[j], across[j + 1], bool(here[i, j])


def _grey(maps: Sequence[Array]) -> str:
    """What the title says of pruned positions, where there are any."""
    return "; grey: pruned" if any(np.isnan(m).any() for m in maps) else ""


def _wrapped(text: str, inches: float, size: int) -> str:
    """A text of so many points broken into lines that fit; breaks of its own stay."""
    letters = max(8, int(inches * 72 / (0.58 * size)))  # wide letters are a little wider than this
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def _png(figure: Figure, title: str) -> bytes:
    figure.suptitle(_wrapped(title, figure.get_size_inches()[0], 11), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


HEADINGS = {
    "kept": "Kept tokens",
    "merged": "Merged tokens",
    "left": "What the head reads where tokens left",
    "importance": "Importance",
    "attention": "Effective attention",
    "directions": "Effective attention by direction",
    "walks": "Walks of the scan",
}
CAPTIONS = {
    "kept": "Tokens kept after every stage; pruned patches are purple.",
    "merged": "Which patches have become one token, after some of the stages: each group is "
    "outlined and has its mean colour. Patches that went are purple.",
    "left": "After which block the token of each position left the scan. From there on the levels "
    "show at such a position what the title says; grey positions kept their token to the end.",
    "importance": "Importance of every token in every block, mean over channels of max(0, y) of "
    "the scan's output before the gate, in the last variant; each map on its own scale. Pruned "
    "positions are grey.",
    "attention": "Effective attention of the scan: what each token's input weighs in the scan's "
    "output at the {readout}, mean over channels of |w|, directions added, in percent of the sum. "
    "Computed from the recurrence, gaps included; a row shares its colour scale, which ends at the "
    "99th percentile of its values. Pruned positions are grey.",
    "directions": "The same, each direction of the scan by itself.",
    "walks": "How the directions walk the tokens in the last variant, from dark to light; dotted "
    "vermilion steps jump over pruned positions, which alignment counts and plain removal forgets. "
    "Where a line is interrupted, the class token stands.",
}


def section(title: str, table: Table, figures: Mapping[str, bytes], *, readout: str) -> Section:
    """What the page says of one image.

    Args:
        title: above all.
        table: what the variants say of the image.
        figures: PNG by the names of HEADINGS.
        readout: whose attention is shown.
    """
    shown = [
        Illustration(png, HEADINGS[name], CAPTIONS[name].format(readout=readout))
        for name, png in figures.items()
    ]
    return Section(title, tables=[table], figures=shown)
