"""Checkpoint files to a plain state dict: formats, official wrappings, refusals with a remedy."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vssm.checkpoints.pickle_machine import Stub, TensorRecord
from vssm.checkpoints.torch_file import LEGACY_MAGIC, ZIP_MAGIC, read_restricted
from vssm.errors import CheckpointError

# Keys under which official training codes save weights: Vim, VMamba, GroupMamba; mmcv; timm's EMA.
WRAPPERS: Final = {"model": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
# What may stand beside tensors in an unwrapped file without being a weight.
_METADATA: Final = frozenset(
    {
        *("arch", "args", "config", "hyper_parameters", "meta", "version"),
        *("epoch", "iteration", "step", "best_acc", "max_accuracy"),
        *("optimizer", "lr_scheduler", "scheduler", "scaler"),
    }
)
_LEGACY_BYTES: Final = LEGACY_MAGIC.to_bytes(10, "little")
_REMEDY: Final = "give a .safetensors file, or a .pth file that holds a state dict"
# First bytes of what people pass by mistake.
_FOREIGN: Final = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"\x89HDF": "an HDF5 file",
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
        format: "safetensors", "torch" or "torch, restricted" (it held objects of unknown classes).
        wrapper: key that the weights lay under; empty for a bare state dict.
        ignored: keys of the file that are no weights, such as "optimizer".
        stubs: names of the classes and functions that were not made.
    """

    state: dict[str, Tensor]
    format: str
    wrapper: str = ""
    ignored: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Selection:
    entries: Mapping[str, object]
    wrapper: str
    ignored: tuple[str, ...]


def read_file(path: str | os.PathLike[str], *, weights: str = "model") -> RawCheckpoint:
    """Read a checkpoint file of any format understood, told by its content, onto the CPU.

    Nothing in the file is executed: safetensors has no code, torch files go through
    `torch.load(weights_only=True)`, and where that refuses other objects, through a reader that
    makes inert stubs of them.

    Args:
        path: a safetensors file, or one that torch.save wrote (zip or legacy).
        weights: "model", or "ema" for the averaged weights that some training codes save beside.

    Raises:
        ValueError: `weights` is neither.
        CheckpointError: the file is missing, foreign, damaged, or holds no such state dict.
    """
    if weights not in WRAPPERS:
        raise ValueError(f"weights={weights!r} is neither 'model' nor 'ema'; choose one of these")
    path = Path(path)
    head = _read_head(path)
    if _is_safetensors(head):
        return _read_safetensors(path, weights)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"checkpoint={path} is damaged or no safetensors file, as its name says; "
            "download or save it again"
        )
    if head.startswith(ZIP_MAGIC):
        _check_zip(path)
    elif _LEGACY_BYTES not in head[:24]:
        raise CheckpointError(f"checkpoint={path} is {_describe(head)}; {_REMEDY}")
    return _read_torch(path, weights)


def _read_head(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"checkpoint={path} is a directory; name the file inside")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={path} cannot be read ({error.strerror}); check the path"
        ) from error
    if not head:
        raise CheckpointError(f"checkpoint={path} is empty; download or save it again")
    return head


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of header length, then the JSON header; the library checks the rest."""
    return len(head) >= 9 and struct.unpack("<Q", head[:8])[0] < 1 << 32 and head[8:9] == b"{"


def _describe(head: bytes) -> str:
    for magic, name in _FOREIGN.items():
        if head.lstrip().startswith(magic):
            return name
    if head[0] == 0x08 and len(head) > 2 and head[2] in {0x12, 0x3A, 0x42}:
        return "an ONNX model, which is exported already"
    try:
        head[:60].decode()
    except UnicodeDecodeError:
        return "no checkpoint format that is known here"
    return "a text file"


def _read_safetensors(path: Path, weights: str) -> RawCheckpoint:
    if weights != "model":
        raise CheckpointError(
            f"checkpoint={path} is a safetensors file, which holds one set of weights; "
            "leave weights='ema' out"
        )
    try:
        return RawCheckpoint(dict(safetensors.torch.load_file(path)), "safetensors")
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint={path} is a damaged safetensors file ({error}); download or save it again"
        ) from error


def _check_zip(path: Path) -> None:
    """Refuse other zips, and check the records' checksums, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if any(name.endswith("/constants.pkl") for name in names):
                raise CheckpointError(
                    f"checkpoint={path} is a TorchScript program, not weights; save its "
                    "state_dict() with safetensors"
                )
            if not any(name.endswith("/data.pkl") for name in names):
                raise CheckpointError(f"checkpoint={path} is a zip, but not torch's; {_REMEDY}")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise zipfile.BadZipFile("a record is compressed, which torch never does")
            # torch.serialization.set_crc32_options(False) leaves all of them 0.
            damaged = archive.testzip() if any(info.CRC for info in infos) else None
            if damaged:
                raise zipfile.BadZipFile(f"record {damaged} does not match its checksum")
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
        raise CheckpointError(
            f"checkpoint={path} is truncated or damaged ({error}); download or save it again"
        ) from error


