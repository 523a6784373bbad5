"""Where a session's time goes by kind of work, and the floor of each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx

from vssm.bench.measure import KindTime, MachineRates
from vssm.errors import UnsupportedError
from vssm.ops.spec import CONV_OPERATORS, DOMAIN, SCAN_OPERATORS

PRODUCTS, SCANS, CONVOLUTIONS, MOVES, REST = (
    "matrix products",
    "scans",
    "convolutions",
    "moving data",
    "rest",
)
# ONNX Runtime's own operators among them: its optimiser fuses what the file has.
_KINDS: Final = {
    PRODUCTS: "MatMul Gemm FusedMatMul FusedGemm MatMulInteger MatMulIntegerToFloat "
    "DynamicQuantizeMatMul QLinearMatMul QGemm MatMulNBits",
    SCANS: " ".join(op.name for op in SCAN_OPERATORS),
    CONVOLUTIONS: " ".join(op.name for op in CONV_OPERATORS)
    + " Conv FusedConv NhwcFusedConv QLinearConv ConvTranspose",
    MOVES: "Transpose Concat Split Reshape Squeeze Unsqueeze Slice Pad Expand Gather Identity Cast "
    "GatherElements GatherND ScatterElements ScatterND TokenGather TokenGather1 TokenScatter "
    "ReorderInput ReorderOutput Flatten Tile",
}
_KIND_OF: Final = {name: kind for kind, names in _KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Work:
    """What one image costs in a file.

    Attributes:
        exps: exponentials of the scans.
        gemm: multiply-adds of matrix products.
        products: products of the scans with one decay for all states.
        conv: multiply-adds of convolutions over all channels, such as the patch embedding.
        taps: those of depthwise ones.
    """

    exps: int
    gemm: int
    products: int = 0
    conv: int = 0
    taps: int = 0

    @property
    def macs(self) -> int:
        """All multiply-adds outside the scans."""
        return self.gemm + self.conv + self.taps


def by_kind(
    operators: Mapping[str, float], path: Path, rates: MachineRates, notes: list[str]
) -> list[KindTime]:
    """A row for each kind of work that takes time, with the floor of one image and one thread.

    Args:
        operators: milliseconds by operator type.
        path: the file, whose work is counted.
        rates: those of one thread among them.
        notes: is told where there are no floors.
    """
    spent: dict[str, float] = dict.fromkeys((*_KINDS, REST), 0.0)
    for name, milliseconds in operators.items():
        spent[_KIND_OF.get(name, REST)] += milliseconds
    floors: dict[str, float] = {}
    try:
        work = count_graph(path)
        floors = {
            PRODUCTS: work.gemm / rates.macs[1],
            SCANS: work.exps / rates.exp2 + work.products / rates.products,
            CONVOLUTIONS: work.conv / rates.macs[1] + work.taps / rates.products,
        }
    except UnsupportedError as error:
        notes.append(f"no floor by kind of work: {error}")
    return [
        KindTime(kind, ms, 1e3 * floors[kind] if kind in floors else None)
        for kind, ms in spent.items()
        if ms
    ]


_SCANS = tuple(op.name for op in SCAN_OPERATORS)
_CONVOLUTIONS = tuple(op.name for op in CONV_OPERATORS)
_PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger")


class _Shapes(dict[str, list[int]]):
    def __missing__(self, name: str) -> list[int]:
        raise UnsupportedError(
            f"the size of {name} is known in a run alone, so the file's work cannot be counted"
        )


def count_graph(path: Path) -> Work:
    """The work of a file, batch 1.

    Raises:
        UnsupportedError: a run decides sizes that the work depends on.
    """
    # Shapes alone are counted, so weights beside the file need not be read.
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = _Shapes((v.name, _sizes(v)) for v in values)
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    exps = gemm = products = conv = taps = 0
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in _SCANS:
            # The inputs `order`, `A` and `B` of every scan operator, see ops/spec.py.
            order, A, B = (shapes[node.input[i]] for i in (7, 2, 3))
            steps = order[1] * order[2] * A[1]
            exps += steps * A[2]
            # Of a state and step: decay h, dt u B and C h.
            products += 3 * steps * B[3] if A[2] < B[3] else 0
        elif node.domain == DOMAIN and node.op_type in _CONVOLUTIONS:
            # Taps beyond an end or edge, or where tokens were pruned, count too, as those of Conv.
            x, weight = shapes[node.input[0]], shapes[node.input[1]]
            taps += math.prod(x[:2]) * math.prod(weight)
        elif node.domain == "" and node.op_type in _PRODUCTS:
            found = _product(node, shapes)
            if node.op_type != "Conv":
                gemm += found
            elif any(a.name == "group" and a.i > 1 for a in node.attribute):
                taps += found
            else:
                conv += found
        elif node.op_type == "MatMulNBits":
            inputs = next(a.i for a in node.attribute if a.name == "K")
            gemm += math.prod(shapes[node.output[0]]) * inputs
    return Work(exps, gemm, products, conv, taps)


def _product(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    """Multiply-adds of one node: its result's size times the terms of each element."""
    result, weight = shapes[node.output[0]], shapes[node.input[1]]
    if node.op_type == "Conv":
        # weight[1] is the channels of one group, so depthwise convolutions come out right.
        return math.prod(result) * math.prod(weight[1:])
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(result) * weight[-1 if transposed else -2 if len(weight) > 1 else 0]


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes of a value; the batch, which has none, counts as 1, also where it is folded in."""
    return [d.dim_value or _at_batch_one(d.dim_param) for d in value.type.tensor_type.shape.dim]


def _at_batch_one(symbol: str) -> int:
    """A symbolic size, the batch or a multiple of it such as "9*batch", for a batch of 1."""
    factors = symbol.split("*")
    if not all(f.isdecimal() or f.isidentifier() for f in factors if symbol):
        raise UnsupportedError(
            f"size={symbol!r} in the graph is not a multiple of the batch, so its work cannot be "
            "counted; export with dynamic_batch=False to measure it"
        )
    return math.prod(int(f) for f in factors if f.isdecimal())
