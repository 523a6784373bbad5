"""The names of a model's classes inside its safetensors file, so that weights bring them along."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from vssm.errors import CheckpointError

_KEY: Final = "vssm.labels"  # of the file's metadata
_LENGTH: Final = struct.Struct("<Q")


def with_labels(data: bytes, labels: Sequence[str]) -> bytes:
    """A safetensors file with the names of its classes; the same names give the same bytes.

    The package itself writes several entries of metadata in an order that changes from process to
    process, so they are put into the header here.
    """
    (length,) = _LENGTH.unpack_from(data)
    header = json.loads(data[_LENGTH.size : _LENGTH.size + length])
    header["__metadata__"] = {**header.get("__metadata__", {}), _KEY: json.dumps(list(labels))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)  # tensors begin at a multiple of eight
    return _LENGTH.pack(len(text)) + text + data[_LENGTH.size + length :]


def stored_labels(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[str, ...] | None:
    """The names of the classes in the metadata of the safetensors file at `path`; None for none.

    Raises:
        CheckpointError: what stands there is no list of names.
    """
    text = metadata.get(_KEY)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(
            f"checkpoint={path} has metadata {_KEY!r} that is not a list of class names; take it "
            "out, or save the weights again"
        )
    return tuple(names)
