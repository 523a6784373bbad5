"""Segmenters against the official code: keys, numbers at several sizes, costs, refusals."""

from __future__ import annotations

import fill
import pytest
import torch
from official_data import filled_model, manifest
from official_dense import FAMILIES, case_images, cases, errors, micro_segmenter
from torch.nn import functional

import vssm
from vssm.errors import CheckpointError, UnsupportedError
from vssm.models.cost import count
from vssm.models.dense.heads import average_pool, upsample
from vssm.models.dense.segmenter import Segmenter
from vssm.models.layers import resize_grid
from vssm.models.registry import cards
from vssm.onnx.options import OUTPUTS

NAMES = [name for name, card in cards().items() if card.task == "segmentation"]
CASES = [(family, case) for family in FAMILIES for case in cases(family)]
# Of the largest value. Measured: micro 1.4e-14; vim_tiny 4.5e-15, plain_mamba_l1 2.7e-14, and in
# float32 3.0e-6 and 1.2e-5.
EXACT = 1e-9
FLOAT32 = 1e-4
# G multiply-adds at 512 x 512 that another count comes to: backbone, neck, head.
COSTS = {
    "vim_tiny_upernet_ade20k": (7.51, 0.91, 30.57),
    "vim_small_upernet_ade20k": (26.35, 3.62, 121.32),
    "plain_mamba_l1_upernet_ade20k": (15.70, 0, 27.86),
    "plain_mamba_l2_upernet_ade20k": (42.11, 0, 29.07),
    "plain_mamba_l3_upernet_ade20k": (75.27, 0, 29.47),
}


def _meta(name, **options):
    with torch.device("meta"):
        return vssm.create_model(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    document = manifest(f"dense/{name}")
    model = _meta(name, image_size=(512, 544))
    assert tuple(model.output_groups) == OUTPUTS["segmentation"]
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == {key: entry["shape"] for key, entry in document["keys"].items()}
    assert sum(p.numel() for p in model.parameters()) == document["n_params"]


@pytest.mark.parametrize("name", COSTS)
def test_cost_by_part(name):
    model = _meta(name)
    cost = count(model)
    parts = (cost.published - cost.neck - cost.head, cost.neck, cost.head)
    assert [part / 1e9 for part in parts] == pytest.approx(COSTS[name], rel=5e-3)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_official_numbers(family, case):
    model = micro_segmenter(family, case).double()
    assert set(model.state_dict()) == set(cases(family)[case]["keys"])
    with torch.no_grad():
        found = model.forward_details(case_images(family, case).double())
        level = found.tensors[model.feature_names[model.auxiliary_level]]
        seg = upsample(found.logits, model.image_size)
        tensors = {**found.tensors, "aux_logits": model.auxiliary_head(level), "seg_logits": seg}
    file = f"dense/micro_{family}_upernet"
    worst = errors(file, f"{case}/", tensors)
    assert set(worst) == set(tensors)
    assert max(worst.values()) < EXACT
    assert torch.equal(model.output("labels", found), seg.argmax(1).int())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(224, 224), (160, 208), (256, 352)])
def test_plain_mamba_l1(size, dtype):
    name, (height, width) = "plain_mamba_l1_upernet_ade20k", size
    asked = next(i for i in manifest(f"dense/{name}")["inputs"] if i["shape"][2:] == [*size])
    model = filled_model(name, image_size=size).to(dtype)
    x = torch.from_numpy(fill.make_input(tuple(asked["shape"]), key=asked["key"])).to(dtype)
    with torch.no_grad():
        found = errors(f"dense/{name}", f"{height}x{width}/", model.forward_details(x).tensors)
    assert len(found) == 7
    assert max(found.values()) < (FLOAT32 if dtype == torch.float32 else EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vim_tiny(dtype):
    name = "vim_tiny_upernet_ade20k"
    x = torch.from_numpy(fill.make_input((1, 3, 512, 520), key="input_vim_tiny_seg_slide"))
    with torch.no_grad():
        tensors = filled_model(name).to(dtype).forward_details(x[..., :512].to(dtype)).tensors
    found = errors(f"dense/{name}", "", tensors)
    assert len(found) == 9
    assert max(found.values()) < (FLOAT32 if dtype == torch.float32 else EXACT)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(16, 16, 6), (5, 7, 3), (2, 2, 6), (1, 3, 2)]
)
def test_pooling_is_adaptive_average_pooling(height, width, side):
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.manual_seed(0))
    want = functional.adaptive_avg_pool2d(x, side)
    torch.testing.assert_close(average_pool(x, side), want, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (10, 13)), ((3, 5), (8, 1)), ((1, 2), (4, 4))])
