"""What `vssm engine`, `vssm bundle` and the engine runtimes do, as functions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.bundle.make import BundleRequest, make_bundle
from vssm.bundle.manifest import BundleManifest
from vssm.runtimes.session import Array, RuntimeInfo, Session

if TYPE_CHECKING:
    from vssm.runtimes.tensorrt.build import Progress
    from vssm.runtimes.tensorrt.engine import EngineInfo
    from vssm.runtimes.tensorrt.engine_request import EngineRequest

ENGINE_RUNTIMES = ("tensorrt", "tensorrt-rtx")


def build_directory(directory: Path, request: EngineRequest, *, progress: Progress) -> EngineInfo:
    """Build an engine of an export; see `tensorrt_build.build_engine`."""
    from vssm.runtimes.tensorrt.build import build_engine
    from vssm.runtimes.tensorrt.engine_request import check_request

    check_request(request)
    artifact = open_artifact(directory, only=(MODEL_FILE,))
    return build_engine(artifact, request, progress=progress)


def bundle_directory(directory: Path, output: Path, request: BundleRequest) -> BundleManifest:
    """Bundle an export; see `bundle.make_bundle`."""
    artifact = open_artifact(directory, only=(MODEL_FILE,))
    return make_bundle(artifact, output, request)


def open_engine(
    artifact: Artifact, runtime: str, operators: str | None, *, threads: int | None, trust: bool
) -> Session:
    """A session on an engine; arguments as for `pipeline.open_session`.

    Raises:
        ValueError: `threads` is given.
        ArtifactError, RuntimeUnavailableError: as for `TensorRtSession`.
    """
    refuse_threads(runtime, threads)
    from vssm.runtimes.tensorrt.session import TensorRtSession

    return TensorRtSession(artifact, runtime=runtime, operators=operators, trust=trust)


def refuse_threads(runtime: str, threads: object) -> None:
    """Refuse a number of threads, which an engine has no use for.

    Raises:
        ValueError: `threads` is not None.
    """
    if threads is not None:
        raise ValueError(
            f"threads={threads} with runtime={runtime!r}, which runs on the GPU: leave it out"
        )


def run_engine(graph: bytes, feeds: Mapping[str, Array], info: RuntimeInfo) -> dict[str, Array]:
    """Run an edited graph in an engine of its own, built as the session's was."""
    from vssm.runtimes.tensorrt.build import run_graph

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / MODEL_FILE
        path.write_bytes(graph)
        return run_graph(path, feeds, runtime=info.runtime, operators=info.operators)
