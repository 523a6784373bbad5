"""Runs one engine: memory for the largest batch, and a CUDA graph for each batch size."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.runtimes.cuda_memory import Cuda
from vssm.runtimes.session import CLOSED
from vssm.runtimes.tensorrt import api
from vssm.types import Array

_MAX_CONTEXTS: Final = 16  # each holds the state of one batch size; the oldest goes


@dataclass(frozen=True)
class _Tensor:
    """An input or output: pinned and device memory for the largest batch."""

    name: str
    is_input: bool
    host: Array
    host_address: int
    device: int

    def size(self, batch: int) -> int:
        """Bytes of a batch."""
        return int(self.host[:batch].nbytes)


@dataclass
class _Context:
    """What one batch size needs: an execution context, and its graph once there is one."""

    context: Any
    graph: Any = None


class EngineRunner:
    """An engine with memory of its own. Runs of several threads follow one another.

    Args:
        product: which TensorRT.
        plan: the engine's bytes.
        cuda: the CUDA runtime.
        host_code: let the engine run code that it carries (plugins inside, version-compatible).
        graphs: run CUDA graphs, one for each batch size.

    Raises:
        RuntimeUnavailableError: the engine cannot be loaded, or memory is short.
        UnsupportedError: it has a type that NumPy lacks.
    """

    def __init__(
        self, product: api.Product, plan: bytes, cuda: Cuda, *, host_code: bool, graphs: bool = True
    ) -> None:
        self._package = api.load_package(product)
        self._product, self._cuda, self._graphs = product, cuda, graphs
        self._lock = threading.Lock()
        self._log = api.logger(self._package)
        self._runtime = self._package.Runtime(self._log)
        if host_code:
            # Off by default, for good reason: such an engine may run anything in this process.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeUnavailableError(
                f"{product.title} {self._package.__version__} cannot load the engine: "
                f"{self._complaint()}; build it again with `{product.command}`"
            )
        self._contexts: dict[int, _Context] = {}
        self._freed: list[tuple[str, Any]] = []  # calls that free what was taken, in order
        self._tensors: list[_Tensor] = []
        # An engine can take most of a GPU: what was had before a failure is given back.
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._is_input(name)]
        shapes = [self._engine.get_tensor_profile_shape(name, 0) for name in inputs]
        # What every input takes: they share one batch.
        self.min_batch = max(int(low[0]) for low, _, _ in shapes)
        self.max_batch = min(int(high[0]) for _, _, high in shapes)
        self._stream = self._cuda.new_stream()
        # Taken first, so freed last, behind all that runs on it.
        self._freed.append(("cudaStreamDestroy", self._stream))
        self._activations = api.activation_bytes(self._engine)
        self._activation_memory = self._take(self._activations)
        self._tensors = [self._make_tensor(name) for name in names]

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._package.TensorIOMode.INPUT)

    def _take(self, size: int) -> int:
        # Of no bytes CUDA gives a null pointer, and to TensorRT that is no address.
        device = int(self._cuda.call("cudaMalloc", max(1, size)))
        self._freed.append(("cudaFree", device))
        return device

    def _make_tensor(self, name: str) -> _Tensor:
        try:
            dtype = np.dtype(self._package.nptype(self._engine.get_tensor_dtype(name)))
        except TypeError as error:
            raise UnsupportedError(f"tensor {name} has a type that NumPy lacks: {error}") from error
        rest = tuple(self._engine.get_tensor_shape(name))[1:]
        address, host = self._cuda.pinned((self.max_batch, *rest), dtype)
        self._freed.append(("cudaFreeHost", address))
        device = self._take(host.nbytes)
        return _Tensor(name, self._is_input(name), host, address, device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes after the batch, of every input and output."""
        return {tensor.name: tuple(tensor.host.shape[1:]) for tensor in self._tensors}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name, which must share their first axis.

        Raises:
            ValueError: the batch is outside the profile, or the runner is closed.
            RuntimeUnavailableError: the GPU reports an error.
        """
        batch = next(iter(feeds.values())).shape[0]
        with self._lock, self._cuda.on_device():
            if self._engine is None:
                raise ValueError(CLOSED)
            if not self.min_batch <= batch <= self.max_batch:
                raise ValueError(
                    f"batch={batch} is outside the engine's [{self.min_batch}, {self.max_batch}]; "
                    f"split the images, or build it with `{self._product.command} --batch MIN,OPT,"
                    "MAX`"
                )
            for tensor in self._tensors:
                if tensor.is_input:
                    tensor.host[:batch] = feeds[tensor.name]
            self._launch(batch)
            self._cuda.call("cudaStreamSynchronize", self._stream)
            # Copies: the next run writes to the same memory.
            return {t.name: t.host[:batch].copy() for t in self._tensors if not t.is_input}

    def _launch(self, batch: int) -> None:
        if batch not in self._contexts:
            self._open_context(batch)
        found = self._contexts[batch]
        if found.graph is None:
            self._enqueue(found.context, batch)
        else:
            self._cuda.call("cudaGraphLaunch", found.graph, self._stream)

    def _open_context(self, batch: int) -> None:
        """A context of this batch alone: a graph is only valid while its context keeps its shapes.

        All share one activation memory, as their work follows one another on one stream.
        """
        if len(self._contexts) >= _MAX_CONTEXTS:
            # A dict keeps its order, so the first is the oldest.
            self._drop_context(next(iter(self._contexts)))
        context = api.create_context(
            self._package, self._engine, self._activation_memory, self._activations
        )
        if context is None:
            raise RuntimeUnavailableError(f"no execution context: {self._complaint()}")
        for tensor in self._tensors:
            if tensor.is_input and not context.set_input_shape(
                tensor.name, tuple(tensor.host[:batch].shape)
            ):
                raise RuntimeUnavailableError(f"batch={batch} is refused: {self._complaint()}")
            context.set_tensor_address(tensor.name, tensor.device)
        found = _Context(context)
        if self._graphs:
            # The first run settles what a change of shape left to do, which cannot be captured.
            self._enqueue(context, batch)
            self._cuda.call("cudaStreamSynchronize", self._stream)
            self._check_capturable(context)
            work = functools.partial(self._enqueue, context, batch)
            found.graph = self._cuda.capture(self._stream, work)
        self._contexts[batch] = found

    def _check_capturable(self, context: Any) -> None:
        """TensorRT for RTX says whether it could be captured; TensorRT's engines always can."""
        ask = getattr(context, "is_stream_capturable", None)
        if ask is not None and not ask(self._stream):
            raise UnsupportedError(
                "this engine cannot run in a CUDA graph; open TensorRtSession(..., graphs=False)"
            )

    def _enqueue(self, context: Any, batch: int) -> None:
        """Copy in, run, copy out: everything a graph holds."""
        for tensor in self._tensors:
            if tensor.is_input:
                self._cuda.to_device(tensor.device, tensor.host, tensor.size(batch), self._stream)
        if not context.execute_async_v3(self._stream):
            raise RuntimeUnavailableError(f"the engine does not run: {self._complaint()}")
        for tensor in self._tensors:
            if not tensor.is_input:
                self._cuda.to_host(tensor.host, tensor.device, tensor.size(batch), self._stream)

    def _complaint(self) -> str:
        return self._log.complaints[-1] if self._log.complaints else "it gave no reason"

    def _drop_context(self, batch: int) -> None:
        dropped = self._contexts.pop(batch)
        if dropped.graph is not None:
            self._cuda.call("cudaGraphExecDestroy", dropped.graph)

    def close(self) -> None:
        """Free everything; the runner cannot run afterwards."""
        with self._lock, self._cuda.on_device():
            for batch in list(self._contexts):
                self._drop_context(batch)
            self._tensors = []
            self._engine = None
            while self._freed:
                name, handle = self._freed.pop()
                self._cuda.call(name, handle)
