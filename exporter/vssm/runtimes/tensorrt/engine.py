"""`engine.json`: what an engine was built from and for; standard library only.

An engine is code for one GPU and one TensorRT. This file lets a session refuse one that is not
its own, and say what to rebuild.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.errors import ArtifactError
from vssm.files.atomic import atomic_write_bytes, sha256_of
from vssm.files.json import FieldError, Node, read_json
from vssm.files.regular import ENGINE, read_regular
from vssm.runtimes.cuda_memory import GpuInfo
from vssm.runtimes.session import BACKENDS
from vssm.runtimes.tensorrt.api import Product

FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class PluginInfo:
    """The plugin library that an engine was built with; `inside`: the engine carries a copy."""

    file: str
    version: str
    sha256: str
    inside: bool


def check_batch(batch: tuple[int, int, int]) -> None:
    """Refuse an impossible (min, opt, max).

    Raises:
        ValueError: the three do not grow from 1 or more.
    """
    low, opt, high = batch
    if not 1 <= low <= opt <= high:
        raise ValueError(
            f"batch={low},{opt},{high} must grow from 1 or more; give MIN,OPT,MAX, such as 1,8,32"
        )


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
        backend: "kernel" (plugins) or "body".
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
    backend: str
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
    # NaN is no JSON, and other readers would refuse the file.
    text = json.dumps(dataclasses.asdict(info), indent=2, sort_keys=True, allow_nan=False)
    atomic_write_bytes(path, f"{text}\n".encode())


def read_info(path: Path, command: str) -> EngineInfo:
    """Read and check `engine.json`; `command` is what builds the engine again.

    Raises:
        ArtifactError: it is missing, no JSON, of a newer format, or a field is wrong.
    """
    build = f"build it with `{command} {path.parent}`"
    absent = f"an engine that does not say what it was built from is not loaded; {build}"
    return read_json(path, _parse, absent=absent, damaged=build)


def _parse(root: Node) -> EngineInfo:
    version = root.at("format_version").format_version(FORMAT_VERSION)
    low, opt, high = (n.integer(1) for n in root.at("batch").items(exactly=3))
    if not low <= opt <= high:
        raise FieldError(f"batch=[{low}, {opt}, {high}] must grow")
    info = EngineInfo(
        product=root.at("product").choice(("tensorrt", "tensorrt-rtx")),
        version=root.at("version").text(),
        gpu=root.at("gpu").optional(Node.text),
        compute_capability=tuple(n.text() for n in root.at("compute_capability").items()),
        cuda=root.at("cuda").optional(Node.text),
        backend=root.at("backend").choice(BACKENDS),
        plugin=root.at("plugin").optional(_plugin),
        batch=(low, opt, high),
        options=root.at("options").mapping(),
        nodes=root.at("nodes").integer(1),
        layers=root.at("layers").integer(1),
        seconds=root.at("seconds").number(0, 1e9),
        model_sha256=root.at("model_sha256").sha256(),
        plan_sha256=root.at("plan_sha256").sha256(),
        plan_bytes=root.at("plan_bytes").integer(1),
        vssm=root.at("vssm").text(),
        format_version=version,
    )
    # Which library to hold against it hangs on this, so a file that was edited by halves is
    # refused.
    if (info.backend == "kernel") != (info.plugin is not None):
        raise FieldError(f"backend={info.backend!r} and plugin={info.plugin} contradict")
    return info


def _plugin(node: Node) -> PluginInfo:
    return PluginInfo(
        file=node.at("file").text(),
        version=node.at("version").text(),
        sha256=node.at("sha256").sha256(),
        inside=node.at("inside").flag(),
    )


@dataclass(frozen=True)
class CheckedEngine:
    """An engine that may be loaded: its bytes, what it says of itself, and what is trusted.

    The bytes are those that were checked: the file may change afterwards. `info` is None for a
    trusted engine without a statement; `trusted` is empty if nothing needed trust.
    """

    data: bytes
    info: EngineInfo | None
    trusted: str


def check_engine(
    artifact: Artifact,
    product: Product,
    *,
    version: str,
    gpu: GpuInfo,
    library: Path | None,
    trust: bool = False,
) -> CheckedEngine:
    """Refuse an engine that is not of this export and machine.

    Args:
        artifact: a verified export.
        product: whose engine.
        version: of the product that is installed.
        gpu: the GPU that would run it.
        library: the plugin library that is here, None without one.
        trust: load a foreign or tampered engine all the same; a stale one never.

    Raises:
        ArtifactError: it is missing, stale, or foreign or tampered and not trusted.
    """
    plan = artifact.directory / product.plan
    remedy = f"build it with `{product.command} {artifact.directory}`"
    if not plan.exists():
        raise ArtifactError(f"{plan} is not there, so nothing can run; {remedy}")
    # Read once: these bytes are hashed and loaded, whatever becomes of the file.
    data = read_regular(plan, limit=ENGINE)
    info: EngineInfo | None = None
    doubts: list[str] = []
    # Trust covers a statement that is missing, never one that is damaged.
    if trust and not (artifact.directory / product.info).exists():
        doubts.append(f"{product.info} is missing")
    else:
        info = read_info(artifact.directory / product.info, product.command)
        # Not a doubt but an error: a stale engine gives another model's numbers, trusted or not.
        _refuse_stale(artifact, info, library, f"{plan.name}: ", remedy)
        doubts += [*_tampered(data, info, product), *_foreign(info, version, gpu)]
    if doubts and not trust:
        raise ArtifactError(
            f"{plan.name}: {'; '.join(doubts)}; {remedy}, or pass trust=True (--trust) if you know "
            "where it comes from: an engine is code"
        )
    return CheckedEngine(data, info, "; ".join(doubts))


def refuse_changes(artifact: Artifact, library: Path | None, plugin: PluginInfo | None) -> None:
    """Refuse to say what an engine is of, when that was replaced during its long building.

    Raises:
        ArtifactError: model.onnx or the plugin library are not what the building began with.
    """
    files = [(artifact.model_path, artifact.manifest.files[MODEL_FILE])]
    if library is not None and plugin is not None:
        files.append((library, plugin.sha256))
    for path, before in files:
        if sha256_of(path) != before:
            raise ArtifactError(
                f"{path.name} was changed while the engine was built, so nobody knows what the "
                "engine is of; build it again"
            )


def _refuse_stale(
    artifact: Artifact, info: EngineInfo, library: Path | None, name: str, remedy: str
) -> None:
    built, now = info.model_sha256, artifact.manifest.files[MODEL_FILE]
    if built != now:
        raise ArtifactError(
            f"{name}stale, built from a {MODEL_FILE} of sha256 {built[:12]}..., but this one has "
            f"{now[:12]}...; {remedy}"
        )
    # What an engine carries is covered by its own hash, whatever library lies beside it.
    if info.plugin is None or info.plugin.inside:
        return
    if library is None:
        raise ArtifactError(
            f"{name}built with {info.plugin.file} {info.plugin.version}, which is not here; "
            "build that library with `make setup`, where CUDA is"
        )
    found = sha256_of(library)
    if found != info.plugin.sha256:
        raise ArtifactError(
            f"{name}stale, built with {info.plugin.file} {info.plugin.version} of sha256 "
            f"{info.plugin.sha256[:12]}..., but {library} has {found[:12]}...; {remedy}"
        )


def _tampered(data: bytes, info: EngineInfo, product: Product) -> Iterator[str]:
    # Against damage and mix-ups; whoever can change the engine can change this statement too.
    found = hashlib.sha256(data).hexdigest()
    if found != info.plan_sha256:
        yield (
            f"tampered or damaged, its sha256 is {found[:12]}..., but {product.info} says "
            f"{info.plan_sha256[:12]}..."
        )


def _foreign(info: EngineInfo, version: str, gpu: GpuInfo) -> Iterator[str]:
    # Only the version that wrote a plan reads it, unless it was built for later ones as well.
    if info.version != version and not _runs_later(info, version):
        yield f"foreign, built by {info.product} {info.version}, but {version} is here"
    level = info.options.get("hardware_compatible")
    if info.compute_capability and not _runs_on(info.compute_capability, gpu, level):
        listed = ", ".join(info.compute_capability)
        yield f"foreign, built for compute capability {listed}, but this GPU has " + (
            gpu.compute_capability
        )
    # The same capability, but kernels were chosen by timing them on another card. TensorRT for RTX
    # finishes compiling on the card itself.
    elif info.gpu not in {None, gpu.name} and level is None and info.product == "tensorrt":
        yield f"foreign, built for {info.gpu}, but this GPU is {gpu.name}"


def _runs_later(info: EngineInfo, version: str) -> bool:
    """A version-compatible engine runs on later versions, never on earlier ones."""
    # As numbers: by text 10.9 would be later than 10.13.
    built, here = ([int(n) for n in re.findall(r"\d+", v)] for v in (info.version, version))
    return bool(info.options.get("version_compatible")) and here >= built


def _runs_on(built: tuple[str, ...], gpu: GpuInfo, level: object) -> bool:
    if level == "ampere-plus":
        # As numbers: by text 12.0 would be below 8.0.
        return float(gpu.compute_capability) >= 8.0
    return gpu.compute_capability in built
