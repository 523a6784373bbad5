"""VMamba for dense prediction: its four stages are the levels, each with a norm of its own.

Source: the numbers of the public code of Liu et al., arXiv:2401.10166, segmentation and
detection. Hierarchical, so dense only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor, nn

from vssm.models.base import BlockCost, ImageSized, blocks_of_stages, refuse_schedule
from vssm.models.dense.base import DenseModel, Levels
from vssm.models.dense.detector import BoxHead, CocoDetector
from vssm.models.dense.regions import DetectionRules
from vssm.models.dense.segmenter import Segmenter
from vssm.models.layers import LayerNorm, to_map
from vssm.models.vmamba import (
    NORM_EPS,
    VMambaBlock,
    VMambaConfig,
    VMambaStage,
    adapt_keys,
    block_costs,
    embed,
    map_cost,
    patch_embed,
    stays_wide,
)
from vssm.pruning.schedule import Schedule

_BACKBONE = "backbone."


@dataclass(frozen=True)
class VMambaBackboneConfig(ImageSized):
    """The backbone's switches under this package's names; the defaults are those of VMamba-T."""

    image_size: int | tuple[int, int] = 512
    depths: tuple[int, ...] = (2, 2, 8, 2)
    d_model: int = 96
    d_state: int = 1
    expand: float = 1.0
    dt_rank: int | None = None
    conv_bias: bool = False
    gate: bool = False
    mlp_ratio: float = 4.0
    patch_embed: str = "v2"
    downsample: str = "v3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != 4:
            raise ValueError(
                f"depths={list(self.depths)} are not four stages, whose ends the head reads; give "
                "the blocks of four"
            )
        # For its errors alone.
        _ = self.vmamba

    @property
    def vmamba(self) -> VMambaConfig:
        """The stages' sizes as a classifier has them."""
        names = [f.name for f in fields(VMambaBackboneConfig)]
        return VMambaConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class VMambaSegmenterConfig(VMambaBackboneConfig):
    """The backbone, and the widths of the heads."""

    head_width: int = 512
    auxiliary_width: int = 256
    num_classes: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("head_width", "auxiliary_width", "num_classes")


class VMambaBackbone(nn.Module):
    """Patches and stages under their official keys, and a norm `outnorm{i}` at each stage's end."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.ModuleDict(patch_embed(config))
        stages = range(len(config.depths))
        self.layers = nn.ModuleList(VMambaStage(config, stage) for stage in stages)
        for stage in stages:
            self.add_module(f"outnorm{stage}", LayerNorm(config.width(stage), eps=NORM_EPS))

    def levels(self, images: Tensor, with_blocks: bool) -> Levels:
        """The maps `level0` to `level3`, finest first, and what each block returned."""
        x = embed(self.patch_embed, images, self.config.image_height_width)
        levels: dict[str, Tensor] = {}
        blocks: list[tuple[Tensor, Tensor | None]] = []
        for number, (stage, grid) in enumerate(zip(self.layers, self.config.grids, strict=True)):
            x, streams = stage(x)
            # Before its downsampling, which goes on from the stream without this norm.
            normed = self.get_submodule(f"outnorm{number}")(streams[-1])
            levels[f"level{number}"] = to_map(normed, grid)
            blocks += [(stream, None) for stream in streams if with_blocks]
        return Levels(levels, [], blocks)


class VMambaDense(DenseModel):
    """What a VMamba with a dense head is, whatever the head; it cannot be pruned."""

    config: VMambaBackboneConfig
    residual_stream = False
    published_directions = 4

    def __init__(
        self, config: VMambaBackboneConfig, schedule: Schedule | None, *, name: str
    ) -> None:
        super().__init__()
        refuse_schedule("VMamba", schedule)
        self.name, self.config, self.schedule = name, config, None
        self.image_size, self.traced_blocks = config.image_height_width, config.vmamba.depth
        self.layout, self.stages = None, {}
        self.backbone = VMambaBackbone(config.vmamba)

    def stays_wide(self, name: str) -> bool:
        """Norms, what the scan takes as float32, and what is folded with a norm."""
        return super().stays_wide(name) or stays_wide(self, name)

    def block_costs(self) -> list[tuple[int, BlockCost]]:
        """Tokens and cost by token of every block; gate and norms are not counted."""
        return block_costs(self.config.vmamba)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old names in the backbone, and 1x1 convolutions as linears.

        Raises:
            CheckpointError: two entries come to one name.
        """
        inner = {k.removeprefix(_BACKBONE): v for k, v in state.items() if k.startswith(_BACKBONE)}
        outer = {key: value for key, value in state.items() if not key.startswith(_BACKBONE)}
        adapted = adapt_keys(inner, self.config.vmamba.grids[0])
        return {**{_BACKBONE + key: value for key, value in adapted.items()}, **outer}


