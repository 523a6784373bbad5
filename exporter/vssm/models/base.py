"""What every model of this package is: a module with official keys that can prune its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from vssm.artifact.manifest import CheckpointInfo, Preprocessing
from vssm.errors import UnsupportedError, check_choice, check_least
from vssm.ops.operators import BACKENDS
from vssm.pruning.merge import MergeResult
from vssm.pruning.schedule import MergeStage, PruneSchedule, Schedule, Stage, TokenLayout
from vssm.pruning.select import StageResult, prune


@dataclass(frozen=True)
class ForwardDetails:
    """Everything a forward pass decided.

    Attributes:
        logits: (batch, num_classes).
        kept_positions: one (batch, num_keep) int64 of original positions per stage; a token that
            others have joined is at its own.
        scores: the (batch, seqlen) scores that chose them, of the tokens present before the stage;
            of a merge the similarity, as `MergeResult` has it.
        blocks: (hidden, residual) after each block, before its stage; only where asked for.
            residual is None in models of one stream.
        merges: what each merge chose, in order.
        tensors: maps of a dense model by their official names ("tap0", "neck0", "level0", ...).
    """

    logits: Tensor
    kept_positions: list[Tensor]
    scores: list[Tensor]
    blocks: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    merges: list[MergeResult] = field(default_factory=list)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def merged(self) -> list[tuple[Tensor, Tensor]]:
        """Of each merge, the indices (batch, r) that left and those they joined, best first.

        Indices are among the tokens before the merge, class token included.
        """
        return [(m.pairs[..., 0], m.pairs[..., 1]) for m in self.merges]


@dataclass(frozen=True)
class BlockCost:
    """One block, by token, in multiply-adds.

    `shared` is what branches share, `branch` the linear layers and `convolution` the convolution
    of one; `states` the channel-states d_inner * d_state of one scan direction, `per_token` its
    skip, and its gate where every direction has one; `gate` is that of a sum of directions.
    `on_grid` says that published figures count the convolution at pruned positions too.
    """

    shared: int
    branch: int
    convolution: int
    branches: int
    directions: int
    states: int
    per_token: int
    gate: int = 0
    on_grid: bool = False


class ImageSized:
    """A configuration whose image is square where `image_size` is one number."""

    image_size: int | tuple[int, int]

    def __post_init__(self) -> None:
        for name, value in [*vars(self).items()]:
            # JSON knows lists only, and a list would make two equal configurations differ.
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(
                f"image_size={self.image_size} does not have two sides; give (height, width)"
            )

    def check_positive(self, *names: str) -> None:
        """Refuse sizes below 1, each of those in a tuple too; None, a default, passes.

        Raises:
            ValueError: one is.
        """
        for name in names:
            value = getattr(self, name)
            parts = enumerate(value) if isinstance(value, tuple) else ()
            check_least(1, **{f"{name}[{i}]": part for i, part in parts} or {name: value})

    def check_patch(self, side: int) -> None:
        """Refuse an image that is smaller than a patch.

        Raises:
            ValueError: it is.
        """
        if min(self.image_height_width) < side:
            raise ValueError(
                f"image_size={self.image_size} is smaller than patch_size={side}; give a larger "
                "image"
            )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Image size in pixels as (height, width)."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size


class VisionModel(nn.Module):
    """Base of the models. A subclass sets these attributes and fills `_forward`.

    Attributes:
        name: for reports and model.json.
        config: the family's configuration, a dataclass.
        schedule: token pruning or merging, None for the dense model.
        stages: the schedule's stages by block, in order.
        layout: the tokens before pruning; None for models that cannot prune.
        image_size: (height, width) in pixels.
        num_classes: width of the logits.
        traced_blocks: how many blocks `forward_details(with_blocks=True)` reports.
        residual_stream: whether a block reports a residual stream beside its output.
        checkpoint: the file the weights were loaded from, None for initial weights.
        loaded: what was loaded from that file and how, in words.
        labels: names of the classes, where that file has them.
        task: what its logits are of: "classification" (images), "segmentation" (pixels) or
            "detection" (anchors).
        output_groups: what an export can be asked for, as names of outputs.
        published_directions: scan directions that the published FLOPs count.
        backend: what computes the custom operators, see `use_backend`.
        class_positions: of class tokens in the unpruned sequence; the rest are patches.
        scans_per_block: scan nodes that are a block's own, before those that only score.
        merges: whether its tokens can be merged, by configurations that have a block's d_model,
            d_state and expand.
        list_convolution: whether a schedule's `conv` changes what it computes.
        pruner: what makes a stage; an ablation may set another of the same form on a model.
    """

    name: str
    config: Any
    schedule: Schedule | None
    stages: Mapping[int, Stage | MergeStage]
    layout: TokenLayout | None
    image_size: tuple[int, int]
    num_classes: int
    traced_blocks: int
    residual_stream = True
    checkpoint: CheckpointInfo | None = None
    loaded: str | None = None
    labels: tuple[str, ...] | None = None
    published_directions = 1  # that the published FLOPs count
    task = "classification"
    output_groups: Mapping[str, tuple[str, ...]] = {"logits": ("logits",)}
    backend = "auto"
    class_positions: tuple[int, ...] = ()
    scans_per_block = 1
    merges = False
    list_convolution = False
    # A plain function as a class attribute would become a method and be given the model.
    pruner = staticmethod(prune)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, 3, height, width), normalised."""
        return self.forward_details(images).logits

    def forward_details(self, images: Tensor, *, with_blocks: bool = False) -> ForwardDetails:
        """The forward pass with its pruning decisions, and the blocks' outputs where asked for.

        Raises:
            ValueError: images is not (batch, 3, height, width) of the model's image size.
        """
        height, width = self.image_size
        # Tables of positions and walks are made for one size; torch
        # would name some inner shape instead.
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(
                f"images.shape={tuple(images.shape)} is not (batch, 3, {height}, {width}); resize "
                "the images, or create the model with image_size=(height, width)"
            )
        return self._forward(images, with_blocks)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        raise NotImplementedError

    def output(self, name: str, found: ForwardDetails) -> Tensor:
        """One of the outputs that `output_groups` names, float32 or integers."""
        return found.logits if name == "logits" else found.tensors[name]

    def preprocessing(self) -> Preprocessing | None:
        """How images of any size become this model's input; None where that is the caller's."""
        return Preprocessing.for_image_size(self.image_size)

    def use_backend(self, backend: str) -> Self:
        """Choose what computes the custom operators of this model; the model itself comes back.

        Exports and parity checks do not depend on it; `vssm.record_backends` says what ran.

        Args:
            backend: "auto": the native kernels on the CPU and on CUDA, forward and backward (on
                CUDA forward); PyTorch in float64, on other devices, and, with a warning, where
                the library is missing. "reference": PyTorch everywhere. "kernel": the native
                kernels, or an error; no float64.

        Raises:
            ValueError: it is not one of the three.
        """
        check_choice("backend", backend, BACKENDS)
        for module in self.modules():
            # The models and their mixers declare it on the class; plain layers do not have it.
            if hasattr(type(module), "backend"):
                vars(module)["backend"] = backend
        return self

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """Every block in order, and the rows and columns of its patches, for pictures of its scans.

        Raises:
            UnsupportedError: the family does not say, or no map shows where the tokens are.
        """
        raise UnsupportedError(
            f"model={type(self).__name__} does not say where the tokens of its blocks are in the "
            "image, so no map can show them; its class needs a method blocks_on_maps "
            "(docs/add_a_family.md)"
        )

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors made to fit this model, such as a resized position table."""
        return state

    def fixed_cost(self) -> int:
        """Multiply-adds outside the blocks, for one image."""
        raise NotImplementedError

    def neck_cost(self) -> int:
        """The part of `fixed_cost` between a dense model's backbone and its head."""
        return 0

    def head_cost(self) -> int:
        """The part of `fixed_cost` in a dense model's head, which no pruning touches."""
        return 0

    def block_cost(self) -> BlockCost:
        """Cost of a block, by token, in a model whose blocks are all alike."""
        raise NotImplementedError

    def block_costs(self) -> list[tuple[int, BlockCost]]:
        """Tokens before pruning and cost by token of every block, in order.

        Models whose blocks differ give their own; the others a `layout` and a `block_cost`.
        """
        if self.layout is None:
            raise NotImplementedError
        return [(self.layout.seqlen, self.block_cost())] * self.config.depth

    def stays_wide(self, name: str) -> bool:
        """Whether a parameter stays float32 in a half-precision export (an island).

        Here all but the weights and biases of linear layers and convolutions do.
        """
        module, _, _ = name.rpartition(".")
        return not isinstance(self.get_submodule(module), nn.Linear | nn.Conv1d | nn.Conv2d)


