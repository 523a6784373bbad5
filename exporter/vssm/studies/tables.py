"""An ablation's tables in the paper's layout: on the screen, in Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vssm.files.page import Illustration, Section, Table, render
from vssm.files.table import table_bytes
from vssm.studies.paired import Paired, probability
from vssm.studies.report import AblationReport, VariantRow, amount

PAIRED: Final = "beside plain removal"
RULES: Final = "FLOPs by rule"
COLUMNS: Final = (
    *("variant", "size", "params", "FLOPs", "reduction", "top-1 %", "images/s", "speed-up"),
    *("published FLOPs", "published top-1 %"),
)
_SAME: Final = ("size", "params")  # in every row; the caption says them, where there is no room
_PAIRED_COLUMNS: Final = ("variant", "difference, points", "better", "worse", "p")
_RULE_COLUMNS: Final = ("variant", "published rule", "without alignment's part", "true")


@dataclass(frozen=True)
class PaperTable:
    """A table of texts with its title and a caption; the first column is the rows' name."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def without(self, *columns: str) -> PaperTable:
        """The table without some of its columns."""
        keep = [i for i, name in enumerate(self.columns) if name not in columns]
        rows = [[row[i] for i in keep] for row in self.rows]
        return PaperTable(self.title, self.caption, [self.columns[i] for i in keep], rows)


def tables(report: AblationReport, *, narrow: bool = False) -> list[PaperTable]:
    """Every table; a published column only where something is published.

    Args:
        report: what was found.
        narrow: leave out what is the same in every row.
    """
    found = [
        PaperTable(
            title,
            report.setting.caption,
            COLUMNS,
            [cells(row, report) for row in report.rows if row.table == title],
        )
        for title in dict.fromkeys(row.table for row in report.rows)
    ]
    found = [one.without(*_empty(one), *(_SAME if narrow else ())) for one in found]
    rows = list({row.runs: row for row in reversed(report.rows)}.values())[::-1]
    paired = [(row.label, *_paired_cells(row.paired)) for row in rows if row.paired]
    if paired:
        found.append(PaperTable(PAIRED, report.setting.caption, _PAIRED_COLUMNS, paired))
    costs = [rule_cells(row) for row in rows if not row.tuned]
    found.append(PaperTable(RULES, report.setting.caption, _RULE_COLUMNS, costs))
    return found


def _empty(table: PaperTable) -> list[str]:
    columns = zip(table.columns, zip(*table.rows, strict=True), strict=True)
    return [name for name, texts in columns if set(texts) == {"-"}]


def cells(row: VariantRow, report: AblationReport) -> tuple[str, ...]:
    """A row as the tables show it; beside top-1 the spread and number of runs, where several."""
    printed, setting = row.published, report.setting
    return (
        row.label,
        " x ".join(map(str, setting.image_size)),
        amount(setting.parameters),
        amount(row.flops.published),
        "-" if row.reduction == 0 else f"{100 * row.reduction:.1f} %",
        f"{100 * row.top1:.2f}{_spread(row.spread, len(row.runs))}",
        f"{row.images_per_s:.1f}",
        f"{row.speed_up:.2f}x",
        "-" if printed.gflops is None else f"{printed.gflops:g} G",
        "-" if printed.top1 is None else f"{printed.top1:g}",
    )


def rule_cells(row: VariantRow) -> tuple[str, ...]:
    """A row's FLOPs by each rule."""
    return row.label, *map(amount, (row.flops.published, row.flops.unaligned, row.flops.true))


def _spread(spread: float | None, runs: int) -> str:
    return "" if spread is None else f" ± {100 * spread:.2f} ({runs})"


def _paired_cells(found: Paired) -> tuple[str, ...]:
    """Sums over the pairs, and p of a single one."""
    better, worse = (sum(getattr(p, name) for p in found.pairs) for name in ("better", "worse"))
    chance = probability(found.pairs[0].p) if len(found.pairs) == 1 else "-"
    difference = f"{100 * found.difference:+.2f}{_spread(found.spread, len(found.pairs))}"
    return difference, f"{better:,}", f"{worse:,}", chance


