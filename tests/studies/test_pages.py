"""Pages and figures at the sizes that people have: nothing overflows, nothing is cut."""

from __future__ import annotations

from typing import Any

import chromium
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from vssm.bench import page as bench_page
from vssm.bench.measure import BenchReport, Timing
from vssm.files.page import Table, render
from vssm.models.family import Published
from vssm.pruning.schedule import PruneSchedule
from vssm.studies import figures, tables
from vssm.studies.measure import Outcome, VariantCost
from vssm.studies.plan import Run, make_plan
from vssm.studies.plot import draw, element, picture
from vssm.studies.report import AblationReport, Measured, Setting, make_row

_CPU = "A_Processor_of_a_Long_Name(R) CPU @ 2.70GHz, 64 threads, float32, torch 2.13.0"


def _ablation() -> AblationReport:
    """Rows of a whole plan, with published figures, so that every column is there."""
    plan = make_plan(PruneSchedule({1: 0.7}), seeds=2, ratios=["0.5"], other_conv=True)
    runs = [Run(v.key, v, False, 0) for v in plan.variants]
    outcomes = {run.key: Outcome("10", [(1, 0.5, True), (1, 0.25, False)]) for run in runs}
    measured = Measured(
        runs, outcomes, dict.fromkeys(outcomes, VariantCost(10**9, 10**9, 2 * 10**9))
    )
    printed = Published(1.45, 76.1)
    rows = [
        make_row(line, measured, tuned=False, weights="w", published=printed) for line in plan.lines
    ]
    setting = Setting("vim_small", (224, 224), 25_796_584, 50_000, _CPU)
    facts = {"weights": "/a/folder/of/a/long/name" * 6, "ran": _CPU}
    return AblationReport(setting, facts, tuple(row for row in rows if row), {}, ())


def _pages() -> list[str]:
    report = _ablation()
    timing = Timing(
        "pruned, without the library", 8, 1, 45.6, 50.1, 44.0, 21, 175.4, 10.0, 4.5, _CPU
    )
    bench = BenchReport([timing] * 6, None, {"SelectiveScan": 1.0}, None, {"cpu": _CPU})
    plot = element(picture(draw(report, against="time"), "svg"))
    seen = {"kept": figures.kept_figure(np.zeros((8, 8, 3)), {"plain removal": []})}
    told = Table(("variant", "best classes"), [["plain removal", "a class of a long name; " * 9]])
    image = figures.section("image.png", told, seen, readout="the class token")
    return [
        bench_page.page(bench),
        tables.html(report, {"a plot": plot}),
        render("vssm visualize", {"model": "vim_small"}, [image]),
    ]


@pytest.mark.slow  # a browser starts twice
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_and_can_be_read(dark: bool) -> None:
    found = chromium.lay_out(_pages(), dark=dark)
    assert len(found) == 3 * len(chromium.WIDTHS)
    for laid in found:
        assert laid.needed <= laid.width
        assert laid.contrast > 7  # WCAG's AAA


def _cut(figure: Figure) -> list[str]:
    """Titles and labels that reach beyond the figure's edge."""
    figure.draw_without_rendering()  # lays out, which a figure without a screen does late
    width, height = figure.get_size_inches() * figure.dpi
    cut = []
    for text in filter(_drawn, figure.findobj(Text)):
        assert isinstance(text, Text)
        box = text.get_window_extent()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            cut.append(text.get_text())
    return cut


def _drawn(text: Any) -> bool:
    """Whether it is the figure's title or a legend's, or an axis's label; not a tick's."""
    axes = text.axes
    if not text.get_text() or not text.get_visible() or axes is None:
        return bool(text.get_text()) and text.get_visible()
    return axes.get_visible() and text in {axes.title, axes.xaxis.label, axes.yaxis.label}


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_no_title_or_label_is_cut(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    original = figures._png

    def kept(figure: Figure, title: str) -> bytes:
        drawn.append(figure)
        return original(figure, title)

    monkeypatch.setattr(figures, "_png", kept)
    picture = np.zeros((8, 8, 3))
    maps = [(f"block {i}, prunes", np.arange(4.0).reshape(2, 2)) for i in range(1, count + 1)]
    figures.importance_figure(picture, maps, variant="aligned (constant)")
    title = "What every token weighs in the scan's output at the class token"
    split = f"{title},\nby direction, block 24"
    for rows in (1, 2):
        named = {f"merged, alignment {i}": dict(maps[: min(count, 3)]) for i in range(rows)}
        figures.attention_figure(picture, named, unit="% of the weight", title=split)
    kept_maps = [(f"after block {i}: 137 of 196", np.ones((2, 2), bool)) for i in range(count)]
    figures.kept_figure(picture, {"plain removal": kept_maps})
    figures.merged_figure(picture, [("after block 24: 137 tokens", np.zeros((2, 2), int))] * count)
    assert len(drawn) == 5
    assert [_cut(figure) for figure in drawn] == [[]] * 5


@pytest.mark.parametrize("kind", ["flops", "time"])
def test_no_caption_of_a_plot_is_cut_or_covered(kind: str) -> None:
    figure = draw(_ablation(), against=kind)
    assert _cut(figure) == []
    title = figure._suptitle.get_window_extent()
    assert not [legend for legend in figure.legends if legend.get_window_extent().overlaps(title)]
