"""Any torch module that holds selective scans, to `model.onnx` and `model.json`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn.parameter import is_lazy

from vssm._version import __version__
from vssm.artifact.directory import MODEL_FILE, Artifact, staged_export
from vssm.artifact.manifest import (
    MODULE_KEY,
    ROUNDING_KEY,
    CheckpointInfo,
    FreeSize,
    Manifest,
    Preprocessing,
    ScheduleInfo,
    TensorInfo,
    write_manifest,
)
from vssm.artifact.reference import REFERENCE_FILE
from vssm.checkpoints.load import save_safetensors
from vssm.checkpoints.wrapped import refuse_packed, refuse_wrapper
from vssm.compat.batch import noting_fixed_sizes, symbolic_arithmetic
from vssm.compat.exact import evaluating, exact_outputs
from vssm.compat.factory import said
from vssm.compat.inputs import Example, Inputs
from vssm.compat.outputs import module_outputs
from vssm.compat.packages.context import NoScanError
from vssm.compat.passes import simplify
from vssm.compat.passes.graph import PassReport
from vssm.compat.passes.regions import RefuseCasts, open_regions
from vssm.compat.passes.writes import without_mutation
from vssm.compat.prune import PrunedModule
from vssm.compat.sizes import (
    FreeAxis,
    SizeRule,
    free_axes,
    join_input,
    joined,
    noting_conditions,
    probes,
    prove,
    size_rules,
    split,
)
from vssm.compat.surroundings import as_if_run
from vssm.errors import UnsupportedError
from vssm.files.atomic import sha256_of
from vssm.files.progress import automatic, shows_progress
from vssm.files.text import shown
from vssm.models.blocks import counted_blocks
from vssm.onnx.describe import describe_schedule, describe_tensor, used_operators
from vssm.onnx.options import check_opset
from vssm.onnx.program import (
    BATCH,
    TRACING,
    program_to_proto,
)
from vssm.onnx.save import EXTERNAL_DATA_ABOVE, save_model
from vssm.onnx.trace import quick_traces, quiet
from vssm.ops.ambient import known_state
from vssm.ops.operators import torch_op
from vssm.ops.record import record_backends
from vssm.ops.spec import OPERATOR_VERSION, SCAN_OPERATORS
from vssm.types import Steps

_PACKAGES: Final = ("torch", "onnx", "onnxscript", "numpy")
_SEED: Final = 0
_UNWRITABLE: Final = re.compile(r'["\n\r\0]')  # torch.fx writes names between plain quotes
_OPSET: Final = 18


@dataclass(frozen=True)
class _Options:
    opset: int
    dynamic_batch: bool
    outputs: tuple[str, ...] | None
    axes: tuple[FreeAxis, ...] = ()

    @property
    def free(self) -> dict[int, str]:
        """The axes of an input that may have any size, by their names in the file."""
        batch = {0: BATCH} if self.dynamic_batch else {}
        return batch | {axis.axis: axis.name for axis in self.axes}


@dataclass(frozen=True)
class DryRun:
    """What an export of a module would hold, from one run of it.

    Attributes:
        inputs: sizes of each input by name, "batch" where it is any.
        outputs: shape of each output by name, of one image.
        scans: selective scans that ran; passes may make one node of several.
        parameters: how many numbers the module learned.
    """

    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int, ...]]
    scans: int
    parameters: int


@known_state()
def dry_run(
    model: nn.Module,
    example_input: Example,
    *,
    outputs: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic: Sequence[str] = (),
) -> DryRun:
    """Refuse what `export_module` refuses before its trace, and say what it would export.

    Takes what one image takes in PyTorch, and writes nothing; the arguments are those of
    `export_module`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `export_module` does.
    """
    example = _refuse(model, example_input, _OPSET)
    axes = _checked_axes(model, example, dynamic)
    named = None if outputs is None else tuple(outputs)
    options = _Options(_OPSET, dynamic_batch, named, axes)
    found, scans = _run_once(model, example, options)
    sizes: dict[str, tuple[int | str, ...]] = {}
    for name, tensor in example.tensors.items():
        free = options.free if name in example.batched else {}
        sizes[name] = tuple(free.get(axis, size) for axis, size in enumerate(tensor.shape))
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    return DryRun(sizes, shapes, scans, sum(p.numel() for p in model.parameters()))


@shows_progress
@known_state()
def export_module(
    model: nn.Module,
    example_input: Example,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    outputs: Sequence[str] | None = None,
    opset: int = _OPSET,
    dynamic_batch: bool = True,
    dynamic: Sequence[str] = (),
    inline: bool = False,
    reference: bool = True,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
    checkpoint: CheckpointInfo | None = None,
    external_data_above: int = EXTERNAL_DATA_ABOVE,
    force: bool = False,
    progress: Steps = automatic,
) -> Artifact:
    """Write any module that calls selective scans as one ONNX file, as `export` does a model.

    Its forward pass must be traceable by torch.export. What the graph passes did, and why one did
    not apply, is in `artifact.manifest.config["passes"]`.

    Args:
        model: left as it was; float32.
        example_input: the one input: images (batch, 3, height, width) float32, tokens
            (batch, seqlen) int64, ...; its sizes behind the batch are those of the file. Of several
            inputs a mapping by the parameters of `forward`, or a tuple in their order, in which
            lists, tuples and mappings of tensors may stand. The file calls them by the parameter,
            and below it the key or place (`views.0`). Those whose first size is that of the first
            have the batch there.
        directory: where model.onnx, model.json and reference.safetensors go.
        name: for reports; None for the class's name.
        outputs: names of the outputs, as `module_outputs` takes them; None: those that the module
            gives them, one called `logits` first.
        opset: 18 to 20.
        dynamic_batch: whether the first axis may have any size.
        dynamic: further axes that may have any size that the module's own code allows: "height"
            and "width" of images, or NAME=AXIS. The file is then held against the module at three
            sizes; model.json says which sizes are allowed (`config["sizes"]`).
        inline: also write model.inlined.onnx, without functions.
        reference: keep inputs and the module's exact outputs, for `vssm check`; model.json says
            how exact (`config["reference"]`).
        preprocessing: how image files become inputs; None: unknown, and then image files are
            refused later.
        labels: a name for every class.
        checkpoint: where the weights came from.
        external_data_above: bytes of weights beyond which they go to model.onnx.data, as protobuf
            reads no file above 2 GiB.
        force: replace the export that `directory` holds.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Returns:
        The export; `open_session`, `check_parity` and `vssm check`, `run` and `bench` take it.

    Raises:
        TypeError: `model` is no module, or a wrapper around one, or `example_input` no tensor or
            tuple or mapping of some.
        ValueError: a weight is not finite or not float32, or an option does not fit.
        UnsupportedError: torch.export cannot trace the module, no scan is in what it traced, the
            module is another function in float64, or a size in `dynamic` is fixed by its code.
        ArtifactError: the directory cannot be written, or holds an export and not `force`.
    """
    # Options first: neither the directory nor the module is touched for what is refused anyway.
    example = _refuse(model, example_input, opset)
    module_outputs(outputs)  # refuses names that are none
    axes = _checked_axes(model, example, dynamic)
    if preprocessing is not None:
        _check_preprocessing(preprocessing, example, axes)
    with staged_export(directory, force=force) as staging:
        asked = None if outputs is None else tuple(outputs)
        options = _Options(opset, dynamic_batch, asked, axes)
        # Names before the trace: an output that nobody can name is refused before the long part.
        names = list(_run_once(model, example, options)[0])
        exact = None
        if reference:  # first, as the trace takes long and this may be refused
            given = _reference_inputs(example, dynamic_batch=dynamic_batch)
            exact = exact_outputs(model, given, module_outputs(outputs, scores=True))
            save_safetensors({**given.tensors, **exact.outputs}, staging / REFERENCE_FILE)
        traced = trace_module(model, example, options, names, progress)
        proto = traced.proto
        save_model(proto, staging, inline=inline, external_data_above=external_data_above)
        if axes:
            prove(
                model,
                module_outputs(outputs),
                staging / MODEL_FILE,
                example.only,
                traced.rules,
                dynamic_batch=dynamic_batch,
            )
        manifest = _describe(
            proto,
            name=name or type(model).__name__,
            config={
                MODULE_KEY: f"{type(model).__module__}.{type(model).__qualname__}",
                **example.config,
                "outputs": None if outputs is None else list(outputs),
                "reference": None if exact is None else exact.precision,
                ROUNDING_KEY: None if exact is None else exact.rounding,
                "passes": [str(report) for report in traced.reports],
            },
            files={path.name: sha256_of(path) for path in sorted(staging.iterdir())},
            preprocessing=preprocessing,
            checkpoint=checkpoint,
            labels=labels,
            schedule=describe_schedule(model) if isinstance(model, PrunedModule) else None,
            sizes={rule.name: rule.size for rule in traced.rules},
        )
        write_manifest(staging, manifest)
    return Artifact(Path(directory).absolute(), manifest)


@dataclass(frozen=True)
class Traced:
    """A module's graph, what the passes did, and which sizes its free axes may have."""

    proto: onnx.ModelProto
    reports: list[PassReport]
    rules: tuple[SizeRule, ...]


