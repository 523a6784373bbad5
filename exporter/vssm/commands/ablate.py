"""The command `vssm ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vssm.commands.options import (
    Classes,
    Device,
    Ema,
    Folder,
    HeadWidth,
    Images,
    Json,
    Key,
    Model,
    ModelOptions,
    NewHead,
    Numbers,
    OwnSchedule,
    Threads,
    Workers,
    options,
)
from vssm.commands.tables import say, show, table, working, write_result
from vssm.studies.plan import TRAINED, AblationOptions, AblationTraining
from vssm.training.recipe import Recipe
from vssm.training.request import ModelSource

if TYPE_CHECKING:
    from vssm.studies.report import AblationReport

Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(help="Weights of a named model, repeatable. Default: seeded initial ones."),
]
Seeds = Annotated[int, typer.Option(help="Seeds of the random choice.")]
Seed = Annotated[
    int, typer.Option(help="The first seed of the random choice and of the trainings.")
]
Ratios = Annotated[str, typer.Option(help="Keep ratios to compare, in place of every stage's.")]
Finetuned = Annotated[
    list[str] | None,
    typer.Option(help="VARIANT=FILE: a row with these weights too; repeatable."),
]
Train = Annotated[
    Path | None, typer.Option(help="Folder to fine-tune on; without it nothing is trained.")
]
Finetune = Annotated[
    str | None, typer.Option(help=f"Variants to fine-tune: {','.join(TRAINED)}, or others.")
]
FinetuneSeeds = Annotated[
    int | None, typer.Option(help="Trainings of each variant; by default one for each checkpoint.")
]
MicroBatch = Annotated[
    int | None, typer.Option(help="Images at a time, where a training step needs too much memory.")
]
Batch = Annotated[int, typer.Option(help="Images per batch.")]
Choice = Annotated[
    str, typer.Option(help="auto, kernel or reference (slow), in PyTorch; auto: kernel.")
]
Average = Annotated[
    bool,
    typer.Option("--average", help="Several checkpoints: their mean, in place of a row for each."),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Measure anew, not where a run was stopped.")
]


def ablate(
    model: Model,
    images: Images,
    output: Folder,
    *,
    checkpoint: Checkpoints = None,
    ema: Ema = False,
    key: Key = None,
    new_head: NewHead = False,
    schedule: OwnSchedule = None,
    seeds: Seeds = 3,
    seed: Seed = 0,
    ratios: Ratios = "0.9,0.8,0.7,0.6,0.5",
    finetuned: Finetuned = None,
    train: Train = None,
    finetune: Finetune = None,
    finetune_seeds: FinetuneSeeds = None,
    recipe: Numbers = None,
    micro_batch: MicroBatch = None,
    batch: Batch = 32,
    workers: Workers = None,
    threads: Threads = None,
    classes: Classes = None,
    backend: Choice = "auto",
    device: Device = "cpu",
    average: Average = False,
    num_classes: HeadWidth = None,
    option: ModelOptions = None,
    restart: Restart = False,
    json_file: Json = None,
) -> None:
    """Compare alignments, importances, keep ratios, merging and EViT's way on a data set."""
    # The first is the model's; every row runs with the others too.
    first, more = (checkpoint[0], checkpoint[1:]) if checkpoint else (None, [])
    source = ModelSource(
        model,
        first,
        weights="ema" if ema else "model",
        key=key,
        new_head=new_head,
        schedule=schedule,
        num_classes=num_classes,
        options=options(option),
    )
    training = _training(train, finetune, finetune_seeds, recipe, micro_batch)
    asked = AblationOptions(
        seeds=seeds,
        seed=seed,
        ratios=_words(ratios),
        batch=batch,
        workers=workers,
        threads=threads,
        classes=classes,
        backend=backend,
        device=device,
        checkpoints=more,
        average=average,
        finetuned=_files(finetuned or []),
        training=training,
        restart=restart,
    )
    _run(source, images, output, asked, json_file)


def _run(
    source: ModelSource,
    images: Path,
    output: Path,
    asked: AblationOptions,
    json_file: Path | None,
) -> None:
    # Before torch is imported, so that a wrong option is answered at once.
    source.checked(exports=True)
    with working("loading PyTorch", leaves="the same command goes on") as tell:
        from vssm.studies.ablate import ablate as ablate_model

        report = ablate_model(source, images, output, asked, progress=tell)
    _print(report, output)
    write_result(json_file, report)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _training(
    data: Path | None,
    variants: str | None,
    seeds: int | None,
    recipe: list[str] | None,
    micro_batch: int | None,
) -> AblationTraining | None:
    """What to train; None without --train.

    Raises:
        ValueError, TypeError: a number does not fit, or is given without --train.
    """
    given: dict[str, Any] = {
        "finetune": None if variants is None else _words(variants),
        "finetune-seeds": seeds,
        "recipe": None if recipe is None else _recipe(recipe),
        "micro-batch": micro_batch,
    }
    # What is not given is left to the defaults of `AblationTraining`.
    given = {name: value for name, value in given.items() if value is not None}
    if data is not None:
        # Errors name the options; the fields have names of their own.
        names = {"finetune": "variants", "finetune-seeds": "seeds", "micro-batch": "micro_batch"}
        return AblationTraining(data, **{names.get(k, k): value for k, value in given.items()})
    if given:
        raise ValueError(f"--{next(iter(given))} without --train trains nothing; give both")
    return None


def _recipe(pairs: list[str]) -> Recipe:
    """The recipe from KEY=VALUE pairs.

    Raises:
        ValueError, TypeError: a pair is malformed, or sets what has an option of its own.
    """
    given = options(pairs, "--recipe")
    if "seed" in given:
        raise ValueError("--recipe seed: each training has its own; --seed N is the first one's")
    return Recipe.of(given)


def _files(pairs: list[str]) -> dict[str, list[Path]]:
    """Read VARIANT=FILE pairs; several files of a variant are several seeds.

    Raises:
        ValueError: a pair is malformed.
    """
    found: dict[str, list[Path]] = {}
    for pair in pairs:
        # At the first "=", as a file's name may have more.
        key, equals, file = pair.partition("=")
        if not equals or not file:
            raise ValueError(
                f"--finetuned {pair}: is not VARIANT=FILE; write gap=model.safetensors"
            )
        found.setdefault(key, []).append(Path(file))
    return found


def _print(report: AblationReport, output: Path) -> None:
    from vssm.studies.ablate import TABLES
    from vssm.studies.tables import notes, tables

    for name, value in report.facts.items():
        say(f"{name}: {value}")
    for one in tables(report, narrow=True):  # a terminal is narrow; the files have all columns
        show(table(f"{one.title}: {one.caption}", one.columns, one.rows))
    for note in notes(report):
        say(note)
    for key, reason in report.left_out.items():
        say(("left out", "yellow"), f": {key}: {reason}")
    for path, error in report.unreadable:
        say(("not read", "yellow"), f": {path}: {error}")
    say(f"wrote {output / TABLES}")
