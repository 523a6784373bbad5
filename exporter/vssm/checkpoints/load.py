"""Checkpoints into models: official wrappings and prefixes, all or nothing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn

from vssm.artifact.manifest import CheckpointInfo
from vssm.checkpoints.formats import read_file
from vssm.checkpoints.labels import stored_labels, with_labels
from vssm.errors import CheckpointError, VssmError
from vssm.files.atomic import atomic_path, sha256_of

_MODULE: Final = "module."
_BACKBONE: Final = "backbone."
_EMA: Final = "ema_"
_SHOWN: Final = 6


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` read and what it did to it.

    Attributes:
        path: the file.
        sha256: of the file.
        format: "safetensors", "torch" or "torch, restricted" (it held objects of unknown classes).
        weights: "model" or "ema".
        wrapper: key that the weights lay under; empty for a bare state dict.
        prefix_stripped: what was taken off the keys, such as "module." or "backbone.".
        prefix_added: what was put before keys that the model has under "backbone.".
        num_tensors: tensors loaded, all that the model has.
        ignored: keys of the file that are no weights of this model ("optimizer", mmcv's "ema_*").
        adapted: keys that the model itself renamed or resized (position tables of another size).
        casts: changes of dtype, each with the count and whether every value stayed the same.
        stubs: classes and functions named in the file that were neither imported nor called.
    """

    path: str
    sha256: str
    format: str
    weights: str
    wrapper: str
    prefix_stripped: str
    prefix_added: str
    num_tensors: int
    ignored: tuple[str, ...]
    adapted: tuple[str, ...]
    casts: tuple[str, ...]
    stubs: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.num_tensors} tensors from {self.path} ({self.format})"]
        parts += [f"under {self.wrapper!r}"] if self.wrapper else []
        parts += [f"prefix {self.prefix_stripped!r} stripped"] if self.prefix_stripped else []
        parts += [f"prefix {self.prefix_added!r} added"] if self.prefix_added else []
        for word, names in (
            ("adapted", self.adapted),
            ("cast", self.casts),
            ("ignored", self.ignored),
            ("never run", self.stubs),
        ):
            parts += [f"{word}: {_list(names)}"] if names else []
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, weights: str = "model"
) -> LoadReport:
    """Load a checkpoint file into `model`, which has the official keys; all of it or nothing.

    "module." goes off the keys, "backbone." off or on as the model's keys have it. A model with a
    method `adapt_state_dict(state) -> state` is asked to rename old keys and resize position
    tables, without changing itself. Values are cast to the model's dtypes. A model with attributes
    `checkpoint` and `labels` is told the file's name and hash, and the names of its classes where
    the file has them, for `model.json`.

    Args:
        model: left as it was on any error; stays on its device.
        path: a safetensors file, or one that torch.save wrote.
        weights: "model", or "ema" for the averaged weights that some training codes save beside.

    Returns:
        What was read and done, for people to check.

    Raises:
        CheckpointError: the file cannot be read; or keys are missing, unexpected or misshapen, or
            values not finite; each kind is named in the one message.
    """
    raw = read_file(path, weights=weights)
    expected = model.state_dict()
    state, stripped, added = _align_prefix(raw.state, expected, path)
    ema = tuple(sorted(key for key in state if key.startswith(_EMA) and key not in expected))
    state = {key: value for key, value in state.items() if key not in ema}
    adapted = _adapt(model, state, path)
    _check_keys(adapted, expected, path)
    cast, casts = _cast(adapted, expected, path)
    labels = stored_labels(path) if raw.format == "safetensors" else None
    info = CheckpointInfo(os.path.basename(os.fspath(path)), sha256_of(path))
    model.load_state_dict(cast, strict=True)
    if hasattr(model, "checkpoint"):
        untyped: Any = model
        untyped.checkpoint = info
        if hasattr(model, "labels"):
            untyped.labels = labels
    return LoadReport(
        path=os.fspath(path),
        sha256=info.sha256,
        format=raw.format,
        weights=weights,
        wrapper=raw.wrapper,
        prefix_stripped=stripped,
        prefix_added=added,
        num_tensors=len(cast),
        ignored=(*raw.ignored, *ema),
        adapted=tuple(sorted(k for k, v in adapted.items() if not _same(v, state.get(k)))),
        casts=casts,
        stubs=raw.stubs,
    )


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
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _align_prefix(
    state: Mapping[str, Tensor], expected: Collection[str], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], str, str]:
    """Keys as the model has them, and the prefixes stripped and added for it."""
    result, stripped = dict(state), ""
    while result and all(key.startswith(_MODULE) for key in result):
        result = {key.removeprefix(_MODULE): value for key, value in result.items()}
        stripped += _MODULE
    wanted = any(key.startswith(_BACKBONE) for key in expected)
    present = any(key.startswith(_BACKBONE) for key in result)
    if present and not wanted:
        return _without_backbone(result, path), stripped + _BACKBONE, ""
    if wanted and not present:
        # Only where that names a key of the model: the head lies outside the backbone.
        longer = {k for k in result if k not in expected and _BACKBONE + k in expected}
        result = {_BACKBONE + k if k in longer else k: value for k, value in result.items()}
        return result, stripped, _BACKBONE if longer else ""
    return result, stripped, ""


