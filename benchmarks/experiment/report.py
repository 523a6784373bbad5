"""What the experiment found as Markdown, JSON and one plot."""

from __future__ import annotations

import io
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch
from benchmarks.experiment import probes, work
from benchmarks.experiment.cases import Case
from benchmarks.experiment.contrasts import MAIN, Contrast, make_contrasts
from benchmarks.experiment.rows import SWEEP, TUNED, ZERO_SHOT, Row, Seeds, make_rows
from benchmarks.experiment.statistics import Difference, Mean, mean

from vssm.files.atomic import atomic_write_bytes
from vssm.files.json import write_json

TABLES, NUMBERS, PLOT = "experiment.md", "experiment.json", "experiment.png"
Why = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """Everything about one case; `why` is the mean over its seeds, `probes` percent right."""

    case: Case
    seeds: Seeds
    rows: Sequence[Row]
    contrasts: Sequence[Contrast]
    why: Why
    probes: Mapping[str, Mean]


def collect(case: Case, folder: Path) -> Found:
    """Read a case whose seeds are all there."""
    places = [folder / str(seed) for seed in range(case.seeds)]
    seeds = [work.read(place) for place in places]
    whys = [json.loads((place / "why.json").read_text()) for place in places]
    rows = make_rows(case, seeds, work.costs(case))
    right = [probes.read(place) for place in places]
    probed = {name: mean([seed[name] for seed in right]) for name in right[0]}
    return Found(case, seeds, rows, make_contrasts(case, seeds), _mean(whys), probed)


def write(found: Sequence[Found], output: Path) -> None:
    """The three files."""
    atomic_write_bytes(output / PLOT, plot(found))
    atomic_write_bytes(output / TABLES, markdown(found).encode())
    write_json(output / NUMBERS, {"ran": _ran(), "cases": [_plain(one) for one in found]})


def _plain(found: Found) -> dict[str, Any]:
    case = asdict(found.case)
    return {**asdict(found), "case": case}


def _ran() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{module.__name__: str(module.__version__) for module in (torch, np, scipy, sklearn)},
        "threads": str(torch.get_num_threads()),
    }


def _mean(values: Sequence[Any]) -> Any:
    """Numbers in like nested objects, averaged."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(list(some)) for some in zip(*values, strict=True)]
    return statistics.fmean(values)


def markdown(found: Sequence[Found]) -> str:
    """A section a case: accuracies, answers, and what explains them."""
    parts = ["# Pruning on small real data", _overview(found)]
    for one in found:
        case = one.case
        parts.append(
            f"## {case.key}\n\n{case.model} with {case.options}, kept {case.schedule}, initial "
            f"steps times {case.step_factor:g}; {case.seeds} seeds, {one.seeds[0]['images']:,} "
            "held-out images."
        )
        for table in (ZERO_SHOT, TUNED, SWEEP):
            if rows := [row for row in one.rows if row.table == table]:
                parts.append(_accuracies(table, rows))
        parts.append(_answers(one.contrasts))
        parts.append(_probed(one.probes))
        parts.append(_explained(one.why))
    parts.append(f"![differences]({PLOT})")
    return "\n\n".join(parts) + "\n"


def _overview(found: Sequence[Found]) -> str:
    """What alignment gives beside how much a dense model hangs on what it keeps right."""
    lines = [
        "| case | tokens of memory, median | every second decay twice | order shuffled | "
        "alignment, zero-shot | fine-tuned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        memory = statistics.fmean(layer["0.5"] for layer in one.why["tokens_of_memory"])
        whole, decays, order = (m.mean for m in one.probes.values())
        gain = {c.table: c.difference for c in one.contrasts if c.question == "alignment"}
        lines.append(
            f"| {one.case.key} | {memory:.0f} | {decays - whole:+.2f} | {order - whole:+.2f} | "
            f"{shown(gain[ZERO_SHOT])} | {shown(gain.get(TUNED))} |"
        )
    return "\n".join(lines)


def _accuracies(table: str, rows: Sequence[Row]) -> str:
    lines = [
        f"| {table} | MFLOPs, published rule | true | top-1 % | less plain removal |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.label} | {row.flops['published'] / 1e6:.2f} | {row.flops['true'] / 1e6:.2f} | "
        f"{row.top1.mean:.2f} ± {row.top1.spread:.2f} | {shown(row.to_plain)} |"
        for row in rows
    ]
    return "\n".join(lines)


def _answers(contrasts: Sequence[Contrast]) -> str:
    lines = ["| question | weights | difference, points |", "| --- | --- | --- |"]
    lines += [f"| {c.question} | {c.table} | {shown(c.difference)} |" for c in contrasts]
    return "\n".join(lines)


def shown(difference: Difference | None) -> str:
    """A difference with its standard error and interval; bold where zero lies outside."""
    if difference is None:
        return "-"
    d = difference
    mark = "**" if d.is_significant else ""
    return f"{mark}{d.mean:+.2f}{mark} ± {d.error:.2f} ({d.low:+.2f} to {d.high:+.2f})"


def _probed(found: Mapping[str, Mean]) -> str:
    lines = ["| dense model, its scans changed | top-1 % |", "| --- | --- |"]
    lines += [f"| {name} | {m.mean:.2f} ± {m.spread:.2f} |" for name, m in found.items()]
    return "\n".join(lines)


def _explained(why: Why) -> str:
    middle = [f"{memory['0.5']:.1f}" for memory in why["tokens_of_memory"]]
    lines = [
        f"- median tokens of memory by layer, 1 / (delta |A|): {', '.join(middle)}",
        f"- mean lag of what a scan reads, by layer: {_numbers(why['mean_lag'])}",
        f"- its share nearer than 4 tokens: {_numbers(why['share_near'])}",
        f"- state over skip in the layer behind the first stage: {why['state_over_skip']:.2f}",
        f"- logits of gap from those of none, relative: {why['gap_from_none']:.2f}",
        "",
        "| first pruned layer | error of the state | size | along the dense one |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {key} | {row['error']:.3f} | {row['size']:.3f} | {row['along']:.3f} |"
        for key, row in why["state"].items()
    ]
    lines += ["", "| | error of the scan's input | of the logits |", "| --- | --- | --- |"]
    lines += [
        f"| {key} | {why['convolution'][key]:.3f} | {error:.3f} |"
        for key, error in why["logits"].items()
    ]
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def plot(found: Sequence[Found]) -> bytes:
    """The main differences with their intervals, a panel a case."""
    from matplotlib.figure import Figure

    panelled = {f.case.key: [c for c in f.contrasts if c.question in MAIN] for f in found}
    heights = [len(some) + 1 for some in panelled.values()]
    figure = Figure(figsize=(9, 1 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (key, some) in zip(panels[:, 0], panelled.items(), strict=True):
        _panel(axes, key, some)
    panels[-1, 0].set_xlabel("difference of top-1, points: mean and 95 % interval over seeds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, title: str, contrasts: Sequence[Contrast]) -> None:
    colours = {ZERO_SHOT: "#0072b2", TUNED: "#d55e00"}
    places = range(len(contrasts))
    for place, contrast in zip(places, contrasts, strict=True):
        d = contrast.difference
        bars = [[d.mean - d.low], [d.high - d.mean]]
        axes.errorbar([d.mean], [place], xerr=bars, fmt="o", color=colours[contrast.table])
    axes.axvline(0, color="#000000", linewidth=0.7)
    axes.set_yticks(places, [f"{c.question}, {c.table}" for c in contrasts], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=10, loc="left")
