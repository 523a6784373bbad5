"""`vssm compare` as a function: exports, checkpoints and results on the same images."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.artifact.preprocessing import open_rgb, preprocessing_of
from vssm.checkpoints.hub import check_checkpoint, hub_file
from vssm.errors import check_least, check_most, check_several
from vssm.evaluation.evaluate import COLUMNS, evaluate
from vssm.extras import require
from vssm.files.atomic import atomic_write_bytes, check_apart, check_writable, make_directory
from vssm.files.json import write_json
from vssm.files.page import Illustration, Section, Table, render
from vssm.files.progress import automatic, shows_progress
from vssm.files.table import table_bytes
from vssm.models.registry import check_task
from vssm.runtimes.open import check_runtime, open_session
from vssm.runtimes.session import run_any
from vssm.studies.paired import (
    holm,
    mcnemar,
    own_names,
    paired_interval,
    probability,
    share_interval,
)
from vssm.training.request import ModelSource
from vssm.types import Steps

PAGE, NUMBERS, PAIRS, IMAGES = "index.html", "compare.json", "pairs.csv", "disagreements.csv"
_ROUNDS: Final = 11
_MOST_IMAGES: Final = 4096
_WHAT: Final = "comparing answers image by image"
_THUMBNAIL: Final = 160  # pixels
_REST: Final = "more"  # what a row has beyond the header


@dataclass(frozen=True)
class CompareOptions:
    """How contenders that are no results yet are evaluated, and what is shown.

    Attributes:
        images: folder of images, laid out as for `evaluate`; needed unless all are results.
        model: what checkpoints are of: name, schedule, sizes; its own checkpoint stays empty.
        runtime: what runs the exports.
        threads: of one run; None for all cores.
        batch: images of a run, and of a measured time.
        workers: processes that load images, as for `evaluate`.
        classes: which folder is which class, as for `evaluate`.
        show: disagreement images on the page.

    Raises:
        ValueError: a number is out of its range.
    """

    images: Path | None = None
    model: ModelSource | None = None
    runtime: str = "ort-cpu"
    threads: int | None = None
    batch: int = 32
    workers: int | None = None
    classes: str | os.PathLike[str] | None = None
    show: int = 48

    def __post_init__(self) -> None:
        check_least(1, batch=self.batch)
        check_least(0, show=self.show)
        check_most(_MOST_IMAGES, batch=self.batch)  # so much noise is made for the times


@dataclass(frozen=True)
class Contestant:
    """One of the things compared.

    Attributes:
        name: the end of its path that no other has.
        path: where it is.
        results: the CSV file with a row for each image.
        correct: images whose class came first.
        top1: their share.
        interval: 95 % interval of it.
        ms_per_image: measured, the model alone; None for results that were there already.
    """

    name: str
    path: str
    results: str
    correct: int
    top1: float
    interval: tuple[float, float]
    ms_per_image: float | None


@dataclass(frozen=True)
class Difference:
    """The first less the second, on the same images.

    Attributes:
        first: name of one.
        second: name of the other.
        difference: of top-1, as a share of the images.
        interval: 95 % interval of it.
        better: images that the first alone gets right.
        worse: images that the second alone gets right.
        p: McNemar's exact two-sided test.
        p_adjusted: for the number of pairs, by Holm's method.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p: float
    p_adjusted: float


@dataclass(frozen=True)
class ComparisonReport:
    """What was found.

    Attributes:
        facts: what was compared and how.
        contestants: in the order given.
        pairs: every two of them.
        disagreements: images that some get right and others do not.
    """

    facts: Mapping[str, str]
    contestants: tuple[Contestant, ...]
    pairs: tuple[Difference, ...]
    disagreements: tuple[str, ...]


@dataclass
class _Opened:
    """One of the things compared, on the way to its results."""

    path: Path
    results: Path
    artifact: Artifact | None = None
    rows: dict[str, dict[str, str]] = field(default_factory=dict)


