"""A module of the user's own: asked for, checked, built, and exported or only tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vssm.artifact.directory import Artifact, check_target
from vssm.artifact.manifest import CheckpointInfo, Preprocessing
from vssm.checkpoints.hub import check_checkpoint
from vssm.commands.options import sizes
from vssm.errors import check_choice
from vssm.files.atomic import check_files
from vssm.models.schedules import named_pruning
from vssm.pruning.schedule import PruneSchedule
from vssm.training.request import refuse_unused_options

if TYPE_CHECKING:
    from vssm.compat.export import DryRun
    from vssm.compat.packages.context import UpstreamReport
    from vssm.types import Steps

DEFAULT_INPUT: Final = "1x3x224x224"


@dataclass(frozen=True)
class InputRequest:
    """One input of the example.

    Attributes:
        name: the parameter of `forward`, and below it keys and places; None where it is not said.
        shape: its sizes, batch first; none of a number alone.
        below: it holds integers from 0, smaller than this; None for noise.
        flags: it holds truth values.
    """

    name: str | None
    shape: tuple[int, ...]
    below: int | None = None
    flags: bool = False


@dataclass(frozen=True)
class ModuleRequest:
    """What `vssm export-module` was asked for; the fields are its options."""

    target: str
    inputs: tuple[InputRequest, ...]
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
    seed: int | None = None
    conv: str | None = None
    blocks: str = "layers"
    cls_index: int | None = None
    imagenet: bool = False
    labels: Path | None = None
    outputs: tuple[str, ...] | None = None
    opset: int = 18
    inline: bool = False
    static_batch: bool = False
    dynamic: tuple[str, ...] = ()
    reference: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class ModuleExport:
    """The export, what stood in for upstream's packages, and what was loaded, in words."""

    artifact: Artifact
    upstream: str
    loaded: str | None


def read_inputs(texts: Sequence[str], tokens: int | None = None) -> tuple[InputRequest, ...]:
    """What `--input` and `--tokens` say.

    Args:
        texts: each [NAME=]SIZES, and behind a colon what it holds: N for integers below N, or
            `bool`; `scalar` in the place of the sizes is a number without an axis.
        tokens: of one input the same as :N.

    Raises:
        ValueError: a text is no such thing, or some inputs have names and others do not.
    """
    found = []
    for text in texts:
        name, equals, rest = text.rpartition("=")
        size, colon, kind = rest.partition(":")
        if (equals and not name) or (colon and kind != "bool" and not _counts(kind)):
            raise ValueError(
                f"input={text!r} is not [NAME=]SIZES or [NAME=]SIZES:N or [NAME=]SIZES:bool; write "
                "for example image=1x3x224x224 or tokens=1x64:50280"
            )
        shape = () if size == "scalar" else sizes("input", size)
        below = int(kind) if _counts(kind) else None
        found.append(InputRequest(name or None, shape, below, flags=kind == "bool"))
    if tokens is not None:
        if len(found) > 1 or found[0].below is not None or found[0].flags:
            raise ValueError(
                f"tokens={tokens} says what one input holds; of several say it behind each, as in "
                f"--input tokens=1x64:{tokens}"
            )
        found[0] = replace(found[0], below=tokens)
    unnamed = [text for text, one in zip(texts, found, strict=True) if one.name is None]
    if len(found) > 1 and unnamed:
        raise ValueError(
            f"input={unnamed[0]!r} has no name, and there are several; give each the name of its "
            "parameter, as in --input image=1x3x224x224 --input mask=1x1x224x224"
        )
    return tuple(found)


def _counts(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


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
            dynamic=request.dynamic,
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
            dynamic=request.dynamic,
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
    from vssm.runtimes.torch import torch_threads

    with (
        torch_threads(request.threads),
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
    from vssm.checkpoints.load import load_checkpoint

    found = load_checkpoint(
        model,
        request.checkpoint,
        weights=request.weights,
        key=request.key,
        new_head=request.new_head,
    )
    return CheckpointInfo(found.name, found.sha256), str(found)


def _check(request: ModuleRequest) -> PruneSchedule | None:
    """Refuse what will not do before the user's code runs; the schedule comes back."""
    from vssm.onnx.options import check_opset
    from vssm.runtimes.session import checked_threads

    names = ("alignment", "importance", "conv", "seed")
    rules = {name: getattr(request, name) for name in names}
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
    checked_threads(request.threads)
    check_checkpoint(request.checkpoint)
    check_files(labels=request.labels)
    # For their errors alone.
    _preprocessing(request)
    if request.dynamic and len(request.inputs) == 1:
        from vssm.compat.sizes import free_axes

        free_axes(request.dynamic, request.inputs[0].shape)
    return named_pruning(request.target, request.schedule, **rules)


def _example(request: ModuleRequest) -> Any:
    import torch

    from vssm.compat.inputs import nested

    # Its own generator: what a factory draws, or does not, must not change the example.
    generator = torch.Generator().manual_seed(0)

    def drawn(one: InputRequest) -> torch.Tensor:
        if one.below is None and not one.flags:
            return torch.randn(one.shape, generator=generator)
        found = torch.randint(one.below or 2, one.shape, generator=generator)
        return found.bool() if one.flags else found

    drawn_by_name = {one.name: drawn(one) for one in request.inputs}
    if None in drawn_by_name:
        return drawn_by_name[None]
    return nested({str(name): tensor for name, tensor in drawn_by_name.items()})


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
    shapes = [one.shape for one in request.inputs]
    if len(shapes) > 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise ValueError(
            f"--imagenet with input {', '.join(map(str, shapes))}: it is for one input, images of "
            "batch x 3 x height x width"
        )
    return Preprocessing.for_image_size((shapes[0][2], shapes[0][3]))
