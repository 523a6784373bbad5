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
    """Stochastic depth: an identity at inference; in training whole samples are left out.

    Args:
        drop_prob: how often; None for never, as timm and mmcv take it.
        scale_by_keep: divide what is kept, so that the mean stays.
    """

    def __init__(
        self, drop_prob: float | None = None, scale_by_keep: bool = True, *_: Any, **__: Any
    ) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob or 0.0, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """X, or zeros in the place of a sample."""
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *_: Any,
    **__: Any,
) -> Tensor:
    """The function of `DropPath`."""
    if not training or not drop_prob:
        return x
    kept = torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device) >= drop_prob
    return x * kept / (1 - drop_prob) if scale_by_keep else x * kept


class PatchEmbed(nn.Module):
    """timm's patches of an image: a convolution whose stride is its size, and a norm."""

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        flatten: bool = True,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        # Such as `output_fmt`, which changes what comes out.
        if options:
            raise UnsupportedError(
                f"PatchEmbed: {sorted(options)} unknown to this stand-in; install timm"
            )
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten, self.dynamic_img_pad = flatten, dynamic_img_pad
        self.strict_img_size = strict_img_size and not dynamic_img_pad
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to tokens (batch, tokens, width), or maps."""
        # As timm has it: a position table behind it has this many rows.
        if self.strict_img_size and tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"PatchEmbed: images of {tuple(x.shape[-2:])}, made for {self.img_size}; give "
                "img_size to the model"
            )
        if self.dynamic_img_pad:
            below, right = (-x.shape[d] % p for d, p in zip((-2, -1), self.patch_size, strict=True))
            x = functional.pad(x, (0, right, 0, below))
        x = self.proj(x)
        out: Tensor = self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x)
        return out


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


class ConvPatchEmbed(BaseModule):
    """mmcv's patches of an image: a convolution over a map that is padded where it has to be."""

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 768,
        conv_type: str = "Conv2d",
        kernel_size: int = 16,
        stride: int = 16,
        padding: Any = "corner",
        dilation: int = 1,
        bias: bool = True,
        norm_cfg: dict[str, Any] | None = None,
        input_size: Any = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        if conv_type != "Conv2d":
            raise UnsupportedError(f"conv_type={conv_type!r}: this stand-in knows 'Conv2d'")
        self.embed_dims = embed_dims
        pads = isinstance(padding, str)
        sizes = (kernel_size, stride, dilation)
        self.adaptive_padding = AdaptivePadding(*sizes, padding=padding) if pads else None
        self.projection = nn.Conv2d(
            in_channels,
            embed_dims,
            kernel_size,
            stride,
            0 if pads else padding,
            dilation,
            bias=bias,
        )
        self.norm = build_norm_layer(norm_cfg, embed_dims)[1] if norm_cfg else None
        self.init_input_size = self.init_out_size = None
        if input_size is not None:
            self.init_input_size = to_2tuple(input_size)
            # As a model asks for its number of patches before there is an image.
            empty = torch.empty(1, in_channels, *self.init_input_size, device="meta")
            padded = self.adaptive_padding(empty) if self.adaptive_padding else empty
            reach = [dilation * (k - 1) + 1 for k in self.projection.kernel_size]
            extra = [2 * int(p) for p in self.projection.padding]
            self.init_out_size = tuple(
                (size + e - r) // s + 1
                for size, e, r, s in zip(
                    padded.shape[2:], extra, reach, self.projection.stride, strict=True
                )
            )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images to tokens (batch, tokens, width), and the height and width of their map."""
        x = self.projection(self.adaptive_padding(x) if self.adaptive_padding else x)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        return (x if self.norm is None else self.norm(x)), size


class Registry:
    """The registry of mmcv, mmengine and fvcore: keeps the classes by name."""

    def __init__(self, name: str = "registry", *_: Any, **__: Any) -> None:
        self.name = name
        self.classes: dict[str, Any] = {}

    # Called as a decorator with and without a name, or with the class itself, while files are
    # imported; nothing is ever built by name here.
    def register_module(self, *_: Any, module: Any = None, **__: Any) -> Any:
        """A decorator that keeps the class and returns it; of `module=`, the class."""
        return self.register(module) if module is not None else self.register

    def register(self, cls: Any = None) -> Any:
        """Keep a class; without one, a decorator that does."""
        if cls is None:
            return self.register
        self.classes[cls.__name__] = cls
        return cls


def to_2tuple(x: Any) -> tuple[Any, Any]:
    """A pair: x twice, or x where it is a pair."""
    return tuple(x) if isinstance(x, tuple | list) else (x, x)


def to_ntuple(n: int) -> Callable[[Any], tuple[Any, ...]]:
    """timm's: a function that makes a tuple of `n` times x, or x itself where it is a sequence."""
    return lambda x: tuple(x) if isinstance(x, tuple | list) else (x,) * n


def register_model(function: Any) -> Any:
    """The decorator of timm: the function as it is."""
    return function


def build_model_with_cfg(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    default_cfg: Any = None,
    *,
    pretrained_cfg: Any = None,
    pretrained_filter_fn: Any = None,
    pretrained_strict: bool = True,
    feature_cfg: Any = None,
    features_only: bool = False,
    kwargs_filter: Any = None,
    **options: Any,
) -> nn.Module:
    """The model that timm's builder makes, without its downloads.

    Raises:
        UnsupportedError: weights are to be downloaded, or features to be taken out.
    """
    if pretrained or features_only:
        raise UnsupportedError(
            f"{variant}: pretrained={pretrained}, features_only={features_only}, but this is a "
            "stand-in for timm; build the plain model, and give its weights with --checkpoint"
        )
    model = model_cls(**options)
    model.default_cfg = model.pretrained_cfg = pretrained_cfg or default_cfg
    return model


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
