"""Checkpoint files to a plain state dict: formats told by content, shards, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
from torch import Tensor

from vssm.checkpoints.hub import INDEX
from vssm.checkpoints.locate import REMEDY, WRAPPERS, Selection, kind, select, some, text
from vssm.checkpoints.torch_file import (
    LEGACY_MAGIC,
    MALFORMED,
    MAX_TENSORS,
    ZIP_MAGIC,
    read_torch,
)
from vssm.errors import CheckpointError
from vssm.files.regular import read_regular

# The file of the largest model here, with optimiser and averages in float32, is 2 GB.
MAX_FILE: Final = 16 << 30
_MAX_HEADER: Final = 8 << 20
_MAX_DIMS: Final = 16
_MAX_KEY: Final = 256
_MAX_INDEX: Final = 8 << 20
_MAX_SHARDS: Final = 1000
_LEGACY_BYTES: Final = LEGACY_MAGIC.to_bytes(10, "little")
# First bytes of what people pass by mistake.
_FOREIGN: Final = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array (.npy), not the tensors of a model",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\x80": "a pickle that torch.save did not write",
    b"version https://git-lfs": "a Git LFS pointer, not the weights; run `git lfs pull`",
    b"<": "a web page or XML, so the download went wrong",
}


@dataclass(frozen=True)
class RawCheckpoint:
    """A state dict as the file has it.

    Attributes:
        state: tensors on the CPU by the file's own keys.
        format: "safetensors" or "torch", or one of them with the number of its shards.
        sha256: of the file's bytes; of shards, see `docs/checkpoints.md`.
        wrapper: dotted key that the weights lay under; empty for a bare state dict.
        ignored: keys of the file that are no weights, such as "optimizer".
        stubs: names of the classes and functions that were not made.
        metadata: of a safetensors file.
    """

    state: dict[str, Tensor]
    format: str
    sha256: str
    wrapper: str = ""
    ignored: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_file(
    path: str | os.PathLike[str], *, weights: str = "model", key: str | None = None
) -> RawCheckpoint:
    """Read a checkpoint of any format understood, told by its content, onto the CPU.

    The file is read once; the hash is that of the bytes that the tensors come from. Nothing in it
    is executed, and time and memory are bounded by its size (docs/checkpoints.md).

    Args:
        path: a safetensors file, one that torch.save wrote (zip or legacy), or the index of several
            shards, or a folder that holds one.
        weights: "model", or "ema" for the averaged weights that some training codes save beside.
        key: dotted path of the weights in the file, where they have no usual name; with names that
            hold dots, what the wanted ones begin with.

    Raises:
        ValueError: `weights` is neither, or `key` is given beside "ema".
        CheckpointError: the file is missing, foreign, damaged, or holds no such state dict.
    """
    if weights not in WRAPPERS:
        raise ValueError(f"weights={weights!r} is neither 'model' nor 'ema'; choose one of these")
    if key is not None and (weights != "model" or not key):
        raise ValueError(
            f"key={key!r} with weights={weights!r}: a key says already which weights; give a key "
            "alone, such as key='model_ema'"
        )
    path = Path(path)
    if path.is_dir():
        path = _index_of(path)
    try:
        if path.name.endswith(INDEX):
            return _read_shards(path, weights, key)
        return _read_bytes(path, _contents(path, MAX_FILE), weights, key)
    except MemoryError as error:
        raise CheckpointError(
            f"checkpoint={path} needs more memory than there is; take a larger machine"
        ) from error


def _contents(path: Path, limit: int) -> bytes:
    try:
        data = read_regular(path, limit=limit)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={path} cannot be read ({error.strerror}); check the path"
        ) from error
    if not data:
        raise CheckpointError(f"checkpoint={path} is empty; download or save it again")
    return data


def _read_bytes(path: Path, data: bytes, weights: str, key: str | None) -> RawCheckpoint:
    head = data[:512]
    form = "safetensors" if _is_safetensors(head) else "torch"
    stubs: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    try:
        if form == "safetensors":
            loaded, metadata = parse_safetensors(data)
            selection = select(loaded, weights=weights, key=key)
            entries = dict(selection.entries)
        elif path.suffix == ".safetensors":
            raise CheckpointError(
                "it is damaged, or no safetensors file although its name says so; download or save "
                "it again"
            )
        # The legacy magic number is pickled, so a few bytes of opcodes come before it.
        elif head.startswith(ZIP_MAGIC) or _LEGACY_BYTES in head[:24]:
            selection, entries, stubs = _torch(data, weights, key)
        else:
            raise CheckpointError(f"it is {_describe(head)}; {REMEDY}")
        state = _dense(entries)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint={path}: {error}") from error
    except (safetensors.SafetensorError, *MALFORMED) as error:
        reason = text(str(error) or type(error).__name__, 200)
        if isinstance(error, LookupError):
            reason = f"it names {reason}, which is not in it"
        raise CheckpointError(
            f"checkpoint={path} cannot be read as a {form} file ({reason}), it may be truncated or "
            "damaged; download or save it again"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    return RawCheckpoint(state, form, digest, selection.wrapper, selection.ignored, stubs, metadata)


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of header length, then the JSON header; the library checks the rest."""
    return len(head) >= 9 and struct.unpack("<Q", head[:8])[0] < 1 << 32 and head[8:9] == b"{"


