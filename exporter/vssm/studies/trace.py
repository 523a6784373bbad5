"""What happens inside a model's blocks: their scans, recorded as they run, and who is present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vssm.errors import UnsupportedError
from vssm.models.base import ForwardDetails, VisionModel
from vssm.ops import operators as ops
from vssm.pruning.select import ScanOutputs, ScoreRule

# Whatever rule the schedule has, so that maps of all blocks and variants compare.
_RULE = ScoreRule("clip", "sum", gated=False)


@dataclass(frozen=True)
class Block:
    """One block of one pass.

    Attributes:
        number: from 1, as schedules count.
        grid: rows and columns of the map of patches.
        class_positions: positions of class tokens in the unpruned sequence; the rest are patches.
        position: (batch, seqlen) int64, the position of each token present.
        scans: its scan nodes: one, or one a group of channels.
    """

    number: int
    grid: tuple[int, int]
    class_positions: tuple[int, ...]
    position: Tensor
    scans: tuple[Scan, ...]

    def importance(self) -> Tensor:
        """The paper's score (batch, seqlen): the mean over channels of max(0, y)."""
        y = torch.cat([scan.output() for scan in self.scans], dim=-1)
        return _RULE.score(ScanOutputs(y, y))

    def attention(self) -> Tensor:
        """Weight of each token in the class token's output, else in the mean over tokens.

        Returns:
            (batch, directions, seqlen) float64, the mean over channels of |w|; a node of one
            direction a group of channels counts as a direction.
        """
        maps = [attention_maps(scan, self._readout()) for scan in self.scans]
        return torch.cat(maps, dim=1)

    def on_grid(self, values: Tensor) -> Tensor:
        """Values (batch, seqlen) of the tokens as maps (batch, rows, columns); NaN where pruned."""
        rows, columns = self.grid
        patches = rows * columns
        sequence = values.new_full(
            (len(values), patches + len(self.class_positions)), torch.nan, dtype=torch.float64
        )
        sequence = sequence.scatter(1, self.position, values.double())
        is_patch = torch.ones(sequence.shape[1], dtype=torch.bool)
        is_patch[list(self.class_positions)] = False
        return sequence[:, is_patch].reshape(-1, rows, columns)

    def _readout(self) -> Tensor:
        if not self.class_positions:
            return torch.full(self.position.shape, 1 / self.position.shape[1])
        positions = torch.tensor(self.class_positions)
        return torch.isin(self.position, positions).double() / len(positions)


@dataclass(frozen=True)
class Trace:
    """One pass of a model: what it decided, and its blocks."""

    details: ForwardDetails
    blocks: list[Block]


def trace(model: VisionModel, images: Tensor) -> Trace:
    """Run `model` on images (batch, 3, height, width) and record its scans.

    Raises:
        UnsupportedError: the model's blocks cannot be told apart, or its tokens are not where the
            maps would show them.
    """
    _refuse_masked(model)
    recorder = _Recorder()
    blocks = [block for block, _ in model.blocks_on_maps()]
    hooks = [block.register_forward_pre_hook(recorder.enter(i)) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(recorder.leave) for block in blocks]
    try:
        with torch.no_grad(), recorder:
            details = model.forward_details(images)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(details, _blocks(model, details, recorder.scans, len(images)))


def _refuse_masked(model: VisionModel) -> None:
    if model.schedule is not None and model.schedule.alignment == "masked":
        raise UnsupportedError(
            "alignment='masked' leaves pruned tokens in every scan, so there is nothing to lay "
            "beside the others; use alignment='gap', 'constant' or 'none'"
        )


@dataclass
class _Recorder(TorchDispatchMode):
    """Sees every scan operator that runs, whatever the family calls it from."""

    scans: dict[int, list[Scan]] = field(default_factory=dict)
    current: int | None = None

    def __post_init__(self) -> None:
        # The dataclass has an __init__ of its own, which does not call the mode's.
        super().__init__()  # type: ignore[no-untyped-call]

    def enter(self, block: int) -> Callable[[nn.Module, Any], None]:
        """A hook that says which block comes."""

        def hook(_module: nn.Module, _inputs: Any) -> None:
            self.current = block

        return hook

    def leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        """A hook: what runs now, such as GroupMamba's class attention, is in no block."""
        self.current = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if self.current is not None and "vssm::" in (name := func._schema.name) and "scan" in name:
            self.scans.setdefault(self.current, []).append(_scan(func._schema, args, given))
        return func(*args, **given)


