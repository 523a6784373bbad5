"""Runs a file with a library from anywhere, once: for what is not this installation's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from vssm.errors import UnsupportedError
from vssm.runtimes.library import kernel_calls
from vssm.runtimes.session import Array


@dataclass(frozen=True)
class OneRun:
    """Outputs by name, and how many of the library's kernels ran."""

    outputs: dict[str, Array]
    kernels: int


def run_once(model: Path, images: Array, library: Path | None) -> OneRun:
    """Run `model` on the CPU with the operators of `library`; None for its fallback bodies.

    Raises:
        UnsupportedError: ONNX Runtime cannot open or run it.
        RuntimeUnavailableError: the library cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    before = 0 if library is None else kernel_calls(library)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {session.get_inputs()[0].name: images})
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise UnsupportedError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {model}: {error}"
        ) from error
    ran = 0 if library is None else kernel_calls(library) - before
    return OneRun(dict(zip(names, values, strict=True)), ran)
