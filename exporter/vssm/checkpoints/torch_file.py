"""A reader of torch's checkpoint files that cannot run what is in them, nor be made to work long.

It is the only reader of them here. `torch.load(weights_only=True)` refuses official checkpoints,
which carry configurations, hooks and arguments beside their weights, and a pickle of a megabyte can
crash it. This one runs the pickle on `pickle_machine`, which has no import and no call: unknown
classes and functions become `Stub`s, tensors become `TensorRecord`s, plain numbers that are checked
here against their storage before any memory is viewed through them.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import Final, Protocol

import torch
from torch import Tensor

from vssm.checkpoints.pickle_machine import PickleMachine, StorageRef, TensorRecord
from vssm.errors import CheckpointError
from vssm.files.text import shown

ZIP_MAGIC: Final = b"PK\x03\x04"
LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
MAX_TENSORS: Final = 1 << 15
_LEGACY_PROTOCOL: Final = 1001
_DIRECTORY_ENTRY: Final = b"PK\x01\x02"
_MAX_RECORDS: Final = 1 << 16
_ENCRYPTED: Final = 1
# Zips that are no files of torch.save, by the end of a record's name, the surest first.
_ZIPS: Final = {
    ("/constants.pkl",): "it is a TorchScript program, not weights; save its state_dict()",
    ("models/model.json",): "it is a program of torch.export, not weights; save its state_dict",
    (".npy",): "it is NumPy arrays (.npz); save plain tensors: torch.save({{k: torch.as_tensor(v) "
    "for k, v in numpy.load(FILE).items()}}, NEW)",
    (".pth", ".pt", ".ckpt", ".bin", ".safetensors"): "it is a zip with {} in it; unpack it first",
}
# What damaged bytes end in.
MALFORMED: Final = (
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    EOFError,
    RuntimeError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
    Warning,  # where warnings are errors: pickletools warns of a text's unknown escapes
)


# What a select function gets: the unpickled tree; what it returns: the entries that are wanted.
Select = Callable[[object], Mapping[str, object]]


def read_torch(data: bytes, select: Select) -> tuple[dict[str, object], tuple[str, ...]]:
    """Read a torch file, zip or legacy, without importing or calling anything that it names.

    Time and memory are bounded by the file's size: less than 300 bytes for each byte of its
    pickle, of which `MAX_STEPS` opcodes are run at most, one copy of the storages that are wanted,
    32,768 tensors and 65,536 records.

    Args:
        data: the file's bytes.
        select: given the tree of plain containers, `TensorRecord`s and `Stub`s, returns the entries
            to load; only their storages are read.

    Returns:
        The selected entries, each record replaced by a tensor on the CPU; and the names of the
        classes and functions that became stubs, sorted.

    Raises:
        MALFORMED: the file is damaged, or describes a tensor outside its storage; and whatever
            `select` raises.
        CheckpointError: it is a zip of another kind.
    """
    archive: _Archive = _ZipArchive(data) if data.startswith(ZIP_MAGIC) else _Legacy(data)
    tensors = _Tensors(archive)
    entries = select(archive.root)
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"it has {len(entries):,} tensors, more than {MAX_TENSORS:,}")
    loaded = {key: tensors.load(key, value) for key, value in entries.items()}
    return loaded, tuple(sorted(archive.unknown))


class _Archive(Protocol):
    root: object
    unknown: set[str]

    def storage(self, ref: StorageRef) -> memoryview: ...


class _ZipArchive:
    """torch's format since 1.6: a zip of data.pkl and one uncompressed record a storage."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._infos = _records(data)
        # torch.serialization.set_crc32_options(False) leaves all of them 0.
        self._has_sums = any(info.CRC for info in self._infos.values())
        pickles = [name for name in self._infos if name.endswith("/data.pkl")]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in self._infos):
            _refuse_foreign(self._infos)
            raise ValueError(f"a zip, but not torch's: {len(pickles)} data.pkl in it, not one")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}byteorder" in self._infos:
            _little_endian(bytes(self._record("byteorder")) == b"little")
        machine = PickleMachine()
        self.root = machine.run(BytesIO(self._record("data.pkl")))
        self.unknown = machine.unknown

    def storage(self, ref: StorageRef) -> memoryview:
        return self._record(f"data/{ref.key}")

    def _record(self, name: str) -> memoryview:
        """The bytes of a record, where they lie."""
        info = self._infos[self._prefix + name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"record {name!r} is compressed, which torch never does")
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"record {name!r} is encrypted")
        header = self._data[info.header_offset :][:30]
        magic, lengths = bytes(header[:4]), struct.unpack("<HH", header[26:30])
        # By the local header: torch pads there, to align storages, and not in the directory.
        start = info.header_offset + 30 + sum(lengths)
        record = self._data[start : start + info.file_size]
        if magic != ZIP_MAGIC or len(record) != info.file_size:
            raise ValueError(f"record {name!r} is not where the zip's directory says")
        if self._has_sums and zlib.crc32(record) != info.CRC:
            raise ValueError(f"record {name!r} does not match its checksum")
        return record


