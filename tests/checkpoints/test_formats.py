"""Foreign, damaged and hostile checkpoint files, and writing safetensors."""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_cases import Bare, Hook, assert_loaded, assert_refused, save, weights
from PIL import Image
from torch import nn

from vssm.checkpoints.load import load_checkpoint, save_safetensors
from vssm.errors import ArtifactError, CheckpointError


def onnx_bytes() -> bytes:
    return b"\x08\x0a\x12\x07pytorch\x1a\x052.13" + bytes(40)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"hello, these are no weights\n", "text file"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\xff\xd8\xff\xe0" + bytes(60), "JPEG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "PNG"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
        (b"\x1f\x8b" + bytes(60), "gzip"),
        (b"\x93NUMPY\x01\x00" + bytes(60), "a NumPy array"),
        (b"GGUF" + bytes(60), "GGUF"),
        (b"model.pth".ljust(257, b"\0") + b"ustar" + bytes(250), "a tar archive; unpack it"),
        (b"\x80\x04K\x01.", "pickle"),
        (onnx_bytes(), "ONNX"),
        (bytes(range(200, 250)), "no checkpoint format"),
        (b"PK\x03\x04" + bytes(60), "truncated"),
        (struct.pack("<Q", 40) + b"{" + bytes(20), "safetensors"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, word):
    (tmp_path / "a.pth").write_bytes(content)
    assert_refused(Bare(), tmp_path / "a.pth", word)


def test_foreign_zips_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    assert_refused(Bare(), tmp_path / "a.npz", "it is NumPy arrays (.npz); save plain tensors:")
    for name, words in (
        ("models/model.json", "a program of torch.export"),
        ("w/model.pth", "a zip with w/model.pth in it; unpack it first"),
        ("readme.txt", "a zip, but not torch's"),
    ):
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
            file.writestr(name, b"N.")
        assert_refused(Bare(), tmp_path / "b.pt", words)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("b/data.pkl", b"N.")
        file.writestr("b/constants.pkl", b"N.")
    assert_refused(Bare(), tmp_path / "b.pt", "TorchScript")


def test_missing_files_directories_and_wrong_names(tmp_path):
    assert_refused(Bare(), tmp_path / "absent.pth", "No such file")
    assert_refused(Bare(), tmp_path, "directory")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    assert_refused(Bare(), tmp_path / "a.jpg", "JPEG")
    save(weights(Bare()), tmp_path / "a.safetensors")
    assert_refused(Bare(), tmp_path / "a.safetensors", "no safetensors file")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([1, 2], "list"),
        ({"model": "vim"}, "holds model"),
        ({}, "nothing"),
        ({"model": nn.Linear(1, 1)}, "under model it holds a torch.nn.modules.linear.Linear"),
        ({"model": None, "ema": nn.Linear(1, 1), "epoch": 1}, "save its state_dict()"),
        (nn.Linear(1, 1), "Linear"),
        (torch.ones(1), "holds a tensor, not a state dict"),
        ({"model": {"epoch": 3}}, "holds model (a mapping)"),
        ({3: torch.ones(1)}, "key 3 is a number, not a text"),
        ({"a": np.ones(1)}, "a is a NumPy array; save plain tensors: torch.save({k:"),
        ({"model": {"a": np.ones(1)}, "epoch": 3}, "a is a NumPy array"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "a is a tensor of complex"),
        ({"a": torch.ones(1, device="meta")}, "a is a tensor without values"),
        ({"a": torch.ones(2), "b": torch.eye(2).to_sparse()}, "'b' is a sparse tensor"),
        ({"a": torch.ones(1).to(torch.float8_e4m3fn)}, "float8_e4m3fn, whose values need a scale"),
        ({"model": {"a": torch.ones(1), "b": Hook()}}, "Hook"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, word):
    assert_refused(Bare(), save(content, tmp_path / "a.pth"), word)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "restricted"])
def test_truncation_at_any_length(tmp_path, form):
    state, path = weights(Bare()), tmp_path / "a.ckpt"
    if form == "safetensors":
        save_safetensors(state, path)
    else:
        content = {"model": state, "args": Hook() if form == "restricted" else None}
        save(content, path, legacy=form == "legacy")
    data = path.read_bytes()
    for length in {*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}:
        path.write_bytes(data[:length])
        assert_refused(Bare(), path)


@pytest.mark.parametrize("form", ["zip", "restricted"])
def test_flipped_bits_never_change_a_weight_unnoticed(tmp_path, form):
    state, path = weights(Bare()), tmp_path / "a.ckpt"
    save({"model": state, "args": Hook() if form == "restricted" else None}, path)
    data, model = path.read_bytes(), Bare()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for bit in torch.randint(8 * len(data), (150,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            load_checkpoint(model, path)
            assert_loaded(model, state)  # the bit lay between the records
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (os.system, ("true",))

    state = weights(Bare())
    path = save({"model": state, "args": Bomb()}, tmp_path / "a.pth")
    weight = save({"model": {**state, "head.bias": Bomb()}}, tmp_path / "b.pth")
    calls = []
    monkeypatch.setattr(os, "system", calls.append)
    model = Bare()
    report = load_checkpoint(model, path)
    assert_loaded(model, state)
    assert calls == []
    assert "system" in report.stubs[0]
    assert_refused(Bare(), weight, "head.bias", "system")
    assert calls == []


def test_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(weights(Bare()), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    model = Bare()
    load_checkpoint(model, path)
    assert_loaded(model, weights(Bare()))


# Writing


def test_save_safetensors_round_trip(tmp_path):
    base = torch.arange(6.0)
    state = {"a": base, "tied": base, "view": base[1:4], "t": base.reshape(2, 3).t()}
    state |= {"h": base.half(), "n": torch.tensor(3), "p": nn.Parameter(base)}
    save_safetensors(state, tmp_path / "a.safetensors")
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in state.items())
    first = (tmp_path / "a.safetensors").read_bytes()
    save_safetensors(dict(reversed(state.items())), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == first
    header = json.loads(first[8 : 8 + struct.unpack("<Q", first[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_save_safetensors_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_safetensors({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        save_safetensors({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_safetensors({"a": torch.ones(2)}, path / "below" / "b.safetensors")
