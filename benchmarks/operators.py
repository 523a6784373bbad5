"""Time of single nodes in ONNX Runtime: kernels by instruction set and threads, and bodies.

    python benchmarks/operators.py [--samples 200] [--json FILE]

Every variant of a shape runs in turn, two samples each a round, so ratios within a table hold when
the machine drifts: the first sample finds the caches as the variant before left them ("cold"), the
second its own inputs in them ("warm", what the median, the percentiles and the floor's multiple are
of). Inputs and outputs are bound to memory of their own, as a model's planner gives it to a node:
an array made anew at each run costs a page fault for every 4 KiB of y, and one that does not begin
with a cache line costs a line more for every vector (Vim-T, batch 8, Xeon, model 207: 4.5 and 6.3
ms).

The floor is the scan's exponentials at the exp2 rate of one thread with the kernel's own code for
that instruction set: the median of samples taken in the same rounds, so at the same clock. Of a
Mamba-2 scan, which has one decay for all states, it is the three multiplications of a state and
step at the rate of the vector units. "Both" is the multiple of that and of the softplus of every
step size, at the rate of the kernel's own: with one state it is the larger part.

A convolution over a grid has the taps that read a token as its floor, at the rate of the vector
units. Its body is what stood in its place: scatter, Conv and gather.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from vssm.commands.tables import table
from vssm.errors import RuntimeUnavailableError
from vssm.files.atomic import atomic_write_bytes
from vssm.native_library import find_library
from vssm.onnx.bodies import build_functions
from vssm.ops.spec import DOMAIN, OPERATORS, PLUGIN_ATTRIBUTES
from vssm.runtimes.library import ISA_NAMES, exp2_rate, product_rate, softplus_rate
from vssm.runtimes.ort import cpu_name

_ISA = "VSSM_CPU_ISA"  # read by the library at every run


@dataclass(frozen=True)
class Shape:
    """The scans of a dense layer: all directions in one node, or in a node each (`separate`)."""

    name: str
    batch: int
    seqlen: int
    d_inner: int
    d_state: int = 16
    directions: int = 2
    shared: str = ""  # the inputs of one direction for all: of u, delta, A, B, C, D
    separate: bool = False
    headdim: int = 0  # channels that share A, one for all states, and step sizes; 0: Mamba-1

    def axis(self, operand: str) -> int:
        """Size of an operand's direction axis."""
        return 1 if operand in self.shared.split() else self.directions

    @property
    def work(self) -> int:
        """Evaluations of exp, those that directions may share counted once; or products."""
        alone = self.headdim or max(self.axis("delta"), self.axis("A")) > 1
        states = self._steps(alone=bool(alone)) * self.d_inner * self.d_state
        return 3 * states if self.headdim else states

    @property
    def step_sizes(self) -> int:
        """Evaluations of softplus, those that directions or channels may share counted once."""
        return self._steps(alone=self.axis("delta") > 1) * self.d_inner // (self.headdim or 1)

    def _steps(self, *, alone: bool) -> int:
        return self.batch * self.seqlen * (self.directions if alone or self.separate else 1)

    def rate(self, isa: str) -> float:
        """How many of these one thread can do in a second."""
        return (product_rate if self.headdim else exp2_rate)(isa, seconds=0.0)


