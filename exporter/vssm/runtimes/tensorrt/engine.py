"""`engine.json`: what an engine was built from and for; standard library only.

An engine is code for one GPU and one TensorRT. This file lets a session refuse one that is not
its own, and say what to rebuild.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vssm.errors import ArtifactError
from vssm.files.atomic import atomic_write_bytes
from vssm.files.json import FieldError, Node

FORMAT_VERSION: Final = 1
_OPERATORS: Final = ("kernel", "body")


@dataclass(frozen=True)
class PluginInfo:
    """The plugin library that an engine was built with; `inside`: the engine carries a copy."""

    file: str
    version: str
    sha256: str
    inside: bool


@dataclass(frozen=True)
class EngineInfo:
    """The whole of `engine.json`.

    Attributes:
        product: "tensorrt" or "tensorrt-rtx".
        version: of that product.
        gpu: the GPU's name, None where none was needed.
        compute_capability: its own, "9.0", or those that were compiled for; empty: the product's
            choice.
        cuda: the CUDA runtime that the driver of the building machine supports, "13.0".
        operators: "kernel" (plugins) or "body".
        plugin: the library, None with "body".
        batch: (min, opt, max) of the optimisation profile.
        options: version_compatible, hardware_compatible, level, memory_mib, as they were asked for.
        nodes: nodes of model.onnx.
        layers: layers of the network that the parser made of them.
        seconds: what building took.
        model_sha256: of the model.onnx that it was built from.
        plan_sha256: of the engine.
        plan_bytes: its size.
        vssm: the version that built it.
    """

    product: str
    version: str
    gpu: str | None
    compute_capability: tuple[str, ...]
    cuda: str | None
    operators: str
    plugin: PluginInfo | None
    batch: tuple[int, int, int]
    options: Mapping[str, Any]
    nodes: int
    layers: int
    seconds: float
    model_sha256: str
    plan_sha256: str
    plan_bytes: int
    vssm: str
    format_version: int = FORMAT_VERSION


def write_info(path: Path, info: EngineInfo) -> None:
    """Write `engine.json`, whole or not at all.

    Raises:
        ArtifactError: the directory cannot be written.
    """
    text = json.dumps(dataclasses.asdict(info), indent=2, sort_keys=True, allow_nan=False)
    atomic_write_bytes(path, f"{text}\n".encode())


def read_info(path: Path, command: str) -> EngineInfo:
    """Read and check `engine.json`; `command` is what builds the engine again.

    Raises:
        ArtifactError: it is missing, no JSON, of a newer format, or a field is wrong.
    """
    try:
        return _parse(Node.parse(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}): an engine that does not say what it was "
            f"built from is not loaded; build it with `{command} {path.parent}`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged or was edited: {error}; build it with `{command} {path.parent}`"
        ) from error


def _parse(root: Node) -> EngineInfo:
    version = root.at("format_version").integer(1)
    if version > FORMAT_VERSION:
        raise FieldError(
            f"format_version={version} is newer than {FORMAT_VERSION}, the newest this vssm reads; "
            "update vssm"
        )
    low, opt, high = (n.integer(1) for n in root.at("batch").items(exactly=3))
    if not low <= opt <= high:
        raise FieldError(f"batch=[{low}, {opt}, {high}] must grow")
    info = EngineInfo(
        product=root.at("product").choice(("tensorrt", "tensorrt-rtx")),
        version=root.at("version").text(),
        gpu=root.at("gpu").optional(Node.text),
        compute_capability=tuple(n.text() for n in root.at("compute_capability").items()),
        cuda=root.at("cuda").optional(Node.text),
        operators=root.at("operators").choice(_OPERATORS),
        plugin=root.at("plugin").optional(_plugin),
        batch=(low, opt, high),
        options=root.at("options").mapping(),
        nodes=root.at("nodes").integer(1),
        layers=root.at("layers").integer(1),
        seconds=root.at("seconds").number(),
        model_sha256=root.at("model_sha256").sha256(),
        plan_sha256=root.at("plan_sha256").sha256(),
        plan_bytes=root.at("plan_bytes").integer(1),
        vssm=root.at("vssm").text(),
        format_version=version,
    )
    if (info.operators == "kernel") != (info.plugin is not None):
        raise FieldError(f"operators={info.operators!r} and plugin={info.plugin} contradict")
    return info


def _plugin(node: Node) -> PluginInfo:
    return PluginInfo(
        file=node.at("file").text(),
        version=node.at("version").text(),
        sha256=node.at("sha256").sha256(),
        inside=node.at("inside").flag(),
    )
