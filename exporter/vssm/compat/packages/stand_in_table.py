"""Which module of an absent package has which stand-in."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from vssm.compat.packages import stand_ins
from vssm.compat.packages.provided import not_supported
from vssm.compat.packages.stand_ins import Registry

_INSTALL: Final = "this is a stand-in with the names that upstream's model files import; install it"


def _refused(package: str, *names: str) -> dict[str, Any]:
    return {name: not_supported(f"{package}.{name}", _INSTALL) for name in names}


_LAYERS: Final[dict[str, Any]] = {
    "DropPath": stand_ins.DropPath,
    "LayerNorm2d": stand_ins.LayerNorm2d,
    "Mlp": stand_ins.Mlp,
    "to_2tuple": stand_ins.to_2tuple,
    "trunc_normal_": stand_ins.trunc_normal_,
    "lecun_normal_": stand_ins.lecun_normal_,
}
# What is imported and never called for inference may be imported; a call says what to install.
_TIMM: Final = _refused("timm", "create_model")
_VIT: Final[dict[str, Any]] = {
    "_cfg": stand_ins.default_config,
    "Mlp": stand_ins.Mlp,
    **_refused("timm.models.vision_transformer", "VisionTransformer", "_load_weights"),
    **_refused("timm.models.vision_transformer", "PatchEmbed"),
}
_BUILDER: Final = _refused(
    "timm.models._builder",
    *("resolve_pretrained_cfg", "_update_default_kwargs", "_update_default_model_kwargs"),
    "build_model_with_cfg",
)
_TRANSFORMER: Final[dict[str, Any]] = {
    "AdaptivePadding": stand_ins.AdaptivePadding,
    "build_dropout": stand_ins.build_dropout,
}
_MMCV_UTILS: Final[dict[str, Any]] = {"to_2tuple": stand_ins.to_2tuple, "Registry": Registry}
_BASE: Final[dict[str, Any]] = {
    "BaseModule": stand_ins.BaseModule,
    "ModuleList": stand_ins.ModuleList,
    "Sequential": nn.Sequential,
}
_CNN: Final[dict[str, Any]] = {
    "build_norm_layer": stand_ins.build_norm_layer,
    "MODELS": Registry("models"),
    **_refused("mmcv.cnn", "build_conv_layer"),
}
_MMCLS_UTILS: Final[dict[str, Any]] = {
    "resize_pos_embed": stand_ins.resize_pos_embed,
    "to_2tuple": stand_ins.to_2tuple,
}
STAND_INS: Final[dict[str, dict[str, Any]]] = {
    "timm": _TIMM,
    "timm.layers": _LAYERS,
    "timm.models": {},
    # timm moved its layers: 0.4 has them here, newer releases in timm.layers.
    "timm.models.layers": _LAYERS,
    "timm.models.registry": {"register_model": stand_ins.register_model},
    "timm.models.vision_transformer": _VIT,
    "timm.models._builder": _BUILDER,
    "fvcore": {},
    "fvcore.nn": _refused(
        "fvcore.nn", "FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"
    ),
    # A mixin that downloads; mamba_ssm's Mamba2 inherits from it.
    "huggingface_hub": {"PyTorchModelHubMixin": stand_ins.Empty},
    "triton": {
        "jit": stand_ins.triton_jit,
        "heuristics": stand_ins.triton_jit,
        "autotune": stand_ins.triton_jit,
        # Takes what `triton.Config({...}, num_warps=4)` is called with when the file is imported.
        "Config": dict,
    },
    # Python evaluates the annotations of a kernel's arguments on import.
    "triton.language": {"constexpr": object, "tensor": object},
    "mmcv": {"__version__": "1.7.0"},
    "mmcv.cnn": _CNN,
    "mmcv.cnn.utils": {},
    "mmcv.cnn.utils.weight_init": {"trunc_normal_": stand_ins.trunc_normal_},
    "mmcv.cnn.bricks": {},
    "mmcv.cnn.bricks.transformer": _TRANSFORMER,
    "mmcv.runner": _BASE,
    "mmcv.runner.base_module": _BASE,
    "mmcv.utils": _MMCV_UTILS,
}
# The user's repository has these packages, and files in them that need what is not there.
SHELLS: Final[dict[str, dict[str, Any]]] = {
    "mmcls": {},
    "mmcls.models": {},
    "mmcls.models.builder": {"BACKBONES": Registry("backbone")},
    "mmcls.models.utils": _MMCLS_UTILS,
    "mmcls.models.backbones": {},
    "mmcls.models.backbones.base_backbone": {"BaseBackbone": stand_ins.BaseBackbone},
}
