"""The commands `vssm export` and `vssm export-module`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vssm.artifact.directory import check_target
from vssm.artifact.manifest import MODULE_KEY
from vssm.commands.options import (
    Alignment,
    Checkpoint,
    Conv,
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
    model_source,
    options,
    sizes,
)
from vssm.commands.tables import phases, say, write_result
from vssm.errors import check_choice
from vssm.files.atomic import check_files
from vssm.files.text import shown

if TYPE_CHECKING:
    from vssm.artifact.directory import Artifact
    from vssm.artifact.manifest import CheckpointInfo, Preprocessing
    from vssm.compat.export import DryRun
    from vssm.compat.packages.context import UpstreamReport
    from vssm.pruning.schedule import PruneSchedule
    from vssm.training.request import ModelSource
    from vssm.types import Steps


@dataclass(frozen=True)
class ModuleRequest:
    """What `vssm export-module` was asked for; the fields are its options."""

    target: str
    input_shape: tuple[int, ...]
    integers: int | None = None
    checkpoint: Path | None = None
    weights: str = "model"
    key: str | None = None
    new_head: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    prefer: str = "ours"
    scans: Mapping[str, str] = field(default_factory=dict)
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
    static_batch: bool = False
    reference: bool = True


@dataclass(frozen=True)
class ModuleExport:
    """The export, what stood in for upstream's packages, and what was loaded, in words."""

    artifact: Artifact
    upstream: str
    loaded: str | None


def export_user_module(
    request: ModuleRequest,
    directory: Path,
    *,
    force: bool = False,
    progress: Steps = lambda *_: None,
) -> ModuleExport:
    """Import, build, load, prune, export. It runs the code that the target names.

    Raises:
        ValueError, VssmError: as `build_from`, `load_checkpoint`, `prune` and `export_module` do.
    """
    schedule = _check(request)
    check_target(directory, force=force)
    from vssm.compat.export import export_module

    # Around the export too: it runs the model's forward, which may import only then.
    with _built(request, schedule, progress) as built:
        artifact = export_module(
            built.model,
            built.example,
            directory,
            # The factory's name, without the path of the user's machine.
            name=request.target.rpartition(":")[2],
            outputs=request.outputs,
            opset=request.opset,
            inline=request.inline,
            dynamic_batch=not request.static_batch,
            reference=request.reference,
            preprocessing=_preprocessing(request),
            labels=_labels(request, built.model, built.example),
            checkpoint=built.checkpoint,
            force=force,
            progress=progress,
        )
    return ModuleExport(artifact, str(built.report), built.loaded)


def dry_run_user_module(
    request: ModuleRequest, *, progress: Steps = lambda *_: None
) -> tuple[DryRun, str]:
    """Import, build, load, prune, and run once: what would be exported, and what stood in.

    Raises:
        ValueError, VssmError: as `export_user_module` does before its trace.
    """
    schedule = _check(request)
    from vssm.compat.export import dry_run

    with _built(request, schedule, progress) as built:
        found = dry_run(
            built.model,
            built.example,
            outputs=request.outputs,
            dynamic_batch=not request.static_batch,
        )
    return found, str(built.report)


@dataclass(frozen=True)
class _Built:
    """A model of the user's, its example input, and how it came about."""

    model: Any
    example: Any
    checkpoint: CheckpointInfo | None
    loaded: str | None
    report: UpstreamReport


@contextlib.contextmanager
def _built(
    request: ModuleRequest, schedule: PruneSchedule | None, progress: Steps
) -> Iterator[_Built]:
    """The model that was asked for, while upstream's packages are stood in for."""
    import torch

    from vssm.compat import upstream
    from vssm.compat.factory import build_from, search_path
    from vssm.compat.prune import prune

    with (
        search_path(request.target, request.paths),
        upstream(prefer=request.prefer, scans=request.scans) as report,
    ):
        # A phase, as a repository and what it imports may take long.
        progress(f"importing {request.target}", 0, 1)
        # A factory may draw its weights: without a checkpoint two exports are equal all the same.
        torch.manual_seed(0)
        model: Any = build_from(request.target, request.options)
        checkpoint, loaded = _load(request, model)
        example = _example(request)
        if schedule is not None:
            model = prune(
                model, schedule, example, blocks=request.blocks, cls_index=request.cls_index
            )
        progress(f"importing {request.target}", 1, 1)
        yield _Built(model, example, checkpoint, loaded, report)


def _load(request: ModuleRequest, model: Any) -> tuple[CheckpointInfo | None, str | None]:
    """Load the checkpoint, if there is one: its name and hash, and what was done, in words."""
    if request.checkpoint is None:
        return None, None
    from vssm.artifact.manifest import CheckpointInfo
    from vssm.checkpoints.load import load_checkpoint

    found = load_checkpoint(
        model,
        request.checkpoint,
        weights=request.weights,
        key=request.key,
        new_head=request.new_head,
    )
    return CheckpointInfo(shown(request.checkpoint.name), found.sha256), str(found)


