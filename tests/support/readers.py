"""The readers of foreign bytes, each with seeds and with the errors that it may end in.

`READERS[name]` reads one input and says how that ended; anything but what was read, or a refusal of
the reader's own kind within its time, is a broken promise. `mutate` makes inputs out of seeds where
no fuzzer does.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_files import MAKERS
from PIL import Image
from yardstick import too_slow

import vssm
from vssm.artifact.directory import open_artifact
from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import preprocess
from vssm.bundle.manifest import (
    BUNDLE_MANIFEST,
    BundleManifest,
    compare_files,
    read_bundle_manifest,
    read_listed,
    write_bundle_manifest,
)
from vssm.checkpoints.load import load_checkpoint
from vssm.errors import ArtifactError, CheckpointError, UnsupportedError
from vssm.pruning.schedule import PruneSchedule, TokenLayout, plan_stages

LONGEST = 1 << 16  # bytes of an input


class BrokenPromiseError(AssertionError):
    """A reader did what none may do."""


@dataclass(frozen=True)
class Reader:
    """One way in.

    Attributes:
        prepare: makes what stands around the input in an empty directory; returns the seeds.
        read: reads one input, which may lie in that directory.
        refusals: the errors that it may end in.
        is_json: whether `mutate` changes values of JSON as well as bytes.
    """

    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    refusals: tuple[type[Exception], ...]
    is_json: bool = False

    def check(self, folder: Path, data: bytes) -> str:
        """Read one input: "read" or "refused".

        Raises:
            BrokenPromiseError: it took too long, or its message is no line of text.
            Exception: an error that is none of `refusals`, which is a fault.
        """
        started = time.process_time()
        end = "read"
        try:
            self.read(folder, data)
        except self.refusals as error:
            end = "refused"
            message = str(error)
            if not message or any(ord(c) < 32 and c != "\n" for c in message):
                raise BrokenPromiseError(f"message={message!r}") from error
        seconds = time.process_time() - started
        if too_slow(seconds, 2 + len(data) / 1e7):
            raise BrokenPromiseError(f"it took {seconds:.1f} s")
        return end


# Checkpoints


def _made(kind: str, count: int = 24) -> list[bytes]:
    made = [MAKERS[kind](random.Random(seed), 200) for seed in range(count)]
    return [data for data in made if len(data) <= LONGEST]


def _checkpoints(_: Path) -> list[bytes]:
    seeds = _made("zip.pth") + _made("legacy.pth")
    for is_zip in (True, False):
        file = io.BytesIO()
        state = torch.nn.Linear(4, 2).state_dict()
        torch.save({"model": state}, file, _use_new_zipfile_serialization=is_zip)
        seeds.append(file.getvalue())
    return seeds


def _load(folder: Path, data: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(data)
    load_checkpoint(torch.nn.Linear(4, 2), path)


def _with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(40)


def _headers(_: Path) -> list[bytes]:
    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
    bias = {"dtype": "F32", "shape": [2], "data_offsets": [32, 40]}
    good = {"weight": entry, "bias": bias, "__metadata__": {"format": "pt"}}
    return [json.dumps(good).encode(), *(data[8:-16] for data in _made("a.safetensors"))]


# Exports and bundles


def _exports(folder: Path) -> list[bytes]:
    sizes = {"image_size": 32, "depth": 2, "d_model": 8, "d_state": 2, "num_classes": 3}
    model = vssm.create_model("vim_tiny", schedule=PruneSchedule({1: 0.7}), **sizes)
    return [(vssm.export(model, folder / "export").directory / "model.json").read_bytes()]


def _open_export(folder: Path, data: bytes) -> None:
    (folder / "export/model.json").write_bytes(data)
    open_artifact(folder / "export")


def _bundles(folder: Path) -> list[bytes]:
    (folder / "bundle/lib").mkdir(parents=True)
    files = {}
    for name in ("README.md", "lib/a.so"):
        (folder / "bundle" / name).write_bytes(name.encode())
        files[name] = hashlib.sha256(name.encode()).hexdigest()
    absent, versions = {"model.plan": "no engine was built"}, {"vssm": "0.1.0", "torch": "2.11"}
    write_bundle_manifest(folder / "bundle", BundleManifest("micro", files, absent, versions))
    return [(folder / "bundle" / BUNDLE_MANIFEST).read_bytes()]


def _open_bundle(folder: Path, data: bytes) -> None:
    bundle = folder / "bundle"
    (bundle / BUNDLE_MANIFEST).write_bytes(_signed(data))
    manifest = read_bundle_manifest(bundle)
    compare_files(bundle, manifest)
    for name in manifest.files:
        read_listed(bundle, manifest, name)


def _signed(data: bytes) -> bytes:
    """With the hash of its content, which whoever edits the file can write as well."""
    try:
        content = json.loads(data)
        del content["sha256"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}).encode()
    except (ValueError, TypeError, LookupError, RecursionError):
        return data


# Images and texts


def _images(_: Path) -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    seeds = []
    for kind, options in (
        *(("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {})),
        *(("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {})),
        *(("JPEG2000", {}), ("AVIF", {})),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        seeds.append(file.getvalue())
    return seeds


def _open_image(folder: Path, data: bytes) -> None:
    (folder / "image").write_bytes(data)
    preprocess(folder / "image", Preprocessing.for_image_size(32))


def _schedules(_: Path) -> list[bytes]:
    texts = (
        "5:0.8,10:0.75,24:1",
        "1:1e-3",
        "2:.5, 3:9e-1",
        "\u0663:\u0660.5",
        "1:NaN",
        "1:1E-999999",
    )
    return [text.encode() for text in texts]


def _plan(_: Path, data: bytes) -> None:
    schedule = PruneSchedule.parse(data.decode("utf-8", "surrogateescape"))
    plan_stages(schedule, TokenLayout(197, 98, keep_odd=True), 24)


READERS = {
    "checkpoint": Reader(
        _checkpoints, lambda folder, data: _load(folder, data, "a.pth"), (CheckpointError,)
    ),
    "safetensors header": Reader(
        _headers,
        lambda folder, data: _load(folder, _with_length(data), "a.safetensors"),
        (CheckpointError,),
        is_json=True,
    ),
    "shard index": Reader(
        lambda _: _made("b.index.json"),
        lambda folder, data: _load(folder, data, "b.index.json"),
        (CheckpointError,),
        is_json=True,
    ),
    "model.json": Reader(_exports, _open_export, (ArtifactError,), is_json=True),
    "MANIFEST.json": Reader(_bundles, _open_bundle, (ArtifactError,), is_json=True),
    "image": Reader(_images, _open_image, (ValueError,)),
    "schedule": Reader(_schedules, _plan, (ValueError, UnsupportedError)),
}


# Inputs without a fuzzer


_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308)
_TEXTS = ("", "a" * 3000, "..", "/", "../../etc/passwd", "a\0b", "\x1b[2J", "\ud800", "\u202e", "K")
_VALUES = (None, True, [], {}, *_NUMBERS, *_TEXTS)


def mutate(rng: random.Random, reader: Reader, seeds: list[bytes]) -> bytes:
    """One input out of seeds: a few changes to one of them."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        by_value = reader.is_json and rng.random() < 0.7
        data = _change_value(rng, data) if by_value else _change_bytes(rng, data, seeds)
        data = data[:LONGEST]  # now: the next change may double it
    return data


