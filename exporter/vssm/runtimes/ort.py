"""Sessions on ONNX Runtime, with this package's kernels or the file's own bodies."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vssm.artifact.directory import Artifact
from vssm.errors import RuntimeUnavailableError, UnsupportedError, VssmError, check_choice, reason
from vssm.runtimes.library import LibraryInfo, kernel_calls, library_info
from vssm.runtimes.session import BACKENDS, CLOSED, RuntimeInfo, Session, checked_threads
from vssm.types import Array

try:
    import onnxruntime
except ImportError as error:  # pragma: no cover - depends on the installation
    raise RuntimeUnavailableError(
        "the package onnxruntime is missing, which runs model.onnx; pip install onnxruntime"
    ) from error


@dataclass(frozen=True)
class Target:
    """Where a session runs.

    Attributes:
        runtime: its name, "ort-cpu" or "ort-cuda".
        provider: ONNX Runtime's name of it.
        device: the device in words.
        calls: how often this package's kernels have run there.
        provider_options: as ONNX Runtime takes them.
        config: entries of the session's configuration.
        fixed_sizes: sizes of the graph's named dimensions that are settled at load.
    """

    runtime: str
    provider: str
    device: str
    calls: Callable[[], int]
    provider_options: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    fixed_sizes: Mapping[str, int] = field(default_factory=dict)

    def kernels(self, library: LibraryInfo) -> str:
        """What the library's kernels are compiled for here."""
        if self.provider == "CPUExecutionProvider":
            return library.cpu_isa
        return f"CUDA {','.join(library.cuda_architectures)}"