@shows_progress
def compare(
    contestants: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: CompareOptions | None = None,
    *,
    progress: Steps = automatic,
) -> ComparisonReport:
    """Compare classifiers image by image.

    Args:
        contestants: two or more of: directories that `export` wrote, checkpoints of
            `options.model`, and results of `evaluate` (CSV).
        output: directory for the page, the pairs, the disagreements and the numbers; exports of
            checkpoints and results of exports are written there too.
        options: the rest; None for the defaults.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        TypeError: `contestants` is one text.
        ValueError: there are not two, an argument does not fit, or they saw other images.
        VssmError: a package, file or runtime is missing or cannot be used.
    """
    options, output = options or CompareOptions(), Path(output)
    check_several(contestants=contestants)
    paths = [Path(one) for one in contestants]
    _check(paths, options)
    check_apart(output, images=options.images)
    make_directory(output)
    check_writable(output / PAGE)
    names = own_names([str(path.resolve()) for path in paths])
    opened = [
        _open(path, output, number, options, progress) for number, path in enumerate(paths, start=1)
    ]
    for name, one in zip(names, opened, strict=True):
        if one.artifact is not None and options.images is not None:
            _evaluate(name, one, options, progress)
        one.rows = _read(one.results)
    images, unread = _same_images(names, opened)
    hits = [{image: one.rows[image]["correct"] == "1" for image in images} for one in opened]
    times = _times([one.artifact for one in opened], options, progress)
    report = _report(names, opened, hits, times, _facts(options, images, unread))
    _write(output, report, [one.rows for one in opened], options)
    return report


def _check(paths: Sequence[Path], options: CompareOptions) -> None:
    for package in ("matplotlib", "jinja2"):
        require(package)
    if len(paths) < 2:
        raise ValueError(f"contestants={len(paths)} is not two or more; give what to compare with")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:  # by another way to write it, too
            raise ValueError(f"contestants={path} is named twice; name each once")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(
            f"images={options.images} is not a folder; give one that holds a folder for each class"
        )
    check_runtime(options.runtime, threads=options.threads)
    for path in paths:
        if hub_file(path) is not None:
            check_checkpoint(path)
        elif not path.exists():
            raise ValueError(f"contestants={path} is not there; give an export, checkpoint or CSV")
        if path.suffix == ".csv" and path.is_file():
            continue
        if options.images is None:
            raise ValueError(
                f"contestants={path} has no results yet; give --images IMAGES to evaluate it on, "
                "or the evaluate.csv of an evaluation"
            )
        if not path.is_dir() and options.model is None:
            raise ValueError(
                f"contestants={path} is a checkpoint, which does not say of what; give --model NAME"
            )
    if options.model is not None:
        if options.model.checkpoint is not None:
            raise ValueError("model: it has a checkpoint already; leave that out, and compare it")
        options.model.checked()
        check_task(options.model.name, "classification", _WHAT)


def _open(
    path: Path, output: Path, number: int, options: CompareOptions, progress: Steps
) -> _Opened:
    if path.is_dir():
        results = output / f"{number}_{path.resolve().name}.csv"
        artifact = open_artifact(path, only=(MODEL_FILE,))
        check_task(artifact.manifest.name, "classification", _WHAT)
        return _Opened(path, results, artifact)
    if path.suffix == ".csv":
        return _Opened(path, path)
    assert options.model is not None
    from vssm.onnx.export import export
    from vssm.training.run import build_model

    progress(f"exporting {path.name}", 0, 1)
    source = replace(options.model, checkpoint=path)
    folder = output / f"{number}_{path.stem}"
    model = build_model(source, source.checked())
    artifact = export(
        model,
        folder,
        force=True,
        progress=lambda phase, *rest: progress(f"{path.name}: {phase}", *rest),
    )
    return _Opened(path, output / f"{folder.name}.csv", artifact)


def _evaluate(name: str, one: _Opened, options: CompareOptions, progress: Steps) -> None:
    assert one.artifact is not None
    assert options.images is not None
    evaluate(
        one.artifact,
        options.images,
        options.runtime,
        threads=options.threads,
        batch=options.batch,
        workers=options.workers,
        classes=options.classes,
        results=one.results,
        progress=lambda phase, *rest: progress(f"{name}: {phase}", *rest),
    )


def _read(results: Path) -> dict[str, dict[str, str]]:
    """Rows of an evaluation by image."""
    try:
        # "-sig": spreadsheets put a byte order mark in front.
        with results.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restkey=_REST, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"contestants={results} cannot be read as CSV ({error})") from error
    if not rows or not {*COLUMNS} <= set(rows[0]):
        raise ValueError(
            f"contestants={results} is not a result of a classifier's evaluation, which has the "
            f"columns {', '.join(COLUMNS)}, separated by commas; give what `vssm evaluate` wrote"
        )
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=1):
        if reason := _wrong(row) or (row["image"] in found and "its image has a row already"):
            raise ValueError(
                f"contestants={results}, row {number} below the header: {reason}; the file was cut "
                "or changed, so give what `vssm evaluate` wrote"
            )
        found[row["image"]] = row
    return found


