"""A stand-in for TensorRT's builder and runtime, on a `FakeCuda`.

It follows the parser's rules for plugins and bodies of the version it claims to be, and its engines
run the file in ONNX Runtime, on the addresses that they are given. It shows that our calls fit
together, not that TensorRT accepts them.
"""

from __future__ import annotations

import ctypes
import json
import types
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cuda import FakeCuda
from onnx import helper

from vssm.native_library import find_library
from vssm.ops.spec import DOMAIN


class FakeTensorRT(types.ModuleType):
    """The package `tensorrt` of a version, with its engines on a `FakeCuda`."""

    def __init__(self, cuda: FakeCuda, version: str = "10.13.3.9") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.version = tuple(map(int, version.split(".")))[:2]
        self.cuda = cuda
        self.loaded: list[str] = []  # plugin libraries
        self.configs: list[Any] = []
        self.enqueued = 0
        self.host_code = False
        self.fail_build = False
        self.cache_mark = b"timings"
        severity = types.SimpleNamespace(ERROR=1)
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        flags = types.SimpleNamespace(__members__={"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1})
        self.NetworkDefinitionCreationFlag = flags
        self.LayerType, self.HardwareCompatibilityLevel = _Layer, _Level
        self.BuilderFlag = types.SimpleNamespace(
            VERSION_COMPATIBLE="version compatible", TF32="TF32"
        )
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
        self.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="ours")
        self.nptype = np.dtype

    def get_plugin_registry(self) -> Any:
        return types.SimpleNamespace(load_library=self._load, get_creator=self._creator)

    def _load(self, path: str) -> int | None:
        if self.loaded:
            return None  # as the real ones do: every plugin once a process
        self.loaded.append(path)
        return 1

    def _creator(self, name: str, version: str, namespace: str) -> object | None:
        return self if self.loaded and (version, namespace) == ("1", "vssm") else None

    def Builder(self, log: Any) -> _Builder:
        return _Builder(self, log)

    def OnnxParser(self, network: Any, log: Any) -> _Parser:
        return _Parser(self, network)

    def Runtime(self, log: Any) -> _Runtime:
        return _Runtime(self, log)


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


class _Runtime:
    def __init__(self, trt: FakeTensorRT, log: Any) -> None:
        self.trt, self.log = trt, log

    @property
    def engine_host_code_allowed(self) -> bool:
        return self.trt.host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self.trt.host_code = value

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        head, _, model = plan.partition(b"\n")
        try:
            return _Engine(self.trt, json.loads(head), model)
        except ValueError:
            self.log.log(1, "magic tag does not match")
            return None


class _Engine:
    def __init__(self, trt: FakeTensorRT, head: Any, model: bytes) -> None:
        self.trt, self.profile = trt, head["profile"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(find_library()))
        graph = onnx.load_from_string(model).graph
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in graph.input]
        self.values = {
            value.name: value.type.tensor_type for value in (*graph.input, *graph.output)
        }
        if trt.version >= (10, 1):
            self.device_memory_size_v2 = 1000
        else:
            self.device_memory_size = 1000

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert profile == 0
        return self.profile[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d.dim_value or -1 for d in self.values[name].shape.dim)

    def get_tensor_dtype(self, name: str) -> Any:
        return helper.tensor_dtype_to_np_dtype(self.values[name].elem_type)

    def create_execution_context(self, strategy: str) -> _Context:
        assert strategy == "ours", "memory that TensorRT would allocate for every context"
        return _Context(self) if self.trt.version >= (10, 1) else _OldContext(self)


class _OldContext:
    """A context before 10.1: its memory is a property."""

    def __init__(self, engine: _Engine) -> None:
        self.engine, self.device_memory = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile[name]
        self.shapes[name] = shape
        return bool(low[0] <= shape[0] <= high[0])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.trt.cuda
        assert self.device_memory in cuda.memory, "no activation memory"
        assert all(address in cuda.memory for address in self.addresses.values())
        cuda.put(self._compute)
        self.engine.trt.enqueued += 1
        return True

    def _compute(self) -> None:
        engine = self.engine
        feeds = {name: self._array(name, shape) for name, shape in self.shapes.items()}
        names = [output.name for output in engine.session.get_outputs()]
        for name, value in zip(names, engine.session.run(names, feeds), strict=True):
            ctypes.memmove(self.addresses[name], value.ctypes.data, value.nbytes)

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape).copy()


class _Context(_OldContext):
    def set_device_memory(self, memory: int, size: int) -> None:
        assert size == self.engine.device_memory_size_v2
        self.device_memory = memory
