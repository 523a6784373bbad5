"""Reading and rewriting the nodes of an exported program, shapes kept up to date."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from vssm.ops import operators as ops
from vssm.ops.spec import GATED_SELECTIVE_SCAN, SELECTIVE_SCAN, OperatorSpec

ATEN: Final = torch.ops.aten
SCANS: Final[dict[Any, OperatorSpec]] = {
    ops.torch_op(op): op for op in (SELECTIVE_SCAN, GATED_SELECTIVE_SCAN)
}
_SMALL: Final = 1 << 20  # elements of a constant that passes read


@dataclass
class PassReport:
    """What one pass did: how often it applied, and why it did not where it might have."""

    name: str
    applied: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str) -> None:
        """Note one place where the pass did not apply."""
        self.refused[reason] += 1

    def __str__(self) -> str:
        reasons = "".join(f"; {n} times not: {why}" for why, n in sorted(self.refused.items()))
        return f"{self.name}: applied {self.applied} times{reasons}"


@dataclass(frozen=True)
class Rewriter:
    """A program under change, and the report of the pass that changes it.

    `probes` are sizes of the symbols that are free beside the batch: what is to hold for every size
    is looked at with each of them. A program whose sizes are settled has one probe, of none.
    """

    program: ExportedProgram
    report: PassReport
    probes: tuple[Mapping[Any, int], ...] = ({},)

    @property
    def graph(self) -> Graph:
        """The graph of the program."""
        graph: Graph = self.program.graph
        return graph

    def emit(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new call in front of `before`, in the same module, its shape inferred."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        # The file names a node after the module that ran it.
        node.meta["nn_module_stack"] = before.meta.get("nn_module_stack", {})
        fake = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        # The dispatcher in Python: the one in C++ would decide what a symbolic size is.
        with _mode_of(self.graph), enable_python_dispatcher():
            node.meta["val"] = target(*fake[0], **fake[1])
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let `new` be used where `old` was, and drop `old` if it can be."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.report.applied += 1

    def table(self, value: Tensor) -> Node:
        """A constant of the program; equal ones are one."""
        name = f"table_{hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]}"
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node  # type: ignore[no-any-return]
        signature = self.program.graph_signature
        place = next(
            i for i, spec in enumerate(signature.input_specs) if spec.kind is InputKind.USER_INPUT
        )
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_before(inputs[place]):
            made: Node = self.graph.placeholder(name)
        with _mode_of(self.graph) as mode:
            made.meta["val"] = mode.from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(made.name), name)
        signature.input_specs.insert(place, spec)
        self.program.constants[name] = value
        return made

    def constants(self, node: Any) -> list[Tensor] | None:
        """The value of a small node that depends on no input and no weight, at each probe."""
        found = [self.constant(node, probe) for probe in self.probes]
        return None if any(value is None for value in found) else found  # type: ignore[return-value]

    # The depth is a bound on time: operands that nodes share are computed again for each of them.
    def constant(
        self, node: Any, probe: Mapping[Any, int], depth: int = 12, largest: int = _SMALL
    ) -> Tensor | None:
        """The value of a node of few elements that no input and no weight decides, at one probe."""
        if not isinstance(node, Node) or not is_tensor(node) or depth == 0:
            return None
        sizes = [number(n, probe) for n in node.meta["val"].shape]
        if any(n is None for n in sizes) or math.prod(sizes) > largest:  # type: ignore[arg-type]
            return None
        if node.op == "placeholder":
            return self._lifted(node.name)
        if node.op != "call_function" or node.target in SCANS:
            return None
        values: dict[Node, Any] = {
            n: number(n.meta["val"], probe)
            if is_size(n)
            else self.constant(n, probe, depth - 1, largest)
            for n in node.all_input_nodes
        }
        if any(value is None for value in values.values()):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        target: Any = node.target
        result: Tensor = target(*args, **kwargs)
        return result

    def _lifted(self, name: str) -> Tensor | None:
        signature = self.program.graph_signature
        key = signature.inputs_to_lifted_tensor_constants.get(name)
        key = key or signature.inputs_to_buffers.get(name)
        place = key or signature.inputs_to_parameters.get(name)
        if place is None:
            return None
        value = self.program.constants.get(place, self.program.state_dict.get(place))
        # Tables are kept as parameters too, which learn nothing: integers are no weights.
        is_weight = key is None and isinstance(value, Tensor) and value.is_floating_point()
        return value if isinstance(value, Tensor) and not is_weight else None


def run_pass(
    program: ExportedProgram,
    name: str,
    change: Callable[[Rewriter], None],
    probes: tuple[Mapping[Any, int], ...] = ({},),
) -> PassReport:
    """Run one pass, drop what nothing reads, and return its report."""
    report = PassReport(name)
    change(Rewriter(program, report, probes))
    # It lints first: a node that a pass put behind its user is found here, not by whoever opens the
    # file.
    program.graph.eliminate_dead_code()
    return report


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def is_size(node: Node) -> bool:
    """Whether a node's value is a size, computed at run time."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def number(size: Any, probe: Mapping[Any, int]) -> int | None:
    """A size as a number at a probe; None if it depends on more."""
    if isinstance(size, int):
        return size
    found = size.node.expr.subs(probe)
    return int(found) if found.is_number else None


def is_integer(node: Any) -> bool:
    """Whether a node's value is one tensor of integers, not a mask."""
    return is_tensor(node) and node.meta["val"].dtype in {torch.int32, torch.int64}


def shape(node: Node) -> tuple[Any, ...]:
    """Shape of a tensor node; a symbolic size by its name, so that comparing it decides nothing."""
    return tuple(n if isinstance(n, int) else str(n) for n in node.meta["val"].shape)


def rank(node: Node) -> int:
    """Number of axes of a tensor node."""
    return int(node.meta["val"].dim())


def axis(node: Node, dim: int) -> int:
    """`dim` of a tensor node, counted from the front."""
    return dim % rank(node)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or keyword."""
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def scan_arguments(node: Node) -> dict[str, Any]:
    """Operands and attributes of a scan node by name."""
    # A traced call leaves out trailing arguments that have their defaults.
    op = SCANS[node.target]
    names = [o.name for o in op.inputs] + [a.name for a in op.attributes]
    defaults: list[Any] = [None] * len(op.inputs) + [a.default for a in op.attributes]
    return dict(zip(names, [*node.args, *defaults[len(node.args) :]], strict=True))


def scan_call(rewriter: Rewriter, before: Node, target: Any, named: dict[str, Any]) -> Node:
    """A scan node with these operands and attributes."""
    op = SCANS[target]
    names = [o.name for o in op.inputs] + [a.name for a in op.attributes]
    return rewriter.emit(before, target, *(named[name] for name in names))


def _mode_of(graph: Graph) -> Any:
    return next(n.meta["val"].fake_mode for n in graph.nodes if is_tensor(n))
