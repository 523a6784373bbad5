"""Sessions on TensorRT and TensorRT for RTX: an engine that `vssm engine` built; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.errors import ArtifactError, RuntimeUnavailableError
from vssm.native_library import find_library
from vssm.runtimes.cuda_memory import Cuda, GpuInfo
from vssm.runtimes.library import TENSORRT_LIBRARY
from vssm.runtimes.session import RuntimeInfo, Session
from vssm.runtimes.tensorrt import api
from vssm.runtimes.tensorrt.engine import CheckedEngine, EngineInfo, check_engine
from vssm.runtimes.tensorrt.runner import EngineRunner
from vssm.types import Array


class TensorRtSession(Session):
    """`tensorrt` and `tensorrt-rtx`: model.plan on the GPU. Runs of several threads take turns.

    Args:
        artifact: a verified export with an engine beside it.
        runtime: which of the two.
        backend: what the engine must have been built with, "kernel" or "body"; None for either.
        trust: load an engine that is foreign or tampered; `info.trusted` then says why that was
            needed.
        graphs: run CUDA graphs, one for each batch size; None for True on TensorRT, and False on
            TensorRT for RTX, which captures graphs of its own.

    Raises:
        ArtifactError: the engine is missing, stale, foreign or tampered.
        RuntimeUnavailableError: the package, the GPU or the plugin library is missing.
        ValueError: the engine was built with another backend than asked for.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        runtime: str = "tensorrt",
        backend: str | None = None,
        trust: bool = False,
        graphs: bool | None = None,
    ) -> None:
        product = api.PRODUCTS[runtime]
        # Its version and the GPU are needed to tell whether the engine is foreign.
        package = api.load_package(product)
        cuda = Cuda()
        gpu = cuda.gpu()
        library = _library()
        engine = check_engine(
            artifact,
            product,
            version=str(package.__version__),
            gpu=gpu,
            library=library,
            trust=trust,
        )
        _check_backend(engine.info, backend, product)
        if library is not None and product.plugins and _wants_library(engine.info):
            plugin = None if engine.info is None else engine.info.plugin
            # Before the engine is read, which looks for its plugins in the registry.
            api.load_plugin(package, library, None if plugin is None else plugin.sha256)
        self._runner = EngineRunner(
            product,
            engine.data,
            cuda,
            host_code=_has_host_code(engine.info),
            # TensorRT for RTX captures graphs by itself, so ours are for the full product.
            graphs=product.plugins if graphs is None else graphs,
        )
        try:
            _check_tensors(self._runner, artifact, product)
        except BaseException:
            self._runner.close()
            raise
        version = str(package.__version__)
        super().__init__(artifact.manifest, _info(product, version, engine, gpu=gpu))

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and largest batch that the engine takes."""
        return self._runner.min_batch, self._runner.max_batch

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._runner.run(feeds)

    def close(self) -> None:
        """Free the engine and its memory."""
        self._runner.close()


def _check_tensors(runner: EngineRunner, artifact: Artifact, product: api.Product) -> None:
    """A trusted engine may be of any model."""
    manifest = artifact.manifest
    wanted = {t.name: tuple(t.shape[1:]) for t in (*manifest.inputs, *manifest.outputs)}
    # Against the engine itself, as nothing else is known of one without a statement.
    found = runner.shapes()
    if found != wanted:
        raise ArtifactError(
            f"{product.plan} has inputs and outputs {found}, but {MODEL_FILE} has {wanted}: it is "
            f"of another model; build it with `{product.command} {artifact.directory}`"
        )


def _library() -> Path | None:
    try:
        return find_library(TENSORRT_LIBRARY)
    except RuntimeUnavailableError:
        # An engine of bodies, or one that carries its library, needs none; `check_engine` refuses
        # the others.
        return None


def _wants_library(info: EngineInfo | None) -> bool:
    """An engine that carries the library registers it itself; of a trusted one nothing is known."""
    return info is None or (info.plugin is not None and not info.plugin.inside)


def _has_host_code(info: EngineInfo | None) -> bool:
    """Host code runs only where engine.json, which was checked, says that we put it there."""
    if info is None:
        return False
    inside = info.plugin is not None and info.plugin.inside
    return inside or bool(info.options.get("version_compatible"))


def _check_backend(info: EngineInfo | None, asked: str | None, product: api.Product) -> None:
    if asked is not None and info is not None and asked != info.backend:
        raise ValueError(
            f"backend={asked!r}, but the engine was built with {info.backend!r}; leave it out, "
            f"or build it with `{product.command} --backend {asked}`"
        )


def _info(
    product: api.Product, version: str, engine: CheckedEngine, *, gpu: GpuInfo
) -> RuntimeInfo:
    info = engine.info
    plugin = None if info is None else info.plugin
    return RuntimeInfo(
        runtime=product.runtime,
        # Of an engine that was trusted without a statement nothing is known but its tensors.
        backend="unknown" if info is None else info.backend,
        version=version,
        device=gpu.name,
        threads=1,
        library=None if plugin is None else plugin.file,
        library_version=None if plugin is None else plugin.version,
        isa=None if plugin is None else f"compute capability {gpu.compute_capability}",
        trusted=engine.trusted or None,
    )
