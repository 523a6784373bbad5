"""A stand-in for the CUDA runtime, on host memory.

It allocates, copies, records a stream into graphs and replays them: it shows that our calls fit
together, not that CUDA accepts them.
"""

from __future__ import annotations

import ctypes
import itertools
import types
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY = 2


class FakeCuda(types.ModuleType):
    """`cuda.bindings.runtime` on host memory."""

    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, *, gpu: str = "NVIDIA H100", major: int = 9, minor: int = 0) -> None:
        super().__init__("cuda.bindings.runtime")
        self.properties = types.SimpleNamespace(name=gpu.encode(), major=major, minor=minor)
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.fail_at: int | None = None  # the allocation that fails
        self.devices = 1
        self.current = 0
        self.handles = itertools.count(1)
        self.events: set[int] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name[4:5].isupper() and "Kind" not in name:
            super().__getattribute__("calls").append(name)
        return super().__getattribute__(name)

    def put(self, work: Callable[[], None]) -> None:
        """Work on the stream: recorded while it captures, else done at once."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return (0, self.devices) if self.devices else (100, 0)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, {OUT_OF_MEMORY: b"out of memory", 100: b"no device"}.get(status, b"error")

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, self.current

    def cudaSetDevice(self, device: int) -> tuple[int]:
        self.current = device
        return (0,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return 0, self.properties

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def _take(self, size: int) -> tuple[int, int]:
        if self.fail_at is not None and len(self.memory) >= self.fail_at:
            return OUT_OF_MEMORY, 0
        buffer = (ctypes.c_uint8 * size)(*([0xCD] * min(size, 64)))
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    cudaMalloc = cudaMallocHost = _take  # noqa: N815

    def _free(self, address: int) -> tuple[int]:
        return (0,) if self.memory.pop(address, None) is not None else (1,)

    cudaFree = cudaFreeHost = _free  # noqa: N815

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == 1, "a stream that waits for the default one"
        return 0, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,) if self.capturing is None else (900,)

    def cudaEventCreate(self) -> tuple[int, int]:
        self.events.add(event := next(self.handles))
        return 0, event

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        return (0,) if event in self.events and stream == 77 else (400,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        return (0,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return 0, 2.5 * (end - start)

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        self.events.remove(event)
        return (0,)

    def cudaMemcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.put(lambda: ctypes.memmove(dst, src, size) and None)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        handle = next(self.handles)
        self.graphs[handle], self.capturing = self.capturing or [], None
        return 0, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        return 0, graph

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[int]:
        return (0,) if self.graphs.pop(graph, None) is not None else (1,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        for work in self.graphs[graph]:
            work()
        return (0,)
