"""The models as data: names, options and sizes, known without torch.

Importing torch takes seconds, so `vssm models`, and a wrong name or option, are answered from
these tables. tests/models/test_catalogue.py holds them against the models as they are built.
"""

from __future__ import annotations

from typing import Any, Final

from vssm.models.family import Figures, ModelCard, ModelFamily, OfficialCheckpoint, Published
from vssm.pruning.schedule import MergeSchedule

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
_VMAMBA_FILES: Final = "https://github.com/MzeroMiko/VMamba/releases/download/%23"


# Addresses, sizes and hashes as the READMEs of hustvl/Vim, ChenhongyiYang/PlainMamba,
# MzeroMiko/VMamba and Amshaker/GroupMamba, and the pages of the hub, give them. Vim's "+" models,
# whose files end in "ft", are those of stride 8.
def _on_hub(repo: str, *facts: Any) -> OfficialCheckpoint:
    return OfficialCheckpoint(f"hf://{repo}", *facts)


def _vmamba_file(name: str) -> OfficialCheckpoint:
    return OfficialCheckpoint(f"{_VMAMBA_FILES}{name}")


def _plain_file(name: str, *facts: Any) -> OfficialCheckpoint:
    return _on_hub(f"ChenhongyiYang/PlainMamba/{name}.pth", *facts)


def _vim(changes: dict[str, Any], *figures: int, tokens: int = 197, **paper: Any) -> ModelCard:
    return ModelCard(changes, _counted(figures, (tokens,), (224, 224)), **paper)


def _plain(changes: dict[str, Any], parameters: int, flops: int, **paper: Any) -> ModelCard:
    return ModelCard(changes, Figures(parameters, (196,), flops, flops), **paper)


def _vmamba(changes: dict[str, Any], parameters: int, flops: int, file: str) -> ModelCard:
    figures = Figures(parameters, _MAPS, flops, flops)
    return ModelCard(changes, figures, checkpoint=_vmamba_file(file))


def _group(
    changes: dict[str, Any], parameters: int, flops: int, official: OfficialCheckpoint
) -> ModelCard:
    # The class block works on one token.
    figures = Figures(parameters, (*_MAPS, 1), flops, flops)
    return ModelCard(changes, figures, checkpoint=official)


_PLAIN_SIZES: Final[dict[str, dict[str, Any]]] = {
    "l1": {"d_model": 192, "stem_convs": 1, "layers_with_dwconv": (0,)},
    "l2": {"d_model": 384},
    "l3": {"d_model": 448, "depth": 36},
}
_L3_ADAPTER: Final = {**_PLAIN_SIZES["l3"], "groups": (9, 18, 27, 36), "attention_heads": 8}


def _detector(
    changes: dict[str, Any],
    *figures: int,
    official: OfficialCheckpoint | None = None,
    tokens: tuple[int, ...] = (4200,),
    image_size: tuple[int, int] = (800, 1344),
) -> ModelCard:
    counted = _counted(figures, tokens, image_size)
    return ModelCard(changes, counted, task="detection", num_classes=80, checkpoint=official)


def _segmenter(
    changes: dict[str, Any],
    *figures: int,
    official: OfficialCheckpoint | None = None,
    tokens: tuple[int, ...] = (1024,),
) -> ModelCard:
    counted = _counted(figures, tokens, (512, 512))
    return ModelCard(changes, counted, task="segmentation", num_classes=150, checkpoint=official)


def _counted(
    figures: tuple[int, ...], tokens: tuple[int, ...], image_size: tuple[int, int]
) -> Figures:
    # Vim alone has two counts: the published rule leaves its second direction out.
    parameters, published, true = figures if len(figures) == 3 else (*figures, figures[1])
    return Figures(parameters, tokens, published, true, image_size)


