"""VMamba against the official code: keys, numbers, switches, files of other times, refusals."""

from __future__ import annotations

import pytest
import torch
from official_data import check_keys, filled_model, images, manifest, shapes, wanted_shapes
from official_hierarchical import (
    case_images,
    case_of,
    micro_error,
    micro_vmamba,
    official_error,
    record,
    stage_ends,
)
from tolerances import relative_error

import vssm
from vssm import PruneSchedule
from vssm.errors import CheckpointError, UnsupportedError
from vssm.models.cost import count
from vssm.models.cross_scan import walk_order
from vssm.models.registry import families
from vssm.models.vmamba import VMamba, VMambaConfig

NAMES = list(families()["vmamba"].cards)
CASES = manifest("micro_vmamba")["cases"]
# Of the largest value. Measured: vmamba_tiny_s1l8 1.4e-15 and 7.2e-7, micro 2.3e-15 and 1.1e-6.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# GFLOPs that the official tables print.
PRINTED = {
    "vmamba_tiny_s1l8": 4.9,
    "vmamba_small_s2l15": 8.7,
    "vmamba_base_s2l15": 15.4,
    "vanilla_vmamba_tiny": 5.6,
    "vanilla_vmamba_small": 11.2,
    "vanilla_vmamba_base": 18.0,
}


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    with torch.device("meta"):
        check_keys(vssm.create_model(name), name)


def test_nine_models():
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", PRINTED)
def test_published_cost(name):
    with torch.device("meta"):
        work = count(vssm.create_model(name))
    assert work.published == work.true
    assert work.published / 1e9 == pytest.approx(PRINTED[name], rel=1e-2)


def test_cost_by_hand():
    """One stage of one block: every product, and nine operations a state of four walks."""
    model = micro_vmamba("v05_withz", depths=[1], image_size=(12, 20))
    embed = 6 * 10 * 3 * 9 * 8 + 3 * 5 * 8 * 9 * 16
    projections = 16 * 32 + 9 * 16 + 16 * 16 + 2 * 16 * 64  # in, convolution, out, MLP
    low = 4 * (16 * 3 + 1 * 16)  # dt, B and C; delta
    scan = 4 * (9 * 16 * 1 + 16)
    work = count(model)
    assert work.true == embed + 15 * (projections + low + scan) + 16 * 10
    assert work.gemm == embed + 15 * (projections + low) + 16 * 10
    assert work.exps == 15 * 4 * 16


@pytest.fixture(scope="module", params=TOLERANCE, ids=str)
def tiny(request):
    """What vmamba_tiny_s1l8 computes, by the official names of its tensors."""
    model = filled_model("vmamba_tiny_s1l8").to(request.param)
    modules = {"block0.mixer": model.layers[0].blocks[0].op}
    modules |= {f"down{i}": model.layers[i].downsample for i in range(3)}
    seen = record({**modules, "patch_embed": model.patch_embed["7"]})
    model.classifier["head"].register_forward_hook(
        lambda m, args, out: seen.update(feature=args[0])
    )
    batch = 2 if request.param == torch.float32 else 1  # the reference takes a second an image
    with torch.no_grad():
        inputs = images("vmamba_tiny_s1l8")[:batch].to(request.param)
        found = model.forward_details(inputs, with_blocks=True)
    streams = [hidden for hidden, _ in found.blocks]
    ends = {f"stage{i}": streams[end] for i, end in enumerate(stage_ends(model))}
    return request.param, {**seen, **ends, "block0": streams[0], "logits": found.logits}


@pytest.mark.parametrize(
    "tensor",
    [
        *("logits", "feature", "patch_embed", "block0.mixer", "block0"),
        *("stage0", "stage1", "stage2", "stage3", "down0", "down1", "down2"),
    ],
)
def test_official_numbers(tiny, tensor):
    dtype, seen = tiny
    assert official_error("vmamba_tiny_s1l8", tensor, seen[tensor]) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_every_switch(case):
    model = micro_vmamba(case)
    assert shapes(model.state_dict()) == wanted_shapes(CASES[case])
    seen = record({"block0.mixer": model.layers[0].blocks[0].op})
    for dtype, tolerance in TOLERANCE.items():
        x = case_images("vmamba", case).to(dtype)
        with torch.no_grad():
            found = model.to(dtype).forward_details(x, with_blocks=True)
        assert [residual for _, residual in found.blocks] == [None] * model.traced_blocks
        seen |= {"logits": found.logits, "stage3": found.blocks[-1][0]}
        for tensor, got in seen.items():
            assert micro_error("vmamba", case, tensor, got) < tolerance


