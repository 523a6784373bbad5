"""The CUDA runtime through cuda-bindings, without torch: memory, streams, graphs, times."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vssm.errors import RuntimeUnavailableError
from vssm.types import Array

INSTALL: Final = 'pip install "vssm[cuda]"'
_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking: never waits for the default stream


@dataclass(frozen=True)
class GpuInfo:
    """The current GPU: its name, compute capability "9.0", and the driver's CUDA version "13.0"."""

    name: str
    compute_capability: str
    cuda: str


class Cuda:
    """CUDA runtime calls that raise, on one device.

    Args:
        device: its ordinal; None for the one that is current when this is made.

    Raises:
        RuntimeUnavailableError: cuda-bindings or a usable GPU is missing, or a call fails.
    """

    def __init__(self, device: int | None = None) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise RuntimeUnavailableError(
                "the package cuda-bindings (of cuda-python) is missing, through which engines get "
                f"their GPU memory, and sessions the times of the GPU itself: {INSTALL}"
            ) from error
        self._runtime: Any = runtime
        # Not by `call`: an error here means that there is no driver, which has a remedy of its own.
        status, count = runtime.cudaGetDeviceCount()
        if int(status) != 0 or not count:
            raise RuntimeUnavailableError(
                f"no GPU that CUDA can use ({self._reason(status)}): this needs an NVIDIA GPU and "
                "its driver; `vssm doctor` says what is here, runtime='ort-cpu' needs none"
            )
        self._device = int(self.call("cudaGetDevice")) if device is None else device

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Make its device the current one for a while: CUDA keeps one for each thread."""
        before = int(self.call("cudaGetDevice"))
        if before == self._device:
            yield
            return
        self.call("cudaSetDevice", self._device)
        try:
            yield
        finally:
            self.call("cudaSetDevice", before)

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a runtime function, None if it has none."""
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            raise RuntimeUnavailableError(f"{name} failed: {self._reason(status)}")
        return values[0] if values else None

    def _reason(self, status: Any) -> str:
        return bytes(self._runtime.cudaGetErrorString(status)[1]).decode()

    def gpu(self) -> GpuInfo:
        """What its device is."""
        properties = self.call("cudaGetDeviceProperties", self._device)
        name = properties.name
        version = int(self.call("cudaDriverGetVersion"))
        return GpuInfo(
            name=name.decode().rstrip("\0") if isinstance(name, bytes) else str(name),
            compute_capability=f"{properties.major}.{properties.minor}",
            # CUDA writes 12.9 as 12090.
            cuda=f"{version // 1000}.{version % 1000 // 10}",
        )

    def new_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self.call("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def to_device(self, device: int, host: Array, size: int, stream: int) -> None:
        """Copy `size` bytes of pinned memory."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host.ctypes.data, size, kind, stream)

    def to_host(self, host: Array, device: int, size: int, stream: int) -> None:
        """Copy `size` bytes into pinned memory."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host.ctypes.data, device, size, kind, stream)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, Array]:
        """Page-locked memory: its address, to be freed with cudaFreeHost, and an array over it."""
        # Of no bytes CUDA gives a null pointer, over which there is no array.
        size = max(1, math.prod(shape) * dtype.itemsize)
        address = int(self.call("cudaMallocHost", size))
        # The array does not own it: whoever frees the address must have dropped the array.
        memory = (ctypes.c_uint8 * size).from_address(address)
        array = np.frombuffer(memoryview(memory), np.uint8)[: math.prod(shape) * dtype.itemsize]
        return address, array.view(dtype).reshape(shape)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """What `work` puts on the stream, as an executable graph."""
        with self._capturing(stream) as graphs:
            work()
        try:
            return self.call("cudaGraphInstantiate", graphs[0], 0)
        finally:
            # The executable graph is a copy; this one goes also where none could be made of it.
            self.call("cudaGraphDestroy", graphs[0])

    @contextmanager
    def _capturing(self, stream: int) -> Iterator[list[Any]]:
        """Between begin and end, also when the work fails: a stream left capturing is lost."""
        # Of this thread alone: in the global mode an allocation in any other thread is an error.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        graphs: list[Any] = []
        try:
            yield graphs
        except BaseException:
            # Not by `call`: its error would hide the one on its way.
            self._runtime.cudaStreamEndCapture(stream)
            raise
        graphs.append(self.call("cudaStreamEndCapture", stream))


class TimedStream:
    """A stream of a device, and what the device takes for work that is put on it.

    Args:
        device: the device's ordinal.

    Raises:
        RuntimeUnavailableError: cuda-bindings or the device is missing.
    """

    def __init__(self, device: int) -> None:
        self._cuda = Cuda(device)
        with self._cuda.on_device():
            self.address = self._cuda.new_stream()
        self._open = True

    def milliseconds(self, work: Callable[[], None]) -> float:
        """Time from the device's start of what `work` puts on the stream to its end.

        `work` must only enqueue: what it waits for on the host lies between the two marks too.
        """
        call = self._cuda.call
        with self._cuda.on_device(), self._event() as start, self._event() as end:
            call("cudaEventRecord", start, self.address)
            work()
            call("cudaEventRecord", end, self.address)
            call("cudaEventSynchronize", end)
            return float(call("cudaEventElapsedTime", start, end))

    @contextmanager
    def _event(self) -> Iterator[Any]:
        event = self._cuda.call("cudaEventCreate")
        try:
            yield event
        finally:
            self._cuda.call("cudaEventDestroy", event)

    def close(self) -> None:
        """Free the stream; what was put on it still ends."""
        if self._open:
            self._open = False
            with self._cuda.on_device():
                self._cuda.call("cudaStreamDestroy", self.address)
