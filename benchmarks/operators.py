"""Time of single scan nodes in ONNX Runtime: kernels by instruction set and threads, and bodies.

    python benchmarks/operators.py [--samples 200] [--json FILE]

Every variant of a shape runs in turn, two samples each a round, so ratios within a table hold when
the machine drifts: the first sample finds the caches as the variant before left them ("cold"), the
second its own inputs in them ("warm", what the median, the percentiles and the floor's multiple are
of). The floor is the scan's exponentials at the exp2 rate of one thread, measured
in the same run with the kernel's own code for that instruction set.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from rich.console import Console

from exporter.errors import RuntimeUnavailableError
from exporter.files import atomic_write_bytes
from exporter.onnx_bodies import build_functions
from exporter.runtimes.library import ISA_NAMES, exp2_rate, find_library
from exporter.runtimes.ort import cpu_name
from exporter.spec import DOMAIN, OPERATORS, PLUGIN_ATTRIBUTES
from exporter.tables import table

_ISA = "VSSM_CPU_ISA"  # read by the library at every run


@dataclass(frozen=True)
class Shape:
    """A dense Vim layer: both directions in one node."""

    name: str
    batch: int
    seqlen: int
    d_inner: int
    d_state: int = 16
    directions: int = 2

    @property
    def exps(self) -> int:
        """Evaluations of exp."""
        return self.batch * self.directions * self.seqlen * self.d_inner * self.d_state


@dataclass(frozen=True)
class Timing:
    """One variant of one shape; milliseconds of warm runs, and the median of cold ones."""

    shape: str
    variant: str
    threads: int
    median_ms: float
    p5_ms: float
    p95_ms: float
    cold_ms: float
    floor_ms: float | None
    over_floor: float | None


SHAPES = (
    Shape("Vim-T layer", 1, 197, 384),
    Shape("Vim-S layer", 1, 197, 768),
    Shape("Vim-T layer, batch 8", 8, 197, 384),
    Shape("Vim-T layer, d_state 1", 1, 197, 384, d_state=1),
)


def main() -> None:
    """Measure every shape and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rates = {isa: exp2_rate(isa) for isa in available_isas()}
    threads = sorted({1, min(2, len(os.sched_getaffinity(0)))})
    console = Console()
    console.print(f"{cpu_name()}, onnxruntime {onnxruntime.__version__}, float32")
    console.print(", ".join(f"exp2 {k}: {v / 1e9:.1f} G/s a thread" for k, v in rates.items()))
    timings = []
    for shape in SHAPES:
        measured = time_shape(shape, rates, threads, options.samples)
        timings += measured
        rows = [tuple(_cell(v) for v in list(asdict(t).values())[1:]) for t in measured]
        columns = ("variant", "threads", "median ms", "p5", "p95", "cold", "floor ms", "over floor")
        console.print(table(f"{shape.name}: {shape}", columns, rows))
    if options.json:
        document = {"cpu": cpu_name(), "exp2": rates, "timings": [asdict(t) for t in timings]}
        atomic_write_bytes(options.json, f"{json.dumps(document, indent=2)}\n".encode())


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def available_isas() -> list[str]:
    """The instruction sets that this processor and this build have, best first."""
    found = []
    for isa in reversed(ISA_NAMES):
        try:
            exp2_rate(isa, seconds=0.0)
        except RuntimeUnavailableError:
            continue
        found.append(isa)
    return found


def time_shape(
    shape: Shape, rates: Mapping[str, float], threads: list[int], samples: int
) -> list[Timing]:
    """Every instruction set at every thread count, and the body on one thread."""
    feeds = scan_feeds(shape)
    model = scan_model()
    variants = [(isa, count) for isa in rates for count in threads]
    sessions = [open_session(model, count, library=True) for _, count in variants]
    variants.append(("body", 1))
    sessions.append(open_session(model, 1, library=False))
    times: list[list[tuple[float, float]]] = [[] for _ in variants]
    want = None
    for sample in range(samples + 1):
        for (isa, _), session, taken in zip(variants, sessions, times, strict=True):
            if isa in rates:
                os.environ[_ISA] = isa
            marks = [time.perf_counter()]
            for _ in range(2):
                (y,) = session.run(None, feeds)
                marks.append(time.perf_counter())
            if sample > 0:
                taken.append((1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[1])))
            want = y if want is None else want
            if not np.abs(y - want).max() <= 1e-4 * np.abs(want).max():
                raise SystemExit(f"{isa} gives other numbers: a timing of these says nothing")
    os.environ.pop(_ISA, None)
    return [
        _timing(shape, variant, np.array(taken), rates.get(variant[0]))
        for variant, taken in zip(variants, times, strict=True)
    ]


def _timing(
    shape: Shape, variant: tuple[str, int], taken: np.ndarray, rate: float | None
) -> Timing:
    cold, warm = taken.T
    median = float(np.median(warm))
    floor = None if rate is None else 1e3 * shape.exps / (rate * variant[1])
    return Timing(
        shape.name,
        *variant,
        median_ms=median,
        p5_ms=float(np.percentile(warm, 5)),
        p95_ms=float(np.percentile(warm, 95)),
        cold_ms=float(np.median(cold)),
        floor_ms=floor,
        over_floor=None if floor is None else median / floor,
    )


def scan_feeds(shape: Shape) -> dict[str, np.ndarray]:
    """Random inputs with step sizes between 1e-3 and 1, as trained models have."""
    rng = np.random.default_rng(0)
    batch, seqlen, k, inner = shape.batch, shape.seqlen, shape.directions, shape.d_inner

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    steps = np.arange(seqlen, dtype=np.int32)
    return {
        "u": normal(batch, seqlen, k, inner),
        "delta": normal(batch, seqlen, k, inner),
        "A": -np.exp(normal(k, inner, shape.d_state)),
        "B": normal(batch, seqlen, k, shape.d_state),
        "C": normal(batch, seqlen, k, shape.d_state),
        "D": normal(k, inner),
        "delta_bias": normal(k, inner) - 3,
        "order": np.stack([steps, steps[::-1]][:k])[None],
        "gap": np.ones((1, k, seqlen), np.int32),
    }


def scan_model() -> bytes:
    """One SelectiveScan node with its body."""
    spec = OPERATORS["SelectiveScan"]
    kinds = {"T": TensorProto.FLOAT, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}

    def value(name: str, dtype: str, rank: int) -> object:
        shape = [f"{name}{axis}" for axis in range(rank)]
        return helper.make_tensor_value_info(name, kinds[dtype], shape)

    attributes = {a.name: a.default for a in spec.attributes}
    node = helper.make_node(
        spec.name,
        [o.name for o in spec.inputs],
        ["y"],
        domain=DOMAIN,
        **attributes,
        **PLUGIN_ATTRIBUTES,
    )
    graph = helper.make_graph(
        [node],
        "scan",
        [value(o.name, o.dtype, len(o.shape)) for o in spec.inputs],
        [value("y", "T", 3)],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    model.functions.extend(build_functions([spec.name], 18))
    return bytes(model.SerializeToString())


def open_session(model: bytes, threads: int, *, library: bool) -> onnxruntime.InferenceSession:
    """A session with our kernels, or on the body."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else the idle threads of one session spin while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library:
        options.register_custom_ops_library(str(find_library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
