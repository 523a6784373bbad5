"""Checkpoints into models: official wrappings and prefixes, all or nothing."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from torch import Tensor, nn

from vssm.artifact.manifest import CheckpointInfo
from vssm.checkpoints.align import BACKBONE, Fitted, align
from vssm.checkpoints.formats import read_file
from vssm.checkpoints.hub import download, hub_file
from vssm.checkpoints.labels import stored_labels, with_labels
from vssm.checkpoints.locate import some
from vssm.checkpoints.wrapped import refuse_wrapper
from vssm.errors import CheckpointError
from vssm.files.atomic import atomic_path
from vssm.files.text import shown

_SHARD: Final = re.compile(r"-\d+-of-\d+\.")


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` read and what it did to it.

    Attributes:
        path: the file; from a hub its address, with the commit.
        sha256: of the file.
        format: "safetensors" or "torch", or one of them with the number of its shards.
        weights: "model" or "ema".
        wrapper: dotted key that the weights lay under; empty for a bare state dict.
        prefix_stripped: what was taken off the keys, such as "module." or "backbone.".
        prefix_added: what was put before keys that the model has under "backbone.".
        unwrapped: wrappers' parts taken out of the middle of keys, such as "_orig_mod".
        num_tensors: tensors loaded, all that the model has but those of a new head.
        ignored: keys of the file that are no weights of this model ("optimizer", mmcv's "ema_*",
            counters).
        adapted: keys that the model itself renamed or resized (position tables of another size).
        casts: changes of dtype, each with the count and whether every value stayed the same.
        stubs: classes and functions named in the file that were neither imported nor called.
        new_head: what the model's head keeps of its own, and why; only where that was asked for.
        own: the parts that keep the model's own tensors because only a backbone was loaded.
    """

    path: str
    sha256: str
    format: str
    weights: str
    wrapper: str
    prefix_stripped: str
    prefix_added: str
    unwrapped: tuple[str, ...]
    num_tensors: int
    ignored: tuple[str, ...]
    adapted: tuple[str, ...]
    casts: tuple[str, ...]
    stubs: tuple[str, ...]
    new_head: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What model.json calls the file: its name alone, or its whole address on a hub."""
        return shown(self.path if hub_file(self.path) else os.path.basename(self.path))

    def __str__(self) -> str:
        parts = [f"{self.num_tensors} tensors from {self.path} ({self.format})"]
        parts += [f"under {self.wrapper!r}"] if self.wrapper else []
        parts += [f"prefix {self.prefix_stripped!r} stripped"] if self.prefix_stripped else []
        parts += [f"prefix {self.prefix_added!r} added"] if self.prefix_added else []
        for word, names in (
            ("taken out of keys", self.unwrapped),
            ("new head", self.new_head),
            ("not in a classifier, the model's own", self.own),
            ("adapted", self.adapted),
            ("cast", self.casts),
            ("ignored", self.ignored),
            ("never run", self.stubs),
        ):
            parts += [f"{word}: {some(names, len(names))}"] if names else []
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    weights: str = "model",
    key: str | None = None,
    new_head: bool = False,
    backbone: bool = False,
) -> LoadReport:
    """Load a checkpoint file into `model`, which has the official keys; all of it or nothing.

    What wrappers and training loops leave in a file is taken off where one way of doing so fits the
    model in every key and shape; docs/checkpoints.md says what. A model with a method
    `adapt_state_dict(state) -> state` is asked to rename old keys and resize position tables,
    without changing itself. Values are cast to the model's dtypes. A model with attributes
    `checkpoint`, `loaded` and `labels` is told the file's name and hash, what was done, and the
    names of its classes where the file has them, for `model.json` and reports.

    Args:
        model: left as it was on any error; stays on its device.
        path: a safetensors file, one that torch.save wrote, or the index or folder of shards; or
            `hf://OWNER/REPO[@REVISION][/FILE]`, which is downloaded (docs/checkpoints.md).
        weights: "model", or "ema" for the averaged weights that some training codes save beside.
        key: where the weights are in the file, if under no usual name: a dotted path, or what the
            keys of a flat file begin with, such as "student".
        new_head: keep the model's own classifier (keys with a part "head", of a segmenter
            "conv_seg") where the file has one of another width, or none.
        backbone: of a segmenter, load the backbone alone, from a classifier of the same sizes. The
            heads, and what else a classifier has not, stay as they are; its head is left out.

    Returns:
        What was read and done, for people to check.

    Raises:
        ValueError: an option does not fit.
        TypeError: `model` is a wrapper (DataParallel, torch.compile's) around the model.
        CheckpointError: the file cannot be read; or keys are missing, unexpected or misshapen, or
            values not finite; each kind is named in the one message.
    """
    refuse_wrapper(model)
    part = _shared(model, new_head=new_head) if backbone else model
    if (wanted := hub_file(path)) is not None:
        file, found_at = download(wanted)
        path = str(found_at)
    else:
        file = Path(path)
    raw = read_file(file, weights=weights, key=key)
    try:
        found = align(raw.state, part, new_head=new_head)
    except CheckpointError as error:
        shard = ""
        if _SHARD.search(os.path.basename(os.fspath(path))):
            shard = "; it is one of several shards by its name: give their index or folder"
        raise CheckpointError(f"checkpoint={path}: {error}{shard}") from error
    own = model.state_dict()
    # All that can fail comes before the model is touched.
    cast, casts = _cast(found.state, part.state_dict(), path)
    if backbone:
        cast = {f"{BACKBONE}{key}": value for key, value in cast.items()}
    labels = stored_labels(raw.metadata, path)
    # The model's own values stand in for a new head, so that `strict` still holds for the rest.
    model.load_state_dict({**own, **cast}, strict=True)
    report = LoadReport(
        path=os.fspath(path),
        sha256=raw.sha256,
        format=raw.format,
        weights=weights,
        wrapper=raw.wrapper,
        prefix_stripped=found.prefix_stripped,
        prefix_added=found.prefix_added,
        unwrapped=found.unwrapped,
        num_tensors=len(cast),
        ignored=(*raw.ignored, *found.ignored),
        adapted=found.adapted,
        casts=casts,
        stubs=raw.stubs,
        new_head=found.new_head,
        own=_parts(key for key in own if key not in cast) if backbone else (),
    )
    # A new head has classes of its own.
    _tell(model, report, None if new_head or backbone else labels)
    return report


def _shared(model: nn.Module, *, new_head: bool) -> Fitted:
    """What a segmenter has in common with a classifier."""
    if new_head:
        raise ValueError(
            "new_head=True with backbone=True, after which the heads are the model's own in any "
            "case; leave new_head out"
        )
    part: Callable[[], Fitted] | None = getattr(model, "classifier_part", None)
    if part is None:
        raise ValueError(
            f"backbone=True for {type(model).__name__}: only a segmenter's backbone is begun from "
            "a classifier's checkpoint; leave it out"
        )
    return part()


def _parts(keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that keys lie in: those in the backbone by their own names."""
    return tuple(dict.fromkeys(".".join(k.split(".")[: 1 + k.startswith(BACKBONE)]) for k in keys))


def _tell(model: nn.Module, report: LoadReport, labels: tuple[str, ...] | None) -> None:
    """Set those of a model's attributes that say where its weights came from."""
    told = {
        "checkpoint": CheckpointInfo(report.name, report.sha256),
        "loaded": str(report),
        "labels": labels,
    }
    for name, value in told.items():
        if hasattr(model, "checkpoint") and hasattr(model, name):
            setattr(model, name, value)


def save_safetensors(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """Write tensors as one safetensors file, whole or not at all; equal tensors give equal bytes.

    Args:
        state: the tensors by name.
        path: the file.
        labels: names of the model's classes, which go into the file's metadata.

    Raises:
        ArtifactError: the file cannot be written.
    """
    # The format has no shared memory: tied weights and views are written out.
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    data = safetensors.torch.save(plain, metadata={"format": "pt"})
    with atomic_path(path) as temporary:
        # save_file would put a file of its own in place, which only its owner may read.
        temporary.write_bytes(data if labels is None else with_labels(data, labels))


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and values of tensors, whatever their order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes in torch, since numpy has no bfloat16; flat, since torch reinterprets no scalar.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cast(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Values in the model's dtypes, and what that changed; refuse values that are not numbers."""
    result: dict[str, Tensor] = {}
    changes: Counter[str] = Counter()
    bad: list[str] = []
    for key, value in state.items():
        # `to` would drop the imaginary part, with no more than a warning.
        if value.is_complex() != expected[key].is_complex():
            bad.append(key)
            continue
        narrow = not value.is_floating_point() and value.dtype.itemsize == 1
        if narrow and expected[key].is_floating_point():
            raise CheckpointError(
                f"checkpoint={path} has weights of 8 bits ({some([key], 1)}: {value.dtype}), which "
                "mean nothing without their scales; use the float weights that were quantised"
            )
        cast = value.to(expected[key].dtype)
        if not bool(torch.isfinite(cast).all()):
            bad.append(key)
        elif cast.dtype != value.dtype:
            exact = torch.equal(cast.to(value.dtype), value)
            # A weight may be rounded; an index or a counter would be another one.
            if not exact and not cast.is_floating_point():
                bad.append(key)
            change = f"{value.dtype} to {cast.dtype}".replace("torch.", "")
            changes[f"{change}, {'exact' if exact else 'rounded'}"] += 1
        result[key] = cast
    if bad:
        raise CheckpointError(
            f"checkpoint={path} has values that the model cannot hold (infinite, NaN, or of "
            f"another kind) in {some(bad, len(bad))}; use a checkpoint of a run that converged"
        )
    return result, tuple(f"{count} {change}" for change, count in sorted(changes.items()))
