"""Stand-ins for what truly needs a GPU: the CUDA runtime, and TensorRT's builder and runtime.

`FakeCuda` is the CUDA runtime on host memory: it allocates, copies, records a stream into graphs
and replays them. `FakeTensorRT` follows the parser's rules for plugins and bodies of the version it
claims to be, and its engines run the file in ONNX Runtime, on the addresses that they are given.
They show that our calls fit together, not that TensorRT accepts them.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import types
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import onnx

from vssm.ops.spec import DOMAIN

if TYPE_CHECKING:
    from tensorrt_standin_engine import FakeTensorRT

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


class _Layer(IntEnum):
    OTHER = 0
    PLUGIN_V3 = 1


class _Level(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class _Network:
    def __init__(self) -> None:
        self.layers: list[_Layer] = []
        self.model: Any = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return types.SimpleNamespace(type=self.layers[index])

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Any:
        value = self.model.graph.input[index]
        shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
        return types.SimpleNamespace(name=value.name, shape=shape)


class _Parser:
    """The rules of the version: before 10.7 a body hides the plugin."""

    def __init__(self, trt: FakeTensorRT, network: _Network) -> None:
        self.trt, self.network, self.errors = trt, network, []

    def parse(self, data: bytes, path: str) -> bool:
        model = onnx.load_from_string(data)
        bodies = {f.name for f in model.functions}
        for node in model.graph.node:
            plugin = node.domain == DOMAIN and bool(self.trt.loaded)
            if plugin and not (self.trt.version < (10, 7) and node.op_type in bodies):
                self.network.layers.append(_Layer.PLUGIN_V3)
            elif node.domain != DOMAIN or node.op_type in bodies:
                self.network.layers.append(_Layer.OTHER)
            else:
                self.errors.append(node)
        self.network.model = model
        return not self.errors

    def parse_from_file(self, path: str) -> bool:
        with open(path, "rb") as file:
            return self.parse(file.read(), path)

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        node = self.errors[index]
        return types.SimpleNamespace(
            node_name=lambda: node.name,
            node=lambda: index,
            node_operator=lambda: node.op_type,
            local_function_stack=list,
            desc=lambda: "plugin not found",
        )


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self.shapes[name] = [low, opt, high]


class _Config:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.cache, self.limits = trt, None, {}
        self.flags = ["TF32"]  # as every TensorRT begins
        self.profile = _Profile()
        self.plugins_to_serialize: list[str] = []

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.limits[pool] = size

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.remove(flag)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profile = profile
        return 0

    def create_timing_cache(self, data: bytes) -> Any:
        return types.SimpleNamespace(data=data, serialize=lambda: self.trt.cache_mark)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return ignore_mismatch or cache.data in (b"", self.trt.cache_mark)

    def get_timing_cache(self) -> Any:
        return self.cache


class _Builder:
    def __init__(self, trt: FakeTensorRT, log: Any) -> None:
        self.trt, self.log = trt, log

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << 1, "not strongly typed"
        return _Network()

    def create_builder_config(self) -> _Config:
        self.trt.configs.append(_Config(self.trt))
        return self.trt.configs[-1]

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        assert monitor.step_complete("Building engine", 0)
        monitor.phase_finish("Building engine")
        if self.trt.fail_build:
            self.log.log(self.trt.ILogger.Severity.ERROR, "could not find any implementation")
            return None
        head = json.dumps({"profile": config.profile.shapes, "version": self.trt.__version__})
        return head.encode() + b"\n" + network.model.SerializeToString()