def _without_backbone(
    state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    twice = [key for key in state if key.startswith(_BACKBONE) and key[len(_BACKBONE) :] in state]
    if twice:
        raise CheckpointError(
            f"checkpoint={path} has {_list(twice)} with and without this prefix; "
            "save one model's state_dict()"
        )
    return {key.removeprefix(_BACKBONE): value for key, value in state.items()}


def _adapt(
    model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is None:
        return state
    try:
        adapted = adapt(dict(state))
    except (ValueError, TypeError, LookupError, RuntimeError, VssmError) as error:
        raise CheckpointError(f"checkpoint={path} does not fit the model: {error}") from error
    return dict(adapted)


def _check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Refuse missing, unexpected and misshapen keys, all in one message."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} (file {tuple(state[key].shape)}, model {tuple(value.shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    if any(keys for _, keys in kinds):
        problems = "; ".join(f"{kind}: {_list(keys)}" for kind, keys in kinds if keys)
        raise CheckpointError(
            f"checkpoint={path} does not fit the model ({problems}); create the model with the "
            "name, num_classes and options that the file was trained with"
        )


def _cast(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Values in the model's dtypes, and what that changed; refuse values that are not numbers."""
    result: dict[str, Tensor] = {}
    changes: Counter[str] = Counter()
    bad: list[str] = []
    for key, value in state.items():
        if value.is_complex() != expected[key].is_complex():
            bad.append(key)
            continue
        cast = value.to(expected[key].dtype)
        if not bool(torch.isfinite(cast).all()):
            bad.append(key)
        elif cast.dtype != value.dtype:
            exact = torch.equal(cast.to(value.dtype), value)
            if not exact and not cast.is_floating_point():
                bad.append(key)
            change = f"{value.dtype} to {cast.dtype}".replace("torch.", "")
            changes[f"{change}, {'exact' if exact else 'rounded'}"] += 1
        result[key] = cast
    if bad:
        raise CheckpointError(
            f"checkpoint={path} has values that the model cannot hold (infinite, NaN, or of "
            f"another kind) in {_list(bad)}; use a checkpoint of a run that converged"
        )
    return result, tuple(f"{count} {change}" for change, count in sorted(changes.items()))


def _same(value: Tensor, before: Tensor | None) -> bool:
    if before is None or value.dtype != before.dtype:
        return False
    return value is before or torch.equal(value, before)


def _list(names: Collection[str]) -> str:
    """At most six of them, and how many there are."""
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"
