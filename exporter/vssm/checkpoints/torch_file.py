"""A reader of torch's checkpoint files that cannot run what is in them.

`torch.load(weights_only=True)` refuses a file for any object besides tensors, and official
checkpoints carry configurations, hooks and arguments beside their weights. This reader runs the
pickle on `pickle_machine`, which has no import and no call: unknown classes and functions become
`Stub`s, tensors become `TensorRecord`s, plain numbers that are checked here against their storage
before any memory is viewed through them.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import torch
from torch import Tensor

from vssm.checkpoints.pickle_machine import PickleMachine, StorageRef, Stub, TensorRecord
from vssm.errors import CheckpointError

__all__ = ["StorageRef", "Stub", "TensorRecord", "read_restricted", "view_storage"]

ZIP_MAGIC: Final = b"PK\x03\x04"
LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_MAX_PICKLE: Final = 256 << 20
_MAX_DIMS: Final = 16
_MALFORMED: Final = (
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    EOFError,
    RuntimeError,
    MemoryError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


# What a select function gets: the unpickled tree; what it returns: the entries that are wanted.
Select = Callable[[object], Mapping[str, object]]


def read_restricted(path: Path, select: Select) -> tuple[dict[str, object], tuple[str, ...]]:
    """Read a torch file, zip or legacy, without importing or calling anything that it names.

    Args:
        path: the file.
        select: given the tree of plain containers, `TensorRecord`s and `Stub`s, returns the entries
            to load; only their storages are read.

    Returns:
        The selected entries, each record replaced by a tensor on the CPU; and the names of the
        classes and functions that became stubs, sorted.

    Raises:
        CheckpointError: the file is damaged, or describes a tensor outside its storage.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            archive: _Archive = _ZipArchive(file) if is_zip else _Legacy(file)
            tensors = _Tensors(archive)
            entries = select(archive.root)
            loaded = {key: tensors.load(key, value) for key, value in entries.items()}
            return loaded, tuple(sorted(archive.unknown))
    except _MALFORMED as error:
        raise CheckpointError(
            f"checkpoint={path} is damaged or no torch file ({error}); download or save it again"
        ) from error


class _Archive(Protocol):
    root: object
    unknown: set[str]

    def storage(self, ref: StorageRef) -> bytes: ...


class _ZipArchive:
    """torch's format since 1.6: a zip of data.pkl and one uncompressed record a storage."""

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file)
        pickles = [n for n in self._zip.namelist() if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"the zip has {len(pickles)} data.pkl records instead of 1")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}byteorder" in self._zip.namelist():
            _little_endian(self._record("byteorder") == b"little")
        machine = PickleMachine()
        self.root = machine.run(BytesIO(self._record("data.pkl", _MAX_PICKLE)))
        self.unknown = machine.unknown

    def storage(self, ref: StorageRef) -> bytes:
        return self._record(f"data/{ref.key}")

    def _record(self, name: str, limit: int | None = None) -> bytes:
        info = self._zip.getinfo(self._prefix + name)
        # Stored records cannot be larger than the file; a compressed one could be a bomb.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"record {name} is compressed, which torch never does")
        if limit is not None and info.file_size > limit:
            raise ValueError(f"record {name} has {info.file_size} bytes, more than {limit}")
        return self._zip.read(info)


class _Legacy:
    """torch's format before 1.6: five pickles, then the storages, each behind its element count."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.seek(0, os.SEEK_END)
        self._end = file.tell()
        file.seek(0)
        magic, protocol = PickleMachine().run(file), PickleMachine().run(file)
        if (magic, protocol) != (LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise ValueError("it does not start as torch's files do")
        system = PickleMachine().run(file)
        _little_endian(isinstance(system, dict) and system.get("little_endian") is True)
        machine = PickleMachine()
        self.root = machine.run(file)
        self.unknown = machine.unknown
        keys = PickleMachine().run(file)
        if not isinstance(keys, list):
            raise TypeError("the list of storages is missing")
        self._places = self._find_storages(keys, {ref.key: ref for ref in machine.storages})

    def _find_storages(
        self, keys: list[object], refs: Mapping[str, StorageRef]
    ) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of every storage's data."""
        places = {}
        for key in keys:
            if not isinstance(key, str) or key not in refs or key in places:
                raise ValueError("the list of storages does not match the tensors")
            (numel,) = struct.unpack("<q", self._file.read(8))
            start, size = self._file.tell(), numel * refs[key].dtype.itemsize
            if numel < 0 or start + size > self._end:
                raise ValueError(f"storage {key} ends behind the file")
            places[key] = (start, size)
            self._file.seek(start + size)
        return places

    def storage(self, ref: StorageRef) -> bytes:
        start, size = self._places[ref.key]
        self._file.seek(start)
        return self._file.read(size)


class _Tensors:
    """Turns records into tensors; those of one storage share its memory, as when saved."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._read: dict[str, bytearray] = {}

    def load(self, name: str, value: object) -> object:
        if not isinstance(value, TensorRecord):
            return value
        key = value.storage.key
        if key not in self._read:
            self._read[key] = bytearray(self._archive.storage(value.storage))
        try:
            return view_storage(value, self._read[key])
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from error


def view_storage(record: TensorRecord, data: bytearray) -> Tensor:
    """The tensor that `record` describes in the bytes of its storage.

    Raises:
        ValueError: size, stride or offset is malformed or reaches outside `data`.
    """
    declared = record.storage.numel * record.storage.dtype.itemsize
    if declared != len(data):
        raise ValueError(f"its storage has {len(data)} bytes, but {declared} were declared")
    size, stride, offset = record.size, record.stride, record.offset
    lists_ok = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not lists_ok or len(size) > _MAX_DIMS:
        raise ValueError(f"size={_short(size)} and stride={_short(stride)} are malformed")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*size, *stride, offset)):
        raise ValueError(f"size={_short(size)}, stride={_short(stride)}, offset are no counts")
    available = len(data) // record.dtype.itemsize
    if 0 in size:
        return torch.empty(size, dtype=record.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    # The second rule stops a tensor of stride 0 that is far larger than the file.
    if last >= available or math.prod(size) > available:
        raise ValueError(
            f"size={size}, stride={stride}, offset={offset} reach outside its storage of "
            f"{available} elements"
        )
    return torch.frombuffer(data, dtype=record.dtype).as_strided(size, stride, offset)


def _short(value: object) -> str:
    text = str(value) if isinstance(value, tuple | int) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _little_endian(is_little: bool) -> None:
    if not is_little:
        raise ValueError("its numbers are not little-endian; save it again on this machine")
