"""GroupMamba against the official code: keys, numbers, quirks, wrappings, refusals."""

from __future__ import annotations

import pytest
import torch
from official_data import check_keys, filled_model, images, manifest, shapes, wanted_shapes
from official_hierarchical import (
    case_images,
    micro_error,
    micro_groupmamba,
    official_error,
    record,
    stage_ends,
)

import vssm
from vssm import PruneSchedule
from vssm.errors import UnsupportedError
from vssm.models.cost import count
from vssm.models.groupmamba import GroupMamba, GroupMambaConfig
from vssm.models.registry import cards, families

NAMES = list(families()["groupmamba"].cards)
CASES = manifest("micro_groupmamba")["cases"]
# Of the largest value. Measured: groupmamba_tiny 6.5e-14 and 4.6e-5, micro 2.3e-14 and 1.0e-5.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    with torch.device("meta"):
        check_keys(vssm.create_model(name), name)


def test_three_models():
    assert len(NAMES) == 3


@pytest.fixture(scope="module", params=TOLERANCE, ids=str)
def tiny(request):
    """What groupmamba_tiny computes, by the official names of its tensors."""
    model = filled_model("groupmamba_tiny").to(request.param)
    layer = model.block1[0].attn
    modules = {f"block0.g{k}": getattr(layer, f"mamba_g{k}") for k in (1, 2, 3, 4)}
    modules |= {"block0.mixer": layer, "patch_embed": model.patch_embed1, "feature": model.norm4}
    seen = record({**modules, "head_logits": model.head, "dist_logits": model.dist_head})
    batch = 2 if request.param == torch.float32 else 1  # the reference takes seconds an image
    with torch.no_grad():
        inputs = images("groupmamba_tiny")[:batch].to(request.param)
        found = model.forward_details(inputs, with_blocks=True)
    streams = [hidden for hidden, _ in found.blocks]
    ends = {f"stage{i}": streams[end] for i, end in enumerate(stage_ends(model))}
    seen["feature"] = seen["feature"].flatten(1)
    return request.param, {**seen, **ends, "block0": streams[0], "logits": found.logits}


@pytest.mark.parametrize(
    "tensor",
    [
        *("logits", "head_logits", "dist_logits", "feature", "patch_embed"),
        *("block0", "block0.mixer", "block0.g1", "block0.g2", "block0.g3", "block0.g4"),
        *("stage0", "stage1", "stage2", "stage3"),
    ],
)
def test_official_numbers(tiny, tensor):
    dtype, seen = tiny
    assert official_error("groupmamba_tiny", tensor, seen[tensor]) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_every_case(case):
    model = micro_groupmamba(case)
    assert shapes(model.state_dict()) == wanted_shapes(CASES[case])
    seen = record({"block0.mixer": model.block1[0].attn})
    for dtype, tolerance in TOLERANCE.items():
        x = case_images("groupmamba", case).to(dtype)
        with torch.no_grad():
            found = model.to(dtype).forward_details(x, with_blocks=True)
        assert [residual for _, residual in found.blocks] == [None] * model.traced_blocks
        assert found.blocks[-1][0].shape[1] == 1  # the class block
        mixed = seen["block0.mixer"]
        streams = {"logits": found.logits, "stage3": found.blocks[-2][0], "block0.mixer": mixed}
        for tensor, got in streams.items():
            assert micro_error("groupmamba", case, tensor, got) < tolerance


def test_cost_by_hand():
    """One block and the class block: every product, and nine operations a state of each group."""
    sizes = {"depths": [1], "widths": [16], "mlp_ratios": [2], "image_size": (12, 20)}
    model = micro_groupmamba("rect", **sizes)
    stem = 6 * 10 * 8 * (3 * 49 + 2 * 8 * 9) + 3 * 5 * 8 * 9 * 16
    group = 4 * 8 + 4 * 9 + 4 * 4 + 4 * (1 + 2) + 4  # in, convolution, out, dt B C, delta
    scan = 9 * 4 + 4
    block = 4 * group + 16 * 16 + 2 * 16 * 32
    means = 2 * 2 * 16 * 1  # fc1 and fc2 of the gate, in both blocks
    heads = 2 * 16 * 10
    work = count(model)
    assert work.gemm == stem + 15 * (block + 32 * 9) + block + means + heads
    assert work.true == work.published == work.gemm + 16 * 4 * scan
    assert work.exps == 16 * 4 * 4


def test_published_cost():
    """The official table prints 4.6, 7.0 and 14 GFLOPs; it leaves some of the small parts out."""
    # The cards have what is counted of the models: test_catalogue.py.
    found = [cards()[name].figures.flops_published / 1e9 for name in NAMES]
    assert found == pytest.approx([4.666, 7.229, 14.104], abs=1e-3)


def test_groups_walk_their_own_ways():
    model = micro_groupmamba("rect")
    rows, columns, back, columns_back = (walks.order[0, 0] for walks in model.walks[0])
    height, width = model.config.grids[0]
    assert torch.equal(rows, torch.arange(height * width, dtype=torch.int32))
    assert columns[:2].tolist() == [0, width]
    assert torch.equal(back, rows.flip(0))
    assert torch.equal(columns_back, columns.flip(0))
    assert [walks.order.shape[-1] for walks in model.walks[-1]] == [1] * 4


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_published_wrappings(tmp_path, wrapper):
    """The published file is a bare state dict; training files have it under "model"."""
    wanted = micro_groupmamba().state_dict()
    path = tmp_path / "file.pth"
    torch.save(wanted if wrapper is None else {wrapper: wanted, "epoch": 1}, path)
    model = GroupMamba(micro_groupmamba().config)
    report = vssm.load_checkpoint(model, path)
    assert report.num_tensors == len(wanted)
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key])


def test_averaged_weights_of_a_training_file(tmp_path):
    wanted = micro_groupmamba().state_dict()
    path = tmp_path / "file.pth"
    torch.save(
        {"model": GroupMamba(micro_groupmamba().config).state_dict(), "model_ema": wanted}, path
    )
    model = GroupMamba(micro_groupmamba().config)
    vssm.load_checkpoint(model, path, weights="ema")
    assert torch.equal(model.head.weight, wanted["head.weight"])


@pytest.mark.parametrize("size", [64, (68, 100), (36, 40)])
def test_other_image_sizes(size):
    model = micro_groupmamba("rect", image_size=size)
    with torch.no_grad():
        found = model.forward_details(torch.zeros(1, 3, *model.image_size), with_blocks=True)
    lengths = [tokens for tokens, _ in model.block_costs()]
    assert [hidden.shape[1] for hidden, _ in found.blocks] == lengths


def test_a_schedule_is_refused():
    with pytest.raises(
        UnsupportedError,
        match=r"schedule='0\.5 after block 1': GroupMamba is hierarchical.*schedule=None",
    ):
        vssm.create_model("groupmamba_tiny", schedule=PruneSchedule({1: 0.5}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (8, 8, 8)}, r"image_size=\(8, 8, 8\) does not have two sides"),
        ({"image_size": 0}, r"height=0 is below 1"),
        ({"widths": (64, 128)}, r"widths=\(64, 128\), depths=.* have not one entry a stage"),
        ({"widths": (64, 128, 350, 448)}, r"350 is not a multiple of 4"),
        ({"depths": (3, 4, 0, 3)}, r"depths\[2\]=0 is below 1"),
        ({"reduction": 65}, r"reduction=65 is outside \[1, 64\]"),
        ({"dt_rank": 0}, r"dt_rank=0 is below 1"),
    ],
)
def test_configurations_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        GroupMambaConfig(**options)