def _read_torch(path: Path, weights: str) -> RawCheckpoint:
    """Use torch's own weights-only reader; where it meets other objects, the restricted one."""
    try:
        # Its warnings are about pickle protocols, which the restricted reader knows all of.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            root: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return _read_restricted(path, weights)
    except Exception as error:  # Damaged bytes end in nearly any exception in there.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"checkpoint={path} is truncated or damaged ({reason}); download or save it again"
        ) from error
    selection = _select(root, weights, path)
    return _raw(selection, selection.entries, path, "torch")


def _read_restricted(path: Path, weights: str) -> RawCheckpoint:
    selections: list[_Selection] = []

    def select(root: object) -> Mapping[str, object]:
        selections.append(_select(root, weights, path))
        return selections[0].entries

    entries, stubs = read_restricted(path, select)
    return _raw(selections[0], entries, path, "torch, restricted", stubs)


def _raw(
    selection: _Selection,
    entries: Mapping[str, object],
    path: Path,
    format_: str,
    stubs: tuple[str, ...] = (),
) -> RawCheckpoint:
    state: dict[str, Tensor] = {}
    for key, value in entries.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                f"checkpoint={path}: entry {key!r} is {_kind(value)}, not a dense tensor; "
                "save the model's plain state_dict()"
            )
        if value.device.type != "cpu":
            raise CheckpointError(f"checkpoint={path}: entry {key!r} has no data; save it again")
        state[key] = value.detach()
    return RawCheckpoint(state, format_, selection.wrapper, selection.ignored, stubs)


def _select(root: object, weights: str, path: Path) -> _Selection:
    """Find the state dict in what a file held."""
    if not isinstance(root, dict):
        raise CheckpointError(
            f"checkpoint={path} holds {_kind(root)}, not a state dict; save model.state_dict()"
        )
    found = [name for name in WRAPPERS[weights] if _holds_tensors(root.get(name))]
    if len(found) > 1:
        raise CheckpointError(
            f"checkpoint={path} holds weights under {' and '.join(found)}; save the ones you mean "
            "alone"
        )
    if found:
        ignored = tuple(sorted(str(key) for key in root if key != found[0]))
        return _Selection(_texts(root[found[0]], path), found[0], ignored)
    if weights == "ema" or not _holds_tensors(root):
        raise CheckpointError(_nothing_found(root, weights, path))
    ignored = tuple(sorted(k for k, v in root.items() if k in _METADATA and not _is_tensor(v)))
    return _Selection(
        _texts({k: v for k, v in root.items() if k not in ignored}, path), "", ignored
    )


def _nothing_found(root: Mapping[Any, Any], weights: str, path: Path) -> str:
    keys = ", ".join(str(key)[:40] for key in list(root)[:6]) or "nothing"
    others = [s for s, names in WRAPPERS.items() if any(_holds_tensors(root.get(n)) for n in names)]
    remedy = f"use weights={others[0]!r}" if others else _REMEDY
    wanted = " or ".join(WRAPPERS[weights])
    return f"checkpoint={path} has no weights under {wanted} (it holds {keys}); {remedy}"


def _texts(entries: Mapping[Any, object], path: Path) -> dict[str, object]:
    for key in entries:
        if not isinstance(key, str):
            raise CheckpointError(
                f"checkpoint={path} has the key {key!r}, which is no text; save model.state_dict()"
            )
    return dict(entries)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | TensorRecord)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(map(_is_tensor, value.values()))


def _kind(value: object) -> str:
    return f"a {value.name}" if isinstance(value, Stub) else f"a {type(value).__name__}"