class OrtSession(Session):
    """One ONNX file in ONNX Runtime. `run` may be called from several threads at once.

    Args:
        artifact: a verified export.
        target: where to run.
        backend: "kernel" (the operator library must be there and must run) or "body".
        threads: intra-op threads; None for all cores.
        spin: whether they spin while they wait for one another within a run.
        model: another graph to run in place of the artifact's file, serialized.
        profile: record a profile, see `profiled_operators`.

    Raises:
        UnsupportedError: a model that this ONNX Runtime does not read, or this provider not run.
        RuntimeUnavailableError: the library is missing, or older than the file.
    """

    def __init__(
        self,
        artifact: Artifact,
        target: Target,
        *,
        backend: str = "kernel",
        threads: int | None = None,
        spin: bool = True,
        model: bytes | None = None,
        profile: bool = False,
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        options = _options(target, threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        for key, value in _quantization_options(artifact).items():
            options.add_session_config_entry(key, value)
        library = _library(artifact) if backend == "kernel" else None
        if library is not None:
            # Before the file is opened: without a library its operators run as their bodies,
            # without a word.
            options.register_custom_ops_library(str(library.path))
        # ONNX Runtime writes profiles to the working directory unless it is told another place.
        self._profile_dir = tempfile.TemporaryDirectory() if profile else None
        if self._profile_dir is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(self._profile_dir.name, "ort")
        providers = [(target.provider, dict(target.provider_options))]
        # Not the file by its name: while another process exchanged it, 31 of 179 opens ran bytes
        # that nobody had checked.
        with artifact.opened_model(model) as path, ort_errors(f"open {artifact.model_path}"):
            # Without its own fallback, which would print a line and go on with another provider.
            self._session = onnxruntime.InferenceSession(
                path, options, providers=providers, enable_fallback=0
            )
        self._output_names = [o.name for o in self._session.get_outputs()]
        self._calls = target.calls
        # Once is enough: which kernel a node has is settled when the file is opened.
        self._proven = library is None or not artifact.manifest.operators
        info = _info(target, backend, options.intra_op_num_threads, library)
        super().__init__(artifact.manifest, info)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self.run_feeds(feeds)

    def run_feeds(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name, unchecked: for graphs with further inputs."""
        session = self._session
        if session is None:
            raise ValueError(CLOSED)
        with ort_errors("run the model"), self._proof():
            outputs = session.run(None, dict(feeds))
        return dict(zip(self._output_names, outputs, strict=True))

    @contextmanager
    def _proof(self) -> Iterator[None]:
        """Holds the first run against the library's own counter of runs."""
        if self._proven:
            yield
            return
        before = self._calls()
        yield
        # The counter is the whole process's: another session's runs can hide a fault, not make one
        # up.
        if self._calls() == before:
            raise RuntimeUnavailableError(
                f"backend='kernel' was asked for, but {self.info.runtime} did not run them: "
                "ONNX Runtime ran the fallback bodies, or another provider; the file's operators "
                "and the library's do not match: export again, or ask for backend='body'"
            )
        self._proven = True

    def profiled_operators(self) -> dict[str, float]:
        """Milliseconds by operator type, each node's minimum over the runs; ends the profile."""
        if self._profile_dir is None:
            raise ValueError("profile=False: open the session with profile=True to read a profile")
        return sum_node_times(json.loads(Path(self._session.end_profiling()).read_text()))

    def close(self) -> None:
        """Free the session and its profile."""
        self._session = None
        if self._profile_dir is not None:
            self._profile_dir.cleanup()


class OrtCpuSession(OrtSession):
    """`ort-cpu`: arguments and errors as `OrtSession`'s; bfloat16 models are unsupported."""

    def __init__(self, artifact: Artifact, **options: Any) -> None:
        if artifact.manifest.dtype == "bfloat16":
            raise UnsupportedError(
                "dtype=bfloat16: ONNX Runtime's CPU provider has no bfloat16 kernels for MatMul "
                "and other standard operators (ours it would run); export float32 or float16 for "
                "ort-cpu"
            )
        target = Target("ort-cpu", "CPUExecutionProvider", cpu_name(), kernel_calls)
        super().__init__(artifact, target, **options)


def sum_node_times(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds by operator type of a profile: the sum of each node's fastest run."""
    fastest: dict[tuple[str, str], float] = {}
    for event in events:
        # A node has other events around the one of its kernel.
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["args"].get("op_name", "?"), event["name"])
            # The minimum, as other work on the machine only ever adds time.
            fastest[key] = min(event["dur"] / 1000.0, fastest.get(key, np.inf))
    totals: dict[str, float] = {}
    for (kind, _), milliseconds in fastest.items():
        totals[kind] = totals.get(kind, 0.0) + milliseconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _options(target: Target, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    # Errors alone: warnings go past Python's logging to the terminal, and faults are raised anyway.
    options.log_severity_level = 3
    # Nodes run one after another, so a second pool of threads would never have work.
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = checked_threads(threads)
    # Threads spin within a run, not after it: several sessions in one process (a benchmark, a
    # server) would otherwise take the cores from each other. Waking them costs microseconds.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in target.config.items():
        options.add_session_config_entry(key, value)
    for name, size in target.fixed_sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    return options


def _quantization_options(artifact: Artifact) -> dict[str, str]:
    """What a quantised model needs in ONNX Runtime."""
    quantization = artifact.manifest.quantization
    if quantization is None:
        return {}
    # Taken literally, what its own products refuse runs in float32; and pairs of weights alone are
    # folded to float weights when the file is opened, not multiplied out in every run.
    literal = quantization.method == "weights" or not quantization.in_ort
    options = {"session.disable_quant_qdq": "1"} if literal else {}
    if quantization.type == "fp8":
        # They take out a Relu or Clip in front of a QuantizeLinear whose zero point is 0, as if
        # that were the least number of every type.
        options["optimization.disable_specified_optimizers"] = "ReluQuantRewrite;ClipQuantRewrite"
    return options


@contextmanager
def ort_errors(task: str) -> Iterator[None]:
    """ONNX Runtime's errors, which have no common base, as one of ours."""
    try:
        yield
    except VssmError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"ONNX Runtime {onnxruntime.__version__} cannot {task}: {reason(error)}"
        ) from error


def _library(artifact: Artifact) -> LibraryInfo:
    library = library_info()
    # An operator that the library lacks would run as its body, under the name of the kernel.
    missing = sorted(set(artifact.manifest.operators) - set(library.operators))
    if missing:
        raise RuntimeUnavailableError(
            f"{library.path.name} {library.version} has no kernels for {', '.join(missing)}; "
            "build the library of the version that made the export"
        )
    return library


def _info(target: Target, backend: str, threads: int, library: LibraryInfo | None) -> RuntimeInfo:
    return RuntimeInfo(
        runtime=target.runtime,
        backend=backend,
        version=f"onnxruntime {onnxruntime.__version__}",
        device=target.device,
        threads=threads,
        library=None if library is None else library.path.name,
        library_version=None if library is None else library.version,
        isa=None if library is None else target.kernels(library),
    )


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        # On Linux platform.processor() is empty or names the architecture.
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
            f"ONNX Runtime {onnxruntime.__version__} cannot run {model}: {reason(error)}"
        ) from error
    ran = 0 if library is None else kernel_calls(library) - before
    return OneRun(dict(zip(names, values, strict=True)), ran)
