"""The restricted reader runs nothing, and views no memory outside a storage."""

from __future__ import annotations

import argparse
import builtins
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LEGACY, save
from torch import nn

from vssm.checkpoints.pickle_machine import StorageRef, Stub, TensorRecord
from vssm.checkpoints.torch_file import MALFORMED, read_torch, view_storage


class Call:
    """Pickles as a call of `function`, which a plain unpickler would make."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


class Meta:
    """A configuration class that exists when saving only."""

    def __init__(self, **values):
        self.__dict__.update(values)


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(24, generator=generator)
    return OrderedDict(
        weight=base[:12].reshape(3, 4),
        transposed=base[12:].reshape(3, 4).t(),
        parameter=nn.Parameter(torch.randn(5, generator=generator)),
        half=torch.randn(3, generator=generator).half(),
        brain=torch.randn(3, generator=generator).bfloat16(),
        count=torch.tensor(7),
        flags=torch.tensor([True, False]),
        wide=torch.tensor([1, 2], dtype=torch.uint16),
        empty=torch.empty(0, 3),
    )


def rewrite(source: Path, target: Path, **changes) -> Path:
    """Copy a torch zip with records changed by functions, keyed by their last name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            change = changes.get(info.filename.rpartition("/")[2].replace(".", "_"), lambda d: d)
            new.writestr(info.filename, change(old.read(info)))
    return target


def entries_of_m(root: object) -> dict[str, object]:
    entries = root["m"]
    if not isinstance(entries, dict):
        raise TypeError("m is no mapping")
    return entries


@pytest.fixture
def trap(monkeypatch):
    """Fail if anything dangerous is called; the functions keep their names for pickling."""

    def caught(*args, **kwargs):
        raise AssertionError("the file's code ran")

    return lambda owner, name: monkeypatch.setattr(owner, name, caught)