@dataclass(frozen=True)
class Grid:
    """A convolution over a grid of which some tokens are kept, at random."""

    name: str
    batch: int
    seqlen: int
    d_inner: int
    grid: int  # its side
    side: int  # of the square of taps
    step_sizes: int = 0

    @property
    def position(self) -> np.ndarray:
        """The places of the kept tokens, (seqlen,)."""
        places = np.random.default_rng(0).permutation(self.grid**2)[: self.seqlen]
        return np.sort(places).astype(np.int32)

    @property
    def work(self) -> int:
        """Multiply-adds of the taps that read a token."""
        row, column = np.divmod(self.position, self.grid)
        near = [np.abs(x[:, None] - x) <= self.side // 2 for x in (row, column)]
        return self.batch * self.d_inner * int((near[0] & near[1]).sum())

    def rate(self, isa: str) -> float:
        """How many of these one thread can do in a second."""
        return product_rate(isa, seconds=0.0)


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
    softplus_ms: float | None
    over_both: float | None


_PLAIN_MAMBA = "u delta A C D"
SHAPES = (
    Shape("Vim-T layer", 1, 197, 384),
    Shape("Vim-S layer", 1, 197, 768),
    Shape("Vim-T layer, batch 8", 8, 197, 384),
    Shape("PlainMamba-L1 layer", 1, 196, 384, directions=4, shared=_PLAIN_MAMBA),
    Shape("PlainMamba-L1, 4 nodes", 1, 196, 384, directions=4, shared=_PLAIN_MAMBA, separate=True),
    Shape("PlainMamba-L3 layer", 1, 196, 896, directions=4, shared=_PLAIN_MAMBA),
    Shape("PlainMamba-L3, 4 nodes", 1, 196, 896, directions=4, shared=_PLAIN_MAMBA, separate=True),
    Shape("VMamba-T layer, stage 1", 1, 3136, 96, d_state=1, directions=4, shared="u"),
    Shape("VMamba layer, D 192", 1, 3136, 192, d_state=1, directions=4, shared="u"),
    Shape("Mamba-2, 64 states", 1, 196, 768, d_state=64, directions=1, headdim=64),
    Shape("Mamba-2, 128 states", 1, 196, 768, d_state=128, directions=1, headdim=64),
    Grid("PlainMamba-L1 convolution", 1, 196, 384, grid=14, side=7),
    Grid("PlainMamba-L1 convolution, pruned", 1, 101, 384, grid=14, side=7),
    Grid("GroupMamba-T MLP, stage 1", 1, 3136, 512, grid=56, side=3),
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
        measured = time_shape(shape, list(rates), threads, options.samples)
        timings += measured
        columns = (
            "variant",
            "threads",
            "median ms",
            "p5",
            "cold",
            "floor ms",
            "over floor",
            "both",
        )
        kept = ("variant", "threads", "median_ms", "p5_ms", "cold_ms", "floor_ms", "over_floor")
        rows = [
            tuple(_cell(getattr(timing, name)) for name in (*kept, "over_both"))
            for timing in measured
        ]
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
    shape: Shape | Grid, isas: list[str], threads: list[int], samples: int
) -> list[Timing]:
    """Every instruction set at every thread count, and the body on one thread."""
    if isinstance(shape, Grid):
        feeds, model = grid_model(shape)
    else:
        feeds, model = scan_feeds(shape), scan_model(shape)
    variants = [(isa, count) for isa in isas for count in threads]
    sessions = [open_session(model, count, library=True) for _, count in variants]
    variants.append(("body", 1))
    sessions.append(open_session(model, 1, library=False))
    bound = [(session, *bind(session, shape, feeds)) for session in sessions]
    times: list[list[tuple[float, float]]] = [[] for _ in variants]
    rates: dict[str, list[tuple[float, float]]] = {isa: [] for isa in isas}
    want = None
    for sample in range(samples + 1):
        for isa in isas:
            rates[isa].append((shape.rate(isa), softplus_rate(isa, seconds=0.0)))
        for (isa, _), (session, binding, outputs), taken in zip(
            variants, bound, times, strict=True
        ):
            if isa in isas:
                os.environ[_ISA] = isa
            elif sample % 10 != 1:
                continue  # bodies take long
            marks = [time.perf_counter()]
            for _ in range(2):
                session.run_with_iobinding(binding)
                marks.append(time.perf_counter())
            if sample > 0:
                taken.append((1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[1])))
            y = sum(outputs)
            want = y if want is None else want
            if not np.abs(y - want).max() <= 1e-4 * np.abs(want).max():
                raise SystemExit(f"{isa} gives other numbers: a timing of these says nothing")
    os.environ.pop(_ISA, None)
    return [
        _timing(shape, variant, np.array(taken), rates.get(variant[0], []))
        for variant, taken in zip(variants, times, strict=True)
    ]


def bind(
    session: onnxruntime.InferenceSession, shape: Shape | Grid, feeds: dict[str, np.ndarray]
) -> tuple[onnxruntime.IOBinding, list[np.ndarray]]:
    """The inputs, and outputs that every run overwrites."""
    binding = session.io_binding()
    for name, array in feeds.items():
        given = on_cache_lines(array.shape, array.dtype)
        given[:] = array
        binding.bind_cpu_input(name, given)
    outputs = []
    for output in session.get_outputs():
        y = on_cache_lines((shape.batch, shape.seqlen, shape.d_inner), np.dtype(np.float32))
        binding.bind_output(output.name, "cpu", 0, np.float32, y.shape, y.ctypes.data)
        outputs.append(y)
    return binding, outputs


