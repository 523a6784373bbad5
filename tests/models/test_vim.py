"""Vim against the official code: keys, numbers, switches, other image sizes."""

from __future__ import annotations

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
    micro_config,
    micro_vim,
    shapes,
    wanted_shapes,
)
from tolerances import relative_error
from torch.nn import functional

import vssm
from vssm import PruneSchedule
from vssm.errors import CheckpointError
from vssm.models.registry import families
from vssm.models.vim import Vim

# Of the largest value, as the fixtures' README asks. Measured on vim_tiny: float64 5e-15, float32
# 2.5e-6; on the micro models: 1.1e-15 and 9e-7.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
MICRO = manifest("micro_vim")["cases"]


@pytest.mark.parametrize("name", families()["vim"].cards)
@pytest.mark.parametrize("schedule", [None, PruneSchedule({5: 0.8})], ids=["dense", "pruned"])
def test_official_keys_and_shapes(name, schedule):
    with torch.device("meta"):
        check_keys(vssm.create_model(name, schedule=schedule), name)


# The whole reference in float64 takes seconds: tests/pruning/test_select.py has one, and it alone
# in `make test`; there are float64 numbers of every switch below.
@pytest.fixture(
    scope="module",
    params=[pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32],
    ids=str,
)
def vim_tiny(request):
    """What vim_tiny computes, by the official names of its tensors."""
    model = filled_model("vim_tiny").to(request.param)
    seen = {}
    hooks = {
        "patch_embed": model.patch_embed.register_forward_hook,
        "block0.normed": model.layers[0].norm.register_forward_hook,
        "feature": model.norm_f.register_forward_hook,
    }
    for name, hook in hooks.items():
        hook(lambda module, args, output, name=name: seen.update({name: output}))
    model.layers[0].norm.register_forward_hook(lambda m, args, out: seen.update(tokens=args[0]))
    with torch.no_grad():
        found = model.forward_details(images().to(request.param), with_blocks=True)
    seen["logits"], seen["feature"] = found.logits, seen["feature"].squeeze(1)
    for name, block in (("block0", 0), ("block_last", -1)):
        seen[f"{name}.hidden"], seen[f"{name}.residual"] = found.blocks[block]
    return request.param, seen


@pytest.mark.parametrize(
    "tensor",
    [
        *("logits", "feature", "patch_embed", "tokens", "block0.normed", "block0.hidden"),
        *("block0.residual", "block_last.hidden", "block_last.residual"),
    ],
)
def test_official_numbers(vim_tiny, tensor):
    dtype, seen = vim_tiny
    assert error_of("vim_tiny", tensor, seen[tensor]) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", MICRO)
def test_every_switch(case):
    model, prefix = micro_vim(case), case + "/"
    arrays = fixture("micro_vim").items()
    wanted = {k.removeprefix(prefix): v for k, v in arrays if k.startswith(prefix)}
    assert shapes(model.state_dict()) == wanted_shapes(MICRO[case])
    for key in (k for k in wanted if k.startswith("kept.")):
        kept = model.state_dict()[key.removeprefix("kept.")]
        assert relative_error(kept, wanted[key]) < 1e-6
    for dtype, tolerance in TOLERANCE.items():
        with torch.no_grad():
            found = model.to(dtype).forward_details(images("micro_vim").to(dtype), with_blocks=True)
        assert relative_error(found.logits, wanted["logits"]) < tolerance
        assert len(found.blocks) == model.traced_blocks
        if found.blocks:  # pairs of layers have no single stream
            first, last = found.blocks[0], found.blocks[-1]
            streams = {"block0.hidden": first[0], "block0.residual": first[1]}
            for name, stream in {**streams, "block_last.hidden": last[0]}.items():
                got = fill.sample(stream.numpy(), 1021)
                assert relative_error(got, wanted[name]) < tolerance


@pytest.mark.parametrize("case", sorted(set(MICRO) - {"double_cls", "if_bidirectional"}))
def test_schedule_leaves_the_keys_alone(case):
    pruned = micro_vim(case, PruneSchedule({1: 0.5}))
    assert shapes(pruned.state_dict()) == wanted_shapes(MICRO[case])


def _cubic(x):
    """Keys' kernel with a = -0.75, torch's."""
    x = abs(x)
    if x <= 1:
        return (1.25 * x - 2.25) * x * x + 1
    return ((-0.75 * x + 3.75) * x - 6) * x + 3 if x < 2 else 0.0


