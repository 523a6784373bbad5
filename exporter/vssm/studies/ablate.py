"""`vssm ablate` as a function: a model and a folder of images to tables and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vssm._version import __version__
from vssm.checkpoints.load import state_digest
from vssm.errors import UnsupportedError
from vssm.evaluation.data import ImageFolder, load_in_order, open_images
from vssm.extras import require
from vssm.files.atomic import (
    atomic_write_bytes,
    check_apart,
    check_writable,
    make_directory,
    sha256_of,
)
from vssm.files.json import write_json
from vssm.files.progress import automatic, shows_progress
from vssm.models import standard_config
from vssm.models.cost import merging_of_equal_cost
from vssm.models.family import Published
from vssm.pruning.schedule import MergeSchedule, PruneSchedule
from vssm.runtimes.torch import torch_threads
from vssm.studies import plot, tables
from vssm.studies.measure import AblationJournal, VariantCost, machine, measure, prepare
from vssm.studies.paired import own_names
from vssm.studies.plan import AblationOptions, Plan, Run, make_plan, published
from vssm.studies.report import AblationReport, Measured, Setting, VariantRow, make_row
from vssm.studies.runs import (
    Trainer,
    check_training,
    given_runs,
    model_of_run,
    open_checkpoints,
    zero_shot_runs,
)
from vssm.studies.source import LoadedSource
from vssm.training.recipe import Recipe
from vssm.training.request import ModelSource
from vssm.types import Steps

TABLES, NUMBERS = "ablation.md", "ablation.json"
PLOTS = {"accuracy_flops": "flops", "accuracy_time": "time"}
FORMATS = ("png", "svg", "pdf")


@shows_progress
def ablate(
    source: ModelSource,
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: AblationOptions | None = None,
    *,
    progress: Steps = automatic,
) -> AblationReport:
    """Compare alignments, importances, keep ratios, merging and EViT's way on a data set.

    Every run sees every batch, in PyTorch. Writes its tables as Markdown, CSV, LaTeX, JSON and a
    page, and two plots, into `output`, over those of a run before, and trained weights into
    `output`/finetuned. A call that was stopped, by kill -9 too, goes on where it ended once it is
    called with the same arguments, and ends with the same accuracies; times are of whichever call
    measured them.

    Args:
        source: the model, by its name or as the directory of an export, and its schedule.
        images: a folder that holds one folder a class; files of any size.
        output: directory to write; made where it is missing.
        options: the rest; None for the defaults.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Returns:
        The rows: top-1 as shares in [0, 1], FLOPs in multiply-adds an image, speed in images/s.

    Raises:
        ValueError: an argument does not fit, or no image can be read.
        VssmError: matplotlib is missing, a file or checkpoint cannot be used, or what a stopped
            call left is of another ablation.
    """
    for package in ("matplotlib", "jinja2"):  # before anything is measured: it is drawn at the end
        require(package)
    options = options or AblationOptions()
    train = None if options.training is None else options.training.data
    check_apart(output, images=Path(images), train=train)
    with torch_threads(options.threads, options.workers) as (threads, workers):
        options = replace(options, threads=threads, workers=workers)
        return _ablate(source, Path(images), Path(output), options, progress)


def _ablate(
    source: ModelSource, images: Path, output: Path, options: AblationOptions, progress: Steps
) -> AblationReport:
    opened = open_checkpoints(source, options.checkpoints)
    schedule = _schedule(source, opened)
    plan = _plan(opened[0], schedule, options)
    runs = [*zero_shot_runs(plan, len(opened)), *given_runs(plan, options.finetuned)]
    folder = open_images(
        images,
        int(opened[0].config["num_classes"]),
        labels=opened[0].labels,
        classes=options.classes,
    )
    facts = _facts(opened, plan, schedule, options, folder)
    facts |= _training_facts(options, plan, opened, folder)
    make_directory(output)
    check_writable(output / TABLES)  # one stands for all: they go into one directory
    # Before the training, which takes long.
    ready = _models(runs, opened, options, progress)
    trained, left_out = Trainer(source, opened, options, output, progress).runs(plan)
    ready = ready.joined(_models(trained, opened, options, progress), left_out)
    runs = [run for run in (*runs, *trained) if run.key in ready.models]
    header = _header(opened, schedule, runs, options, folder)  # has the hashes of trained weights
    path = output / f"{NUMBERS}.journal"
    with AblationJournal(path, header, restart=options.restart) as journal:
        batches = _batches(folder, opened[0], options, done=len(journal.done))
        outcomes = measure(
            ready.models,
            batches,
            total=len(folder.pictures),
            device=options.device,
            journal=journal,
            progress=progress,
        )
        progress("drawing tables and plots", 0, 1)
        measured = Measured(runs, outcomes, ready.costs)
        rows = _rows(plan, opened, measured, average=options.average)
        unreadable = [pair for step in journal.done for pair in step.unreadable]
        setting = _setting(opened[0], options, folder)
        report = _write(
            output, AblationReport(setting, facts, tuple(rows), ready.left_out, tuple(unreadable))
        )
        journal.remove()  # last: until the tables are written, it is all there is
    return report


def _schedule(source: ModelSource, opened: Sequence[LoadedSource]) -> PruneSchedule:
    schedule = opened[0].schedule
    if schedule is None:
        raise ValueError(
            f"model={source.name!r} has no schedule to ablate; give --schedule BLOCK:RATIO,..."
        )
    if isinstance(schedule, MergeSchedule):
        raise UnsupportedError(
            f"schedule={schedule.describe()!r} merges, but an ablation begins with pruning, beside "
            "which it merges by itself at equal FLOPs; give --schedule BLOCK:RATIO,..."
        )
    return schedule


def _plan(source: LoadedSource, schedule: PruneSchedule, options: AblationOptions) -> Plan:
    dense = source.variant(None)
    # The other families refuse it, and the report says why.
    merging = merging_of_equal_cost(dense, schedule) if dense.merges else MergeSchedule()
    return make_plan(
        schedule,
        seeds=options.seeds,
        seed=options.seed,
        ratios=options.ratios,
        other_conv=dense.list_convolution,
        merging=merging,
    )


@dataclass(frozen=True)
class _Ready:
    """Models and costs of runs by their keys, and what cannot run, with its reason."""

    models: dict[str, Any]
    costs: dict[str, VariantCost]
    left_out: dict[str, str]

    def joined(self, other: _Ready, left_out: dict[str, str]) -> _Ready:
        return _Ready(
            {**self.models, **other.models},
            {**self.costs, **other.costs},
            {**self.left_out, **left_out, **other.left_out},
        )


def _models(
    runs: Sequence[Run],
    opened: Sequence[LoadedSource],
    options: AblationOptions,
    progress: Steps,
) -> _Ready:
    ready = _Ready({}, {}, {})
    for number, run in enumerate(runs):
        progress("building the variants", number, len(runs), run.key)
        try:
            model = model_of_run(run, opened)
        # The report says so, and the other variants run.
        except UnsupportedError as error:
            ready.left_out[run.name] = str(error)
            continue
        ready.models[run.key], ready.costs[run.key] = prepare(
            run.variant, model, backend=options.backend, device=options.device
        )
    return ready


def _header(
    opened: Sequence[LoadedSource],
    schedule: PruneSchedule,
    runs: Sequence[Run],
    options: AblationOptions,
    folder: ImageFolder,
) -> dict[str, str]:
    """What must be the same when a stopped ablation goes on."""
    tuned = (f"{run.key}: {sha256_of(run.weights)}" for run in runs if run.weights is not None)
    return {
        "model": opened[0].name,
        "config": json.dumps(dict(opened[0].config), sort_keys=True),
        "weights": ", ".join(state_digest(one.state) for one in opened),
        "schedule": repr(schedule),
        "runs": "; ".join(run.key for run in runs),
        "fine-tuned": "; ".join(tuned),
        "images": folder.fingerprint(),
        "classes": folder.rule,
        "preprocessing": repr(opened[0].preprocessing),
        "batch": str(options.batch),
        "backend": options.backend,
        # Times of two machines must not meet in one median.
        "machine": machine(options.device),
        "vssm": __version__,
    }


def _batches(
    folder: ImageFolder,
    source: LoadedSource,
    options: AblationOptions,
    *,
    done: int,
) -> Iterator[tuple[Any, list[int], list[tuple[str, str]]]]:
    """Images, classes and what cannot be read of every batch that is not done."""
    size = options.batch
    pictures = folder.pictures
    # The journal has a line for every batch, of unreadable images too: so many are done.
    batches = [pictures[i : i + size] for i in range(0, len(pictures), size)][done:]
    files = [[str(folder.root / p.path) for p in some] for some in batches]
    loaded = load_in_order(files, source.preprocessing, workers=options.workers or 0)
    for some, batch in zip(batches, loaded, strict=True):
        pairs = list(zip(some, batch.errors, strict=True))
        unreadable = [(p.path, error) for p, error in pairs if error is not None]
        yield batch.images, [p.target for p, error in pairs if error is None], unreadable


def _rows(
    plan: Plan, opened: Sequence[LoadedSource], measured: Measured, *, average: bool
) -> list[VariantRow]:
    standard = _is_standard(opened[0])  # of other sizes of a model nothing is published
    schedules = {variant.key: variant.schedule for variant in plan.variants}
    apart = len(opened) > 1 and not average
    each = list(enumerate(own_names([one.weights for one in opened]))) if apart else []
    # Weights that were handed over begin with a checkpoint that nobody knows: one row for all.
    handed = any(run.tuned and run.checkpoint is None for run in measured.runs)
    weights, rows = ", ".join(one.weights for one in opened), []
    for line in plan.lines:
        key = line.keys[0]
        printed = published(opened[0].name, key, schedules[key]) if standard else Published()
        for tuned in (False, True):
            kept_apart = [None] if not each or (tuned and handed) else each
            found = [
                make_row(
                    line, measured, tuned=tuned, weights=weights, published=printed, checkpoint=one
                )
                for one in kept_apart
            ]
            rows += [row for row in found if row is not None]
    return rows


def _setting(source: LoadedSource, options: AblationOptions, folder: ImageFolder) -> Setting:
    dense = source.variant(None)
    return Setting(
        source.name,
        dense.image_size,
        sum(p.numel() for p in dense.parameters()),
        len(folder.pictures),
        _ran(options),
    )


def _ran(options: AblationOptions) -> str:
    return f"{machine(options.device)}, backend {options.backend}, batch {options.batch}"


def _is_standard(source: LoadedSource) -> bool:
    return dict(source.config) == standard_config(source.name)


def _facts(
    opened: Sequence[LoadedSource],
    plan: Plan,
    schedule: PruneSchedule,
    options: AblationOptions,
    folder: ImageFolder,
) -> dict[str, str]:
    merging = {v.key: v.schedule for v in plan.variants}["merge"]
    # Each sentence once, however many checkpoints it is true of.
    loaded = "; ".join(dict.fromkeys(one.loaded for one in opened if one.loaded is not None))
    return {
        "model": opened[0].name,
        "weights": ", ".join(one.weights for one in opened),
        **({} if len(opened) == 1 else {"checkpoints": _together(options, len(opened))}),
        **({"loaded": loaded} if loaded else {}),
        "kept": schedule.describe(),
        **({} if merging is None else {"merged": merging.describe()}),
        "images": f"{len(folder.pictures):,} in {folder.root}",
        "classes": "; ".join((folder.rule, *folder.notes)),
        "ran": _ran(options),
        "images/s": "median over the full batches but a call's first, model alone, runs in turn",
    }


def _together(options: AblationOptions, count: int) -> str:
    if options.average:
        return f"{count}, averaged: a row is the mean over them, ± their standard deviation"
    return f"{count}, apart: a row for each"


def _training_facts(
    options: AblationOptions, plan: Plan, opened: Sequence[LoadedSource], tested: ImageFolder
) -> dict[str, str]:
    """What is trained; refuses what could only fail later."""
    training = options.training
    if training is None:
        return {}
    images = check_training(training, plan, opened, options, tested)
    numbers, usual = asdict(training.recipe), asdict(Recipe())
    # The seed is each training's own.
    changed = [f"{k}={v}" for k, v in numbers.items() if k != "seed" and v != usual[k]]
    same = training.data.resolve() == tested.root.resolve()
    seen = ", which are those to measure on" if same else ""
    return {
        "fine-tuned": f"{', '.join(training.variants)}: {training.seeds or len(opened)} each, on "
        f"{images:,} images in {training.data}{seen}; the weights of the last step, not their "
        "average",
        "recipe": f"published, but {', '.join(changed)}" if changed else "published",
    }


def _write(output: Path, report: AblationReport) -> AblationReport:
    figures = {name: plot.draw(report, against=against) for name, against in PLOTS.items()}
    made = {
        f"{name}.{kind}": plot.picture(figure, kind)
        for name, figure in figures.items()
        for kind in FORMATS
    }
    elements = {
        f"{report.setting.caption} ({name})": plot.element(made[f"{name}.svg"]) for name in figures
    }
    made["ablation.csv"] = tables.csv(report)
    made["ablation.tex"] = tables.latex(report).encode()
    made["ablation.html"] = tables.html(report, elements).encode()
    # Last, as it refers to the plots.
    made[TABLES] = tables.markdown(report, [f"{name}.png" for name in PLOTS]).encode()
    for name, content in made.items():
        atomic_write_bytes(output / name, content)
    write_json(output / NUMBERS, report)
    return report
