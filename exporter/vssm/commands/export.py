"""The commands `vssm export` and `vssm export-module`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vssm.artifact.directory import Artifact, check_target
from vssm.artifact.manifest import MODULE_KEY
from vssm.commands.options import (
    Alignment,
    Checkpoint,
    Conv,
    DrawSeed,
    Dtype,
    Ema,
    Folder,
    Force,
    Importance,
    Inline,
    Json,
    Key,
    Labels,
    Merge,
    Name,
    NewHead,
    NumClasses,
    Opset,
    Restore,
    Schedule,
    Switches,
    Threads,
    options,
)
from vssm.commands.tables import say, working, write_result
from vssm.commands.user_module import (
    DEFAULT_INPUT,
    ModuleExport,
    ModuleRequest,
    dry_run_user_module,
    export_user_module,
    read_inputs,
)
from vssm.models.registry import check_name
from vssm.training.request import ModelSource

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Sizes of the input, batch first (1x3x224x224); of several NAME=SIZES each, with :N "
        "behind it for integers below N, or :bool.",
    ),
]
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
Weights = Annotated[Path | None, typer.Option(help="Weights. Default: the factory's own.")]
Scans = Annotated[
    list[str] | None,
    typer.Option(
        "--scan",
        help="A scan not known by itself: MODULE:NAME=channels, =tokens or =heads, repeatable.",
    ),
]
Dynamic = Annotated[
    str | None,
    typer.Option(
        help="Axes of the input that may have any size: height,width of images, or NAME=AXIS."
    ),
]
StaticBatch = Annotated[
    bool, typer.Option("--static-batch", help="Keep the batch size of --input.")
]
NoReference = Annotated[
    bool, typer.Option("--no-reference", help="Leave out the answers that `vssm check` compares.")
]
DryRunOnly = Annotated[
    bool,
    typer.Option("--dry-run", help="Import, build and run once; say what would be exported."),
]
Survey = Annotated[
    Path | None,
    typer.Option(help="Export every model of a JSON file, each in a process of its own."),
]
TimeLimit = Annotated[float, typer.Option(help="Seconds for each model of a survey.")]
OptionalFolder = Annotated[Path | None, typer.Option("-o", "--output", help="Directory to write.")]
Prefer = Annotated[
    str, typer.Option(help="Functions of upstream's packages: ours, or those installed.")
]
ModuleSchedule = Annotated[
    str | None, typer.Option(help="BLOCK:RATIO,..., such as 5:0.8,10:0.8. Default: dense.")
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


Outputs = Annotated[
    str | None,
    typer.Option(
        help="Of a segmenter logits (the default), labels (and the class of every pixel) or "
        "features (the levels that its head reads); of a detector features (the default), dense "
        "(and what its head says of every anchor) or boxes (what is in one image)."
    ),
]


def export(
    name: Name,
    output: Folder,
    checkpoint: Checkpoint = None,
    ema: Ema = False,
    key: Key = None,
    new_head: NewHead = False,
    schedule: Schedule = None,
    merge: Merge = None,
    alignment: Alignment = None,
    importance: Importance = None,
    seed: DrawSeed = None,
    conv: Conv = None,
    restore: Restore = None,
    outputs: Outputs = None,
    dtype: Dtype = "float32",
    opset: Opset = 18,
    num_classes: NumClasses = None,
    option: Switches = None,
    labels: Labels = None,
    inline: Inline = False,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave weights.safetensors out.")
    ] = False,
    threads: Threads = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Export a model, pruned, merged or dense, to model.onnx and model.json."""
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
        num_classes=num_classes,
        options=options(option),
        seed=seed,
    )
    artifact, loaded = _export(
        source,
        output,
        outputs=outputs,
        dtype=dtype,
        opset=opset,
        labels=labels,
        num_classes=num_classes,
        inline=inline,
        weights=not no_weights,
        threads=threads,
        force=force,
    )
    _print(artifact, loaded)
    write_result(json_file, artifact.manifest)


def _export(
    source: ModelSource,
    output: Path,
    *,
    outputs: str | None,
    dtype: str,
    opset: int,
    labels: Path | None,
    num_classes: int | None,
    inline: bool,
    weights: bool,
    threads: int | None,
    force: bool,
) -> tuple[Artifact, str | None]:
    """The export, and what was loaded, in words."""
    from vssm.onnx.options import check_opset, checked_dtype, checked_outputs

    dtype = checked_dtype(dtype)
    check_opset(opset)
    card = check_name(source.name)
    outputs = checked_outputs(card.task, outputs)
    # Asked again when the files are put in place; here it saves the work.
    check_target(output, force=force)
    # All that needs no torch comes before its import.
    pruning = source.checked()
    from vssm.artifact.preprocessing import read_labels
    from vssm.runtimes.session import checked_threads

    checked_threads(threads)
    classes = card.num_classes if num_classes is None else num_classes
    names = None if labels is None else read_labels(labels, classes)

    with working("loading PyTorch") as progress:
        from vssm.onnx.export import export as export_model
        from vssm.runtimes.torch import torch_threads
        from vssm.training.run import build_model

        with torch_threads(threads):
            progress(f"building {source.name}", 0, 1)
            model = build_model(source, pruning)
            progress(f"building {source.name}", 1, 1)
            artifact = export_model(
                model,
                output,
                outputs=outputs,
                dtype=dtype,
                opset=opset,
                inline=inline,
                weights=weights,
                labels=names,
                force=force,
                progress=progress,
            )
    return artifact, model.loaded


def _print(artifact: Artifact, loaded: str | None) -> None:
    if loaded is None:
        say(("no checkpoint given: these are the seeded initial weights", "yellow"))
    else:
        say(f"weights: {loaded}")
    _print_files(artifact)


