"""What this machine can do at the most: the floor that measured times are held against."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from vssm.bench.measure import MachineRates
from vssm.runtimes.library import exp2_rate, library_info

# Large enough that a matrix product is bound by arithmetic, small enough for tens of milliseconds.
_SIDE = 1024
_SAMPLES = 9


def machine_rates(threads: Sequence[int]) -> MachineRates:
    """Measure exp2 of one thread with the kernel's own code, and multiply-adds by thread count."""
    return MachineRates(
        exp2=exp2_rate(library_info().cpu_isa), macs={count: _macs(count) for count in set(threads)}
    )


def _macs(threads: int) -> float:
    """Multiply-adds a second of ONNX Runtime's float32 matrix product."""
    shape = [_SIDE, _SIDE]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feeds = {"a": matrix, "b": matrix}
    session.run(None, feeds)
    times = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    return float(_SIDE**3 / np.median(times))