def trace_module(
    model: nn.Module,
    example: Inputs,
    options: _Options,
    names: Sequence[str],
    progress: Steps = lambda *_: None,
) -> Traced:
    """The ModelProto of a module, and what is known of it."""
    wrapper = _Wrapper(model, example, options)
    with evaluating(wrapper), counted_blocks(model, progress, TRACING):
        program, rules = _trace(wrapper, example, options)
    _refuse_open_outputs(program, names)
    scans = {torch_op(spec) for spec in SCAN_OPERATORS}
    if not any(node.target in scans for node in program.graph.nodes):
        raise UnsupportedError(
            f"{type(model).__name__} runs selective scans, and there is none in its trace: it "
            "computes them otherwise where it is traced; take that branch out, or set what "
            "decides on it"
        )
    # What follows runs no code of the user's, so no call has to be asked what it means to it.
    reports = simplify(program, probes(program, rules))
    proto = program_to_proto(
        program,
        options.opset,
        inputs=list(example.tensors),
        names=names,
        public=len(names),
        free=options.free,
        steps={axis.axis: axis.step for axis in options.axes},
        progress=progress,
    )
    return Traced(proto, reports, rules)


def _refuse_open_outputs(program: ExportedProgram, names: Sequence[str]) -> None:
    """Refuse outputs of a size that only the values tell, as `x[mask]` has."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    for name, node in zip(names, output.args[0], strict=True):
        if free_unbacked_symbols(node.meta["val"].shape):
            raise UnsupportedError(
                f"output {name!r} has as many entries as the values say (a mask as an index, "
                "nonzero), and outputs of a file have sizes that their inputs tell; return all "
                "entries, and the mask beside them"
            )


def _run_once(
    model: nn.Module, example: Inputs, options: _Options
) -> tuple[dict[str, Tensor], int]:
    """The outputs by name, and how many selective scans ran."""
    # One image is enough, but a module that reshapes by its batch runs on the fixed one alone.
    x = example.map(lambda x: x[:1], batched=True) if options.dynamic_batch else example
    with evaluating(model), torch.inference_mode():
        try:
            # The user's line is known here, before the trace; where a `try` of the module's hides
            # this error, `open_regions` finds the cast in the trace.
            with RefuseCasts(), record_backends() as ran:
                found = module_outputs(options.outputs)(model, x)
        except (UnsupportedError, ValueError):
            raise
        # The user's code may raise anything, which would drown in what torch.export says of it.
        except (Exception, SystemExit) as error:
            before = "" if ran else " and before any selective scan"
            raise UnsupportedError(
                f"{type(model).__name__} fails on {x}{before}: {said(error)}; give the input that "
                "it is made for, or mend that line"
            ) from error
    if not ran:
        raise NoScanError(_no_scan(model))
    if shared := sorted(found.keys() & example.tensors.keys()):
        raise ValueError(
            f"outputs: {shared[0]!r} is the name of an input as well, and a file has it once; say "
            f"outputs=['NEW={shared[0]}', ...] (--outputs)"
        )
    return found, sum(ran.values())


class _Wrapper(nn.Module):
    """Gives the outputs as a tuple of tensors."""

    def __init__(self, model: nn.Module, example: Inputs, options: _Options) -> None:
        super().__init__()
        self.model, self.example, self.axes = model, example, options.axes
        self.outputs = module_outputs(options.outputs)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        whole = (joined(x, self.axes) for x in xs)
        inputs = replace(self.example, tensors=dict(zip(self.example.tensors, whole, strict=True)))
        # Each its own value: a stage's choice may be an input of the next.
        return tuple(y.clone() for y in self.outputs(self.model, inputs).values())


def _refuse(model: Any, example: Any, opset: int) -> Inputs:
    """Refuse what is no module to export, or no example of its inputs; those come back."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} is not a torch.nn.Module; give the module")
    refuse_wrapper(model)
    if lazy := [key for key, value in model.state_dict().items() if is_lazy(value)]:
        raise ValueError(
            f"model: {lazy[0]} has no size yet, as of a lazy module before its first call; call "
            "the model once on an input before it is exported (in the factory, for a command)"
        )
    refuse_packed(model)
    inputs = Inputs.of(model, example).map(lambda x: x.detach().cpu())
    if not inputs.batched:
        raise ValueError("example_input: no tensor in it has an axis; give one with a batch axis")
    check_opset(opset)
    for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers()):
        if _UNWRITABLE.search(name):
            raise UnsupportedError(
                f"model: the name {shown(repr(name), limit=80)} of a module or weight holds a "
                "quote or a line break, which torch.export cannot write; rename it"
            )
    bad: dict[str, list[str]] = {"not float32": [], "on device meta": [], "not finite": []}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.is_meta:
            bad["on device meta"].append(key)
        elif value.dtype != torch.float32:
            bad["not float32"].append(key)
        elif not bool(value.isfinite().all()):
            bad["not finite"].append(key)
    if faults := [
        f"{why}: {', '.join(keys[:4])} ({len(keys)})" for why, keys in bad.items() if keys
    ]:
        raise ValueError(
            f"model: weights {'; '.join(faults)}; load float32 weights on a real device "
            "(model.float()), half precision is for the models of vssm.create_model"
        )
    return inputs


