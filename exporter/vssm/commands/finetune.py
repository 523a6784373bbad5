"""The command `vssm finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vssm.commands.options import (
    Alignment,
    Checkpoint,
    Classes,
    Conv,
    Device,
    Ema,
    Importance,
    Json,
    Key,
    Merge,
    Name,
    NewHead,
    Numbers,
    NumClasses,
    Restore,
    Schedule,
    Switches,
    Threads,
    Workers,
    options,
)
from vssm.commands.tables import say, say_folders, show, table, working, write_result
from vssm.extras import install_command
from vssm.training.recipe import Recipe
from vssm.training.request import FinetuneRequest, ModelSource, Resources, names_segmenter
from vssm.training.scene_recipe import SceneRecipe

if TYPE_CHECKING:
    from vssm.training.run import FinetuneReport

Data = Annotated[
    Path,
    typer.Option(help="Folder with a folder of images for each class; of a segmenter as ADE20K."),
]
Val = Annotated[
    Path | None,
    typer.Option(help="Folder as --data; top-1 on it after each epoch, the best weights are kept."),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Directory for all that is written.")]
Backbone = Annotated[
    bool,
    typer.Option(
        "--backbone",
        help="Of a segmenter: the checkpoint is a classifier's, from which the backbone begins.",
    ),
]
Tokens = Annotated[
    str,
    typer.Option(help="gather: as deployed; masked: as published, Vim only; fused: EViT-style."),
]
# None, as a segmenter's are those of its own recipe. The help has the published numbers.
Epochs = Annotated[
    int | None,
    typer.Option(help=f"Passes over the images, {Recipe.epochs} by default; not of a segmenter."),
]
Batch = Annotated[
    int | None,
    typer.Option(help=f"Images per step, {Recipe.batch} by default; of a segmenter as published."),
]
Rate = Annotated[
    float | None,
    typer.Option(
        help=f"Learning rate after the warm-up, {Recipe.lr:g} by default; of a segmenter as "
        "published."
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Of everything random: order, augmentation, mixing, importance random."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped.")]
MicroBatch = Annotated[
    int | None, typer.Option(help="Images at a time, where a step needs too much memory.")
]
SaveEvery = Annotated[
    int, typer.Option(help="Steps between saved states; each epoch's end is saved too.")
]


def finetune(
    name: Name,
    *,
    data: Data,
    output: Output,
    val: Val = None,
    checkpoint: Checkpoint = None,
    ema: Ema = False,
    key: Key = None,
    new_head: NewHead = False,
    backbone: Backbone = False,
    schedule: Schedule = None,
    merge: Merge = None,
    alignment: Alignment = None,
    importance: Importance = None,
    conv: Conv = None,
    restore: Restore = None,
    tokens: Tokens = "gather",
    num_classes: NumClasses = None,
    option: Switches = None,
    epochs: Epochs = None,
    batch: Batch = None,
    lr: Rate = None,
    seed: Seed = Recipe.seed,
    numbers: Numbers = None,
    classes: Classes = None,
    split: Annotated[
        str | None, typer.Option(help="Of a segmenter's data: the part; training by default.")
    ] = None,
    resume: Resume = False,
    workers: Workers = None,
    micro_batch: MicroBatch = None,
    save_every: SaveEvery = Resources.save_every,
    device: Device = Resources.device,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Train a model, pruned, merged or dense; after a kill, --resume goes on bit for bit."""
    source = ModelSource(
        name,
        checkpoint,
        weights="ema" if ema else "model",
        key=key,
        new_head=new_head,
        schedule=schedule,
        merge=merge,
        alignment=alignment,
        importance=importance,
        conv=conv,
        restore=restore,
        tokens=tokens,
        backbone=backbone,
        num_classes=num_classes,
        options=options(option),
        seed=seed if importance == "random" else None,
    )
    named = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    recipe = _recipe(name, numbers, named)
    resources = Resources(workers, micro_batch, save_every, device, threads)
    request = FinetuneRequest(source, data, output, recipe, classes, resume, resources, split, val)
    _run(request, json_file)


def _run(request: FinetuneRequest, json_file: Path | None) -> None:
    # Allowed, but seldom meant.
    if request.source.checkpoint is None:
        say("no checkpoint given: training begins at the seeded initial weights")
    # Before torch is imported, so that a wrong option is answered at once.
    request.source.checked()
    again = "" if request.resume else " with --resume"
    with working("loading PyTorch", leaves=f"the same command{again} goes on") as tell:
        from vssm.training.run import finetune as run_finetune

        report = run_finetune(request, progress=tell)
    # Under torchrun, only the process that leads has one.
    if report is not None:
        _print(report)
        write_result(json_file, report)


def _recipe(name: str, pairs: list[str] | None, named: dict[str, Any]) -> Recipe | SceneRecipe:
    """The recipe from KEY=VALUE pairs, and the numbers that have options of their own."""
    given = options(pairs, "--recipe")
    # Neither could win without the other being ignored.
    if twice := sorted(set(given) & set(named)):
        raise ValueError(f"--recipe {twice[0]}: this number has an option of its own; --{twice[0]}")
    values = {**{key: value for key, value in named.items() if value is not None}, **given}
    if not names_segmenter(name):
        return Recipe.of(values)
    if "epochs" in values:
        raise ValueError(
            f"epochs={values['epochs']} for {name!r}: a segmenter's run is counted in steps; give "
            "--recipe iterations=N"
        )
    return SceneRecipe.published(name, values)


def _print(report: FinetuneReport) -> None:
    trained = report.trained
    speed = "-" if trained.images_per_s is None else f"{trained.images_per_s:.1f}"
    rows = [
        ("images", f"{trained.images:,}"),
        ("steps", f"{trained.steps:,}"),
        ("loss, last epoch", f"{trained.loss:.4f}"),
        ("images/s, loading included", speed),
    ]
    if trained.resumed:
        rows.insert(2, ("steps of the run that was stopped", f"{trained.resumed:,}"))
    show(table(f"{report.run['model']}, trained", ("", ""), rows))
    if trained.validated:
        lines = [
            (
                row.epoch or "before",
                f"{row.top1:.2%}",
                f"{row.loss:.4f}",
                "best" if row.epoch == report.best_epoch else "",
            )
            for row in trained.validated
        ]
        show(table("on the validation images", ("epoch", "top-1", "loss", ""), lines))
    say(f"began with {report.loaded}")
    say_folders(report.run["classes"], report.notes)
    say(f"wrote {report.weights}")
    say(f"wrote {report.ema} (averaged)")
    if report.best is not None:
        say(f"wrote {report.best} (best on the validation images)")
    if not report.tensorboard:
        say(f"no TensorBoard log: {install_command('tensorboard')} brings it; log.csv has the rows")
