"""Which module of an absent package has which stand-in.

Only what builds a model and runs it is there. Every other name may be imported, as files import
much that inference never calls; a call says what to install.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from vssm.compat.packages import stand_ins
from vssm.compat.packages.stand_ins import Registry

_LAYERS: Final[dict[str, Any]] = {
    "DropPath": stand_ins.DropPath,
    "drop_path": stand_ins.drop_path,
    "LayerNorm2d": stand_ins.LayerNorm2d,
    "Mlp": stand_ins.Mlp,
    "PatchEmbed": stand_ins.PatchEmbed,
    "to_2tuple": stand_ins.to_2tuple,
    "to_ntuple": stand_ins.to_ntuple,
    "trunc_normal_": stand_ins.trunc_normal_,
    "lecun_normal_": stand_ins.lecun_normal_,
}
_VIT: Final[dict[str, Any]] = {
    "_cfg": stand_ins.default_config,
    "Mlp": stand_ins.Mlp,
    "PatchEmbed": stand_ins.PatchEmbed,
}
_REGISTER: Final[dict[str, Any]] = {"register_model": stand_ins.register_model}
_BUILDER: Final[dict[str, Any]] = {"build_model_with_cfg": stand_ins.build_model_with_cfg}
_MEANS: Final[dict[str, Any]] = {
    "IMAGENET_DEFAULT_MEAN": (0.485, 0.456, 0.406),
    "IMAGENET_DEFAULT_STD": (0.229, 0.224, 0.225),
    "IMAGENET_INCEPTION_MEAN": (0.5, 0.5, 0.5),
    "IMAGENET_INCEPTION_STD": (0.5, 0.5, 0.5),
}
_TRANSFORMER: Final[dict[str, Any]] = {
    "AdaptivePadding": stand_ins.AdaptivePadding,
    "PatchEmbed": stand_ins.ConvPatchEmbed,
    "build_dropout": stand_ins.build_dropout,
}
_UTILS: Final[dict[str, Any]] = {"to_2tuple": stand_ins.to_2tuple, "Registry": Registry}
_BASE: Final[dict[str, Any]] = {
    "BaseModule": stand_ins.BaseModule,
    "ModuleList": stand_ins.ModuleList,
    "Sequential": nn.Sequential,
}
_WEIGHTS: Final[dict[str, Any]] = {"trunc_normal_": stand_ins.trunc_normal_}
_CNN: Final[dict[str, Any]] = {"build_norm_layer": stand_ins.build_norm_layer, **_WEIGHTS}
_MMCLS_UTILS: Final[dict[str, Any]] = {
    "resize_pos_embed": stand_ins.resize_pos_embed,
    "to_2tuple": stand_ins.to_2tuple,
}
# The packages that may be absent; each of their modules that is not listed below has no names.
ABSENT: Final = frozenset(
    {
        *("timm", "torchvision", "fvcore", "triton", "mmcv", "mmengine", "huggingface_hub"),
        # Files of models import these to count what they cost.
        *("thop", "ptflops", "calflops", "torchinfo", "torchsummary"),
    }
)
# Installed packages look for these, and would go on to call them.
LOOKED_FOR: Final = frozenset({"triton", "torchvision"})
# timm moved its layers, its registry and its builder: 0.4 and newer releases have other names.
STAND_INS: Final[dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("timm.layers", "timm.models.layers"), _LAYERS),
    **{
        f"timm.{place}.{file}": _LAYERS
        for place in ("layers", "models.layers")
        for file in ("helpers", "drop", "mlp", "patch_embed", "weight_init", "norm")
    },
    "timm.models": {**_REGISTER, **_BUILDER},
    **dict.fromkeys(("timm.models.registry", "timm.models._registry"), _REGISTER),
    **dict.fromkeys(("timm.models.helpers", "timm.models._builder"), _BUILDER),
    "timm.models.vision_transformer": _VIT,
    # A mixin that downloads; mamba_ssm's Mamba2 inherits from it.
    "huggingface_hub": {"PyTorchModelHubMixin": stand_ins.Empty},
    **dict.fromkeys(("timm.data", "timm.data.constants"), _MEANS),
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
    "mmcv.cnn.utils.weight_init": _WEIGHTS,
    "mmcv.cnn.bricks.transformer": _TRANSFORMER,
    "mmcv.runner": _BASE,
    "mmcv.runner.base_module": _BASE,
    "mmcv.utils": _UTILS,
    "mmengine.model": {**_BASE, **_WEIGHTS},
    "mmengine.registry": _UTILS,
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