def _check(request: ModuleRequest) -> PruneSchedule | None:
    """Refuse what will not do before the user's code runs; the schedule comes back."""
    from vssm.models.schedules import named_pruning
    from vssm.onnx.options import check_opset
    from vssm.training.request import refuse_unused_options

    rules = {name: getattr(request, name) for name in ("alignment", "importance", "conv")}
    refuse_unused_options(
        schedule=request.schedule,
        checkpoint=request.checkpoint,
        weights=request.weights,
        key=request.key,
        new_head=request.new_head,
        cls_index=request.cls_index,
        **rules,
    )
    check_choice("prefer", request.prefer, ("ours", "installed"))
    check_opset(request.opset)
    check_files(checkpoint=request.checkpoint, labels=request.labels)
    # For its error alone.
    _preprocessing(request)
    return named_pruning(request.target, request.schedule, **rules)


def _example(request: ModuleRequest) -> Any:
    import torch

    # Its own generator: what a factory draws, or does not, must not change the example.
    generator = torch.Generator().manual_seed(0)
    if request.integers is not None:
        return torch.randint(request.integers, request.input_shape, generator=generator)
    return torch.randn(request.input_shape, generator=generator)


def _labels(request: ModuleRequest, model: Any, example: Any) -> tuple[str, ...] | None:
    """As many names as the logits are wide; None where no file has them."""
    if request.labels is None:
        return None
    import torch

    from vssm.artifact.preprocessing import read_labels
    from vssm.compat.outputs import module_outputs

    # Only a run tells how wide the logits are.
    with torch.inference_mode():
        found = module_outputs(request.outputs)(model, example)
    if "logits" not in found:
        raise ValueError(
            f"labels={request.labels}: the outputs are {', '.join(found)}, and none is called "
            "logits; say --outputs logits=NAME for the one that the labels belong to"
        )
    return read_labels(request.labels, int(found["logits"].shape[-1]))


def _preprocessing(request: ModuleRequest) -> Preprocessing | None:
    if not request.imagenet:
        return None
    if len(request.input_shape) != 4 or request.input_shape[1] != 3:
        raise ValueError(
            f"--imagenet with input {request.input_shape}: images are batch x 3 x height x width"
        )
    from vssm.artifact.manifest import Preprocessing

    return Preprocessing.for_image_size((request.input_shape[2], request.input_shape[3]))


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
Scans = Annotated[
    list[str] | None,
    typer.Option(
        "--scan",
        help="A scan that is not known by itself: MODULE:NAME=channels or =tokens, repeatable.",
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


Outputs = Annotated[
    str | None,
    typer.Option(
        help="Of a segmenter logits (the default), labels (and the class of every pixel) or "
        "features (the levels that its head reads); of a detector features (the default) or dense."
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
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Export a model, pruned, merged or dense, to model.onnx and model.json."""
    source = model_source(
        name,
        checkpoint,
        ema,
        key,
        new_head,
        schedule=schedule,
        merge=merge,
        alignment=alignment,
        importance=importance,
        conv=conv,
        restore=restore,
        num_classes=num_classes,
        option=option,
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
    force: bool,
) -> tuple[Artifact, str | None]:
    """The export, and what was loaded, in words."""
    from vssm.models.catalogue import check_name
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

    classes = card.num_classes if num_classes is None else num_classes
    names = None if labels is None else read_labels(labels, classes)
    from vssm.onnx.export import export as export_model
    from vssm.training.run import build_model

    with phases() as progress:
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
    shape: Shape = "1x3x224x224",
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
    conv: Conv = None,
    blocks: Annotated[str, typer.Option(help="Attribute of the blocks to prune.")] = "layers",
    cls_index: ClassToken = None,
    imagenet: Imagenet = False,
    labels: Labels = None,
    outputs: ModuleOutputs = None,
    opset: Opset = 18,
    inline: Inline = False,
    static_batch: StaticBatch = False,
    no_reference: NoReference = False,
    dry_run: DryRunOnly = False,
    survey: Survey = None,
    time_limit: TimeLimit = 600.0,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Export a model of your own repository. This runs the code that you name."""
    if survey is not None:
        from vssm.commands.survey import survey_modules

        survey_modules(survey, _needed(output, "-o DIR"), json_file, time_limit=time_limit)
        return
    target = _needed(target, "TARGET")
    request = ModuleRequest(
        target=target,
        input_shape=sizes("input", shape),
        integers=tokens,
        checkpoint=checkpoint,
        weights="ema" if ema else "model",
        options=options(option or []),
        key=key,
        new_head=new_head,
        paths=tuple(path or ()),
        prefer=prefer,
        scans=_scans(scan or []),
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
        static_batch=static_batch,
        reference=not no_reference,
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
    with phases() as progress:
        found, upstream = dry_run_user_module(request, progress=progress)
    say(f"executed the code of {request.target}; upstream packages: {upstream}")
    shapes = ", ".join(
        f"{name} {'x'.join(map(str, shape))}" for name, shape in found.outputs.items()
    )
    say(f"would export: {found.scans} selective scans, {found.parameters:,} parameters")
    say(f"outputs of one image: {shapes}")
    write_result(json_file, found)


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
    with phases() as progress:
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