def _weights(old, new):
    """(new, old) bicubic weights of one axis, align_corners=False, edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += _cubic(center - tap)
    return matrix


@pytest.mark.parametrize("case", ["mid_div2", "head_cls", "double_cls", "nocls_mean"])
@pytest.mark.parametrize("size", [64, (40, 72), (32, 48)])
def test_position_table_of_another_image_size(case, size):
    """The class rows are taken out, the 6 x 6 grid is resized, and they are put back."""
    small = micro_vim(case).double()
    table = small.state_dict()["pos_embed"].numpy()[0]
    classes = {"mid_div2": [18], "head_cls": [0], "double_cls": [0, 37], "nocls_mean": []}[case]
    grid = np.delete(table, classes, axis=0).reshape(6, 6, -1)
    height, width = (side // 8 for side in (size if isinstance(size, tuple) else (size, size)))
    resized = np.einsum("ya,xb,abc->yxc", _weights(6, height), _weights(6, width), grid)
    wanted = list(resized.reshape(height * width, -1))
    places = {"mid_div2": [height * width // 2], "head_cls": [0], "nocls_mean": []}.get(
        case, [0, height * width + 1]
    )
    for place, row in zip(places, classes, strict=True):
        wanted.insert(place, table[row])

    model = Vim(micro_config(case, image_size=size)).eval()
    adapted = model.adapt_state_dict(small.state_dict())
    assert relative_error(adapted["pos_embed"][0], np.stack(wanted)) < 1e-13  # measured 2e-16
    model.load_state_dict(adapted)
    pixels = (8 * height, 8 * width)
    assert torch.isfinite(model(torch.zeros(1, 3, *pixels))).all()
    again = model.adapt_state_dict(adapted)
    assert torch.equal(again["pos_embed"], adapted["pos_embed"])


def test_checkpoint_of_another_class_token_layout():
    state = micro_vim("nocls_mean").state_dict()
    model = Vim(micro_config("mid_div2", image_size=64))
    with pytest.raises(CheckpointError, match=r"pos_embed\.shape=.*1 class token.*same class"):
        model.adapt_state_dict(state)


def test_non_square_images_are_rows_of_patches():
    """A wide image's tokens are those of its own grid: shifting by a patch shifts the tokens."""
    model = micro_vim("nocls_mean", image_size=(16, 32)).double()
    picture = torch.randn(1, 3, 16, 32, dtype=torch.float64)
    patches = model.patch_embed(picture)
    unfolded = functional.unfold(picture, 8, stride=8).transpose(1, 2)
    proj = model.patch_embed.proj
    wanted = unfolded @ proj.weight.flatten(1).T + proj.bias
    assert relative_error(patches, wanted) < 1e-14
    assert model.config.grid == (2, 4)


@pytest.mark.parametrize(
    "shape", [(2, 3, 48, 40), (2, 3, 40, 48), (2, 1, 48, 48), (3, 48, 48), (2, 48, 48, 3)]
)
def test_wrong_image_shape(shape):
    with pytest.raises(ValueError, match=r"images\.shape=.* is not \(batch, 3, 48, 48\); resize"):
        micro_vim()(torch.zeros(shape))


def test_create_model():
    assert vssm.list_models()[0] == "vim_tiny"
    model = vssm.create_model("vim_tiny", num_classes=7, depth=2, image_size=(32, 64))
    assert not model.training
    assert model.name == "vim_tiny"
    assert model.layout.seqlen == 9
    assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"img_size": 32},
            r"img_size=32: .* called 'image_size' here",
        ),
        ({"image_size": 8}, r"image_size=8 is smaller than patch_size=16"),
        ({"image_size": (32, 32, 3)}, r"image_size=\(32, 32, 3\) does not have two sides"),
        ({"class_token": "tail"}, r"class_token='tail' is not one of middle, head, double, none"),
        ({"pool": "avg"}, r"pool='avg' is not one of mean, max, last"),
        ({"bimamba": "v3"}, r"bimamba='v3' is not one of v2, v1, none"),
        ({"num_classes": 0}, r"num_classes=0 is below 1"),
        ({"expand": 0}, r"expand=0 is below 1"),
        ({"dt_rank": 0}, r"dt_rank=0 is below 1"),
        ({"norm_eps": -1e-5}, r"norm_eps=-1e-05 is below 0"),
        ({"rope": True, "d_model": 6}, r"d_model=6 with rope=True is not a multiple of 4"),
        ({"rope": True, "class_token": "double"}, r"rope=True with class_token='double'"),
        ({"bidirectional_layers": True}, r"needs bimamba='none' and an even depth"),
        ({"schedule": PruneSchedule({3: 0.5})}, r"block=3 .*outside the model's blocks 1 to 2"),
    ],
)
def test_create_model_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        vssm.create_model("vim_tiny", **{"depth": 2, "d_model": 16, **options})


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'vim_huge' is not a model; did you mean 'vim_base'"):
        vssm.create_model("vim_huge")


def test_initial_weights_are_seeded_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    sizes = {"depth": 1, "d_model": 16}
    first = vssm.create_model("vim_tiny", **sizes)
    assert torch.equal(torch.rand(3), wanted)
    second = vssm.create_model("vim_tiny", **sizes)
    pruned = vssm.create_model("vim_tiny", **sizes, schedule=PruneSchedule({1: 0.5}))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
        assert torch.equal(value, pruned.state_dict()[key])
    assert first.state_dict()["pos_embed"].std() > 0.01