def _scan(schema: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Scan:
    """The node of an operator call; its gate is left out."""
    named = {a.name: a.default_value for a in schema.arguments}  # a call leaves defaults out
    named |= dict(zip(named, args, strict=False)) | given
    # Not every scan operator has this operand.
    named["delta0"] = named.get("delta0")
    # A view: tokens first, as the formula has them.
    if named["direction_axis"] == 1:
        named |= {name: named[name].transpose(1, 2) for name in ("u", "delta", "B", "C")}
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Scan)):
        value = named[name]  # some are parameters
        values[name] = value.detach() if isinstance(value, Tensor) else value
    return Scan(**values)


def _blocks(
    model: VisionModel, details: ForwardDetails, scans: dict[int, list[Scan]], batch: int
) -> list[Block]:
    found = []
    position: Tensor | None = None
    for i, (_, grid) in enumerate(model.blocks_on_maps()):
        seqlen = scans[i][0].order.shape[2]
        if position is None or model.layout is None:
            position = torch.arange(seqlen).expand(batch, -1)
        # Behind a layer's own nodes: Vim scans a direction once more to score it alone.
        nodes = tuple(scans[i][: model.scans_per_block])
        found.append(Block(i + 1, grid, model.class_positions, position, nodes))
        stage = model.stages.get(i + 1) if model.layout is not None else None
        if stage is not None:
            position = details.kept_positions[stage.index]
    return found


@dataclass(frozen=True)
class Scan:
    """One scan node without its gate: the operands of `ops.selective_scan`, by the same names.

    The directions of u, delta, B and C are behind their tokens.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor
    order: Tensor
    gap: Tensor
    delta0: Tensor | None
    delta_softplus: int
    params_by_step: int
    scale: float

    def output(self) -> Tensor:
        """The ungated y (batch, seqlen, d_inner)."""
        flags = {n: bool(getattr(self, n)) for n in ("delta_softplus", "params_by_step")}
        return ops.selective_scan(**{**vars(self), **flags}, backend="reference")

    @property
    def skip(self) -> Tensor:
        """What a token's own input weighs in its own output beside the state: (K or 1, d_inner)."""
        return self.D.double() * self.scale


def readout_weights(scan: Scan, readout: Tensor) -> Tensor:
    """The weights w of the module's formula, exact in float64.

    Args:
        scan: the node.
        readout: (batch, seqlen), the weight r of each token's output.

    Returns:
        (batch, K, seqlen, d_inner) float64, in token order; the skip is not in it.
    """
    directions = scan.order.shape[1]
    token = scan.order.long().expand(scan.u.shape[0], -1, -1).transpose(1, 2)
    dt = _by_step(scan, scan.delta, token) + scan.delta_bias.double()
    dt = functional.softplus(dt) if scan.delta_softplus else dt
    # The decay spans the pruned places too: each counts dt once more, or delta0.
    extra = scan.gap.transpose(1, 2)[..., None].double() - 1
    span = dt + extra * (dt if scan.delta0 is None else scan.delta0.double())
    asked = readout.double()[..., None].expand(-1, -1, directions).gather(1, token)
    B, C = (_by_step(scan, x, token) for x in (scan.B, scan.C))
    A = scan.A.double()
    # Backwards: `reach` is what the state after a step adds to the readout from there on.
    # Forwards there would be a weight for every pair of steps.
    reach = dt.new_zeros(dt.shape[0], directions, *A.shape[1:])  # (batch, K, d_inner, d_state)
    weights = torch.empty_like(span)
    for t in reversed(range(token.shape[1])):
        reach = reach + (asked[:, t, :, None] * C[:, t])[:, :, None]
        # What comes in is scaled by dt alone; the gap is in the decay.
        weights[:, t] = dt[:, t] * (reach * B[:, t, :, None]).sum(-1)
        reach = reach * torch.exp(span[:, t, ..., None] * A)  # of no use at t = 0: no state before
    index = token[..., None].expand_as(weights)
    in_tokens = torch.zeros_like(weights).scatter(1, index, weights)
    return in_tokens.transpose(1, 2) * scan.scale


def attention_maps(scan: Scan, readout: Tensor) -> Tensor:
    """Mean over channels of |w|, by direction: (batch, K, seqlen) float64."""
    return readout_weights(scan, readout).abs().mean(-1)


def _by_step(scan: Scan, x: Tensor, token: Tensor) -> Tensor:
    """X (batch, seqlen, 1 or K, width) by step: (batch, seqlen, K, width) float64."""
    spread = x.double().expand(-1, -1, token.shape[2], -1)
    if scan.params_by_step:
        return spread
    return spread.gather(1, token[..., None].expand(-1, -1, -1, x.shape[-1]))
