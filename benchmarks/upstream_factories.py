"""Factories of a few lines for public models that need a configuration object, or two inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Around(nn.Module):
    """A part of a model, behind a stem, or with its further inputs given."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.stem = nn.Conv2d(3, 16, 4, 4) if kind == "stem" else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        """The logits, or what the part gives."""
        if self.kind == "pair":
            return self.model(x, x.flip(-1))
        if self.kind == "time":
            return self.model(x, torch.full((x.shape[0],), 0.5))
        if self.kind == "detector":
            return self.model(x)[0]
        return self.model(self.stem(x))


def transformers_mamba(**options: Any) -> nn.Module:
    """Transformers' MambaModel."""
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, use_cache=False, **options
    )
    return MambaModel(config)


def transformers_mamba2() -> nn.Module:
    """Transformers' Mamba2Model."""
    from transformers import Mamba2Config, Mamba2Model

    return Mamba2Model(
        Mamba2Config(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            use_cache=False,
            head_dim=16,
            num_heads=4,
            state_size=16,
            n_groups=1,
        )
    )


def mamba_minimal() -> nn.Module:
    """mamba-minimal's language model."""
    import model

    return model.Mamba(model.ModelArgs(d_model=16, n_layer=2, vocab_size=24))


def mamba_py(vision: bool = False) -> nn.Module:
    """mamba.py's stack, or its Vim's."""
    if vision:
        from mambapy.vim import MambaConfig, VMamba

        return VMamba(MambaConfig(d_model=32, n_layers=2))
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=32, n_layers=2))


def zigma() -> nn.Module:
    """Zigma at one time step."""
    from model_zigma import ZigMa

    model = ZigMa(
        in_channels=4, embed_dim=32, depth=2, img_dim=8, patch_size=2, scan_type="v2", use_pe=2
    )
    return _Around(model, "time")


def change_mamba(**options: Any) -> nn.Module:
    """ChangeMamba's binary change detection; the second image is the first, mirrored."""
    from changedetection.models.ChangeMambaBCD import ChangeMambaBCD

    return _Around(ChangeMambaBCD(None, **options), "pair")


def mamba_yolo() -> nn.Module:
    """Mamba-YOLO's smallest detector, its decoded boxes and classes."""
    from pathlib import Path

    import ultralytics
    from ultralytics.nn.tasks import DetectionModel

    file = next(Path(ultralytics.__file__).parent.rglob("Mamba-YOLO-T.yaml"))
    return _Around(DetectionModel(str(file), verbose=False), "detector")


def u_mamba(dims: int = 2) -> nn.Module:
    """U-Mamba with a Mamba layer in its bottleneck, for images or volumes."""
    from importlib import import_module

    net = import_module(f"nnunetv2.nets.UMambaBot_{dims}d")
    convolution, norm = (
        (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    )
    return net.UMambaBot(
        1,
        3,
        [8, 16, 32],
        convolution,
        [[3] * dims] * 3,
        [[1] * dims, [2] * dims, [2] * dims],
        [1, 1, 1],
        2,
        [1, 1],
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def light_m_unet(dims: int = 2) -> nn.Module:
    """LightM-UNet, for images or volumes."""
    from nnunetv2.nets.LightMUNet import LightMUNet

    return LightMUNet(
        spatial_dims=dims,
        init_filters=8,
        in_channels=1,
        out_channels=2,
        blocks_down=[1, 1, 1, 1],
        blocks_up=[1, 1, 1],
    )