def _wrong(row: Mapping[str, str]) -> str:
    """What shows that a row is not as `evaluate` wrote it; nothing where it may be."""
    if _REST in row:
        return "it has more cells than the header"
    if not row["image"] or not row["class"].isdecimal():
        return "it does not name an image and the number of its class"
    if row["error"]:
        return ""
    right = str(int(row["predicted"] == row["class"]))
    if row["correct"] != right:
        return (
            f"class {row['class']!r} and predicted {row['predicted']!r} do not go with correct "
            f"{row['correct']!r}"
        )
    try:
        share = float(row["probability"])
    except ValueError:
        share = math.nan
    return "" if 0 <= share <= 1 else f"probability {row['probability']!r} is not in [0, 1]"


def _same_images(names: Sequence[str], opened: Sequence[_Opened]) -> tuple[list[str], int]:
    """The images that all could read, and how many one of them could not."""
    first = opened[0].rows
    for name, one in zip(names[1:], opened[1:], strict=True):
        odd = sorted(set(first) ^ set(one.rows))
        if odd:
            has, lacks = (names[0], name) if odd[0] in first else (name, names[0])
            raise ValueError(
                f"contestants={name}: {len(odd):,} images are not in both: {lacks} lacks "
                f"{odd[0]}, which {has} has; evaluate both on one folder"
            )
        moved = [image for image in first if first[image]["class"] != one.rows[image]["class"]]
        if moved:
            raise ValueError(
                f"contestants={name}: {moved[0]} is class {one.rows[moved[0]]['class']} there and "
                f"{first[moved[0]]['class']} for {names[0]}; evaluate both with the same --classes"
            )
    images = [image for image in first if all(not one.rows[image]["error"] for one in opened)]
    if not images:
        raise ValueError("contestants: there is no image that all of them could read")
    return images, len(first) - len(images)


def _times(
    artifacts: Sequence[Artifact | None], options: CompareOptions, progress: Steps
) -> list[float | None]:
    """Milliseconds an image of each export, run in turn on the same noise; None for results."""
    live = [(i, one) for i, one in enumerate(artifacts) if one is not None]
    found: list[float | None] = [None] * len(artifacts)
    if not live:
        return found
    sessions = [open_session(one, options.runtime, threads=options.threads) for _, one in live]
    try:
        make, seconds = np.random.default_rng(0), [[] for _ in live]  # type: ignore[var-annotated]
        feeds = [_noise(make, one, options.batch) for _, one in live]
        for turn in range(_ROUNDS + 1):
            progress("measuring times, rounds", turn, _ROUNDS + 1)
            for session, images, some in zip(sessions, feeds, seconds, strict=True):
                start = time.perf_counter()
                run_any(session, images)
                if turn:  # the first warms up
                    some.append(time.perf_counter() - start)
        progress("measuring times, rounds", _ROUNDS + 1, _ROUNDS + 1)
    finally:
        for session in sessions:
            session.close()
    for (i, _), some in zip(live, seconds, strict=True):
        found[i] = 1e3 * statistics.median(some) / options.batch
    return found


def _noise(make: np.random.Generator, artifact: Artifact, batch: int) -> Any:
    # Not the size of the input, which may be open: it is that of the images.
    return make.standard_normal((batch, 3, *preprocessing_of(artifact).crop), np.float32)


def _facts(options: CompareOptions, images: Sequence[str], unread: int) -> dict[str, str]:
    from vssm.runtimes.ort import cpu_name

    threads = "all cores" if options.threads is None else f"threads: {options.threads}"
    return {
        "images": f"{len(images):,}" + (f"; {unread:,} that not all could read" if unread else ""),
        "times": f"median of {_ROUNDS} runs in turn, batch {options.batch}, {options.runtime}, "
        f"{threads}, {cpu_name()}",
        "intervals": "95 %: Wilson's of an accuracy, Bonett and Price's of a paired difference",
        "p": "McNemar's exact two-sided test; adjusted for the number of pairs by Holm's method",
    }


def _report(
    names: Sequence[str],
    opened: Sequence[_Opened],
    hits: Sequence[Mapping[str, bool]],
    times: Sequence[float | None],
    facts: Mapping[str, str],
) -> ComparisonReport:
    images = list(hits[0])
    total = len(images)
    found = [
        Contestant(
            name,
            str(one.path),
            str(one.results),
            correct := sum(right.values()),
            correct / total,
            share_interval(correct, total),
            ms,
        )
        for name, one, right, ms in zip(names, opened, hits, times, strict=True)
    ]
    splits = []
    for i, j in itertools.combinations(range(len(names)), 2):
        better = sum(hits[i][image] and not hits[j][image] for image in images)
        worse = sum(hits[j][image] and not hits[i][image] for image in images)
        splits.append((i, j, better, worse, mcnemar(better, worse)))
    adjusted = holm([p for *_, p in splits])
    pairs = [
        Difference(
            names[i],
            names[j],
            (better - worse) / total,
            paired_interval(better, worse, total),
            better,
            worse,
            p,
            p_adjusted,
        )
        for (i, j, better, worse, p), p_adjusted in zip(splits, adjusted, strict=True)
    ]
    odd = tuple(image for image in images if len({right[image] for right in hits}) > 1)
    return ComparisonReport(facts, tuple(found), tuple(pairs), odd)


