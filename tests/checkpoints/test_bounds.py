"""Work and memory are bounded by the file's size, whatever the file describes."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from checkout import PYTHONPATH, SUPPORT
from hostile_files import MAKERS, text
from torch import nn
from yardstick import too_slow

import vssm
from vssm.checkpoints.load import load_checkpoint
from vssm.errors import CheckpointError

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
REPEATS = 60_000  # of a use of something large: if each took its size, for minutes


def zipped(pickle: bytes, *, method: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        file.writestr("a/data.pkl", pickle)
        file.writestr("a/data/0", bytes(16))
    return data.getvalue()


def legacy(pickle: bytes) -> bytes:
    magic = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.M\xe9\x03.}"
    system = text("little_endian") + b"\x88s."
    return magic + system + pickle + b"]" + text("0") + b"a." + struct.pack("<q", 4) + bytes(16)


def weight(size: bytes, stride: bytes) -> bytes:
    """A pickle of one tensor, "w", over 4 stored numbers."""
    return b"}" + text("w") + TENSOR + b"(" + STORAGE + b"K\x00" + size + stride + b"\x89}tRs."


def again(large: bytes, use: bytes) -> bytes:
    """A pickle that makes something large once, and uses it by a few bytes, often."""
    return large + b"q\x01" + use * REPEATS + b"N."


LONG_TEXT = text("a" * 1_000_000)
LONG_TUPLE = b"(" + b"N" * 200_000 + b"t"
LONG_INTEGER = b"\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000
PICKLES = {
    "size doubled": weight(b"K\x01\x85" + b"2\x86" * 40, b"K\x01\x85"),
    "size doubled by memo": weight(b"K\x01\x85q\x01" + b"h\x01h\x01\x86q\x01" * 60, b"K\x01\x85"),
    "stride of huge integers": weight(b"K\x01\x85", LONG_INTEGER + b"\x85"),
    "stride 0": weight(b"M\x11\x03\x85", b"K\x00\x85"),
    "2**26 tokens of 4 numbers": weight(b"J\x00\x00\x00\x04K\x04\x86", b"K\x00K\x01\x86"),
    "count of a storage": again(LONG_INTEGER + b"0", b"") + STORAGE,
    "key nested deep": b"}N" + b"\x85" * 400_000 + b"Ns.",
    "key doubled": b"}K\x01\x85" + b"2\x86" * 60 + b"Ns.",
    "key doubled by memo": b"}K\x01\x85q\x01" + b"h\x01h\x01\x86q\x01" * 60 + b"Ns.",
    "key of a long tuple": again(LONG_TUPLE, b"}h\x01Ns0"),
    "key of a long integer": again(LONG_INTEGER, b"}h\x01Ns0"),
    "keys that are long and equal": b"}" + LONG_TEXT + b"NsX" + again(LONG_TEXT[1:], b"h\x01Ns"),
    "set of long tuples": again(LONG_TUPLE, b"\x8f(h\x01\x900"),
    "frozen set of doubled tuples": b"K\x01\x85" + b"2\x86" * 60 + b"\x85(N\x910.",
    "names of a million letters": again(LONG_TEXT, b"h\x01h\x01\x930"),
    "global of a million letters": b"c" + b"a" * 1_000_000 + b"\nb\n.",
    "many arguments": again(LONG_TUPLE, TENSOR + b"h\x01R0"),
    "many parts of a storage's name": again(LONG_TUPLE, b"h\x01Q0"),
    "call in a call": b"N"
    + b"q\x01(ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\nh\x01Nt" * 5000
    + b"q\x01ctorch._tensor\n_rebuild_from_type_v2\nh\x01R.",
    "state of an object": again(LONG_TUPLE, b"ca\nb\nh\x01b0"),
    "as many steps as there are bytes": b"N" + b"0N" * 2_000_000 + b".",
    "escape that is none": b"S'\\y'\n.",  # of which codecs warns
    "digits": b"L" + b"9" * 2_000_000 + b"L\n.",
    "mapping in itself": b"}q\x01("
    + b"".join(text(n) + b"h\x01" for n in ("model", "net", "state_dict", "module"))
    + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(150_000))
    + b"u.",
}


def refuse(path, data: bytes) -> str:
    """Write and read, within 2 s of this process and a second for each 10 MB: see `yardstick`."""
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(nn.Linear(4, 2), path)
    seconds = time.process_time() - started
    assert not too_slow(seconds, 2 + len(data) / 1e7), f"{seconds:.1f} s"
    message = str(caught.value)
    assert len(message) < 1000
    return message


def test_the_yardstick_can_say_no():
    assert not too_slow(1, 2)
    assert too_slow(1000, 2)


@pytest.mark.parametrize("wrap", [zipped, legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("pickle", PICKLES.values(), ids=PICKLES)
def test_a_small_file_is_little_work(tmp_path, pickle, wrap):
    refuse(tmp_path / "a.pth", wrap(pickle))


def test_generated_files_take_time_and_memory_of_their_size(tmp_path):
    """In a process that may take 400 MiB; seeds are fixed, and each file is another."""
    script = SUPPORT / "read_under_limits.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, ",".join(MAKERS), "0", "40", "20000"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.stdout == "read 40\n", done.stdout + done.stderr


# Zips


def with_directory(entries) -> bytes:
    """A zip whose directory is changed by a function before it is written."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("a/data.pkl", b"}.")
        file.writestr("a/data/0", bytes(1 << 20))
        entries(file.filelist)
    return data.getvalue()