def notes(report: AblationReport) -> list[str]:
    """What a reader must know of the numbers."""
    error = max(row.standard_error for row in report.rows)
    found = [
        "FLOPs are multiply-adds of an image by the published rule; the reduction and the speed-up "
        "are beside the dense model. A difference of top-1 below about "
        f"{200 * error:.2f} points (twice the standard error of one run) may be chance; the pairs "
        f"say more: {PAIRED}, better and worse are images that one of the two alone gets right, p "
        "is McNemar's exact two-sided test. ± is the standard deviation over runs, their number in "
        "brackets.",
    ]
    if any(row.published.top1 or row.published.gflops for row in report.rows):
        found.append(
            "Published figures, on ImageNet: Zhan et al., arXiv:2409.18962, and of merging Shi et "
            "al., arXiv:2412.12496; their pruned and merged rows are fine-tuned, rows here only "
            "where they say so."
        )
    return found


def markdown(report: AblationReport, plots: Sequence[str]) -> str:
    """The tables as Markdown, with what ran and what did not."""
    parts = ["# vssm ablate", "\n".join(f"- {k}: {v}" for k, v in report.facts.items())]
    for table in tables(report):
        lines = [f"## {table.title}", "", table.caption, "", _line(table.columns)]
        lines += [_line(["---"] * len(table.columns)), *map(_line, table.rows)]
        parts.append("\n".join(lines))
    parts += notes(report)
    for title, pairs in _lists(report).items():
        parts.append("\n".join([f"## {title}", "", *(f"- {k}: {v}" for k, v in pairs)]))
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _lists(report: AblationReport) -> dict[str, list[tuple[str, str]]]:
    found = {
        "left out": list(report.left_out.items()),
        "images that cannot be read": list(report.unreadable),
    }
    return {title: pairs for title, pairs in found.items() if pairs}


def _line(columns: Sequence[str]) -> str:
    # A bar in a text would begin a cell.
    escaped = (column.replace("|", "\\|") for column in columns)
    return f"| {' | '.join(escaped)} |"


def html(report: AblationReport, plots: Mapping[str, str]) -> str:
    """The same as one page; `plots` are SVG elements by their captions."""
    shown = [
        Table(one.columns, one.rows, f"{one.title}: {one.caption}", numbers=True)
        for one in tables(report)
    ]
    others = [
        Section(title, [f"{key}: {value}" for key, value in pairs])
        for title, pairs in _lists(report).items()
    ]
    figures = [Illustration(svg, caption=caption) for caption, svg in plots.items()]
    found = Section(paragraphs=notes(report), tables=shown, figures=figures)
    return render("vssm ablate", report.facts, [found, *others])


def csv(report: AblationReport) -> bytes:
    """A row a line, with plain numbers for other programs: shares in [0, 1], FLOPs, images/s."""
    setting = report.setting
    shared = {
        "model": setting.model,
        "height": setting.image_size[0],
        "width": setting.image_size[1],
        "parameters": setting.parameters,
        "images": setting.images,
        "ran": setting.ran,
    }
    lines = [{**_numbers(row), **shared} for row in report.rows]
    texts = [["" if value is None else value for value in line.values()] for line in lines]
    return table_bytes(tuple(lines[0]), texts)


def _numbers(row: VariantRow) -> dict[str, object]:
    paired, printed = row.paired, row.published
    pairs = () if paired is None else paired.pairs
    return {
        "table": row.table,
        "variant": row.label,
        "fine_tuned": int(row.tuned),
        "checkpoint": row.checkpoint,
        "flops": row.flops.published,
        "flops_without_alignment": row.flops.unaligned,
        "flops_true": row.flops.true,
        "reduction": row.reduction,
        "runs": len(row.runs),
        "top1": row.top1,
        "top1_sd": row.spread,
        "top1_standard_error": row.standard_error,
        "images_per_s": row.images_per_s,
        "speed_up": row.speed_up,
        "published_gflops": printed.gflops,
        "published_top1_percent": printed.top1,
        "difference": None if paired is None else paired.difference,
        "difference_sd": None if paired is None else paired.spread,
        "better": sum(pair.better for pair in pairs) if pairs else None,
        "worse": sum(pair.worse for pair in pairs) if pairs else None,
        "p": pairs[0].p if len(pairs) == 1 else None,
    }


_LATEX: Final = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "<": "$<$",
    ">": "$>$",
}


def latex(report: AblationReport) -> str:
    r"""The tables for a paper that has \usepackage{booktabs}."""
    parts = ["% written by vssm ablate; needs \\usepackage{booktabs}"]
    for table in tables(report):
        columns = "l" + "r" * (len(table.columns) - 1)
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (table.columns, *table.rows)]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_escaped(f'{table.title}: {table.caption}')}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    lines[0],
                    r"\midrule",
                    *lines[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