ACCURACY_COLUMNS: Final = ("", "top-1 %", "95 % interval", "ms per image")
PAIR_COLUMNS: Final = (
    *("", "difference, points", "95 % interval", "better", "worse", "p", "p, adjusted"),
)


def accuracy_cells(one: Contestant) -> tuple[str, ...]:
    """A contestant as a row of texts."""
    low, high = (100 * end for end in one.interval)
    ms = "-" if one.ms_per_image is None else f"{one.ms_per_image:.3g}"
    return one.name, f"{100 * one.top1:.2f}", f"{low:.2f} to {high:.2f}", ms


def pair_cells(pair: Difference) -> tuple[str, ...]:
    """A pair as a row of texts."""
    low, high = (100 * end for end in pair.interval)
    return (
        f"{pair.first} less {pair.second}",
        f"{100 * pair.difference:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{pair.better:,}",
        f"{pair.worse:,}",
        probability(pair.p),
        probability(pair.p_adjusted),
    )


def _write(
    output: Path,
    report: ComparisonReport,
    rows: Sequence[Mapping[str, Mapping[str, str]]],
    options: CompareOptions,
) -> None:
    names = [one.name for one in report.contestants]
    lines = [
        (
            image,
            rows[0][image]["class"],
            *(one[image][k] for one in rows for k in ("predicted", "probability")),
        )
        for image in report.disagreements
    ]
    columns = [f"{name} {k}" for name in names for k in ("predicted", "probability")]
    atomic_write_bytes(output / IMAGES, table_bytes(("image", "class", *columns), lines))
    pairs = [
        (p.first, p.second, p.difference, *p.interval, p.better, p.worse, p.p, p.p_adjusted)
        for p in report.pairs
    ]
    header = ("first", "second", "difference", "low", "high", "better", "worse", "p", "p_adjusted")
    atomic_write_bytes(output / PAIRS, table_bytes(header, pairs))
    tables = [
        Table(ACCURACY_COLUMNS, [*map(accuracy_cells, report.contestants)], "top-1", numbers=True),
        Table(PAIR_COLUMNS, [*map(pair_cells, report.pairs)], "paired differences", numbers=True),
    ]
    figures = [Illustration(svg)] if (svg := _plot(report)) else []
    sections = [Section(tables=tables, figures=figures), _shown(report, rows, options)]
    atomic_write_bytes(output / PAGE, render("vssm compare", report.facts, sections).encode())
    write_json(output / NUMBERS, report)


def _shown(
    report: ComparisonReport,
    rows: Sequence[Mapping[str, Mapping[str, str]]],
    options: CompareOptions,
) -> Section:
    """Images on which the contestants disagree, evenly from all of them."""
    odd, count = report.disagreements, min(options.show, len(report.disagreements))
    text = f"{len(odd):,} images that some get right and others do not; {IMAGES} has all."
    if options.images is None:
        return Section("disagreements", [f"{text} None is shown: give --images IMAGES."])
    chosen = [odd[i * len(odd) // count] for i in range(count)]
    figures = []
    for image in chosen:
        said = [
            f"{one.name}: {row[image]['predicted']}, {float(row[image]['probability']):.0%}"
            for one, row in zip(report.contestants, rows, strict=True)
        ]
        caption = f"{image}, class {rows[0][image]['class']}; {'; '.join(said)}"
        figures.append(Illustration(_thumbnail(options.images / image), caption=caption))
    return Section("disagreements", [f"{text} Shown: {count:,}."], figures=figures)


def _thumbnail(path: Path) -> bytes:
    image = open_rgb(path)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _plot(report: ComparisonReport) -> str | None:
    """Accuracy against measured time; None where nothing was measured."""
    from vssm.studies.plot import element, picture, scatter

    measured = [one for one in report.contestants if one.ms_per_image is not None]
    if not measured:
        return None
    points = [
        (one.name, one.ms_per_image or 0.0, 100 * one.top1, [100 * end for end in one.interval])
        for one in measured
    ]
    figure = scatter(points, x="milliseconds per image", y="top-1 %; bars: 95 % interval")
    return element(picture(figure, "svg"))