def _change_bytes(rng: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    size = int(len(data) ** rng.random())
    part, rest = data[at : at + size], data[at + size :]
    other = rng.choice(seeds)
    start = rng.randrange(len(other) + 1)
    new = (
        b"",
        part + part,
        part * rng.randrange(1, 50),
        rng.randbytes(min(size, 8)),
        rng.choice((b"\xff", b"\x00", b"\x7f\xff\xff\xff", b"9" * 20, b"-", b'"', b"[" * 500)),
        bytes((part[:1] or b"\0")[0] ^ (1 << rng.randrange(8)) for _ in (0,)) + part[1:],
        other[start : start + size],
    )
    return data[:at] + rng.choice(new) + rest


def _change_value(rng: random.Random, data: bytes) -> bytes:
    """Another value, one value less, or a name of another one's, somewhere in a JSON text."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            entries = dict(node if isinstance(node, dict) else enumerate(node))
            places += [(node, key) for key in entries]
            waiting += entries.values()
    if not places:
        return json.dumps(rng.choice(_VALUES)).encode()
    (node, key), (other, its) = rng.choice(places), rng.choice(places)
    change = rng.randrange(4)
    if change == 0:
        node[key] = rng.choice(_VALUES)
    elif change == 1:
        del node[key]
    elif change == 2:
        node[key] = json.loads(json.dumps(other[its]))
    elif isinstance(node, dict):
        node[str(rng.choice((its, *_TEXTS)))] = node.pop(key)
    else:
        node.extend(node[:2000])
    return json.dumps(root).encode()
