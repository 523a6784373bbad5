"""The command `vssm export-module`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vssm.commands.options import (
    Alignment,
    Conv,
    Ema,
    Folder,
    Inline,
    Json,
    Labels,
    options,
    sizes,
    telling,
)
from vssm.commands.pipeline_module import ModuleExport, ModuleRequest, export_user_module
from vssm.files.json_files import write_json

_console = Console(markup=False, emoji=False)

Shape = Annotated[str, typer.Option("--input", help="Sizes of the input, batch first.")]
Tokens = Annotated[int | None, typer.Option(help="The input holds integers below this, no floats.")]
Options = Annotated[
    list[str] | None, typer.Option("--set", help="Factory argument KEY=VALUE, repeatable.")
]
Paths = Annotated[
    list[Path] | None, typer.Option("--path", help="Further folder to import from, repeatable.")
]
Imagenet = Annotated[
    bool, typer.Option("--imagenet", help="Images: resize, crop and normalise as ImageNet's.")
]
Weights = Annotated[Path | None, typer.Option(help="Weights; the factory's own without.")]
Prefer = Annotated[
    str, typer.Option(help="Functions of upstream's packages: ours, or those installed.")
]
ModuleSchedule = Annotated[
    str | None, typer.Option(help="BLOCK:RATIO,..., such as 5:0.8,10:0.8; dense without.")
]
ModuleImportance = Annotated[
    str | None, typer.Option(help="clip (the default), sum, l1, l2 or random.")
]
ClassToken = Annotated[
    int | None, typer.Option(help="Place of the class token; by default as Vim's attributes say.")
]


def add_to(app: typer.Typer) -> None:
    """Make the command one of `app`'s."""
    app.command("export-module")(export_module)


def export_module(
    target: Annotated[str, typer.Argument(help="repo/model.py:factory or repo:module.factory.")],
    output: Folder,
    shape: Shape = "1x3x224x224",
    tokens: Tokens = None,
    checkpoint: Weights = None,
    ema: Ema = False,
    option: Options = None,
    path: Paths = None,
    prefer: Prefer = "ours",
    schedule: ModuleSchedule = None,
    alignment: Alignment = None,
    importance: ModuleImportance = None,
    conv: Conv = None,
    blocks: Annotated[str, typer.Option(help="Attribute of the blocks to prune.")] = "layers",
    cls_index: ClassToken = None,
    imagenet: Imagenet = False,
    labels: Labels = None,
    opset: Annotated[int, typer.Option(help="18 to 20.")] = 18,
    inline: Inline = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the export there.")] = False,
    json_file: Json = None,
) -> None:
    """Export a model of your own repository. This runs the code that you name."""
    request = ModuleRequest(
        target=target,
        input_shape=sizes("input", shape),
        integers=tokens,
        checkpoint=checkpoint,
        source="ema" if ema else "model",
        options=options(option or []),
        paths=tuple(path or ()),
        prefer=prefer,
        schedule=schedule,
        alignment=alignment,
        importance=importance,
        conv=conv,
        blocks=blocks,
        cls_index=cls_index,
        imagenet=imagenet,
        labels=labels,
        opset=opset,
        inline=inline,
        force=force,
    )
    with telling(_console, "working") as tell:
        done = export_user_module(request, output, progress=tell)
    _print(done)
    if json_file is not None:
        write_json(json_file, done.artifact.manifest)


def _print(done: ModuleExport) -> None:
    manifest = done.artifact.manifest
    _console.print(f"executed the code of {manifest.name}; upstream packages: {done.upstream}")
    if done.loaded is None:
        _console.print("no checkpoint given: the weights are the factory's", style="yellow")
    else:
        _console.print(f"weights: {done.loaded}")
    for line in manifest.config["passes"]:
        if not line.endswith("applied 0 times"):  # model.json has them all
            _console.print(f"pass {line}")
    if manifest.schedule is not None:
        _console.print(f"tokens kept by stage: {list(manifest.schedule.num_keep)}")
    if manifest.preprocessing is None:
        _console.print("preprocessing unknown: `vssm run` refuses image files (see --imagenet)")
    path = done.artifact.model_path
    _console.print(f"wrote {path} ({path.stat().st_size:,} bytes, {manifest.dtype})")