def _refuse_foreign(names: Iterable[str]) -> None:
    """Say what a zip is that other programs write, and what to do with it."""
    listed = sorted(names)
    for ends, answer in _ZIPS.items():
        if found := [name for name in listed if name.endswith(ends)]:
            raise CheckpointError(answer.format(shown(found[0], limit=100)))


def _records(data: bytes) -> dict[str, zipfile.ZipInfo]:
    """The zip's directory; the cheapest rules first, as each entry of it takes memory."""
    # Counted in the bytes, at worst too many: zipfile makes an object of each before it answers.
    if (count := data.count(_DIRECTORY_ENTRY)) > _MAX_RECORDS:
        raise ValueError(f"its zip has {count:,} records, more than {_MAX_RECORDS:,}")
    with zipfile.ZipFile(BytesIO(data)) as archive:
        infos = archive.infolist()
    found = {info.filename: info for info in infos}
    if len(found) != len(infos):
        raise ValueError("two records of its zip have one name")
    # Records that lie over each other would be copied once each, out of a small file.
    if (total := sum(info.compress_size for info in infos)) > len(data):
        raise ValueError(f"the records of its zip claim {total:,} bytes of {len(data):,}")
    return found


class _Legacy:
    """torch's format before 1.6: five pickles, then the storages, each behind its element count."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        file, machine = BytesIO(data), PickleMachine()
        magic, protocol = machine.run(file), machine.run(file)
        if (magic, protocol) != (LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise ValueError("it does not start as torch's files do")
        system = machine.run(file)
        _little_endian(isinstance(system, dict) and system.get("little_endian") is True)
        self.root = machine.run(file)
        keys = machine.run(file)
        self.unknown = machine.unknown
        if not isinstance(keys, list):
            raise TypeError("the list of storages is missing")
        self._places = self._find_storages(keys, machine.storages, file.tell())

    def _find_storages(
        self, keys: list[object], refs: Mapping[str, StorageRef], start: int
    ) -> dict[str, memoryview]:
        """The bytes of every storage, where they lie."""
        places: dict[str, memoryview] = {}
        for key in keys:
            if not isinstance(key, str) or key not in refs or key in places:
                raise ValueError("the list of storages does not match the tensors")
            (numel,) = struct.unpack("<q", self._data[start : start + 8])
            size = numel * refs[key].dtype.itemsize
            start += 8
            if numel < 0 or start + size > len(self._data):
                raise ValueError(f"storage {key!r} ends behind the file")
            places[key] = self._data[start : start + size]
            start += size
        return places

    def storage(self, ref: StorageRef) -> memoryview:
        return self._places[ref.key]


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
            # A copy, as a tensor's memory must be open to writing; one for all views of a storage.
            self._read[key] = bytearray(self._archive.storage(value.storage))
        try:
            return view_storage(value, self._read[key])
        except ValueError as error:
            raise ValueError(f"tensor {name[:100]!r}: {error}") from error


def view_storage(record: TensorRecord, data: bytearray) -> Tensor:
    """The tensor that `record` describes in the bytes of its storage.

    Raises:
        ValueError: it reaches outside `data`, or has more elements than there are.
    """
    declared = record.storage.numel * record.storage.dtype.itemsize
    if declared != len(data):
        raise ValueError(f"its storage has {len(data)} bytes, but {declared} were declared")
    size, stride, offset = record.size, record.stride, record.offset
    available = len(data) // record.dtype.itemsize
    # No element to check, and `frombuffer` refuses an empty buffer.
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


def _little_endian(is_little: bool) -> None:
    if not is_little:
        raise ValueError("its numbers are not little-endian; save it again on this machine")