def on_cache_lines(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins where ONNX Runtime has its own begin, at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _timing(
    shape: Shape | Grid,
    variant: tuple[str, int],
    taken: np.ndarray,
    rates: list[tuple[float, float]],
) -> Timing:
    cold, warm = taken.T
    median = float(np.median(warm))
    floor = softplus = None
    if rates:
        work, step_sizes = 1e3 * np.array([shape.work, shape.step_sizes]) / np.median(rates, axis=0)
        floor, softplus = float(work / variant[1]), float(step_sizes / variant[1])
    return Timing(
        shape.name,
        *variant,
        median_ms=median,
        p5_ms=float(np.percentile(warm, 5)),
        p95_ms=float(np.percentile(warm, 95)),
        cold_ms=float(np.median(cold)),
        floor_ms=floor,
        over_floor=None if floor is None else median / floor,
        softplus_ms=softplus,
        over_both=None if floor is None or softplus is None else median / (floor + softplus),
    )


def scan_feeds(shape: Shape) -> dict[str, np.ndarray]:
    """Random inputs with step sizes between 1e-3 and 1, as trained models have."""
    rng = np.random.default_rng(0)
    batch, seqlen, k, inner = shape.batch, shape.seqlen, shape.directions, shape.d_inner

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    steps = np.arange(seqlen, dtype=np.int32)
    side = round(seqlen**0.5)
    turned = steps.reshape(side, side).T.reshape(-1) if k > 2 else steps
    orders = np.stack([steps, steps[::-1], turned, turned[::-1]][:k])
    feeds = {
        "u": normal(batch, seqlen, shape.axis("u"), inner),
        "delta": normal(batch, seqlen, shape.axis("delta"), inner),
        "A": -np.exp(normal(shape.axis("A"), inner, shape.d_state)),
        "B": normal(batch, seqlen, shape.axis("B"), shape.d_state),
        "C": normal(batch, seqlen, shape.axis("C"), shape.d_state),
        "D": normal(shape.axis("D"), inner),
        "delta_bias": normal(shape.axis("delta"), inner) - 3,
        "order": orders[None],
        "gap": np.ones((1, k, seqlen), np.int32),
    }
    if shape.headdim:
        first = np.arange(inner) // shape.headdim * shape.headdim
        feeds["A"] = np.ascontiguousarray(feeds["A"][:, first, :1])
        feeds |= {n: np.ascontiguousarray(feeds[n][..., first]) for n in ("delta", "delta_bias")}
    if shape.separate:
        for i in range(k):
            feeds[f"B{i}"] = np.ascontiguousarray(feeds["B"][:, :, i : i + 1])
            feeds[f"order{i}"] = orders[None, i : i + 1]
        feeds["gap"] = np.ones((1, 1, seqlen), np.int32)
        del feeds["B"], feeds["order"]
    return feeds


def scan_model(shape: Shape) -> bytes:
    """The SelectiveScan node of a shape with its body; or one node a direction, y0, y1, ..."""
    spec = OPERATORS["SelectiveScan"]
    kinds = {"T": TensorProto.FLOAT, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    attributes = {a.name: a.default for a in spec.attributes}
    if "delta" in shape.shared:
        attributes["params_by_step"] = 1

    def value(name: str, dtype: str, rank: int) -> object:
        sizes = [f"{name}{axis}" for axis in range(rank)]
        return helper.make_tensor_value_info(name, kinds[dtype], sizes)

    suffixes = [str(i) for i in range(shape.directions)] if shape.separate else [""]
    inputs: dict[str, object] = {}
    nodes = []
    for suffix in suffixes:
        names = {o.name: o.name + (suffix if o.name in ("B", "order") else "") for o in spec.inputs}
        inputs |= {names[o.name]: value(names[o.name], o.dtype, len(o.shape)) for o in spec.inputs}
        nodes.append(
            helper.make_node(
                spec.name,
                list(names.values()),
                [f"y{suffix}"],
                domain=DOMAIN,
                **attributes,
                **PLUGIN_ATTRIBUTES,
            )
        )
    outputs = [value(f"y{suffix}", "T", 3) for suffix in suffixes]
    graph = helper.make_graph(nodes, "scan", list(inputs.values()), outputs)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    model.functions.extend(build_functions([spec.name], 18))
    return bytes(model.SerializeToString())


def grid_model(shape: Grid) -> tuple[dict[str, np.ndarray], bytes]:
    """Inputs, and the TokenConv2D node with its body; weights are constants, as in an export."""
    rng = np.random.default_rng(0)
    spec, inner = OPERATORS["TokenConv2D"], shape.d_inner
    constants = {
        "weight": rng.standard_normal((inner, shape.side, shape.side)).astype(np.float32),
        "bias": rng.standard_normal(inner).astype(np.float32),
        "position": shape.position[None],
    }
    x = rng.standard_normal((shape.batch, shape.seqlen, inner)).astype(np.float32)
    node = helper.make_node(
        spec.name,
        [o.name for o in spec.inputs],
        ["y"],
        domain=DOMAIN,
        grid_height=shape.grid,
        grid_width=shape.grid,
        group=inner,
        by_position=int(shape.seqlen < shape.grid**2),
        activation=1,
        **PLUGIN_ATTRIBUTES,
    )
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *x.shape[1:]])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *x.shape[1:]])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "convolution", [value], [result], tensors)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    model.functions.extend(build_functions([spec.name], 18))
    return {"x": x}, bytes(model.SerializeToString())


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
