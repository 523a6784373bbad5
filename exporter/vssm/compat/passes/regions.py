"""Regions of a traced program that are graphs of their own: opened, or refused with the reason.

torch.export puts what runs under autocast or another gradient mode, and branches and loops, into
sub-graphs of higher-order operators. The passes and the file know one graph, so what a region only
frames comes out of it before they look.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from vssm.compat.passes.graph import SCANS
from vssm.errors import UnsupportedError
from vssm.onnx.decompose import rename_outputs

_GRADIENTS: Final[Any] = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST: Final[Any] = torch.ops.higher_order.wrap_with_autocast
_CHECKPOINT: Final[Any] = torch.ops.higher_order.tag_activation_checkpoint
# Where in the operands the sub-graph stands; behind it are what goes in.
_FRAMES: Final[dict[Any, int]] = {_GRADIENTS: 1, _AUTOCAST: 4, _CHECKPOINT: 0}
_FILE: Final = re.compile(r'File "([^<"][^"]*)", line (\d+)')


class RefuseCasts(TorchFunctionMode):
    """Refuses a forward pass that computes under autocast on the CPU: the export is float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every function of torch goes through here."""
        if torch.is_autocast_enabled("cpu"):
            # The innermost frame that is not torch's own is the user's line.
            caller = next(
                (
                    f
                    for f in reversed(traceback.extract_stack()[:-1])
                    if "/torch/" not in f.filename
                ),
                None,
            )
            where = "" if caller is None else f" at {caller.filename}:{caller.lineno}"
            raise UnsupportedError(_cast(torch.get_autocast_dtype("cpu"), where))
        return func(*args, **(kwargs or {}))


def open_regions(program: ExportedProgram) -> ExportedProgram:
    """The program with every region that changes nothing inlined, in place.

    Raises:
        UnsupportedError: a region casts, or a scan is inside a branch or a loop.
    """
    graph = program.graph
    # Regions stand in regions: what an opened one holds is looked at in the next round.
    while frames := [node for node in graph.nodes if node.target in _FRAMES]:
        for node in frames:
            _refuse_cast(node)
            _inline(program.graph_module, node)
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and any(
            inner.target in SCANS for part in _parts(program.graph_module, node) for inner in part
        ):
            raise UnsupportedError(
                f"a selective scan is inside torch's {node.target}{_where(node)}, a branch or loop "
                "of its own, but a node that a runtime has a kernel for stands in the graph "
                "itself; take it out of the branch, or write the loop over layers in Python, which "
                "is unrolled"
            )
    graph.eliminate_dead_code()
    program.graph_module.delete_all_unused_submodules()
    rename_outputs(program)
    return program


def _refuse_cast(node: Node) -> None:
    if node.target is _AUTOCAST:
        device, dtype, enabled = node.args[:3]
        # Another device's autocast does nothing to a model on the CPU, where this one is.
        if enabled and device == "cpu":
            raise UnsupportedError(_cast(dtype, _where(node)))


def _cast(dtype: Any, where: str) -> str:
    return (
        f"the module computes under torch.autocast in {dtype}{where}, but the export is float32; "
        "take autocast out of its forward pass, or say enabled=False"
    )


def _inline(owner: GraphModule, node: Node) -> None:
    """Put the nodes of a region in its place."""
    place = _FRAMES[node.target]
    part, *operands = list[Any](node.args)[place:]
    inner: GraphModule = getattr(owner, part.target)
    values = dict(zip(_placeholders(inner), operands, strict=True))
    for entry in inner.graph.nodes:
        if entry.op == "get_attr":  # a region or a constant inside moves up
            name = f"{part.target}_{entry.target}".replace(".", "_")
            setattr(owner, name, getattr(inner, str(entry.target)))
            entry.target = name
    with owner.graph.inserting_before(node):
        found: Any = owner.graph.graph_copy(inner.graph, values)
    if isinstance(found, Node):
        node.replace_all_uses_with(found)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])  # a getitem of it
            owner.graph.erase_node(user)
    owner.graph.erase_node(node)


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _parts(owner: GraphModule, node: Node) -> Iterator[list[Node]]:
    """Nodes of every sub-graph of a higher-order operator, however deep."""
    for operand in node.all_input_nodes:
        if operand.op != "get_attr":
            continue
        found = getattr(owner, str(operand.target), None)
        if isinstance(found, GraphModule):
            yield list(found.graph.nodes)
            for inner in found.graph.nodes:
                if isinstance(inner.target, torch._ops.HigherOrderOperator):
                    yield from _parts(found, inner)


def _where(node: Node) -> str:
    """The line of the user's code, where torch noted it."""
    lines = _FILE.findall(node.meta.get("stack_trace") or "")
    return f" at {lines[-1][0]}:{lines[-1][1]}" if lines else ""