def test_one_record_under_many_names(tmp_path):
    def rename(entries):
        for i in range(20_000):
            entries.append(copy.copy(entries[1]))
            entries[-1].filename = f"a/data/{i + 1}"

    assert "records of its zip claim" in refuse(tmp_path / "a.pth", with_directory(rename))


def test_one_name_of_many_records(tmp_path):
    message = refuse(
        tmp_path / "a.pth", with_directory(lambda all_: all_.extend(all_[1:] * 20_000))
    )
    assert "one name" in message


def test_more_records_than_any_checkpoint_has(tmp_path):
    data = with_directory(lambda _: None) + b"PK\x01\x02" * 70_000
    assert "70,002 records" in refuse(tmp_path / "a.pth", data)


def test_a_compressed_record_is_not_unpacked(tmp_path):
    data = zipped(b"N" * 100_000_000 + b".", method=zipfile.ZIP_DEFLATED)
    assert "compressed" in refuse(tmp_path / "a.pth", data)


# safetensors


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_many_empty_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count, word in ((400_000, "header has"), (40_000, "40,000 tensors")):
        header = json.dumps({f"t{i}": entry for i in range(count)}).encode()
        assert word in refuse(tmp_path / "a.safetensors", safetensors(header))


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b'{"a":{"dtype":"F32","shape":[' + b"1," * 1000 + b'1],"data_offsets":[0,4]}}', "16 axes"),
        (b'{"a":' + b"1" * 5_000_000 + b"}", "19 digits"),
        (b'{"a":' + b"[" * 5_000_000, "recursion"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}', ""),
        (b'{"a":1,"a":1}', "twice"),
        (b'{"a":1}', ""),
        (b'{"' + b"k" * 300 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "characters"),
        (b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', "float8"),
    ],
)
def test_headers_that_lie(tmp_path, header, word):
    assert word in refuse(tmp_path / "a.safetensors", safetensors(header, bytes(4)))


# Files and tables


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            load_checkpoint(nn.Linear(1, 1), path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "a.pth").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="more than the 17,179,869,184"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
def test_a_position_table_of_too_many_tokens_is_not_resized(tmp_path, name):
    model = vssm.create_model(name, depth=1, num_classes=2, d_model=8)
    state = model.state_dict()
    key = next(k for k in state if k.endswith("pos_embed"))
    extra = state[key].shape[1] - 14 * 14
    state[key] = torch.zeros(1, 600 * 600 + extra, 8)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="600 x 600 positions"):
        load_checkpoint(model, tmp_path / "a.pth")
