"""The models as data: names, options and sizes, known without torch.

Importing torch takes seconds, so `vssm models`, and a wrong name or option, are answered from
these tables. tests/models/test_catalogue.py holds them against the models as they are built.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args, get_origin

from vssm.errors import did_you_mean


@dataclass(frozen=True)
class ModelCard:
    """A model at its standard configuration.

    Attributes:
        family: key of `OPTIONS`.
        changes: what the name changes in the family's configuration.
        parameters: numbers that are trained.
        stage_tokens: tokens of the blocks in order, repeats left out.
        flops_published: multiply-adds of one image by the published rule.
        flops_true: with every scan direction counted.
        image_size: (height, width) in pixels.
        task: "classification", "segmentation" or "detection".
        num_classes: width of the logits.
    """

    family: str
    changes: Mapping[str, Any]
    parameters: int
    stage_tokens: tuple[int, ...]
    flops_published: int
    flops_true: int
    image_size: tuple[int, int] = (224, 224)
    task: str = "classification"
    num_classes: int = 1000


_VANILLA: Final[dict[str, Any]] = {
    "d_state": 16,
    "expand": 2.0,
    "conv_bias": True,
    "gate": True,
    "mlp_ratio": 0.0,
    "patch_embed": "v1",
    "downsample": "v1",
}
_MAPS: Final = (3136, 784, 196, 49)  # of a hierarchical model at 224 pixels
_MAPS_512: Final = (16384, 4096, 1024, 256)
_MAPS_COCO: Final = (67200, 16800, 4200, 1050)  # at 800 x 1344


def _vim(changes: dict[str, Any], *figures: int, tokens: int = 197) -> ModelCard:
    parameters, published, true = figures
    # Vim alone has two counts: the published rule leaves its second direction out.
    return ModelCard("vim", changes, parameters, (tokens,), published, true)


def _plain(changes: dict[str, Any], parameters: int, flops: int) -> ModelCard:
    return ModelCard("plain_mamba", changes, parameters, (196,), flops, flops)


def _vmamba(changes: dict[str, Any], parameters: int, flops: int) -> ModelCard:
    return ModelCard("vmamba", changes, parameters, _MAPS, flops, flops)


def _group(changes: dict[str, Any], parameters: int, flops: int) -> ModelCard:
    # The class block works on one token.
    return ModelCard("groupmamba", changes, parameters, (*_MAPS, 1), flops, flops)


_PLAIN_SIZES: Final[dict[str, dict[str, Any]]] = {
    "l1": {"d_model": 192, "stem_convs": 1, "layers_with_dwconv": (0,)},
    "l2": {"d_model": 384},
    "l3": {"d_model": 448, "depth": 36},
}
_L3_ADAPTER: Final = {**_PLAIN_SIZES["l3"], "groups": (9, 18, 27, 36), "attention_heads": 8}


def _detector(
    family: str,
    changes: dict[str, Any],
    *figures: int,
    tokens: tuple[int, ...] = (4200,),
    image_size: tuple[int, int] = (800, 1344),
) -> ModelCard:
    parameters, published, true = figures
    return ModelCard(
        f"{family}_detector",
        changes,
        parameters,
        tokens,
        published,
        true,
        image_size=image_size,
        task="detection",
        num_classes=80,
    )


def _segmenter(
    family: str,
    changes: dict[str, Any],
    *figures: int,
    tokens: tuple[int, ...] = (1024,),
) -> ModelCard:
    parameters, published, true = figures
    return ModelCard(
        f"{family}_segmenter",
        changes,
        parameters,
        tokens,
        published,
        true,
        image_size=(512, 512),
        task="segmentation",
        num_classes=150,
    )


MODELS: Final[dict[str, ModelCard]] = {
    "vim_tiny": _vim({"d_model": 192}, 7_148_008, 1_448_855_040, 1_822_858_752),
    "vim_small": _vim({"d_model": 384}, 25_796_584, 5_076_372_480, 5_911_526_400),
    "vim_base": _vim({"d_model": 768}, 97_598_440, 18_867_394_560, 20_886_288_384),
    "vim_tiny_stride8": _vim(
        {"d_model": 192, "stride": 8}, 7_250_344, 5_368_733_184, 6_754_635_264, tokens=730
    ),
    "vim_small_stride8": _vim(
        {"d_model": 384, "stride": 8}, 26_001_256, 18_810_682_368, 21_905_415_168, tokens=730
    ),
    "plain_mamba_l1": _plain(_PLAIN_SIZES["l1"], 7_551_656, 3_014_703_360),
    "plain_mamba_l2": _plain(_PLAIN_SIZES["l2"], 26_145_832, 8_078_318_592),
    "plain_mamba_l3": _plain(_PLAIN_SIZES["l3"], 50_956_456, 14_439_294_464),
    "vmamba_tiny_s1l8": _vmamba({"depths": (2, 2, 8, 2)}, 30_249_064, 4_875_843_072),
    "vmamba_tiny_s2l5": _vmamba({"depths": (2, 2, 5, 2), "expand": 2.0}, 30_705_832, 4_824_588_288),
    "vmamba_small_s2l15": _vmamba(
        {"depths": (2, 2, 15, 2), "expand": 2.0}, 50_147_752, 8_667_568_128
    ),
    "vmamba_small_s1l20": _vmamba({"depths": (2, 2, 20, 2)}, 49_012_840, 8_568_897_024),
    "vmamba_base_s2l15": _vmamba(
        {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0}, 88_557_800, 15_294_668_800
    ),
    "vmamba_base_s1l20": _vmamba(
        {"depths": (2, 2, 20, 2), "d_model": 128}, 86_614_504, 15_163_107_328
    ),
    "vanilla_vmamba_tiny": _vmamba({**_VANILLA, "depths": (2, 2, 9, 2)}, 22_893_448, 5_597_700_096),
    "vanilla_vmamba_small": _vmamba(
        {**_VANILLA, "depths": (2, 2, 27, 2)}, 44_417_416, 11_181_987_840
    ),
    "vanilla_vmamba_base": _vmamba(
        {**_VANILLA, "depths": (2, 2, 27, 2), "d_model": 128}, 76_254_056, 17_953_595_392
    ),
    "groupmamba_tiny": _group({}, 23_361_917, 4_665_958_008),
    "groupmamba_small": _group(
        {"stem_width": 64, "widths": (64, 128, 348, 512), "depths": (3, 4, 16, 3)},
        34_781_555,
        7_228_916_096,
    ),
    "groupmamba_base": _group(
        {"stem_width": 64, "widths": (96, 192, 424, 512), "depths": (3, 6, 21, 3)},
        57_150_838,
        14_103_612_608,
    ),
    "vim_tiny_upernet_ade20k": _segmenter("vim", {}, 12_311_276, 39_005_724_672, 40_949_784_576),
    "vim_small_upernet_ade20k": _segmenter(
        "vim",
        # The official configuration leaves if_divide_out out, which was false when it was trained.
        {
            "d_model": 384,
            "rope": True,
            "divide_out": False,
            "tap_stream": "sum",
            "head_width": 384,
        },
        45_448_364,
        151_342_055_424,
        155_683_160_064,
    ),
    "plain_mamba_l1_upernet_ade20k": _segmenter(
        "plain_mamba", _PLAIN_SIZES["l1"], 35_455_596, 43_615_911_936, 43_615_911_936
    ),
    "plain_mamba_l2_upernet_ade20k": _segmenter(
        "plain_mamba", _PLAIN_SIZES["l2"], 55_874_156, 71_282_589_696, 71_282_589_696
    ),
    "plain_mamba_l3_upernet_ade20k": _segmenter(
        "plain_mamba",
        {**_PLAIN_SIZES["l3"], "taps": (9, 18, 27, 36)},
        81_292_908,
        104_919_400_448,
        104_919_400_448,
    ),
    "vmamba_tiny_upernet_ade20k": _segmenter(
        "vmamba", {}, 61_902_572, 236_832_030_720, 236_832_030_720, tokens=_MAPS_512
    ),
    "vmamba_small_upernet_ade20k": _segmenter(
        "vmamba",
        {"depths": (2, 2, 15, 2), "expand": 2.0},
        81_801_260,
        256_641_859_584,
        256_641_859_584,
        tokens=_MAPS_512,
    ),
    "vmamba_base_upernet_ade20k": _segmenter(
        "vmamba",
        {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0},
        122_069_292,
        292_042_047_488,
        292_042_047_488,
        tokens=_MAPS_512,
    ),
    "vim_tiny_cascade_mask_rcnn_coco": _detector(
        "vim",
        {},
        60_080_078,
        187_141_128_192,
        194_917_367_808,
        tokens=(4096,),
        image_size=(1024, 1024),
    ),
    "vim_small_cascade_mask_rcnn_coco": _detector(
        "vim",
        {"d_model": 384},
        79_918_142,
        266_740_629_504,
        284_105_048_064,
        tokens=(4096,),
        image_size=(1024, 1024),
    ),
    "plain_mamba_adapter_l1_maskrcnn_coco": _detector(
        "plain_mamba", _PLAIN_SIZES["l1"], 31_212_128, 217_524_670_272, 217_524_670_272
    ),
    "plain_mamba_adapter_l1_retinanet_coco": _detector(
        "plain_mamba",
        {**_PLAIN_SIZES["l1"], "head": "retinanet"},
        19_360_356,
        266_358_657_600,
        266_358_657_600,
    ),
    "plain_mamba_adapter_l2_maskrcnn_coco": _detector(
        "plain_mamba", _PLAIN_SIZES["l2"], 53_202_496, 378_972_300_672, 378_972_300_672
    ),
    "plain_mamba_adapter_l2_retinanet_coco": _detector(
        "plain_mamba",
        {**_PLAIN_SIZES["l2"], "head": "retinanet"},
        41_301_572,
        424_503_273_600,
        424_503_273_600,
    ),
    "plain_mamba_adapter_l3_maskrcnn_coco": _detector(
        "plain_mamba", _L3_ADAPTER, 79_781_520, 541_376_119_872, 541_376_119_872
    ),
    "plain_mamba_adapter_l3_retinanet_coco": _detector(
        "plain_mamba",
        {**_L3_ADAPTER, "head": "retinanet"},
        67_864_212,
        585_806_088_000,
        585_806_088_000,
    ),
    "vmamba_tiny_maskrcnn_coco": _detector(
        "vmamba", {}, 49_755_312, 213_350_844_672, 213_350_844_672, tokens=_MAPS_COCO
    ),
    "vmamba_small_maskrcnn_coco": _detector(
        "vmamba",
        {"depths": (2, 2, 15, 2), "expand": 2.0},
        69_654_000,
        294_602_095_872,
        294_602_095_872,
        tokens=_MAPS_COCO,
    ),
    "vmamba_base_maskrcnn_coco": _detector(
        "vmamba",
        {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0},
        107_931_376,
        437_638_102_272,
        437_638_102_272,
        tokens=_MAPS_COCO,
    ),
}

_SIZE: Final = int | tuple[int, int]
_SIZES: Final = tuple[int, ...]
_HEADS: Final[dict[str, Any]] = {"head_width": int, "auxiliary_width": int, "num_classes": int}
_REGIONS: Final[dict[str, Any]] = {"neck_width": int, "region_width": int, "num_classes": int}
# The fields of each family's configuration and their types.
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "vim": {
        "image_size": _SIZE,
        "patch_size": int,
        "stride": int,
        "depth": int,
        "d_model": int,
        "d_state": int,
        "d_conv": int,
        "expand": int,
        "dt_rank": int | None,
        "num_classes": int,
        "class_token": str,
        "pool": str,
        "bimamba": str,
        "bidirectional_layers": bool,
        "divide_out": bool,
        "rms_norm": bool,
        "norm_eps": float,
        "rope": bool,
        "rope_residual": bool,
        "rope_grid": int,
        "layer_scale": float | None,
    },
    "plain_mamba": {
        "image_size": _SIZE,
        "patch_size": int,
        "depth": int,
        "d_model": int,
        "d_state": int,
        "conv_size": int,
        "expand": int,
        "dt_rank": int | None,
        "num_classes": int,
        "stem_width": int,
        "stem_convs": int,
        "layers_with_dwconv": _SIZES,
    },
    "vmamba": {
        "image_size": _SIZE,
        "patch_size": int,
        "depths": _SIZES,
        "d_model": int,
        "d_state": int,
        "expand": float,
        "dt_rank": int | None,
        "conv_bias": bool,
        "gate": bool,
        "scan": str,
        "mlp_ratio": float,
        "gated_mlp": bool,
        "patch_embed": str,
        "downsample": str,
        "pos_embed": bool,
        "num_classes": int,
    },
    "groupmamba": {
        "image_size": _SIZE,
        "stem_width": int,
        "widths": _SIZES,
        "depths": _SIZES,
        "mlp_ratios": _SIZES,
        "d_state": int,
        "dt_rank": int | None,
        "reduction": int,
        "distillation": bool,
        "num_classes": int,
    },
    "vim_segmenter": {
        "image_size": _SIZE,
        "table_size": int,
        "patch_size": int,
        "depth": int,
        "d_model": int,
        "d_state": int,
        "d_conv": int,
        "expand": int,
        "dt_rank": int | None,
        "divide_out": bool,
        "rope": bool,
        "rope_grid": int,
        "taps": _SIZES,
        "tap_stream": str,
        **_HEADS,
    },
    "plain_mamba_segmenter": {
        "image_size": _SIZE,
        "table_size": int,
        "patch_size": int,
        "depth": int,
        "d_model": int,
        "d_state": int,
        "conv_size": int,
        "expand": int,
        "dt_rank": int | None,
        "stem_width": int,
        "stem_convs": int,
        "layers_with_dwconv": _SIZES,
        "taps": _SIZES,
        **_HEADS,
    },
    "vmamba_segmenter": {
        "image_size": _SIZE,
        "depths": _SIZES,
        "d_model": int,
        "d_state": int,
        "expand": float,
        "dt_rank": int | None,
        "conv_bias": bool,
        "gate": bool,
        "mlp_ratio": float,
        "patch_embed": str,
        "downsample": str,
        **_HEADS,
    },
    "vim_detector": {
        "image_size": _SIZE,
        "table_size": int,
        "patch_size": int,
        "depth": int,
        "d_model": int,
        "d_state": int,
        "d_conv": int,
        "expand": int,
        "dt_rank": int | None,
        "divide_out": bool,
        "rope": bool,
        "rope_grid": int,
        **_REGIONS,
    },
    "plain_mamba_detector": {
        "image_size": _SIZE,
        "table_size": int,
        "patch_size": int,
        "depth": int,
        "d_model": int,
        "d_state": int,
        "conv_size": int,
        "expand": int,
        "dt_rank": int | None,
        "stem_width": int,
        "stem_convs": int,
        "layers_with_dwconv": _SIZES,
        "groups": _SIZES,
        "attention_heads": int,
        "prior_width": int,
        "injector": str,
        "head": str,
        "head_convs": int,
        **_REGIONS,
    },
    "vmamba_detector": {
        "image_size": _SIZE,
        "depths": _SIZES,
        "d_model": int,
        "d_state": int,
        "expand": float,
        "dt_rank": int | None,
        "conv_bias": bool,
        "gate": bool,
        "mlp_ratio": float,
        "patch_embed": str,
        "downsample": str,
        **_REGIONS,
    },
}

# What the official code, timm and Hugging Face call our options, in the order to try.
_FOREIGN: Final[dict[str, tuple[str, ...]]] = {
    "img_size": ("image_size",),
    "input_size": ("image_size",),
    "embed_dim": ("d_model", "widths"),
    "embed_dims": ("widths", "d_model"),
    "dims": ("d_model", "widths"),
    "hidden_size": ("d_model", "widths"),
    "hidden_sizes": ("widths", "d_model"),
    "num_layers": ("depth", "depths"),
    "num_hidden_layers": ("depth", "depths"),
    "depth": ("depths",),
    "depths": ("depth",),
    "state_size": ("d_state",),
    "ssm_d_state": ("d_state",),
    "ssm_ratio": ("expand",),
    "ssm_dt_rank": ("dt_rank",),
    "time_step_rank": ("dt_rank",),
    "conv_kernel": ("d_conv", "conv_size"),
    "num_labels": ("num_classes",),
    "bimamba_type": ("bimamba",),
    "if_divide_out": ("divide_out",),
    "if_rope": ("rope",),
    "if_cls_token": ("class_token",),
    "use_middle_cls_token": ("class_token",),
    "final_pool_type": ("pool",),
    "global_pool": ("pool",),
    "init_layer_scale": ("layer_scale",),
    "stem_hidden_dim": ("stem_width",),
}
_LOAD: Final = (
    "no weights come with this package; leave it out and load the official file with "
    "vssm.load_checkpoint(model, FILE), or --checkpoint FILE on the command line"
)
_DTYPE: Final = (
    "a model is made in float32; leave it out and give the dtype to vssm.export, or --dtype"
)
# Habits that no option of ours stands for.
_ANSWERS: Final[dict[str, str]] = {
    "pretrained": _LOAD,
    "checkpoint_path": _LOAD,
    "pretrained_cfg": _LOAD,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "in_chans": "images have 3 channels; leave it out",
    "in_channels": "images have 3 channels; leave it out",
    "num_channels": "images have 3 channels; leave it out",
    "drop_rate": "the models drop nothing out; leave it out",
    "drop_path_rate": "the models drop no path; leave it out",
    "device": "a model is made on the CPU; leave it out and call model.to(device)",
}


def describe_models() -> list[dict[str, Any]]:
    """Name, task, parameters, image size, tokens and cost of every model.

    "tokens" are those of the first block, "stage_tokens" those of all, repeats left out.
    """
    return [
        {
            "name": name,
            "task": card.task,
            "parameters": card.parameters,
            "image_size": card.image_size,
            "tokens": card.stage_tokens[0],
            "stage_tokens": card.stage_tokens,
            "flops_published": card.flops_published,
            "flops_true": card.flops_true,
        }
        for name, card in MODELS.items()
    ]


def check_name(name: str) -> ModelCard:
    """The card of a model.

    Raises:
        ValueError: there is none of this name; the message names the closest.
    """
    if name in MODELS:
        return MODELS[name]
    if official := _contained(name):
        raise ValueError(
            f"name={name!r} is not a model here; did you mean {official!r}? What else an official "
            "name says is an option: vssm.create_model(name, image_size=...), or --set KEY=VALUE"
        )
    hint = did_you_mean(name, MODELS) or f"; choose one of {', '.join(MODELS)}"
    raise ValueError(f"name={name!r} is not a model{hint} (`vssm models` lists them)")


def check_task(name: str, task: str, what: str) -> None:
    """Refuse a model of another task than a command is for.

    Args:
        name: a model's name; one that is unknown here passes, as exports of other modules have.
        task: the one that is needed.
        what: what the command does, to complete "... is for".

    Raises:
        ValueError: the model has another task.
    """
    if name in MODELS and MODELS[name].task != task:
        raise ValueError(
            f"model={name!r} is for {MODELS[name].task}, and {what} is for {task}; choose a model "
            "of that task (`vssm models` lists them)"
        )


def _contained(name: str) -> str | None:
    """The longest of our names whose parts are all in an official one, whatever is between.

    So are vim_small_patch16_stride8_224_bimambav2_... and hustvl/Vim-tiny-midclstok read.
    """
    parts = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = [known for known in MODELS if parts.issuperset(known.split("_"))]
    # The longest, because vim_small is contained in every name that contains vim_small_stride8.
    return max(found, key=len, default=None)


def check_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model, an `image_size` such as "224x320" as (224, 320).

    Raises:
        ValueError: the model has no such option; the message says what it is called here.
        TypeError: a value is of another type than its option.
    """
    allowed = OPTIONS[check_name(name).family]
    options = dict(given)
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(f"{key}={value!r}: {_unknown(name, key, allowed)}")
    if isinstance(size := options.get("image_size"), str):
        options["image_size"] = _image_size(size)
    for key, value in options.items():
        _check_type(key, value, allowed[key])
    return options


def _unknown(name: str, key: str, allowed: Mapping[str, Any]) -> str:
    if key in _ANSWERS:
        return _ANSWERS[key]
    # The same foreign name is another option in another family, so the family's own list decides.
    ours = next((known for known in _FOREIGN.get(key, ()) if known in allowed), None)
    hint = did_you_mean(key, allowed) if ours is None else f"; it is called {ours!r} here"
    return f"{name} has no such option{hint or '; its options are ' + ', '.join(allowed)}"


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"image_size={text!r} is not height x width; write 224x320, or 224")
    return int(sides[0]), int(sides[1])


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuse a text for a number, or for true or false: any text counts as true."""
    parts = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(tuple if get_origin(kind) is tuple else kind for kind in parts)
    # JSON has lists only, and people write 2 where 2.0 is meant.
    kinds += ((list,) if tuple in kinds else ()) + ((int,) if float in kinds else ())
    # bool is a subclass of int: without the second half True would pass as a depth of 1.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{key}={value!r} is not of type {names}; give one (true, 16, [32, 48])")
