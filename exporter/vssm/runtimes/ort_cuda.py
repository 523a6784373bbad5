"""Sessions on ONNX Runtime's CUDA provider."""

from __future__ import annotations

import importlib.metadata
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnxruntime

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import Manifest, TensorInfo
from vssm.errors import RuntimeUnavailableError, UnsupportedError, check_choice
from vssm.ops.spec import DOMAIN
from vssm.runtimes.cuda_driver import find_gpu
from vssm.runtimes.cuda_memory import TimedStream
from vssm.runtimes.library import cuda_kernel_calls, library_info
from vssm.runtimes.ort import OrtSession, Target, ort_errors
from vssm.runtimes.session import BACKENDS, CLOSED, plural
from vssm.types import Array

PROVIDER: Final = "CUDAExecutionProvider"
_NUMPY_TYPES: Final = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
_WARM_UP = 2  # runs before ONNX Runtime has captured its graph


class OrtCudaSession(OrtSession):
    """`ort-cuda`: float32, float16 and bfloat16 exports on an NVIDIA GPU.

    float32 is float32: TF32 products are off.

    Args:
        artifact: a verified export.
        backend: "kernel" or "body".
        threads: intra-op threads of the nodes that stay on the CPU; None for all cores.
        model: another graph to run in place of the artifact's file, serialized.
        profile: record a profile, see `profiled_operators`.
        device: ordinal of the GPU.
        cuda_graph_batch: record one CUDA graph for this batch size, the only one `run` then takes.
        timed: put the work on a stream of this package, which `DeviceRun.device_ms` needs; takes
            cuda-bindings.

    Raises:
        RuntimeUnavailableError: the provider, its libraries, our CUDA kernels or the GPU are
            missing, or nodes of ours would run elsewhere.
        UnsupportedError: this ONNX Runtime cannot run the file, or not as one CUDA graph.
        ValueError: an argument is not one of these.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        backend: str = "kernel",
        device: int = 0,
        cuda_graph_batch: int | None = None,
        timed: bool = False,
        **options: Any,
    ) -> None:
        # Options first, then what can be installed, then the GPU: a missing package is said on a
        # machine without a GPU too.
        fixed = _fixed_sizes(artifact.manifest, cuda_graph_batch)
        _require_provider()
        check_choice("backend", backend, BACKENDS)
        if backend == "kernel":
            _require_kernels()
        gpu = find_gpu(device)
        self.device = device
        self._graph_batch = cuda_graph_batch
        self._graph_run: DeviceRun | None = None
        self._lock = threading.Lock()
        self._stream = TimedStream(device) if timed else None
        target = Target(
            runtime="ort-cuda",
            provider=PROVIDER,
            device=str(gpu),
            calls=cuda_kernel_calls,
            provider_options=_provider_options(device, cuda_graph_batch, self._stream),
            config=_config(cuda_graph_batch),
            fixed_sizes=fixed,
        )
        try:
            super().__init__(artifact, target, backend=backend, **options)
            self._say_what_stayed()
        except UnsupportedError as error:
            self.close()
            raise _explained(error, cuda_graph_batch) from error
        except BaseException:
            self.close()
            raise

    def _say_what_stayed(self) -> None:
        """Refuse a session without the GPU; name the standard nodes that stay on the CPU."""
        # A provider whose libraries do not load is dropped with a warning, and the CPU would run.
        if PROVIDER not in self._session.get_providers():
            raise RuntimeUnavailableError(
                f"onnxruntime {onnxruntime.__version__} could not load {PROVIDER}: the CUDA "
                "libraries it was built for are missing or too old; pip install "
                "'onnxruntime-gpu[cuda,cudnn]', or import a torch with CUDA first"
            )
        elsewhere = nodes_elsewhere(self._session)
        ours = sorted({name for domain, name in elsewhere if domain == DOMAIN})
        if ours:
            raise RuntimeUnavailableError(
                f"{', '.join(ours)} would run on the CPU, not on {PROVIDER}: ONNX Runtime did not "
                "take the library's CUDA kernels; rebuild the library (make setup), or update "
                "onnxruntime-gpu to 1.20 or newer"
            )
        if elsewhere:
            names = ", ".join(sorted({name for _, name in elsewhere}))
            stayed = f"{plural(elsewhere.total(), 'node')} on the CPU ({names})"
            self.info = replace(self.info, device=f"{self.info.device}, {stayed}")

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self._graph_batch is None:
            return super()._run(feeds)
        images = feeds[self.manifest.inputs[0].name]
        # One set of buffers: a second thread would put its images over those of the first.
        with self._lock:
            if self._graph_run is None:
                self._graph_run = DeviceRun(self, images)
                for _ in range(_WARM_UP):
                    self._graph_run.run()
            # In place: a graph replays addresses, so inputs and outputs stay where they were
            # recorded.
            self._graph_run.update(images)
            self._graph_run.run()
            return self._graph_run.outputs()

    def _checked(self, images: Array, spec: TensorInfo) -> Array:
        checked = super()._checked(images, spec)
        if self._graph_batch not in (None, len(images)):
            raise ValueError(
                f"images.shape={images.shape} is not a batch of "
                f"cuda_graph_batch={self._graph_batch}, which the CUDA graph was recorded for; pad "
                "the batch, or open another session"
            )
        return checked

    def on_device(self, images: Array) -> DeviceRun:
        """Images (batch, 3, height, width) on the GPU, ready to run again and again.

        Raises:
            TypeError, ValueError: as `run`.
            UnsupportedError: the file has several inputs.
        """
        _refuse_several(self.manifest, "images on the GPU")
        (checked,) = self._feeds(images).values()
        return DeviceRun(self, checked)

    def close(self) -> None:
        """Free the session, its stream and its profile."""
        # Ahead of the session, whose device memory it holds.
        self._graph_run = None
        # Opening may have failed before the base class set anything.
        if hasattr(self, "_profile_dir"):
            super().close()
        # Behind the session, which runs on it.
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class DeviceRun:
    """Inputs and outputs of one batch that stay on the GPU, at fixed addresses."""

    def __init__(self, session: OrtCudaSession, images: Array) -> None:
        self._owner = session
        self._session = session._session
        if self._session is None:
            raise ValueError(CLOSED)
        make = onnxruntime.OrtValue
        self._images = make.ortvalue_from_numpy(
            np.ascontiguousarray(images), "cuda", session.device
        )
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(self._session.get_inputs()[0].name, self._images)
        self._names = []
        for output, spec in zip(self._session.get_outputs(), session.manifest.outputs, strict=True):
            self._names.append(output.name)
            shape = [len(images), *spec.shape[1:]]
            if session.manifest.sizes and not all(isinstance(n, int) for n in shape):
                # Of a size that follows from the input's: ONNX Runtime makes room for it.
                self._binding.bind_output(output.name, "cuda", session.device)
                continue
            kind = _NUMPY_TYPES[output.type]
            value = make.ortvalue_from_shape_and_type(shape, kind, "cuda", session.device)
            self._binding.bind_ortvalue_output(output.name, value)

    def update(self, images: Array) -> None:
        """Copy other images of the same batch size to the GPU, in place."""
        self._images.update_inplace(np.ascontiguousarray(images))

    def run(self) -> None:
        """Run once and wait for it; nothing is copied between host and device."""
        with ort_errors("run the model"), self._owner._proof():
            self._session.run_with_iobinding(self._binding)

    def outputs(self) -> dict[str, Array]:
        """Outputs of the last run by name, copied to the host."""
        return dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))

    def device_ms(self, samples: int) -> list[float]:
        """Milliseconds of `samples` runs, each between two CUDA events on the session's stream.

        ONNX Runtime enqueues from the host between the two, so a model of many small nodes is
        bound by that, unless the session holds a CUDA graph.

        Raises:
            ValueError: the session was opened without `timed=True`.
        """
        stream = self._owner._stream
        if stream is None:
            raise ValueError("timed=False: open the session with timed=True to time its device")
        options = onnxruntime.RunOptions()
        # Else each run waits for the device, and that wait lies between the two marks.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def enqueue() -> None:
            self._session.run_with_iobinding(self._binding, options)

        with ort_errors("run the model"), self._owner._proof():
            return [stream.milliseconds(enqueue) for _ in range(samples)]


def nodes_elsewhere(session: Any) -> Counter[tuple[str, str]]:
    """(domain, operator) of the nodes that another provider than CUDA's was given.

    Empty where an older ONNX Runtime does not tell; the counter of kernel runs still does.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Counter()
    return Counter(
        (node.domain, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    )


def _fixed_sizes(manifest: Manifest, batch: int | None) -> dict[str, int]:
    if batch is None:
        return {}
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(
            f"cuda_graph_batch={batch!r} is not a batch size; give one from 1, or None for no graph"
        )
    if manifest.gives_boxes:
        raise UnsupportedError(
            f"cuda_graph_batch={batch} with a whole detector, whose outputs have another size for "
            "every image, so that no CUDA graph can hold them; leave it out"
        )
    _refuse_several(manifest, f"cuda_graph_batch={batch}")
    # Settled at load, shapes are constants, and no arithmetic of shapes is left for the CPU.
    return {str(manifest.inputs[0].shape[0]): batch}


def _refuse_several(manifest: Manifest, what: str) -> None:
    if len(manifest.fed) > 1:
        raise UnsupportedError(
            f"{what} with the inputs {', '.join(spec.name for spec in manifest.fed)}: only a file "
            "of one input keeps its place on the GPU; open a session without it, and call run"
        )


def _require_provider() -> None:
    """The provider is part of another distribution than the CPU's, and a missing one only warns."""
    available = onnxruntime.get_available_providers()
    if PROVIDER not in available:
        raise RuntimeUnavailableError(
            f"runtime='ort-cuda' needs {PROVIDER}, which onnxruntime {onnxruntime.__version__} "
            f"lacks (it has {', '.join(available)}): {_remedy()}"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries out of pip's packages


def _remedy() -> str:
    try:
        importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return "pip install onnxruntime-gpu"
    return "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


def _require_kernels() -> None:
    library = library_info()
    if not library.cuda_architectures:
        raise RuntimeUnavailableError(
            f"library={library.path} was built without CUDA kernels; put nvcc in the PATH, set "
            "CUDA_HOME or pip install nvidia-cuda-nvcc, run `make setup` again, or ask for "
            "backend='body'"
        )


def _provider_options(device: int, batch: int | None, stream: TimedStream | None) -> dict[str, str]:
    # TF32 has ten bits of mantissa: it would make a float32 export a half one.
    options = {"device_id": str(device), "use_tf32": "0"}
    if batch is not None:
        options["enable_cuda_graph"] = "1"
    if stream is not None:
        options["user_compute_stream"] = str(stream.address)
    return options


def _config(batch: int | None) -> Mapping[str, str]:
    config = {"session.record_ep_graph_assignment_info": "1"}
    # A graph holds nothing that runs on the host. Without one the arithmetic of shapes stays there.
    return config if batch is None else {**config, "session.disable_cpu_ep_fallback": "1"}


def _explained(error: UnsupportedError, batch: int | None) -> UnsupportedError:
    # ONNX Runtime has no type for this, so it is told by its words.
    if "fallback to CPU EP has been explicitly disabled" not in str(error):
        return error
    return UnsupportedError(
        f"cuda_graph_batch={batch}: this ONNX Runtime has no CUDA kernel for some nodes of the "
        "file, and a CUDA graph cannot hold what runs on the CPU; leave cuda_graph_batch out (the "
        f"session then names these nodes): {error}"
    )
