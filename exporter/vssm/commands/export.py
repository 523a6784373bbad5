"""`vssm export` as a function: a name and options to an exported directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import CheckpointInfo, Preprocessing
from vssm.artifact.preprocessing import read_labels
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
from vssm.files.json import write_json
from vssm.pruning.schedule import PruneSchedule
from vssm.training.request import refuse_unused_options
from vssm.types import Progress


@dataclass(frozen=True)
class ModuleRequest:
    """What `vssm export-module` was asked for; the fields are its options."""

    target: str
    input_shape: tuple[int, ...]
    integers: int | None = None
    checkpoint: Path | None = None
    weights: str = "model"
    options: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    prefer: str = "ours"
    schedule: str | None = None
    alignment: str | None = None
    importance: str | None = None
    conv: str | None = None
    blocks: str = "layers"
    cls_index: int | None = None
    imagenet: bool = False
    labels: Path | None = None
    outputs: tuple[str, ...] | None = None
    opset: int = 18
    inline: bool = False
    force: bool = False


@dataclass(frozen=True)
class ModuleExport:
    """The export, what stood in for upstream's packages, and what was loaded, in words."""

    artifact: Artifact
    upstream: str
    loaded: str | None


def export_user_module(
    request: ModuleRequest, directory: Path, *, progress: Progress = lambda _: None
) -> ModuleExport:
    """Import, build, load, prune, export. It runs the code that the target names.

    Raises:
        ValueError, VssmError: as `build_from`, `load_checkpoint`, `prune` and `export_module` do.
    """
    import torch

    from vssm.checkpoints.load import load_checkpoint
    from vssm.compat import upstream
    from vssm.compat.export import export_module
    from vssm.compat.factory import build_from, search_path
    from vssm.compat.prune import prune

    _check(request)
    loaded = None
    with search_path(request.target, request.paths), upstream(prefer=request.prefer) as report:
        progress(f"importing {request.target}")
        torch.manual_seed(0)
        model: Any = build_from(request.target, request.options)
        checkpoint = None
        if request.checkpoint is not None:
            progress(f"loading {request.checkpoint}")
            found = load_checkpoint(model, request.checkpoint, weights=request.weights)
            checkpoint, loaded = CheckpointInfo(request.checkpoint.name, found.sha256), str(found)
        example = _example(request)
        if request.schedule is not None:
            progress("pruning")
            schedule = PruneSchedule.parse(
                request.schedule,
                alignment=request.alignment or "gap",
                importance=request.importance or "clip",
                conv=request.conv or "compact",
            )
            model = prune(
                model, schedule, example, blocks=request.blocks, cls_index=request.cls_index
            )
        progress("tracing and writing")
        artifact = export_module(
            model,
            example,
            directory,
            name=request.target.rpartition(":")[2],
            outputs=request.outputs,
            opset=request.opset,
            inline=request.inline,
            preprocessing=_preprocessing(request),
            labels=_labels(request, request.labels, model, example)
            if request.labels is not None
            else None,
            checkpoint=checkpoint,
            force=request.force,
        )
    return ModuleExport(artifact, str(report), loaded)


def _check(request: ModuleRequest) -> None:
    refuse_unused_options(
        schedule=request.schedule,
        checkpoint=request.checkpoint,
        weights=request.weights,
        alignment=request.alignment,
        importance=request.importance,
        conv=request.conv,
        cls_index=request.cls_index,
    )


def _example(request: ModuleRequest) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    if request.integers is not None:
        return torch.randint(request.integers, request.input_shape, generator=generator)
    return torch.randn(request.input_shape, generator=generator)


def _labels(request: ModuleRequest, path: Path, model: Any, example: Any) -> tuple[str, ...]:
    """As many names as the logits are wide."""
    import torch

    from vssm.compat.outputs import module_outputs

    with torch.inference_mode():
        found = module_outputs(request.outputs)(model, example)
    if "logits" not in found:
        raise ValueError(
            f"labels={request.labels}: the outputs are {', '.join(found)}, and none is called "
            "logits; say --outputs logits=NAME for the one that the labels belong to"
        )
    return read_labels(path, int(found["logits"].shape[-1]))


def _preprocessing(request: ModuleRequest) -> Preprocessing | None:
    if not request.imagenet:
        return None
    if len(request.input_shape) != 4 or request.input_shape[1] != 3:
        raise ValueError(
            f"--imagenet with input {request.input_shape}: images are batch x 3 x height x width"
        )
    return Preprocessing.for_image_size((request.input_shape[2], request.input_shape[3]))


@dataclass(frozen=True)
class ExportRequest:
    """What `vssm export` was asked for; the fields are its options."""

    name: str
    checkpoint: Path | None = None
    weights: str = "model"
    schedule: str | None = None
    alignment: str | None = None
    importance: str | None = None
    conv: str | None = None
    dtype: str = "float32"
    opset: int = 18
    num_classes: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Path | None = None
    inline: bool = False
    write_weights: bool = True
    force: bool = False


def export_model(
    request: ExportRequest, directory: Path, *, progress: Progress = lambda _: None
) -> Artifact:
    """Build, load, export; nothing is written unless all of it succeeds.

    Raises:
        ValueError, VssmError: as `create_model`, `load_checkpoint` and `export` do.
    """
    from vssm.checkpoints.load import load_checkpoint
    from vssm.models import create_model
    from vssm.models.schedules import named_schedule
    from vssm.onnx.export import export

    rules = {name: getattr(request, name) for name in ("alignment", "importance", "conv")}
    refuse_unused_options(
        schedule=request.schedule,
        checkpoint=request.checkpoint,
        weights=request.weights,
        model_options=request.options,
        **rules,
    )
    schedule = named_schedule(request.name, request.schedule, **rules)
    progress(f"building {request.name}")
    model = create_model(
        request.name, schedule=schedule, num_classes=request.num_classes, **request.options
    )
    labels = None if request.labels is None else read_labels(request.labels, request.num_classes)
    if request.checkpoint is not None:
        progress(f"loading {request.checkpoint}")
        load_checkpoint(model, request.checkpoint, weights=request.weights)
    progress("tracing and writing")
    return export(
        model,
        directory,
        dtype=request.dtype,
        opset=request.opset,
        inline=request.inline,
        weights=request.write_weights,
        labels=labels,
        force=request.force,
    )


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


ModuleOutputs = Annotated[
    str | None,
    typer.Option(
        help="Names of what the model returns, in order and separated by commas; NEW=NAME renames. "
        "Default: its own names."
    ),
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
    outputs: ModuleOutputs = None,
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
        weights="ema" if ema else "model",
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
        outputs=None if outputs is None else tuple(outputs.split(",")),
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