def _trace(
    wrapper: _Wrapper, example: Inputs, options: _Options
) -> tuple[ExportedProgram, tuple[SizeRule, ...]]:
    """torch.export's program; a batch of one would be taken for a constant."""
    dynamic_batch = options.dynamic_batch
    pair = example
    if dynamic_batch:
        pair = example.map(lambda x: torch.cat([x, x])[: max(2, len(x))], batched=True)
    with noting_fixed_sizes() as lines:
        try:
            return _exported(wrapper, pair, options)
        except UnsupportedError as error:
            # Only sizes that code made numbers of can be had otherwise.
            if not options.axes:
                raise
            failure: Exception = error
        except Exception as error:
            failure = error
        if options.free and (lines or options.axes):
            # Once more, with the arithmetic of the module's code kept symbolic.
            with contextlib.suppress(Exception), symbolic_arithmetic(wrapper.model):
                return _exported(wrapper, pair, options)
    if isinstance(failure, UnsupportedError):
        raise failure
    name = type(wrapper.model).__name__
    # Only a size that was to be any is fixed by a line; what else fails has another cause.
    if lines and (fixed := _fixed(options, pair, str(failure))):
        raise UnsupportedError(
            f"{name} computes with the {' and the '.join(fixed)} in Python, which makes it "
            f"{' and '.join(map(str, fixed.values()))} for good, at {lines[0]}; use the size of a "
            "tensor there as it is (x.shape[0] // n, -1 in reshape), or export with "
            "dynamic_batch=False (--static-batch)"
            + (" or without dynamic (--dynamic)" if options.axes else "")
        ) from failure
    raise UnsupportedError(
        f"torch.export cannot trace {name}: {said(failure)}. Trace it "
        "inside vssm.compat.upstream(), take data-dependent control "
        "flow and .item() out of its forward pass"
        + (", or try dynamic_batch=False (--static-batch)" if dynamic_batch else "")
        + " (docs/compat.md)"
    ) from failure


