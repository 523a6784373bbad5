"""Factories of a few lines for public models that need a configuration object, or are a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Boxes(nn.Module):
    """A detector without the maps that it returns beside its boxes, for its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """The decoded boxes and classes."""
        return self.model(x)[0]


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
    """Zigma, of a latent image and a time step."""
    from model_zigma import ZigMa

    return ZigMa(
        in_channels=4, embed_dim=32, depth=2, img_dim=8, patch_size=2, scan_type="v2", use_pe=2
    )


def change_mamba(**options: Any) -> nn.Module:
    """ChangeMamba's binary change detection, of two images."""
    from changedetection.models.ChangeMambaBCD import ChangeMambaBCD

    return ChangeMambaBCD(None, **options)


def mamba_yolo() -> nn.Module:
    """Mamba-YOLO's smallest detector, its decoded boxes and classes."""
    from pathlib import Path

    import ultralytics
    from ultralytics.nn.tasks import DetectionModel

    file = next(Path(ultralytics.__file__).parent.rglob("Mamba-YOLO-T.yaml"))
    return _Boxes(DetectionModel(str(file), verbose=False))


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


def caduceus(both_strands: bool = False) -> nn.Module:
    """Caduceus' stack, over one strand of DNA or over both."""
    from caduceus.configuration_caduceus import CaduceusConfig
    from caduceus.modeling_caduceus import Caduceus

    config = CaduceusConfig(
        d_model=32,
        n_layer=2,
        vocab_size=12,
        ssm_cfg={"d_state": 8},
        pad_vocab_size_multiple=1,
        rcps=both_strands,
        complement_map={token: token * 7 % 12 for token in range(12)},
    )
    return Caduceus(config)


def mamba_tiny() -> nn.Module:
    """mamba-tiny's language model, whose scan is a cumulative sum of logarithms."""
    import model

    options = {"d_model": 16, "n_layer": 2, "vocab_size": 24, "scan_mode": "logcumsumexp"}
    return model.Mamba(model.ModelArgs(**options))