def _describe(head: bytes) -> str:
    for magic, name in _FOREIGN.items():
        if head.lstrip().startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    # As a ModelProto begins: ir_version, then producer_name, graph or opset_import.
    if head[0] == 0x08 and len(head) > 2 and head[2] in {0x12, 0x3A, 0x42}:
        return "an ONNX model, which is exported already"
    try:
        head[:60].decode()
    except UnicodeDecodeError:
        return "no checkpoint format that is known here"
    return "a text file"


def parse_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, after rules that cost less than the library does.

    Raises:
        SafetensorError, MALFORMED: the file is damaged, or describes more than it may.
    """
    if len(data) < 8:
        raise ValueError("it is too short for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > _MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {_MAX_HEADER:,}")
    header: Any = json.loads(data[8 : 8 + length], parse_int=_count, object_pairs_hook=_distinct)
    if not isinstance(header, dict):
        raise TypeError("its header is not a mapping")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"it has {len(entries):,} tensors, more than {MAX_TENSORS:,}")
    for name, entry in entries.items():
        if len(entry["shape"]) > _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has more than {_MAX_DIMS} axes")
    tensors = dict(safetensors.torch.load(data))  # which holds metadata to texts by texts
    return tensors, header.get("__metadata__") or {}


def _count(digits: str) -> int:
    # 64 bits have 19 digits at most, and `int` takes very long for very many.
    if len(digits) > 19:
        raise ValueError("its header has a number of more than 19 digits")
    return int(digits)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _torch(
    data: bytes, weights: str, key: str | None
) -> tuple[Selection, dict[str, object], tuple[str, ...]]:
    selections: list[Selection] = []

    # Asked between pickle and storages, so that an optimiser's state is never read.
    def wanted(root: object) -> Mapping[str, object]:
        selections.append(select(root, weights=weights, key=key))
        return selections[0].entries

    entries, stubs = read_torch(data, wanted)
    return selections[0], entries, stubs


def _dense(entries: Mapping[str, object]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in entries.items():
        if len(key) > _MAX_KEY:
            raise CheckpointError(
                f"the key {text(key)} has {len(key):,} characters, more than {_MAX_KEY}; save the "
                "model's plain state_dict()"
            )
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"entry {text(key)!r} is {kind(value)}, not a dense tensor; save the model's "
                "plain state_dict()"
            )
        if value.is_floating_point() and value.dtype.itemsize < 2:
            raise CheckpointError(
                f"entry {text(key)!r} has dtype {value.dtype}, whose values need a scale; save the "
                "weights as float16 or wider"
            )
        state[key] = value.detach()
    return state


def _index_of(folder: Path) -> Path:
    """The one index of shards in a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={folder} cannot be read ({error.strerror}); check the path"
        ) from error
    found = [name for name in names if name.endswith(INDEX)]
    if len(found) == 1:
        return folder / found[0]
    what = f"{len(found)} indices of shards" if found else "no index of shards (*.index.json)"
    raise CheckpointError(
        f"checkpoint={folder} is a directory with {what}; name the file inside"
        + (f": {some(found or names, len(found or names))}" if names else "")
    )


def _read_shards(path: Path, weights: str, key: str | None) -> RawCheckpoint:
    """The tensors of all shards that an index names; exactly those that it lists for each."""
    content = _contents(path, _MAX_INDEX)
    shards = _parse_index(path, content)
    state: dict[str, Tensor] = {}
    digest = hashlib.sha256(content)
    parts: list[RawCheckpoint] = []
    for name, keys in sorted(shards.items()):
        file = path.parent / name
        # A shard is a flat piece: where the weights are is asked of all shards together.
        part = _read_bytes(file, _contents(file, MAX_FILE), "model", None)
        if set(part.state) != keys:
            odd = sorted(set(part.state) ^ keys)
            raise CheckpointError(
                f"checkpoint={path}: shard {text(name)} does not hold what the index says "
                f"({some(odd, len(odd))}); download both again"
            )
        state.update(part.state)
        digest.update(f"{name} {part.sha256}\n".encode())
        parts.append(part)
    if weights != "model" or key is not None:
        try:
            selection = select(state, weights=weights, key=key)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint={path}: {error}") from error
        state = _dense(selection.entries)
    return replace(
        parts[0],
        state=state,
        format=f"{parts[0].format}, {len(parts)} shards",
        sha256=digest.hexdigest(),
        wrapper=key or "",
        stubs=tuple(sorted({stub for part in parts for stub in part.stubs})),
    )


def _parse_index(path: Path, content: bytes) -> dict[str, set[str]]:
    """The keys of each shard."""
    try:
        listed = json.loads(content, parse_int=_count)["weight_map"].items()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint={path} is not an index of shards: it has no weight_map; name the file of "
            "weights itself"
        ) from error
    shards: dict[str, set[str]] = {}
    for key, name in listed:
        # A name with a separator could lead anywhere; no writer of shards uses one.
        if not isinstance(name, str) or name in {"", ".", ".."} or Path(name).name != name:
            raise CheckpointError(
                f"checkpoint={path}: {text(key)} lies in {text(name)!r}, outside the index's own "
                "folder; put all shards beside the index"
            )
        shards.setdefault(name, set()).add(key)
    if not 0 < len(shards) <= _MAX_SHARDS or any(name.endswith(INDEX) for name in shards):
        raise CheckpointError(
            f"checkpoint={path} names {len(shards)} shards; a checkpoint has 1 to {_MAX_SHARDS} "
            "files of weights"
        )
    missing = [name for name in sorted(shards) if not os.path.exists(path.parent / name)]
    if missing:
        raise CheckpointError(
            f"checkpoint={path}: of {len(shards)} shards {some(missing, len(missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing; download them into {path.parent}"
        )
    return shards
