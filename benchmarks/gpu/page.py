"""A run as Markdown, and its short form for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.gpu.program import label
from benchmarks.gpu.result import Document, Row
from rich.table import Table

from vssm.commands.tables import table

_TARGETS = ("target", "asked", "measured", "verdict")
_STAGES = ("stage", "status", "seconds", "limit", "reason")
_VARIANTS = ("layer", "cache", "throughput us", "latency us", "auto us", "auto over the better")
_SUBJECTS = ("subject", "cache", "median us", "5 to 95 %", "n", "x exp", "x special", "x bytes")


def tables(document: Document) -> list[Table]:
    """The stages and the targets."""
    return [
        table("stages", _STAGES, _stages(document)),
        table("targets", _TARGETS, _targets(document)),
    ]


def page(document: Document) -> str:
    """Everything that was measured; what was not is named with its reason."""
    parts = [
        f"# gpu_check on {document.machine.get('gpu', 'an unknown card')}",
        _facts(document),
        _section("Targets", _markdown(_TARGETS, _targets(document))),
        _section("Variants of our scan", _markdown(_VARIANTS, _variants(document))),
        _section("Stages", _markdown(_STAGES, _stages(document))),
        *_measured(document),
        _section(
            "Not measured",
            _markdown(
                ("stage", "what", "why"),
                ((a.stage, a.subject, a.reason) for a in document.absent),
            ),
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(document: Document) -> str:
    facts = {
        **document.machine,
        "commit": document.commit,
        "command": f"`{document.command}`",
        "started": document.started,
        "finished": document.finished or "not finished",
    }
    if document.ceilings is not None:
        facts["ex2 a second"] = f"{document.ceilings.ex2_per_s:.3g}"
        facts["copy, read plus written"] = f"{document.ceilings.copy_bytes_per_s / 1e12:.2f} TB/s"
        facts["empty kernel in a CUDA graph"] = f"{document.ceilings.launch_us:.2f} us"
    how = (
        "Medians of device times inside CUDA graphs, subjects taken in turn: compare ratios within "
        "a table. Warm: the operands are in the cache as far as they fit; cold: they are not. "
        "Floors: the exponentials (x exp), with softplus and gate (x special), and the bytes at "
        "the card's measured rates. Outputs were checked in the same run."
    )
    return "\n".join([*(f"- {key}: {value}" for key, value in facts.items()), "", how])


def _targets(document: Document) -> Iterable[Sequence[str]]:
    for t in document.targets:
        measured = "-" if t.measured is None else f"{t.measured:.3g}"
        name = f"{t.name} ({t.detail})" if t.detail else t.name
        yield name, t.asked, measured, t.verdict


def _stages(document: Document) -> Iterable[Sequence[str]]:
    for s in document.stages:
        yield s.name, s.status, f"{s.seconds:.0f}", f"{s.limit_s:.0f}", s.reason or "-"


def _variants(document: Document) -> Iterable[Sequence[str]]:
    """What the automatic choice is worth: its time over that of the better variant."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for row in document.rows:
        if row.stage == "scans":
            groups.setdefault((label(row.case), row.cache), {})[row.subject] = row.median_us
    for (case, cache), times in groups.items():
        auto, *each = (times.get(f"vssm {v}") for v in ("auto", "throughput", "latency"))
        known = [t for t in each if t is not None]
        over = "-" if auto is None or not known else f"{auto / min(known):.2f}"
        cells = ("-" if t is None else f"{t:.4g}" for t in (*each, auto))
        yield case, cache, *cells, over


def _measured(document: Document) -> Iterable[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in document.rows:
        groups.setdefault((row.stage, label(row.case)), []).append(row)
    for (stage, case), rows in groups.items():
        yield _section(
            f"{stage}: {case}", _markdown(_SUBJECTS, (_cells(document, r) for r in rows))
        )


def _cells(document: Document, row: Row) -> Sequence[str]:
    floors = {} if document.ceilings is None else row.work.floors_us(document.ceilings)
    over = [f"{row.median_us / f:.3g}" if f else "-" for f in floors.values()] or ["-"] * 3
    spread = f"{row.p5_us:.4g} to {row.p95_us:.4g}"
    return row.subject, row.cache, f"{row.median_us:.4g}", spread, str(row.samples), *over


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, empty where there is no row; a cell cannot break it."""
    lines = [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *lines])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