@LEGACY
def test_reads_what_torch_saves(tmp_path, legacy):
    path = save(
        {"model": state(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth", legacy=legacy
    )
    entries, stubs = read_torch(path.read_bytes(), lambda root: root["model"])
    assert stubs == ("argparse.Namespace",)
    assert list(entries) == list(state())
    for key, value in state().items():
        assert entries[key].dtype == value.dtype
        assert torch.equal(entries[key], value), key


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_torch_save(tmp_path, protocol):
    torch.save(state(), tmp_path / "a.pth", pickle_protocol=protocol)
    entries, _ = read_torch((tmp_path / "a.pth").read_bytes(), lambda root: root)
    assert all(torch.equal(entries[key], value) for key, value in state().items())


def test_shared_storage_stays_shared(tmp_path):
    base = torch.arange(6.0)
    save({"a": base, "b": base[2:]}, tmp_path / "a.pth")
    entries, _ = read_torch((tmp_path / "a.pth").read_bytes(), lambda root: root)
    entries["a"][3] = -1
    assert entries["b"][1] == -1


@LEGACY
def test_only_selected_storages_are_read(tmp_path, legacy):
    path = save(
        {"model": {"w": torch.ones(2)}, "huge": torch.ones(1000)}, tmp_path / "a", legacy=legacy
    )
    if not legacy:
        path = rewrite(path, tmp_path / "b", **{"1": lambda _: b""})
    entries, _ = read_torch(path.read_bytes(), lambda root: root["model"])
    assert torch.equal(entries["w"], torch.ones(2))


@LEGACY
@pytest.mark.parametrize(
    ("owner", "name", "args"),
    [(os, "system", ("true",)), (builtins, "eval", ("1",)), (builtins, "exec", ("1",))],
)
def test_calls_become_stubs(tmp_path, trap, owner, name, args, legacy):
    function = getattr(owner, name)
    path = save({"w": torch.ones(1), "x": Call(function, *args)}, tmp_path / "a.pth", legacy=legacy)
    trap(owner, name)
    entries, stubs = read_torch(path.read_bytes(), lambda root: root)
    assert torch.equal(entries["w"], torch.ones(1))
    # Protocol 2 names the builtins as Python 2 did.
    expected = f"{function.__module__}.{name}".replace("builtins", "__builtin__")
    assert entries["x"] == Stub(expected)
    assert stubs == (expected,)


def record(*, size=(2, 3), stride=(3, 1), offset=0, numel=6, dtype=torch.float32) -> TensorRecord:
    return TensorRecord(StorageRef("0", dtype, numel), dtype, offset, size, stride)


def test_view_storage_reads_the_layout():
    data = bytearray(torch.arange(6.0).numpy().tobytes())
    assert torch.equal(view_storage(record(), data), torch.arange(6.0).reshape(2, 3))
    last = view_storage(record(size=(), stride=(), offset=5), data)
    assert last.item() == 5.0


@pytest.mark.parametrize(
    "bad",
    [
        record(size=(3, 3)),
        record(stride=(4, 1)),
        record(offset=1),
        record(offset=1 << 61),
        record(size=(1 << 61, 1 << 61), stride=(0, 0)),
        record(size=(1000,), stride=(0,)),
        record(size=(1, 785), stride=(0, 0)),
        record(size=(4, 4), stride=(1, 1)),  # overlapping rows
        record(numel=5),
        record(numel=7),
        record(dtype=torch.float64),
    ],
)
def test_no_view_outside_the_storage(bad):
    with pytest.raises(ValueError, match=r"size|storage|stride"):
        view_storage(bad, bytearray(24))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x02K\x03\x86", b"K\xffK\x03\x86"),  # size
        (b"K\x03K\x01\x86", b"K\xffK\x01\x86"),  # stride
        (b"QK\x00K\x02", b"QK\x64K\x02"),  # offset
        (b"K\x06tq", b"K\x60tq"),  # element count
        (b"FloatStorage", b"DoubleStorage"),
        (b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x009q"),  # no such storage
    ],
)
def test_crafted_layouts_in_files_are_refused(tmp_path, old, new):
    save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "a.pth")

    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    path = rewrite(tmp_path / "a.pth", tmp_path / "b.pth", data_pkl=change)
    with pytest.raises(MALFORMED):
        read_torch(path.read_bytes(), lambda root: root)


def test_compressed_records_are_refused(tmp_path):
    save(state(), tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(ValueError, match="compressed"):
        read_torch((tmp_path / "b.pth").read_bytes(), lambda root: root)


def test_big_endian_is_refused(tmp_path):
    save(state(), tmp_path / "a.pth")
    path = rewrite(tmp_path / "a.pth", tmp_path / "b.pth", byteorder=lambda _: b"big")
    with pytest.raises(ValueError, match="little-endian"):
        read_torch(path.read_bytes(), lambda root: root)


@LEGACY
def test_truncation_at_any_length_is_an_error(tmp_path, legacy):
    data = save({"m": state(), "x": Meta(a=1)}, tmp_path / "a", legacy=legacy).read_bytes()
    for length in {*range(0, len(data), max(1, len(data) // 150)), len(data) - 1}:
        (tmp_path / "b").write_bytes(data[:length])
        with pytest.raises(MALFORMED):
            read_torch((tmp_path / "b").read_bytes(), entries_of_m)


@LEGACY
def test_bit_flips_end_in_tensors_or_an_error(tmp_path, legacy):
    data = save({"m": state(), "x": Meta(a=1)}, tmp_path / "a", legacy=legacy).read_bytes()
    generator = torch.Generator().manual_seed(0)
    good = 0
    for bit in torch.randint(8 * len(data), (400,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / "b").write_bytes(flipped)
        try:
            entries, _ = read_torch((tmp_path / "b").read_bytes(), entries_of_m)
        except MALFORMED:
            continue
        # Every element is read: a view outside its memory would crash here.
        assert all(v.double().sum() is not None for v in entries.values() if torch.is_tensor(v))
        good += 1
    assert good < 400
