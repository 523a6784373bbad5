"""`vssm ablate` as a function: a model and a folder of images to tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import UnsupportedError
from exporter.files import atomic_write_bytes, check_writable
from exporter.json_files import write_json
from exporter.pipeline_subject import Subject, SubjectRequest, open_subject
from exporter.preprocessing import read_labels
from exporter.schedule import PruneSchedule
from exporter.training.evaluate_data import Picture, find_pictures, load_in_order

if TYPE_CHECKING:
    from exporter.training.ablate_plan import Plan, Variant
    from exporter.training.ablate_report import AblationReport, Row
    from exporter.training.ablate_run import Cost

TABLES, NUMBERS = "ablation.md", "ablation.json"
PLOTS = {"accuracy_flops.png": "flops", "accuracy_time.png": "time"}
DEVICES = ("cpu", "cuda")
_TUNED = "fine-tuned "  # before the key of a variant with weights of its own


@dataclass(frozen=True)
class AblationOptions:
    """What `vssm ablate` was asked for beside the model; the fields are its options."""

    seeds: int = 3
    ratios: Sequence[str] = ("0.9", "0.8", "0.7", "0.6", "0.5")
    batch: int = 32
    workers: int = 0
    classes: Path | None = None
    operators: str = "auto"
    device: str = "cpu"
    finetuned: Mapping[str, Path] = field(default_factory=dict)


def ablate(
    request: SubjectRequest,
    images: Path,
    output: Path,
    options: AblationOptions | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> AblationReport:
    """Compare alignments, importances, the EViT-style baseline and keep ratios on a data set.

    Every variant runs on every batch, in PyTorch. Writes `ablation.md`, `ablation.json` and two
    plots into `output`, over those of a run before.

    Args:
        request: the model and its schedule.
        images: a folder that holds one folder a class.
        output: directory to write; made where it is missing.
        options: the rest; None for the defaults.
        progress: called with a line of text after every batch.

    Raises:
        ValueError: an argument does not fit, or no image can be read.
        VssmError: matplotlib is missing, or a file or checkpoint cannot be used.
    """
    from exporter.training.ablate_plan import make_plan
    from exporter.training.ablate_run import measure
    from exporter.training.visualize_figures import require_matplotlib

    options = options or AblationOptions()
    require_matplotlib()
    _check(options)
    subject = open_subject(request)
    schedule = subject.schedule
    if schedule is None:
        raise ValueError(
            f"source={request.source!r} has no schedule to ablate; give --schedule BLOCK:RATIO,..."
        )
    plan = make_plan(schedule, seeds=options.seeds, ratios=options.ratios)
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output / TABLES)
    models, costs, left_out = _models(subject, plan, options)
    pictures = _pictures(images, subject, options)
    unreadable: list[tuple[str, str]] = []
    batches = _batches(images, pictures, subject, options, unreadable)
    outcomes = measure(
        models, batches, total=len(pictures), device=options.device, progress=progress
    )
    rows = _rows(plan, subject, schedule, outcomes, costs)
    facts = _facts(subject, schedule, options, images, len(pictures))
    return _write(output, facts, rows, left_out, unreadable)


def _check(options: AblationOptions) -> None:
    if options.batch < 1:
        raise ValueError(f"batch={options.batch} is below 1; give the number of images of a run")
    if options.workers < 0:
        raise ValueError(f"workers={options.workers} is below 0; 0 loads images in this process")
    if options.device not in DEVICES:
        raise ValueError(
            f"device={options.device!r} is not one of {', '.join(DEVICES)}; choose one of these"
        )


def _models(
    subject: Subject, plan: Plan, options: AblationOptions
) -> tuple[dict[str, Any], dict[str, Cost], dict[str, str]]:
    """Model and cost of every variant by its key, and of those that cannot be, the reason."""
    from exporter.training.ablate_run import prepare

    models: dict[str, Any] = {}
    costs: dict[str, Cost] = {}
    left_out: dict[str, str] = {}
    named = {v.key: v for v in plan.variants}
    if unknown := sorted(set(options.finetuned) - set(named)):
        raise ValueError(
            f"finetuned={unknown[0]!r} is no variant of this ablation; name one of "
            f"{', '.join(named)}"
        )
    wanted: list[tuple[str, Variant, Path | None]] = [(v.key, v, None) for v in plan.variants]
    wanted += [(_TUNED + k, named[k], file) for k, file in options.finetuned.items()]
    for key, variant, file in wanted:
        try:
            model = _model(subject, variant, file)
        except UnsupportedError as error:
            left_out[key] = str(error)
            continue
        models[key], costs[key] = prepare(
            variant, model, operators=options.operators, device=options.device
        )
    return models, costs, left_out


def _model(subject: Subject, variant: Variant, file: Path | None) -> Any:
    if file is None:
        return subject.variant(variant.schedule)
    from exporter.checkpoint import load_checkpoint
    from exporter.models import model_from_config

    model = model_from_config(subject.name, subject.config, variant.schedule)
    load_checkpoint(model, file)
    return model


def _pictures(images: Path, subject: Subject, options: AblationOptions) -> list[Picture]:
    classes = int(subject.config["num_classes"])
    names = None if options.classes is None else read_labels(options.classes, classes)
    return find_pictures(images, classes, names)


def _batches(
    root: Path,
    pictures: Sequence[Picture],
    subject: Subject,
    options: AblationOptions,
    unreadable: list[tuple[str, str]],
) -> Iterator[tuple[Any, list[int]]]:
    """Images and classes of every batch; what cannot be read goes to `unreadable`."""
    size = options.batch
    batches = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    files = [[str(root / p.path) for p in some] for some in batches]
    loaded = load_in_order(files, subject.preprocessing, workers=options.workers)
    for some, batch in zip(batches, loaded, strict=True):
        pairs = list(zip(some, batch.errors, strict=True))
        unreadable += [(p.path, error) for p, error in pairs if error is not None]
        yield batch.images, [p.target for p, error in pairs if error is None]


def _rows(
    plan: Plan,
    subject: Subject,
    schedule: PruneSchedule,
    outcomes: Mapping[str, Any],
    costs: Mapping[str, Cost],
) -> list[Row]:
    from exporter.training.ablate_plan import Line, Published, published
    from exporter.training.ablate_report import FINE_TUNED, make_row

    rows = []
    for line in plan.lines:
        printed = published(subject.name, line.keys[0], schedule)
        # Other sizes of a model are not the paper's: nothing is published of them.
        printed = printed if _is_standard(subject) else Published(None, None)
        tuned = tuple(_TUNED + key for key in line.keys)
        for keys, label, weights in (
            (line.keys, line.label, subject.weights),
            (tuned, f"{line.label}, {FINE_TUNED}", FINE_TUNED),
        ):
            if all(key in outcomes for key in keys):
                found = Line(line.table, label, keys)
                rows.append(make_row(found, outcomes, costs, weights=weights, published=printed))
    return rows


def _is_standard(subject: Subject) -> bool:
    from exporter.models.catalog import standard_config

    return dict(subject.config) == standard_config(subject.name)


def _facts(
    subject: Subject, schedule: PruneSchedule, options: AblationOptions, images: Path, count: int
) -> dict[str, str]:
    from exporter.training.ablate_run import machine

    pruned = ", ".join(f"{r} after block {b}" for b, r in schedule.ratios.items())
    return {
        "model": subject.name,
        "weights": subject.weights,
        "kept": pruned,
        "images": f"{count:,} in {images}",
        "ran": f"{machine(options.device)}, operators {options.operators}, batch {options.batch}",
        "images/s": "median over the full batches but the first, model alone, variants in turn",
    }


def _write(
    output: Path,
    facts: dict[str, str],
    rows: list[Row],
    left_out: dict[str, str],
    unreadable: list[tuple[str, str]],
) -> AblationReport:
    from exporter.training.ablate_report import AblationReport, markdown, plot

    report = AblationReport(facts, tuple(rows), left_out, tuple(unreadable))
    for name, against in PLOTS.items():
        atomic_write_bytes(output / name, plot(report, against=against))
    atomic_write_bytes(output / TABLES, markdown(report, list(PLOTS)).encode())
    write_json(output / NUMBERS, report)
    return report