def _fixed(options: _Options, example: Inputs, failure: str) -> dict[str, int]:
    """The free sizes that torch says it was made to fix, and what they are."""
    # In the split input an axis stands behind the second halves of those in front of it.
    names = {
        at + sum(0 < other < at for other in options.free): name
        for at, name in options.free.items()
    }
    # Of several inputs nothing but the batch is free.
    whole = next(x for name, x in example.tensors.items() if name in example.batched)
    sizes = {name: whole.shape[at] for at, name in options.free.items()}
    found = re.findall(r"marked L\['xs'\]\[\d+\]\.size\(\)\[(\d+)\] as dynamic but", failure)
    if "specialized" not in failure:
        return {}
    fixed = [names[int(at)] for at in found if int(at) in names] or list(names.values())
    return {name: sizes[name] for name in fixed}


def _exported(
    wrapper: _Wrapper, inputs: Inputs, options: _Options
) -> tuple[ExportedProgram, tuple[SizeRule, ...]]:
    places = sorted(axis.axis for axis in options.axes)
    # Sizes behind the batch are symbols without a bound: which ones the code allows is read off.
    # Each is split in two, which moves those behind it by one.
    free: dict[int, Any] = {at + i: torch.export.Dim.DYNAMIC for i, at in enumerate(places)}
    # One for all inputs: they have the same number of images.
    batch = {0: torch.export.Dim(BATCH)} if options.dynamic_batch else {}
    shapes = tuple({**free, **(batch if n in inputs.batched else {})} for n in inputs.tensors)
    torch.compiler.reset()  # a torch.cond that ran before was compiled, and cannot be traced
    # Where all that is compiled runs as it is, the branches of a cond could not be traced.
    with torch.no_grad(), quiet(), as_if_run(), torch.compiler.set_stance("default"):
        given = tuple(split(x, options.axes) for x in inputs.tensors.values())

        def traced() -> ExportedProgram:
            return torch.export.export(wrapper, given, dynamic_shapes={"xs": shapes})

        with noting_conditions() as conditions, quick_traces():
            program = traced()
        rules: tuple[SizeRule, ...] = ()
        if options.axes:
            join_input(program, options.axes)
            rules = size_rules(program, options.axes, conditions)
        # Regions first: what is written inside one is out of sight until it is opened.
        try:
            opened = open_regions(program)
        except UnsupportedError:
            open_regions(traced())  # once more with the lines of the code, to name the one refused
            raise
        return without_mutation(opened), rules