# Schedules of Vim: Zhan et al., arXiv:2409.18962. Those of PlainMamba are ours: that paper prints
# FLOPs for L3 and no blocks; these blocks reach them (docs/plain_mamba.md). L1 and L2 have the same
# relative depths. Published figures are of that paper, and of merging of Shi et al.,
# arXiv:2412.12496. All of their rows but the dense are fine-tuned.
_PLAIN_24: Final = "4:0.8,7:0.8,9:0.8,12:0.8,15:0.8,17:0.8,20:0.8,23:0.8"
_SIZE: Final = int | tuple[int, int]
_SIZES: Final = tuple[int, ...]
_HEADS: Final[dict[str, Any]] = {"head_width": int, "auxiliary_width": int, "num_classes": int}
_REGIONS: Final[dict[str, Any]] = {
    "neck_width": int,
    "region_width": int,
    "num_classes": int,
    "score": float,
    "overlap": float,
    "most": int,
    "level_proposals": int,
    "proposals": int,
    "proposal_overlap": float,
}
# What the classifiers, segmenters and detectors of a kind have all.
_VIM: Final[dict[str, Any]] = {
    "image_size": _SIZE,
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
}
_PLAIN: Final[dict[str, Any]] = {
    "image_size": _SIZE,
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
}
_VMAMBA: Final[dict[str, Any]] = {
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
}
# Classes by name, so that only those of a model that is made bring torch; then the models, and the
# fields of the configuration with their types.
FAMILIES: Final = (
    ModelFamily(
        "vim",
        "vssm.models.vim:Vim",
        "vssm.models.vim:VimConfig",
        {
            "vim_tiny": _vim(
                {"d_model": 192},
                7_148_008,
                1_448_855_040,
                1_822_858_752,
                schedule="10:0.8",
                published={
                    "dense": Published(1.45, 76.1),
                    "evit": Published(None, 71.3),
                    "gap": Published(1.29, 75.1),
                    "merge": Published(1.28, 75.3),
                },
                merged=MergeSchedule(5),
                checkpoint=_on_hub(
                    "hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth",
                    115,
                    "fedb1e60267f3bc7b2a8443f2ddead8d39e019d10247a87252162b3789801fd5",
                ),
            ),
            "vim_small": _vim(
                {"d_model": 384},
                25_796_584,
                5_076_372_480,
                5_911_526_400,
                schedule="5:0.8,10:0.8,15:0.8",
                published={
                    "dense": Published(5.08, 80.5),
                    "evit": Published(None, 74.8),
                    "none": Published(None, 75.4),
                    "gap": Published(3.60, 78.8),
                    "merge": Published(3.58, 79.9),
                },
                merged=MergeSchedule(11),
                checkpoint=_on_hub(
                    "hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth",
                    413,
                    "aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
                ),
            ),
            "vim_base": _vim(
                {"d_model": 768},
                97_598_440,
                18_867_394_560,
                20_886_288_384,
                published={"merge": Published(13.21, 81.3)},
                merged=MergeSchedule(11),
                checkpoint=_on_hub("hustvl/Vim-base-midclstok"),
            ),
            "vim_tiny_stride8": _vim(
                {"d_model": 192, "stride": 8},
                7_250_344,
                5_368_733_184,
                6_754_635_264,
                tokens=730,
                checkpoint=_on_hub(
                    "hustvl/Vim-tiny-midclstok/vim_t_midclstok_ft_78p3acc.pth",
                    117,
                    "9847490c5c3ca36cc38caf8be537b726f326a1b5b15764b0bde650934ac35b54",
                ),
            ),
            "vim_small_stride8": _vim(
                {"d_model": 384, "stride": 8},
                26_001_256,
                18_810_682_368,
                21_905_415_168,
                tokens=730,
                checkpoint=_on_hub(
                    "hustvl/Vim-small-midclstok/vim_s_midclstok_ft_81p6acc.pth",
                    417,
                    "fc46ad7cbd7f35021de31aefc618611d9ee75958076fc8168ca47d6d613665e3",
                ),
            ),
        },
        {
            **_VIM,
            "stride": int,
            "num_classes": int,
            "class_token": str,
            "pool": str,
            "bimamba": str,
            "bidirectional_layers": bool,
            "rms_norm": bool,
            "norm_eps": float,
            "rope_residual": bool,
            "layer_scale": float | None,
        },
    ),
    ModelFamily(
        "plain_mamba",
        "vssm.models.plain_mamba:PlainMamba",
        "vssm.models.plain_mamba:PlainMambaConfig",
        {
            "plain_mamba_l1": _plain(
                _PLAIN_SIZES["l1"],
                7_551_656,
                3_014_703_360,
                schedule=_PLAIN_24,
                published={"dense": Published(3.0, 77.9)},
                checkpoint=_plain_file("l1", 30.3),
            ),
            "plain_mamba_l2": _plain(
                _PLAIN_SIZES["l2"],
                26_145_832,
                8_078_318_592,
                schedule=_PLAIN_24,
                published={"dense": Published(8.1, 81.6)},
                checkpoint=_plain_file("l2", 105),
            ),
            "plain_mamba_l3": _plain(
                _PLAIN_SIZES["l3"],
                50_956_456,
                14_439_294_464,
                schedule="6:0.8,10:0.8,14:0.8,18:0.8,22:0.8,26:0.8,30:0.8,34:0.8",
                published={
                    "dense": Published(14.4, 82.3),
                    "none": Published(None, 79.3),
                    "gap": Published(8.44, 81.7),
                },
                checkpoint=_plain_file("l3", 204),
            ),
        },
        {**_PLAIN, "num_classes": int},
    ),
    ModelFamily(
        "vmamba",
        "vssm.models.vmamba:VMamba",
        "vssm.models.vmamba:VMambaConfig",
        {
            "vmamba_tiny_s1l8": _vmamba(
                {"depths": (2, 2, 8, 2)},
                30_249_064,
                4_875_843_072,
                "v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
            ),
            "vmamba_tiny_s2l5": _vmamba(
                {"depths": (2, 2, 5, 2), "expand": 2.0},
                30_705_832,
                4_824_588_288,
                "v2cls/vssm_tiny_0230_ckpt_epoch_262.pth",
            ),
            "vmamba_small_s2l15": _vmamba(
                {"depths": (2, 2, 15, 2), "expand": 2.0},
                50_147_752,
                8_667_568_128,
                "v2cls/vssm_small_0229_ckpt_epoch_222.pth",
            ),
            "vmamba_small_s1l20": _vmamba(
                {"depths": (2, 2, 20, 2)},
                49_012_840,
                8_568_897_024,
                "v2cls/vssm1_small_0229s_ckpt_epoch_240.pth",
            ),
            "vmamba_base_s2l15": _vmamba(
                {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0},
                88_557_800,
                15_294_668_800,
                "v2cls/vssm_base_0229_ckpt_epoch_237.pth",
            ),
            "vmamba_base_s1l20": _vmamba(
                {"depths": (2, 2, 20, 2), "d_model": 128},
                86_614_504,
                15_163_107_328,
                "v2cls/vssm1_base_0229s_ckpt_epoch_225.pth",
            ),
            "vanilla_vmamba_tiny": _vmamba(
                {**_VANILLA, "depths": (2, 2, 9, 2)},
                22_893_448,
                5_597_700_096,
                "v0cls/vssmtiny_dp01_ckpt_epoch_292.pth",
            ),
            "vanilla_vmamba_small": _vmamba(
                {**_VANILLA, "depths": (2, 2, 27, 2)},
                44_417_416,
                11_181_987_840,
                "v0cls/vssmsmall_dp03_ckpt_epoch_238.pth",
            ),
            "vanilla_vmamba_base": _vmamba(
                {**_VANILLA, "depths": (2, 2, 27, 2), "d_model": 128},
                76_254_056,
                17_953_595_392,
                "v0cls/vssmbase_dp06_ckpt_epoch_241.pth",
            ),
        },
        {
            **_VMAMBA,
            "patch_size": int,
            "scan": str,
            "gated_mlp": bool,
            "pos_embed": bool,
            "num_classes": int,
        },
    ),
    ModelFamily(
        "groupmamba",
        "vssm.models.groupmamba:GroupMamba",
        "vssm.models.groupmamba:GroupMambaConfig",
        {
            "groupmamba_tiny": _group(
                {},
                23_361_917,
                4_665_958_008,
                _on_hub(
                    "Abdelrahman-shaker/GroupMamba-Tiny/groupmamba_tiny_ema.pth",
                    93.9,
                    "4c8e15f20d476ddd9080efa845be36e6f1e076721e087e88ebd276463e279425",
                ),
            ),
            "groupmamba_small": _group(
                {"stem_width": 64, "widths": (64, 128, 348, 512), "depths": (3, 4, 16, 3)},
                34_781_555,
                7_228_916_096,
                _on_hub("Abdelrahman-shaker/GroupMamba-Small/groupmamba_small_ema.pth", 140),
            ),
            "groupmamba_base": _group(
                {"stem_width": 64, "widths": (96, 192, 424, 512), "depths": (3, 6, 21, 3)},
                57_150_838,
                14_103_612_608,
                _on_hub("Abdelrahman-shaker/GroupMamba-Base"),
            ),
        },
        {
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
        # Tokens are multiplied with their mixed selves before a norm, block after block: rounding
        # grows tenfold over the other families (docs/groupmamba.md has the measurements).
        magnifies=10.0,
    ),
    ModelFamily(
        "vim_segmenter",
        "vssm.models.dense.vim:VimSegmenter",
        "vssm.models.dense.vim:VimSegmenterConfig",
        {
            "vim_tiny_upernet_ade20k": _segmenter({}, 12_311_276, 39_005_724_672, 40_949_784_576),
            "vim_small_upernet_ade20k": _segmenter(
                # The official configuration leaves if_divide_out out, which was false when it
                # was trained.
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
        },
        {
            **_VIM,
            "table_size": int,
            "taps": _SIZES,
            "tap_stream": str,
            **_HEADS,
        },
    ),
    ModelFamily(
        "plain_mamba_segmenter",
        "vssm.models.dense.plain_mamba:PlainMambaSegmenter",
        "vssm.models.dense.plain_mamba:PlainMambaSegmenterConfig",
        {
            "plain_mamba_l1_upernet_ade20k": _segmenter(
                _PLAIN_SIZES["l1"],
                35_455_596,
                43_615_911_936,
                official=_plain_file("segmentation/l1_upernet"),
            ),
            "plain_mamba_l2_upernet_ade20k": _segmenter(
                _PLAIN_SIZES["l2"],
                55_874_156,
                71_282_589_696,
                official=_plain_file(
                    "segmentation/l2_upernet",
                    224,
                    "aba713e1627ea4b7c7fa94640bd532528c0fbd5fdc442b8cfb4bf59e00299bce",
                ),
            ),
            "plain_mamba_l3_upernet_ade20k": _segmenter(
                {**_PLAIN_SIZES["l3"], "taps": (9, 18, 27, 36)},
                81_292_908,
                104_919_400_448,
                official=_plain_file("segmentation/l3_upernet"),
            ),
        },
        {**_PLAIN, "table_size": int, "taps": _SIZES, **_HEADS},
    ),
    ModelFamily(
        "vmamba_segmenter",
        "vssm.models.dense.vmamba:VMambaSegmenter",
        "vssm.models.dense.vmamba:VMambaSegmenterConfig",
        {
            "vmamba_tiny_upernet_ade20k": _segmenter(
                {},
                61_902_572,
                236_832_030_720,
                tokens=_MAPS_512,
                official=_vmamba_file(
                    "v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth"
                ),
            ),
            "vmamba_small_upernet_ade20k": _segmenter(
                {"depths": (2, 2, 15, 2), "expand": 2.0},
                81_801_260,
                256_641_859_584,
                tokens=_MAPS_512,
                official=_vmamba_file(
                    "v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth"
                ),
            ),
            "vmamba_base_upernet_ade20k": _segmenter(
                {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0},
                122_069_292,
                292_042_047_488,
                tokens=_MAPS_512,
                official=_vmamba_file(
                    "v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth"
                ),
            ),
        },
        {**_VMAMBA, **_HEADS},
    ),
    ModelFamily(
        "vim_detector",
        "vssm.models.dense.vim:VimDetector",
        "vssm.models.dense.vim:VimDetectorConfig",
        {
            "vim_tiny_cascade_mask_rcnn_coco": _detector(
                {},
                60_080_078,
                187_141_128_192,
                194_917_367_808,
                tokens=(4096,),
                image_size=(1024, 1024),
            ),
            "vim_small_cascade_mask_rcnn_coco": _detector(
                {"d_model": 384},
                79_918_142,
                266_740_629_504,
                284_105_048_064,
                tokens=(4096,),
                image_size=(1024, 1024),
            ),
        },
        {**_VIM, "table_size": int, **_REGIONS},
    ),
    ModelFamily(
        "plain_mamba_detector",
        "vssm.models.dense.plain_mamba:PlainMambaDetector",
        "vssm.models.dense.plain_mamba:PlainMambaDetectorConfig",
        {
            "plain_mamba_adapter_l1_maskrcnn_coco": _detector(
                _PLAIN_SIZES["l1"],
                31_212_128,
                217_524_670_272,
                official=_plain_file("detection/maskrcnn/l1_1x"),
            ),
            "plain_mamba_adapter_l1_retinanet_coco": _detector(
                {**_PLAIN_SIZES["l1"], "head": "retinanet"},
                19_360_356,
                266_358_657_600,
                official=_plain_file("detection/retinanet/l1_1x"),
            ),
            "plain_mamba_adapter_l2_maskrcnn_coco": _detector(
                _PLAIN_SIZES["l2"],
                53_202_496,
                378_972_300_672,
                official=_plain_file("detection/maskrcnn/l2_1x"),
            ),
            "plain_mamba_adapter_l2_retinanet_coco": _detector(
                {**_PLAIN_SIZES["l2"], "head": "retinanet"},
                41_301_572,
                424_503_273_600,
                official=_plain_file("detection/retinanet/l2_1x"),
            ),
            "plain_mamba_adapter_l3_maskrcnn_coco": _detector(
                _L3_ADAPTER,
                79_781_520,
                541_376_119_872,
                official=_plain_file("detection/maskrcnn/l3_1x"),
            ),
            "plain_mamba_adapter_l3_retinanet_coco": _detector(
                {**_L3_ADAPTER, "head": "retinanet"},
                67_864_212,
                585_806_088_000,
                official=_plain_file("detection/retinanet/l3_1x"),
            ),
        },
        {
            **_PLAIN,
            "table_size": int,
            "groups": _SIZES,
            "attention_heads": int,
            "prior_width": int,
            "injector": str,
            "head": str,
            "head_convs": int,
            **_REGIONS,
        },
    ),
    ModelFamily(
        "vmamba_detector",
        "vssm.models.dense.vmamba:VMambaDetector",
        "vssm.models.dense.vmamba:VMambaDetectorConfig",
        {
            "vmamba_tiny_maskrcnn_coco": _detector(
                {},
                49_755_312,
                213_350_844_672,
                tokens=_MAPS_COCO,
                official=_vmamba_file("v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth"),
            ),
            "vmamba_small_maskrcnn_coco": _detector(
                {"depths": (2, 2, 15, 2), "expand": 2.0},
                69_654_000,
                294_602_095_872,
                tokens=_MAPS_COCO,
                official=_vmamba_file("v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth"),
            ),
            "vmamba_base_maskrcnn_coco": _detector(
                {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0},
                107_931_376,
                437_638_102_272,
                tokens=_MAPS_COCO,
                official=_vmamba_file("v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth"),
            ),
        },
        {**_VMAMBA, **_REGIONS},
    ),
)
