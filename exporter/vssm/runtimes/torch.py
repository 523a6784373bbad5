"""The model in PyTorch: rebuilt from an export, run as a session, and as the float64 oracle."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vssm.artifact.directory import WEIGHTS_FILE, Artifact
from vssm.artifact.manifest import BOXES, MERGED_PAIRS, SIZES, Manifest
from vssm.artifact.reference import (
    OracleMerge,
    OracleResult,
    is_module,
    module_result,
    refuse_module,
)
from vssm.checkpoints.formats import parse_safetensors
from vssm.checkpoints.torch_file import MALFORMED
from vssm.compat.exact import exact_outputs
from vssm.compat.inputs import Inputs
from vssm.compat.outputs import module_outputs
from vssm.errors import ArtifactError, check_choice
from vssm.models import model_from_config
from vssm.models.base import ForwardDetails, VisionModel
from vssm.models.blocks import counted_blocks
from vssm.models.dense.detector import Detector
from vssm.models.dense.heads import upsample
from vssm.ops.ambient import known_state
from vssm.ops.kernels import kernels
from vssm.pruning.schedule import MergeSchedule, MergeStage, PruneSchedule, Schedule
from vssm.runtimes.library import library_version
from vssm.runtimes.ort import cpu_name
from vssm.runtimes.session import (
    CLOSED,
    TORCH_BACKENDS,
    RuntimeInfo,
    Session,
    by_name,
    checked_threads,
    share_cores,
)
from vssm.types import Array, Steps

_KEPT: Final = "kept_positions_"
TorchModule = nn.Module  # for files that name no torch


@contextmanager
def torch_threads(
    threads: int | None, workers: int | None = 0, *, processes: int = 1
) -> Iterator[tuple[int, int]]:
    """Give torch its share of the cores, as `share_cores`; at the end it has what it had before.

    Where `threads` is None, torch has no more of them than before. Gives threads and workers.
    """
    before = torch.get_num_threads()
    share, workers = share_cores(threads, workers, processes=processes)
    torch.set_num_threads(share if threads is not None else min(share, before))
    try:
        yield torch.get_num_threads(), workers
    finally:
        torch.set_num_threads(before)


@known_state()
def model_of(artifact: Artifact, *, dense: bool = False) -> VisionModel:
    """The float32 model of an export, rebuilt from model.json and weights.safetensors.

    Args:
        artifact: a verified export.
        dense: leave its schedule out.

    Raises:
        ArtifactError: the weights were not exported, or do not fit model.json.
    """
    refuse_module(
        artifact, "so PyTorch cannot run it; run model.onnx, or give check_parity the model"
    )
    manifest = artifact.manifest
    schedule = None if dense else schedule_of(artifact)
    model = model_from_config(manifest.name, dict(manifest.config), schedule)
    try:
        weights, _ = parse_safetensors(artifact.read_weights())
        model.load_state_dict(weights, strict=True)
    except (SafetensorError, *MALFORMED) as error:
        raise ArtifactError(
            f"{artifact.directory / WEIGHTS_FILE} does not fit the model of model.json: {error}; "
            "export again"
        ) from error
    model.checkpoint = manifest.checkpoint
    return model.eval()


def schedule_of(artifact: Artifact) -> Schedule | None:
    """The schedule that model.json describes."""
    pruning, info = _pruning_of(artifact), artifact.manifest.merge
    if info is None:
        return pruning
    rules = {f.name: getattr(info, f.name) for f in fields(info)}
    del rules["blocks"], rules["num_keep"]  # follow from the rules
    return MergeSchedule(prune=pruning, **rules)


def _pruning_of(artifact: Artifact) -> PruneSchedule | None:
    info = artifact.manifest.schedule
    if info is None:
        return None
    return PruneSchedule(
        info.blocks,
        alignment=info.alignment,
        importance=info.importance,
        score_direction=info.score_direction,
        gated=info.gated,
        conv=info.conv,
        step_parameters=info.step_parameters,
        restore=info.restore,
        seed=info.seed or 0,
    )


def _refuse_another(model: VisionModel, artifact: Artifact) -> None:
    # Both through JSON: in a manifest that was read from its file, tuples have become lists.
    exported, given = json.loads(json.dumps([artifact.manifest.config, asdict(model.config)]))
    if exported != given or _rules(schedule_of(artifact)) != _rules(model.schedule):
        raise ValueError(
            f"model: {model.name} of this configuration and schedule is not the model of this "
            f"export, in {artifact.directory}; pass the one that was exported, or export it again"
        )


def _rules(schedule: Schedule | None) -> dict[str, Any]:
    """What a schedule does: its seed only where it draws."""
    rules = {} if schedule is None else dict(vars(schedule))
    if isinstance(schedule, MergeSchedule):
        return {**rules, "prune": _rules(schedule.prune)}
    return rules if rules.get("importance") == "random" else {**rules, "seed": 0}


class TorchSession(Session):
    """`torch`: the float32 model in PyTorch.

    `run` may be called from several threads at once; they share torch's threads, whose number
    `threads` sets for the whole process until `close`.

    Args:
        artifact: a verified export.
        backend: "kernel" (the library must be there) or "reference", a loop over the sequence.
        threads: torch's threads; None leaves their number as it is.

    Raises:
        ValueError: `backend` is neither, or `threads` is no number of threads.
        RuntimeUnavailableError: there is no library for "kernel".
    """

    def __init__(
        self, artifact: Artifact, *, backend: str = "kernel", threads: int | None = None
    ) -> None:
        # Before the model: a missing library is said before any weights are read.
        library = _library(backend)
        self._model: VisionModel | None = model_of(artifact).use_backend(backend)
        # The number is the whole process's, so it is put back at the end.
        self._threads_before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(checked_threads(threads))
        info = RuntimeInfo(
            runtime="torch",
            backend=backend,
            version=f"torch {torch.__version__} float32",
            device=cpu_name(),
            threads=torch.get_num_threads(),
            library=None if library is None else library.name,
            library_version=None if library is None else library_version(library),
        )
        super().__init__(artifact.manifest, info)

    @known_state()
    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        model, images = self._model, feeds[self.manifest.inputs[0].name]
        if model is None:
            raise ValueError(CLOSED)
        with torch.inference_mode():
            # A copy: torch takes no negative strides, as of a BGR view, and warns of read-only
            # arrays.
            found = model.forward_details(torch.from_numpy(np.array(images)))
            if isinstance(model, Detector) and self.manifest.gives_boxes:
                found = model.detected(found, _sizes(model, feeds.get(SIZES)))
        kept = {f"{_KEPT}{i}": k.numpy() for i, k in enumerate(found.kept_positions)}
        pairs = {f"{MERGED_PAIRS}{i}": m.pairs.numpy() for i, m in enumerate(found.merges)}
        return {**_outputs(model, found, self.manifest), **kept, **pairs}

    def close(self) -> None:
        """Free the model, and give torch back the threads it had."""
        if self._model is not None:
            torch.set_num_threads(self._threads_before)
        self._model = None


def _outputs(model: VisionModel, found: ForwardDetails, manifest: Manifest) -> dict[str, Array]:
    """The export's outputs by name, but for what the stages chose."""
    names = [o.name for o in manifest.outputs if not o.name.startswith((_KEPT, MERGED_PAIRS))]
    return {name: model.output(name, found).numpy() for name in names}


