"""Whether an engine belongs to this export and this machine; no TensorRT is loaded to find out.

An engine is code that the GPU and, with plugins inside, the host will run. Three faults are told
apart: stale (built from something that changed since), foreign (built for another GPU or TensorRT)
and tampered (not the bytes that were built). A caller may trust the last two.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.errors import ArtifactError
from vssm.files.atomic import sha256_of
from vssm.runtimes.cuda_memory import GpuInfo
from vssm.runtimes.tensorrt.api import Product
from vssm.runtimes.tensorrt.engine import EngineInfo, PluginInfo, read_info


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
    if not plan.is_file():
        raise ArtifactError(f"{plan} is not there, so nothing can run; {remedy}")
    data = plan.read_bytes()
    info: EngineInfo | None = None
    doubts: list[str] = []
    if trust and not (artifact.directory / product.info).exists():
        doubts.append(f"{product.info} is missing")
    else:
        info = read_info(artifact.directory / product.info, product.command)
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
    found = hashlib.sha256(data).hexdigest()
    if found != info.plan_sha256:
        yield (
            f"tampered or damaged, its sha256 is {found[:12]}..., but {product.info} says "
            f"{info.plan_sha256[:12]}..."
        )


def _foreign(info: EngineInfo, version: str, gpu: GpuInfo) -> Iterator[str]:
    if info.version != version and not _runs_later(info, version):
        yield f"foreign, built by {info.product} {info.version}, but {version} is here"
    level = info.options.get("hardware_compatible")
    if info.compute_capability and not _runs_on(info.compute_capability, gpu, level):
        listed = ", ".join(info.compute_capability)
        yield f"foreign, built for compute capability {listed}, but this GPU has " + (
            gpu.compute_capability
        )
    elif info.gpu not in {None, gpu.name} and level is None and info.product == "tensorrt":
        yield f"foreign, built for {info.gpu}, but this GPU is {gpu.name}"


def _runs_later(info: EngineInfo, version: str) -> bool:
    """A version-compatible engine runs on later versions, never on earlier ones."""
    built, here = ([int(n) for n in re.findall(r"\d+", v)] for v in (info.version, version))
    return bool(info.options.get("version_compatible")) and here >= built


def _runs_on(built: tuple[str, ...], gpu: GpuInfo, level: object) -> bool:
    if level == "ampere-plus":
        return float(gpu.compute_capability) >= 8.0
    return gpu.compute_capability in built