def test_a_table_is_resized_bicubically(old, new):
    generator = torch.manual_seed(0)
    table = torch.randn(1, old[0] * old[1], 6, dtype=torch.float64, generator=generator)
    grid = table.reshape(1, *old, 6).permute(0, 3, 1, 2)
    want = functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    got = resize_grid(table, old, new)
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1).reshape(1, -1, 6), rtol=0, atol=1e-14)


def test_vim_at_another_size():
    """Positions are resized, and the rope's angles keep the range that they were trained in."""
    same = micro_segmenter("vim", "residual_rope_64")
    other = micro_segmenter("vim", "residual_rope_64", image_size=(96, 48))
    assert set(same.state_dict()) == set(other.state_dict())
    assert torch.equal(same.backbone.rope.freqs_cos, other.backbone.rope.freqs_cos)
    angle = other.backbone.rope_here.freqs_sin.reshape(6, 3, -1)
    # Row 3 of 6 is where row 2 of 4 is; its first frequency is 1.
    assert angle[3, 0, 0] == same.backbone.rope.freqs_sin.reshape(4, 4, -1)[2, 0, 0]
    with torch.no_grad():
        assert other(torch.zeros(1, 3, 96, 48)).shape == (1, 11, 24, 12)


def test_a_checkpoint_in_mmengines_wrapping(tmp_path):
    model = micro_segmenter("vmamba", "odd_53x71")
    state = model.state_dict()
    path = tmp_path / "vssm.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": state, "optimizer": {}}, path)
    fresh = micro_segmenter("vmamba", "odd_53x71")
    for value in fresh.state_dict().values():
        value.zero_()
    report = vssm.load_checkpoint(fresh, path)
    assert report.num_tensors == len(state)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": micro_segmenter("vim", "nodiv_64").state_dict()}, path)
    other = micro_segmenter("vim", "nodiv_64", num_classes=19)
    with pytest.raises(CheckpointError, match=r"decode_head\.conv_seg.*num_classes"):
        vssm.load_checkpoint(other, path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vim_tiny", {"image_size": 8}, "smaller than patch_size=16"),
        ("plain_mamba_l1", {"image_size": 8}, "smaller than patch_size=16"),
        ("vmamba_tiny", {"image_size": 3}, "smaller than patch_size=4"),
        ("vim_tiny", {"image_size": 16}, "no place in the coarsest level"),
        ("vim_tiny", {"table_size": 500}, "table_size=500 is not a multiple"),
        ("vim_tiny", {"patch_size": 0}, "patch_size=0 is below 1"),
        ("vim_tiny", {"patch_size": 32}, "made for patches of 8 and 16"),
        ("vim_tiny", {"taps": (6, 12, 24)}, "are not four of the blocks"),
        ("vim_tiny", {"taps": (6, 12, 18, 23)}, "the last being 24"),
        ("vim_tiny", {"tap_stream": "stream"}, "is not one of mixer, sum"),
        ("vim_tiny", {"head_width": 0}, "head_width=0 is below 1"),
        ("plain_mamba_l1", {"table_size": 0}, "table_size=0 is below 1"),
        ("plain_mamba_l1", {"depth": 12}, "are not four of the blocks 1 to 12"),
        ("vmamba_tiny", {"depths": (2, 2, 2)}, "are not four stages"),
    ],
)
def test_a_wrong_option_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        _meta(f"{name}_upernet_ade20k", **options)


def test_vmamba_cannot_be_pruned():
    with pytest.raises(UnsupportedError, match="hierarchical"):
        _meta("vmamba_tiny_upernet_ade20k", schedule=vssm.PruneSchedule({2: 0.8}))


def test_every_segmenter_has_its_base():
    assert len(NAMES) == 8
    assert all(isinstance(_meta(name), Segmenter) for name in NAMES)