def _check_preprocessing(
    preprocessing: Preprocessing, example: Inputs, axes: Sequence[FreeAxis]
) -> None:
    if len(example.tensors) > 1:
        raise ValueError(
            f"preprocessing with the inputs {', '.join(example.tensors)}: image files become the "
            "one input of a file; leave it out"
        )
    dtype = str(example.only.dtype).removeprefix("torch.")
    free = {axis.axis: axis.name for axis in axes}
    shape = tuple(free.get(axis, size) for axis, size in enumerate(example.only.shape))
    # Which sizes these may have, the trace will tell; model.json is held against that.
    any_size = {axis.name: FreeSize(axis.example, multiple=1, minimum=1) for axis in axes}
    preprocessing.check(TensorInfo(next(iter(example.tensors)), dtype, shape), any_size)


def _checked_axes(
    model: nn.Module, example: Inputs, dynamic: Sequence[str]
) -> tuple[FreeAxis, ...]:
    if dynamic and len(example.tensors) > 1:
        raise UnsupportedError(
            f"dynamic={list(dynamic)} with the inputs {', '.join(example.tensors)}: sizes can be "
            "left open where a module has one input alone; leave it out"
        )
    axes = free_axes(dynamic, next(iter(example.tensors.values())).shape)
    if axes and isinstance(model, PrunedModule):
        raise UnsupportedError(
            f"dynamic={list(dynamic)} with a pruned module, which keeps a number of tokens that "
            "was settled by the size of its example input; export it dense, or without dynamic"
        )
    return axes


def _no_scan(model: nn.Module) -> str:
    return (
        f"{type(model).__name__}: it calls no selective scan of vssm.compat, so "
        "its scan, if it has one, would become a loop of plain operators. Import and build the "
        "model inside vssm.compat.upstream(), or replace its own scan function with "
        "upstream(scans={'module:name': 'channels'}) (--scan module:name=channels); a loop inside "
        "a forward pass first has to be a function of u, delta, A, B and C (docs/compat.md)"
    )


def _reference_inputs(example: Inputs, *, dynamic_batch: bool) -> Inputs:
    """What the module's answers are kept for: noise, or the example where that may not be valid."""
    if len(example.tensors) > 1:
        if not dynamic_batch:
            return example
        # A second image, so that the batch is tried as well: the first mirrored.
        return example.map(
            lambda x: torch.cat([x, x.flip(-1) if x.dim() > 1 else x])[: max(2, len(x))],
            batched=True,
        )
    x = example.only
    # Only the user knows which integers are valid, such as those that a vocabulary has.
    if not x.is_floating_point():
        return example
    generator = torch.Generator().manual_seed(_SEED)
    count = 2 if dynamic_batch else len(x)
    return example.map(lambda x: torch.randn((count, *x.shape[1:]), generator=generator))


def _describe(
    proto: onnx.ModelProto,
    *,
    name: str,
    config: dict[str, Any],
    files: dict[str, str],
    preprocessing: Preprocessing | None,
    checkpoint: CheckpointInfo | None,
    labels: Sequence[str] | None,
    schedule: ScheduleInfo | None,
    sizes: dict[str, FreeSize],
) -> Manifest:
    return Manifest(
        name=name,
        config=config,
        inputs=tuple(map(describe_tensor, proto.graph.input)),
        outputs=tuple(map(describe_tensor, proto.graph.output)),
        dtype="float32",
        opset=proto.opset_import[0].version,
        files=files,
        operators=dict.fromkeys(used_operators(proto), OPERATOR_VERSION),
        versions={
            "vssm": __version__,
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
        schedule=schedule,
        sizes=sizes,
        weights="custom" if checkpoint is None else "checkpoint",
        preprocessing=preprocessing,
        checkpoint=checkpoint,
        labels=None if labels is None else tuple(labels),
    )
