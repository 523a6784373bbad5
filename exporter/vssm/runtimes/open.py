"""Opens an export in the runtime that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.errors import check_choice
from vssm.extras import explain_missing
from vssm.runtimes.session import BACKENDS, TORCH_BACKENDS, Session, checked_threads

if TYPE_CHECKING:
    from vssm.runtimes.ort import OrtSession

ENGINE_RUNTIMES = ("tensorrt", "tensorrt-rtx")
RUNTIMES = ("ort-cpu", "ort-cuda", "torch", *ENGINE_RUNTIMES)


def open_session(
    artifact: Artifact | str | os.PathLike[str],
    runtime: str = "ort-cpu",
    *,
    backend: str | None = None,
    threads: int | None = None,
    device: int | None = None,
    cuda_graph_batch: int | None = None,
    trust: bool = False,
    spin: bool = True,
) -> Session:
    """Open an export in a runtime. torch is imported for runtime "torch" alone.

    Args:
        artifact: what `export` returned, or the directory it wrote, wherever that is now.
        runtime: "ort-cpu", "ort-cuda", "torch", "tensorrt" or "tensorrt-rtx".
        backend: "kernel" (this package's library; the default) or "body" (the file's fallback
            functions); for runtime "torch" "kernel" or "reference" (PyTorch alone); for an engine
            what it must have been built with.
        threads: threads of one run; None for all cores; not for an engine.
        trust: load an engine that is foreign or tampered; the session's `info` then says so.
        device: ordinal of the GPU, for "ort-cuda"; None for the first.
        cuda_graph_batch: for "ort-cuda", the one batch size to record a CUDA graph for.
        spin: whether ONNX Runtime's threads spin while they wait for one another within a run: less
            time for a small batch on idle cores, more where other work needs them. Other runtimes
            have no such threads.

    Raises:
        ValueError: an argument is not one of these.
        ArtifactError: the directory is no export, or was changed.
        RuntimeUnavailableError: the runtime or the library is missing.
        MissingPackageError: runtime "torch" without torch.
        UnsupportedError: the runtime cannot run this export.
    """
    check_runtime(runtime, backend=backend, threads=threads, trust=trust)
    options = {"device": device, "cuda_graph_batch": cuda_graph_batch}
    # Only what was given: the classes of the other runtimes have no such arguments.
    on_gpu = {name: value for name, value in options.items() if value is not None}
    if on_gpu and runtime != "ort-cuda":
        given = ", ".join(f"{name}={value}" for name, value in on_gpu.items())
        raise ValueError(f"{given} with runtime={runtime!r}: only ort-cuda takes it; leave it out")
    # A session on ONNX Runtime reads and checks the model itself, once.
    only = {"torch": None, "ort-cpu": (), "ort-cuda": ()}.get(runtime, (MODEL_FILE,))
    opened = open_artifact(artifact, only=only)
    if runtime in ENGINE_RUNTIMES:
        # Here and below: a runtime is imported when it is asked for, as none of them has to be
        # installed.
        from vssm.runtimes.tensorrt.session import TensorRtSession

        return TensorRtSession(opened, runtime=runtime, backend=backend, trust=trust)
    if runtime == "torch":
        with explain_missing():
            from vssm.runtimes.torch import TorchSession
        return TorchSession(opened, backend=backend or "kernel", threads=threads)
    return ort_session(runtime)(
        opened, backend=backend or "kernel", threads=threads, spin=spin, **on_gpu
    )


def ort_session(runtime: str) -> Callable[..., OrtSession]:
    """The class of a runtime; the CUDA one loads libraries of the driver."""
    from vssm.runtimes.ort import OrtCpuSession

    if runtime == "ort-cpu":
        return OrtCpuSession
    from vssm.runtimes.ort_cuda import OrtCudaSession

    return OrtCudaSession


def check_runtime(
    runtime: str,
    *,
    backend: str | None = None,
    threads: int | None = None,
    trust: bool = False,
) -> None:
    """Refuse options of `open_session` that do not go together, before any file is read.

    Raises:
        ValueError, TypeError: one is not known, or the runtime has no use for it.
    """
    check_choice("runtime", runtime, RUNTIMES)
    if backend is not None:
        check_choice("backend", backend, TORCH_BACKENDS if runtime == "torch" else BACKENDS)
    if runtime in ENGINE_RUNTIMES:
        refuse_threads(runtime, threads)
    # An option without effect would let the caller believe that something was trusted.
    elif trust:
        raise ValueError(
            f"trust=True with runtime={runtime!r}, which loads no engine: leave it out"
        )
    checked_threads(threads)


def refuse_threads(runtime: str, threads: object) -> None:
    """Refuse a number of threads, which an engine has no use for.

    Raises:
        ValueError: `threads` is not None.
    """
    if threads is not None:
        raise ValueError(
            f"threads={threads} with runtime={runtime!r}, which runs on the GPU: leave it out"
        )