def details(
    logits: Tensor,
    chosen: list[StageResult],
    blocks: list[tuple[Tensor, Tensor | None]],
    tensors: Mapping[str, Tensor] | None = None,
) -> ForwardDetails:
    """The public details of a pass from what its stages chose."""
    return ForwardDetails(
        logits,
        # The operators have int32 positions; PyTorch's gather and indexing want int64.
        [c.kept_position.long() for c in chosen],
        [c.score for c in chosen],
        blocks,
        [c for c in chosen if isinstance(c, MergeResult)],
        tensors or {},
    )


def blocks_of_stages(
    model: VisionModel,
    kind: type[nn.Module],
    grids: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[tuple[nn.Module, tuple[int, int]]]:
    """What `blocks_on_maps` gives of a hierarchical model, whose blocks are of one class."""
    blocks = [module for module in model.modules() if isinstance(module, kind)]
    of_blocks = [grid for grid, depth in zip(grids, depths, strict=True) for _ in range(depth)]
    return list(zip(blocks, of_blocks, strict=True))


def refuse_schedule(family: str, schedule: Schedule | None) -> None:
    """Hierarchical models are dense only.

    Raises:
        UnsupportedError: there is a schedule.
    """
    if schedule is not None:
        raise UnsupportedError(
            f"schedule={schedule.describe()!r}: {family} is hierarchical, its convolutions and "
            "downsampling need whole maps and no token can leave them; use schedule=None, or "
            "prune a model whose tokens form a plain sequence (vim_*, plain_mamba_*), or merge "
            "those of a vim_*"
        )


def refuse_merging(what: str, schedule: Schedule | None) -> PruneSchedule | None:
    """The schedule of what can be pruned, but not merged.

    Raises:
        UnsupportedError: it merges.
    """
    if schedule is None or isinstance(schedule, PruneSchedule):
        return schedule
    raise UnsupportedError(
        f"schedule={schedule.describe()!r}: {what}; prune with a PruneSchedule, or merge the "
        "tokens of a vim_* model"
    )