def test_walks():
    """A 2 x 3 map: rows, columns, and both backwards."""
    order = walk_order((2, 3), ["rows", "columns", "rows_back", "columns_back"])
    wanted = [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert order.tolist() == [wanted]
    assert order.dtype == torch.int32


def _old_names(state):
    """The first release: other names, no position map, linears as 1x1 convolutions."""
    renamed = {
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        ".norm.": ".ln_1.",
        ".op.": ".self_attention.",
        "classifier.norm.": "norm.",
        "classifier.head.": "head.",
    }
    old = {}
    for key, value in state.items():
        name = key
        for today, then in renamed.items():
            if not (today == ".norm." and ".blocks." not in key):
                name = (
                    name.replace(today, then)
                    if today.startswith(".")
                    else (then + name.removeprefix(today) if name.startswith(today) else name)
                )
        linear = key.endswith(("in_proj.weight", "out_proj.weight", "reduction.weight"))
        old[name.replace("op.ln_1", "op.norm")] = value[..., None, None] if linear else value
    return old


def _one_file(state):
    """The one-file code of March 2025: joined projections of all directions."""
    new = {}
    for key, value in state.items():
        joined = key.endswith(("x_proj_weight", "dt_projs_weight"))
        name = key.replace("proj_weight", "proj.weight").replace("projs_weight", "projs.weight")
        new[name] = value.flatten(0, 1) if joined else value
        if key.endswith(("fc1.weight", "fc2.weight")):
            new[name] = value[..., None, None]
    return new


@pytest.mark.parametrize(
    ("case", "change"),
    [("v0_vanilla", _old_names), ("s2_n4", _one_file), ("v0_vanilla", lambda state: state)],
    ids=["old names", "one file", "today's"],
)
def test_files_of_other_times(tmp_path, case, change):
    wanted = micro_vmamba(case).state_dict()
    stored = change(wanted)
    torch.save({"model": stored, "epoch": 3}, tmp_path / "file.pth")
    model = VMamba(micro_vmamba(case).config)
    report = vssm.load_checkpoint(model, tmp_path / "file.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key])
    assert bool(report.adapted) == (set(stored) != set(wanted))


def test_two_names_of_one_weight():
    state = micro_vmamba("v0_vanilla").state_dict()
    state["head.bias"] = state["classifier.head.bias"]
    with pytest.raises(
        CheckpointError, match=r"'head\.bias' is an older name of 'classifier\.head"
    ):
        micro_vmamba("v0_vanilla").adapt_state_dict(state)


def test_position_map_of_another_image_size():
    state = micro_vmamba("posembed").state_dict()
    model = micro_vmamba("posembed", image_size=(40, 96))
    adapted = model.adapt_state_dict(state)
    assert adapted["pos_embed"].shape == (1, 16, 10, 24)
    model.load_state_dict(adapted)
    # Bicubic weights sum to one: the mean of every channel stays near where it was.
    old, new = (s["pos_embed"].mean((2, 3)) for s in (state, adapted))
    assert float((old - new).abs().max()) < 0.05
    assert torch.equal(model.adapt_state_dict(adapted)["pos_embed"], adapted["pos_embed"])


@pytest.mark.parametrize("case", ["s1_square", "v0_vanilla", "down_v2_pe_v1"])
@pytest.mark.parametrize("size", [64, (68, 100), (36, 64)])
def test_other_image_sizes(case, size):
    """The configuration's maps are those of the convolutions, odd sides too."""
    model = micro_vmamba(case, image_size=size)
    with torch.no_grad():
        found = model.forward_details(torch.zeros(1, 3, *model.image_size), with_blocks=True)
    lengths = [tokens for tokens, _ in model.block_costs()]
    assert [hidden.shape[1] for hidden, _ in found.blocks] == lengths


def test_a_schedule_is_refused():
    with pytest.raises(
        UnsupportedError,
        match=r"schedule='0\.8 after block 5': VMamba is hierarchical.*schedule=None",
    ):
        vssm.create_model("vmamba_tiny_s1l8", schedule=PruneSchedule({5: 0.8}))


def test_ablations_walk_less():
    assert case_of("vmamba", "unidi")["config"]["forward_type"] == "v051d_noz"
    order = micro_vmamba("unidi").layers[0].walks.order
    assert torch.equal(order, order[:, :1].expand_as(order))
    x = case_images("vmamba", "unidi")
    changed = micro_vmamba("unidi", scan="cross")
    with torch.no_grad():
        assert relative_error(changed(x), micro_vmamba("unidi")(x)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (4, 8, 8)}, r"image_size=\(4, 8, 8\) does not have two sides"),
        ({"image_size": (3, 16)}, r"image_size=\(3, 16\) is smaller than patch_size=4"),
        ({"image_size": 16, "downsample": "v2"}, r"image_size=16 leaves no token in the last of 4"),
        ({"scan": "zigzag"}, r"scan='zigzag' is not one of cross, unidi, bidi"),
        ({"downsample": "v4"}, r"downsample='v4' is not one of v1, v2, v3"),
        ({"depths": ()}, r"depths=\(\) has no stage"),
        ({"depths": (1, 0)}, r"depths\[1\]=0 is below 1"),
        ({"mlp_ratio": -1.0}, r"mlp_ratio=-1\.0 is below 0"),
        ({"expand": 0.0}, r"d_inner=0 is below 1"),
        ({"dt_rank": 0}, r"dt_rank=0 is below 1"),
        ({"patch_size": 8}, r"patch_size=8 with patch_embed='v2'"),
    ],
)
def test_configurations_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        VMambaConfig(**options)