def _print_files(artifact: Artifact) -> None:
    manifest, path = artifact.manifest, artifact.model_path
    if manifest.schedule is not None:
        say(f"tokens kept by stage: {list(manifest.schedule.num_keep)}")
    for name, size in manifest.sizes.items():
        say(f"{name}: any multiple of {size.multiple} from {size.minimum} on")
    if manifest.merge is not None:
        say(f"tokens left by each merge: {list(manifest.merge.num_keep)}")
    if manifest.preprocessing is None:
        hint = " (see --imagenet)" if MODULE_KEY in manifest.config else ""
        say(f"preprocessing unknown: `vssm run` refuses image files{hint}")
    say(f"wrote {path} ({path.stat().st_size:,} bytes, {manifest.dtype})")


def export_module(
    target: Annotated[
        str | None, typer.Argument(help="repo/model.py:factory or repo:module.factory.")
    ] = None,
    output: OptionalFolder = None,
    shapes: Shapes = None,
    tokens: Tokens = None,
    checkpoint: Weights = None,
    ema: Ema = False,
    key: Key = None,
    new_head: NewHead = False,
    option: Options = None,
    path: Paths = None,
    prefer: Prefer = "ours",
    scan: Scans = None,
    schedule: ModuleSchedule = None,
    alignment: Alignment = None,
    importance: ModuleImportance = None,
    seed: DrawSeed = None,
    conv: Conv = None,
    blocks: Annotated[str, typer.Option(help="Attribute of the blocks to prune.")] = "layers",
    cls_index: ClassToken = None,
    imagenet: Imagenet = False,
    labels: Labels = None,
    outputs: ModuleOutputs = None,
    opset: Opset = 18,
    inline: Inline = False,
    static_batch: StaticBatch = False,
    dynamic: Dynamic = None,
    no_reference: NoReference = False,
    dry_run: DryRunOnly = False,
    survey: Survey = None,
    time_limit: TimeLimit = 600.0,
    threads: Threads = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Export a model of your own repository. This runs the code that you name."""
    if survey is not None:
        from vssm.commands.survey import survey_modules

        survey_modules(
            survey, _needed(output, "-o DIR"), json_file, time_limit=time_limit, threads=threads
        )
        return
    target = _needed(target, "TARGET")
    request = ModuleRequest(
        target=target,
        inputs=read_inputs(shapes or [DEFAULT_INPUT], tokens),
        checkpoint=checkpoint,
        weights="ema" if ema else "model",
        options=options(option),
        key=key,
        new_head=new_head,
        paths=tuple(path or ()),
        prefer=prefer,
        scans=_scans(scan or []),
        schedule=schedule,
        alignment=alignment,
        importance=importance,
        seed=seed,
        conv=conv,
        blocks=blocks,
        cls_index=cls_index,
        imagenet=imagenet,
        labels=labels,
        outputs=None if outputs is None else tuple(outputs.split(",")),
        opset=opset,
        inline=inline,
        static_batch=static_batch,
        dynamic=() if dynamic is None else tuple(dynamic.split(",")),
        reference=not no_reference,
        threads=threads,
    )
    if dry_run:
        _dry_run(request, json_file)
    else:
        _export_module(request, _needed(output, "-o DIR"), json_file, force=force)


def _needed(value: Any, name: str) -> Any:
    # typer would ask for these always; a dry run writes nothing, and a survey has many targets.
    if value is None:
        raise ValueError(f"{name} is missing; give it, or see --dry-run and --survey in --help")
    return value


def _dry_run(request: ModuleRequest, json_file: Path | None) -> None:
    with working("loading PyTorch") as progress:
        found, upstream = dry_run_user_module(request, progress=progress)
    say(f"executed the code of {request.target}; upstream packages: {upstream}")
    say(f"would export: {found.scans} selective scans, {found.parameters:,} parameters")
    say(f"inputs: {_shapes(found.inputs)}")
    say(f"outputs of one image: {_shapes(found.outputs)}")
    write_result(json_file, found)


def _shapes(found: Mapping[str, tuple[int | str, ...]]) -> str:
    """Sizes by name, as in "images batchx3x224x224"."""
    return ", ".join(
        f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in found.items()
    )


def _scans(given: list[str]) -> dict[str, str]:
    """What `--scan` says, by the place of the scan."""
    found = {}
    for text in given:
        place, equals, signature = text.partition("=")
        if not equals or not all(place.partition(":")):
            raise ValueError(
                f"--scan {text!r} is not MODULE:NAME=LAYOUT; write for example "
                "models.block:Mixer.scan=tokens"
            )
        found[place] = signature
    return found


def _export_module(
    request: ModuleRequest, output: Path, json_file: Path | None, *, force: bool
) -> None:
    with working("loading PyTorch") as progress:
        done = export_user_module(request, output, force=force, progress=progress)
    _print_module(done)
    write_result(json_file, done.artifact.manifest)


def _print_module(done: ModuleExport) -> None:
    manifest = done.artifact.manifest
    # Said each time: whoever runs this is to know that code of the repository ran.
    say(f"executed the code of {manifest.name}; upstream packages: {done.upstream}")
    if done.loaded is None:
        say(("no checkpoint given: the weights are the factory's", "yellow"))
    else:
        say(f"weights: {done.loaded}")
    for line in manifest.config["passes"]:
        if not line.endswith("applied 0 times"):  # model.json has them all
            say(f"pass {line}")
    # Worth a word only where it is weaker than usual.
    if manifest.config["reference"] not in {None, "float64"}:
        say(f"reference of `vssm check`: {manifest.config['reference']}")
    _print_files(done.artifact)