def _sizes(model: Detector, given: Array | None) -> Tensor:
    return torch.tensor([model.image_size]) if given is None else torch.from_numpy(given)


def _library(backend: str) -> Path | None:
    check_choice("backend", backend, TORCH_BACKENDS)
    return None if backend == "reference" else kernels().path


@known_state()
def oracle(
    model: nn.Module,
    artifact: Artifact,
    images: Array | Mapping[str, Array],
    *,
    progress: Steps = lambda *_: None,
) -> OracleResult:
    """What the model says of images, or what else it takes, in float64; it stays as it is.

    `progress` is called with the blocks that are done.

    Raises:
        ValueError: it is not the model that was exported, whatever its weights.
        UnsupportedError: it is a module of the user's that does not run in float64.
    """
    feeds = by_name(artifact.manifest, images)
    if is_module(artifact):
        return _module_oracle(model, artifact, feeds)
    if not isinstance(model, VisionModel):
        raise TypeError(
            f"model={type(model).__name__} is not a model of this package, but {artifact.directory}"
            " is the export of one; pass the model that was exported, or None"
        )
    _refuse_another(model, artifact)
    (images,) = feeds.values()
    # A copy, so that the caller's model stays float32; kernels have no float64.
    exact = copy.deepcopy(model).cpu().eval().double().use_backend("reference")
    streams = artifact.manifest.block_outputs
    with counted_blocks(exact, progress, "float64 oracle, blocks"), torch.inference_mode():
        found = exact.forward_details(
            torch.from_numpy(np.array(images)).double(), with_blocks=bool(streams)
        )
    blocks: dict[str, Array] = {}
    for name, (hidden, residual) in zip(streams, found.blocks, strict=True):
        blocks[name.hidden] = hidden.numpy()
        if name.residual is not None and residual is not None:
            blocks[name.residual] = residual.numpy()
    kept = [k.numpy() for k in found.kept_positions]
    detector = exact if isinstance(exact, Detector) and artifact.manifest.gives_boxes else None
    if detector is None:
        main = artifact.manifest.main_output.name
        outputs = _outputs(exact, found, artifact.manifest)
    else:
        main, names = detector.dense_names[0], detector.output_groups["dense"]
        outputs = {name: detector.output(name, found).numpy() for name in names}
    labels = outputs.pop("labels", None)
    return OracleResult(
        logits=outputs.pop(main),
        kept_positions=kept,
        scores=[s.numpy() for s in found.scores],
        # Stage i chooses among what stage i - 1 kept.
        positions=[_every_position(exact, len(images)), *kept[:-1]] if kept else [],
        blocks={**blocks, **outputs},
        merges=_merges(exact, found),
        labels=labels,
        label_margins=None if labels is None else _label_margins(exact, found.logits),
        detections=None if detector is None else _detections(detector, found),
        main=None if detector is None else main,
    )


