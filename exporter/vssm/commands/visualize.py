"""The command `vssm visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vssm.commands.options import (
    Conv,
    DrawSeed,
    Ema,
    Folder,
    HeadWidth,
    Json,
    Key,
    Merge,
    Model,
    ModelOptions,
    NewHead,
    OwnSchedule,
    Threads,
    integers,
    options,
)
from vssm.commands.tables import say, working, write_result
from vssm.training.request import ModelSource


def visualize(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    output: Folder,
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a named model. Default: seeded initial ones.")
    ] = None,
    ema: Ema = False,
    key: Key = None,
    new_head: NewHead = False,
    schedule: OwnSchedule = None,
    merge: Merge = None,
    alignment: Annotated[
        str | None, typer.Option(help="gap, constant or none, in place of the export's.")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(help="clip, sum, l1, l2, as_released or random, in place of the export's."),
    ] = None,
    conv: Conv = None,
    seed: DrawSeed = None,
    blocks: Annotated[
        str | None, typer.Option(help="Blocks whose attention is shown, separated by commas.")
    ] = None,
    threads: Threads = None,
    num_classes: HeadWidth = None,
    option: ModelOptions = None,
    json_file: Json = None,
) -> None:
    """Draw kept tokens, importance, attention and walks: dense, plain removal, aligned."""
    source = ModelSource(
        model,
        checkpoint,
        weights="ema" if ema else "model",
        key=key,
        new_head=new_head,
        schedule=schedule,
        merge=merge,
        alignment=alignment,
        importance=importance,
        conv=conv,
        num_classes=num_classes,
        options=options(option),
        seed=seed,
    )
    source.checked(exports=True)
    # Options first, then what imports torch.
    shown = None if blocks is None else integers("blocks", blocks)
    with working("loading PyTorch", leaves="pictures that are drawn stay, without a page") as tell:
        from vssm.studies.visualize import visualize as visualize_images

        numbers = visualize_images(
            source, images, output, blocks=shown, threads=threads, progress=tell
        )
    _print(numbers, output)
    write_result(json_file, numbers)


def _print(numbers: dict[str, Any], output: Path) -> None:
    from vssm.studies.visualize import PAGE

    for name, value in numbers["facts"].items():
        say(f"{name}: {value}")
    files = sum(len(image["figures"]) for image in numbers["images"])
    say(f"wrote {output / PAGE} and {files} PNG files")
