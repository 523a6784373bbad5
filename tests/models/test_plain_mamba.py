"""PlainMamba against the official code: keys, numbers, walks, odd and padded images."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import fill
import numpy as np
import pytest
import torch
from official_data import (
    check_keys,
    error_of,
    filled_model,
    fixture,
    images,
    manifest,
    micro_plain_mamba,
    plain_mamba_config,
    plain_mamba_images,
    shapes,
    wanted_shapes,
)
from tolerances import relative_error

import vssm
from vssm import PruneSchedule
from vssm.checkpoints.load import load_checkpoint, save_safetensors
from vssm.errors import CheckpointError
from vssm.models import model_from_config
from vssm.models.plain_mamba import PlainMamba, grid_walks
from vssm.models.registry import families

# Of the largest value. Measured: float64 9e-15 on plain_mamba_l1, 2e-14 on the micro models;
# float32 3e-6 and 1e-6.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
MICRO = manifest("micro_plain_mamba")["cases"]
GRIDS = sorted({key.partition("/")[0] for key in fixture("plain_mamba_scan_orders")})


@pytest.mark.parametrize("name", families()["plain_mamba"].cards)
@pytest.mark.parametrize("schedule", [None, PruneSchedule({5: 0.8})], ids=["dense", "pruned"])
def test_official_keys_and_shapes(name, schedule):
    with torch.device("meta"):
        check_keys(vssm.create_model(name, schedule=schedule), name)


# The whole reference in float64 takes seconds: test_plain_mamba_pruning has one, and it alone in
# `make test`; there are float64 numbers of every switch below.
@pytest.fixture(
    scope="module",
    params=[pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32],
    ids=str,
)
def plain_mamba_l1(request):
    """What plain_mamba_l1 computes, by the official names of its tensors."""
    model = filled_model("plain_mamba_l1").to(request.param)
    seen = {}
    hooks = {
        "patch_embed": model.backbone.patch_embed,
        "block0.mixer": model.backbone.layers[0].mamba.out_proj,
        "final_norm": model.backbone.ln1,
    }
    for name, module in hooks.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    model.backbone.layers[0].norm.register_forward_hook(
        lambda m, args, out: seen.update(tokens=args[0])
    )
    model.head.register_forward_hook(lambda m, args, out: seen.update(feature=args[0]))
    with torch.no_grad():
        found = model.forward_details(images("plain_mamba_l1").to(request.param), with_blocks=True)
    seen["logits"] = found.logits
    for name, block in (("block0", 0), ("block1", 1), ("block_last", -1)):
        seen[name] = found.blocks[block][0]
    return request.param, seen


@pytest.mark.parametrize(
    "tensor",
    [
        *("logits", "feature", "patch_embed", "tokens", "block0.mixer", "block0", "block1"),
        *("block_last", "final_norm"),
    ],
)
def test_official_numbers(plain_mamba_l1, tensor):
    dtype, seen = plain_mamba_l1
    assert error_of("plain_mamba_l1", tensor, seen[tensor]) < TOLERANCE[dtype]


def _micro_with_its_table(case, dtype):
    """The model of a case; its position table is made for the grid of img_size, then resized."""
    official = MICRO[case]["config"]
    trained = micro_plain_mamba(case, image_size=official["img_size"]).to(dtype)
    assert shapes(trained.backbone.state_dict()) == wanted_shapes(MICRO[case])
    model = micro_plain_mamba(case).to(dtype)
    model.load_state_dict(model.adapt_state_dict(trained.state_dict()))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", MICRO)
def test_every_case(case, dtype):
    model, seen = _micro_with_its_table(case, dtype), {}
    backbone = model.backbone
    for name, module in {
        "out": backbone.ln1,
        "patch_embed": backbone.patch_embed,
        "block0.mixer": backbone.layers[0].mamba.out_proj,
    }.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        found = model.forward_details(plain_mamba_images(case).to(dtype), with_blocks=True)
    seen["block0"] = found.blocks[0][0]
    for name, value in seen.items():
        wanted = fixture("micro_plain_mamba")[f"{case}/{name}"]
        got = value.numpy() if name == "out" else fill.sample(value.numpy(), 1021)
        assert relative_error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("grid", GRIDS)
def test_official_walks(grid):
    height, width = map(int, grid.split("x"))
    order, move = grid_walks(height, width)
    wanted = fixture("plain_mamba_scan_orders")
    np.testing.assert_array_equal(order.numpy(), wanted[f"{grid}/order"])
    np.testing.assert_array_equal(order.argsort(1).numpy(), wanted[f"{grid}/inverse"])
    np.testing.assert_array_equal(move.numpy(), wanted[f"{grid}/direction"])


def test_checkpoint_of_another_size_is_resized(tmp_path: Path):
    trained = micro_plain_mamba("two_convs_nodw")
    model = micro_plain_mamba("two_convs_nodw", image_size=(48, 96))
    wanted = model.adapt_state_dict(trained.state_dict())
    # Without the prefix, as a file of the backbone alone would have it; the head stays.
    state = {k.removeprefix("backbone."): v for k, v in trained.state_dict().items()}
    path = tmp_path / "l.safetensors"
    save_safetensors(state, path)
    report = load_checkpoint(model, path)
    assert report.prefix_added == "backbone."
    assert report.adapted == ("backbone.pos_embed",)
    assert torch.equal(model.backbone.pos_embed, wanted["backbone.pos_embed"])
    again = model.adapt_state_dict(wanted)
    assert again["backbone.pos_embed"] is wanted["backbone.pos_embed"]


def test_checkpoint_of_an_unknown_grid():
    model = micro_plain_mamba("odd_odd_3x5", image_size=64)
    state = micro_plain_mamba("odd_odd_3x5").state_dict()
    with pytest.raises(CheckpointError, match=r"pos_embed\.shape=\(1, 15, 32\) is not a square"):
        model.adapt_state_dict(state)


def test_training_keeps_the_statistics():
    """Batch norms use the checkpoint's statistics in training too, and leave them alone."""
    model = micro_plain_mamba("dw_all").double()  # float32 trains on the native kernels
    x = plain_mamba_images("dw_all").double()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(x)
    model.train()
    logits = model(x)
    assert torch.equal(logits, wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "grid"), [(224, (14, 14)), ((50, 70), (4, 5)), ((16, 17), (1, 2)), (33, (3, 3))]
)
def test_grids(size, grid):
    config = plain_mamba_config("dw_all", image_size=size)
    assert config.grid == grid
    model = PlainMamba(config).eval()
    logits = model(torch.zeros(1, 3, *config.image_height_width))
    assert logits.shape == (1, 10)
    assert torch.isfinite(logits).all()


def test_configuration_survives_json():
    model = vssm.create_model("plain_mamba_l1", depth=1, image_size=(32, 48), d_model=16)
    fields = json.loads(json.dumps(vars(model.config)))
    assert model_from_config("plain_mamba_l1", fields).config == model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (32, 32, 3)}, r"image_size=\(32, 32, 3\) does not have two sides"),
        ({"image_size": (0, 3)}, r"image_size=\(0, 3\) is smaller than patch_size=16"),
        ({"patch_size": 7}, r"patch_size=7 is odd"),
        ({"conv_size": 6}, r"conv_size=6 is even"),
        ({"d_state": 0}, r"d_state=0 is below 1"),
        ({"dt_rank": 0}, r"dt_rank=0 is below 1"),
        ({"stem_convs": -1}, r"stem_convs=-1 is below 0"),
        ({"layers_with_dwconv": (2,)}, r"layers_with_dwconv=\(2,\) names 2, outside .* 0 to 1"),
        ({"class_token": "middle"}, r"plain_mamba_l1 has no such option.*layers_with_dwconv"),
    ],
)
def test_create_model_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        vssm.create_model("plain_mamba_l1", **{"depth": 2, "d_model": 16, **options})