def _detections(model: Detector, found: ForwardDetails) -> list[dict[str, Array]]:
    """What is in each image of a pass, none of which was padded."""
    whole = torch.tensor([model.image_size] * len(found.logits))
    names = model.output_groups[BOXES]
    with torch.inference_mode():
        told = model.told(found, whole)
    return [{name: getattr(one, name).numpy() for name in names} for one in told]


def _merges(model: VisionModel, found: ForwardDetails) -> dict[int, OracleMerge]:
    stages = [s.index for s in model.stages.values() if isinstance(s, MergeStage)]
    return {
        stage: OracleMerge(
            merge.pairs.numpy(),
            merge.score.numpy(),
            merge.sources.numpy(),
            merge.destinations.numpy(),
        )
        for stage, merge in zip(stages, found.merges, strict=True)
    }


def _label_margins(model: VisionModel, logits: Tensor) -> Array:
    """How far each pixel's best class is from its second, over the largest logit."""
    best = upsample(logits, model.image_size).topk(2, dim=1).values
    margins: Array = ((best[:, 0] - best[:, 1]) / logits.abs().max()).numpy()
    return margins


def _module_oracle(
    model: nn.Module, artifact: Artifact, feeds: Mapping[str, Array]
) -> OracleResult:
    names = [output.name for output in artifact.manifest.outputs]
    # How they were asked for: of names alone it would not be known which outputs they rename.
    asked = artifact.manifest.config.get("outputs")
    outputs = module_outputs(asked, scores=True)
    given = Inputs.again(feeds, artifact.manifest.config)
    found = exact_outputs(model, given, outputs).outputs
    if not set(names) <= set(found):
        raise ValueError(
            f"model: it returns {sorted(found)}, the export in {artifact.directory} "
            f"{sorted(names)}; pass the module that was exported"
        )
    arrays = {name: value.numpy() for name, value in found.items()}
    return module_result(arrays, artifact.manifest.main_output.name)


def _every_position(model: VisionModel, batch: int) -> Array:
    """Places (batch, seqlen) of the tokens before the first stage."""
    seqlen = 0 if model.layout is None else model.layout.seqlen
    return np.broadcast_to(np.arange(seqlen), (batch, seqlen))
