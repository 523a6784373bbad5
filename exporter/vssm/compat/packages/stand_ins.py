"""The few names that upstream's model files take from timm 0.4, mmcv 1.x, mmcls and others.

Only what builds and runs a model for inference. Used where the package is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import UnsupportedError


class Empty:
    """A base class without anything."""


class DropPath(nn.Module):
    """Stochastic depth: an identity at inference.

    Raises:
        UnsupportedError: it is run in training mode with a probability above 0.
    """

    def __init__(self, drop_prob: float | None = None, *_: Any, **__: Any) -> None:
        super().__init__()
        # timm and mmcv take None for "never".
        self.drop_prob = drop_prob or 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return x itself."""
        # An identity here would train another model than the one that was asked for.
        if self.training and self.drop_prob:
            raise UnsupportedError(
                "DropPath in training mode: vssm.compat stands in for timm and mmcv at "
                "inference only; call model.eval(), or install the package"
            )
        return x


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (batch, channels, height, width)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.LayerNorm has
        """The normed map."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """timm's two linear layers with an activation between them."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        # Newer releases have `norm_layer`, `bias` and `use_conv`, each of which changes the
        # function.
        if options:
            raise UnsupportedError(f"Mlp: {sorted(options)} unknown to this stand-in; install timm")
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class BaseModule(nn.Module):
    """mmcv's base module; `init_cfg` is kept and not acted upon."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()
        # It can name a checkpoint to download, which an export must not do on its own.
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Do nothing: weights come from a checkpoint."""


class BaseBackbone(BaseModule):
    """mmcls's base of the backbones."""


class ModuleList(BaseModule, nn.ModuleList):
    """mmcv's module list."""

    def __init__(self, modules: Any = None, init_cfg: Any = None) -> None:
        # One by one: `super().__init__` would hand both arguments to the first base alone.
        BaseModule.__init__(self, init_cfg)
        nn.ModuleList.__init__(self, modules)


class AdaptivePadding(nn.Module):
    """mmcv's zero padding up to a multiple of the stride, "corner": at the bottom and right."""

    def __init__(
        self,
        kernel_size: Any = 1,
        stride: Any = 1,
        dilation: Any = 1,
        padding: str = "corner",
    ) -> None:
        super().__init__()
        if padding != "corner":
            raise UnsupportedError(f"padding={padding!r}: this stand-in knows 'corner'; use mmcv")
        self.kernel_size, self.stride = to_2tuple(kernel_size), to_2tuple(stride)
        self.dilation = to_2tuple(dilation)

    def get_pad_shape(self, input_shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns to add to (height, width)."""
        added = []
        for size, kernel, stride, dilation in zip(
            input_shape, self.kernel_size, self.stride, self.dilation, strict=True
        ):
            # mmcv's own rule: the last window that begins inside the map has to fit.
            reach = (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1
            added.append(max(reach - size, 0))
        return added[0], added[1]

    def forward(self, x: Tensor) -> Tensor:
        """The map x (batch, channels, height, width), padded."""
        rows, columns = self.get_pad_shape((x.shape[-2], x.shape[-1]))
        return functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


class Registry:
    """mmcv's registry: keeps the classes by name."""

    def __init__(self, name: str, **_: Any) -> None:
        self.name = name
        self.classes: dict[str, Any] = {}

    # Called as a decorator with and without a name, while files are imported; nothing is ever built
    # by name here.
    def register_module(self, *_: Any, **__: Any) -> Callable[[Any], Any]:
        """A decorator that keeps the class and returns it."""

        def keep(cls: Any) -> Any:
            self.classes[cls.__name__] = cls
            return cls

        return keep


def to_2tuple(x: Any) -> tuple[Any, Any]:
    """A pair: x twice, or x where it is a pair."""
    return tuple(x) if isinstance(x, tuple | list) else (x, x)


def register_model(function: Any) -> Any:
    """The decorator of timm: the function as it is."""
    return function


def default_config(url: str = "", **options: Any) -> dict[str, Any]:
    """The model description of timm."""
    return {"url": url, **options}


def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Tensor:
    """The truncated normal initialiser of timm and mmcv."""
    return nn.init.trunc_normal_(tensor, mean, std, a, b)


def lecun_normal_(tensor: Tensor) -> Tensor:
    """The initialiser of timm: normal, variance one over the inputs."""
    fan_in = nn.init._calculate_fan_in_and_fan_out(tensor)[0]
    # 0.8796 is the deviation of a standard normal that is cut off at two: timm makes up for the
    # cut.
    return nn.init.trunc_normal_(tensor, std=math.sqrt(1 / fan_in) / 0.87962566103423978)


def build_norm_layer(cfg: dict[str, Any], width: int, postfix: Any = "") -> tuple[str, nn.Module]:
    """A norm of mmcv by description: "LN" alone, named ln and its postfix."""
    options = dict(cfg)
    kind = options.pop("type")
    if kind != "LN":
        raise UnsupportedError(f"norm type={kind!r}: this stand-in knows 'LN'; install mmcv 1.x")
    # It says whether the norm is trained, nothing about its numbers.
    options.pop("requires_grad", None)
    # The name goes into the checkpoint's keys, and 1e-5 is mmcv's default.
    return f"ln{postfix}", nn.LayerNorm(width, **{"eps": 1e-5, **options})


def build_dropout(cfg: dict[str, Any]) -> nn.Module:
    """A dropout of mmcv by description: "DropPath" alone."""
    if cfg.get("type") != "DropPath":
        raise UnsupportedError(f"dropout {cfg}: this stand-in knows DropPath; install mmcv 1.x")
    return DropPath(cfg.get("drop_prob", 0.1))


def resize_pos_embed(
    pos_embed: Tensor, src: Any, dst: Any, mode: str = "bicubic", num_extra_tokens: int = 0
) -> Tensor:
    """As mmcls does, resize a position table (1, tokens, width) from grid `src` to `dst`."""
    if tuple(src) == tuple(dst):
        return pos_embed
    extra, grid = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    maps = grid.reshape(1, src[0], src[1], -1).permute(0, 3, 1, 2)
    maps = functional.interpolate(maps, size=tuple(dst), align_corners=False, mode=mode)
    return torch.cat([extra, maps.flatten(2).transpose(1, 2)], dim=1)


def triton_jit(*args: Any, **_: Any) -> Any:
    """triton.jit: keeps the kernel's source unread; the result cannot be launched."""
    # `@triton.jit`, or `@triton.jit(...)` and `@triton.autotune([...])`, which return the
    # decorator.
    if args and callable(args[0]):
        return Kernel(getattr(args[0], "__name__", "kernel"))
    return triton_jit


class Kernel:
    """A Triton kernel that cannot run here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Any:
        raise UnsupportedError(
            f"Triton kernel {self.name}: vssm.compat stands in for triton, which is not "
            "installed and could not be exported; replace the function that launches it "
            "(docs/compat.md)"
        )