class VMambaSegmenter(VMambaDense, Segmenter):
    """VMamba with UPerNet, under the keys of the official segmentation code.

    Args:
        config: architecture.
        schedule: must be None.
        name: for reports and model.json.

    Raises:
        UnsupportedError: there is a schedule.
    """

    config: VMambaSegmenterConfig
    auxiliary_level = 2
    own_parts = ("outnorm",)
    classifier_parts = ("classifier.", "head.", "norm.")  # the last two in older files

    def __init__(
        self,
        config: VMambaSegmenterConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "vmamba_segmenter",
    ) -> None:
        super().__init__(config, schedule, name=name)
        sizes, self.num_classes = config.vmamba, config.num_classes
        self.feature_names = tuple(f"level{i}" for i in range(len(config.depths)))
        self.level_sizes = sizes.grids
        widths = tuple(map(sizes.width, range(len(config.depths))))
        self._add_heads(widths, config.head_width, config.auxiliary_width)

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """The blocks of every stage on the grid of that stage."""
        return blocks_of_stages(self, VMambaBlock, self.config.vmamba.grids, self.config.depths)

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        return self.backbone.levels(images, with_blocks)

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding, the downsampling and the head."""
        return map_cost(self.config.vmamba) + self.head_cost()

    def adapt_classifier(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old names, and 1x1 convolutions as linears.

        Raises:
            CheckpointError: two entries come to one name.
        """
        return adapt_keys(state, self.config.vmamba.grids[0])


@dataclass(frozen=True)
class VMambaDetectorConfig(VMambaBackboneConfig, DetectionRules):
    """The backbone, the widths of the neck and of the heads that read regions, and what is told."""

    image_size: int | tuple[int, int] = (800, 1344)
    neck_width: int = 256
    region_width: int = 1024
    num_classes: int = 80

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rules()
        self.check_positive("neck_width", "region_width", "num_classes")


class VMambaDetector(VMambaDense, CocoDetector):
    """VMamba with Mask R-CNN, under the keys of the official detection code.

    Args:
        config: architecture.
        schedule: must be None.
        name: for reports and model.json.

    Raises:
        UnsupportedError: there is a schedule.
    """

    config: VMambaDetectorConfig

    def __init__(
        self,
        config: VMambaDetectorConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "vmamba_detector",
    ) -> None:
        super().__init__(config, schedule, name=name)
        sizes, self.num_classes = config.vmamba, config.num_classes
        box = BoxHead(
            config.neck_width,
            convs=0,
            linears=2,
            width=config.region_width,
            num_classes=config.num_classes,
        )
        widths = tuple(map(sizes.width, range(len(config.depths))))
        self._add_mask_rcnn(widths, sizes.grids, box, norm=False)

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        found = self.backbone.levels(images, with_blocks)
        maps = list(found.tensors.values())
        return replace(found, tensors={**found.tensors, **self._pyramid(maps)})

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding, the downsampling, the neck and the dense head."""
        return map_cost(self.config.vmamba) + self.neck_cost() + self.head_cost()
