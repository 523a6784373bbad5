"""A segmenter's backbone begun from a classifier's checkpoint, in every family."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import vssm
from vssm import FinetuneRequest, ModelSource, Recipe, SceneRecipe
from vssm.errors import CheckpointError

# Classifiers of 3 x 3 patches (PlainMamba's and Vim's), segmenters of 4 x 4.
VIM = {"depth": 4, "d_model": 16, "d_state": 4}
PLAIN = {"depth": 4, "d_model": 16, "d_state": 4, "stem_width": 8}
VMAMBA = {"depths": (1, 1, 1, 1), "d_model": 8}
HEADS = {"head_width": 8, "auxiliary_width": 4, "num_classes": 3}
TAPS = {"taps": (1, 2, 3, 4)}
SEGMENTERS = {
    "vim": ("vim_tiny_upernet_ade20k", {**VIM, **TAPS, "image_size": 64, "table_size": 64}),
    "plain_mamba": (
        "plain_mamba_l1_upernet_ade20k",
        {**PLAIN, **TAPS, "image_size": 96, "table_size": 64},
    ),
    "vmamba": ("vmamba_tiny_upernet_ade20k", {**VMAMBA, "image_size": 64}),
}
CLASSIFIERS = {
    "vim": ("vim_tiny", {**VIM, "image_size": 48}),
    "plain_mamba": ("plain_mamba_l1", {**PLAIN, "image_size": 48}),
    "vmamba": ("vmamba_tiny_s1l8", {**VMAMBA, "image_size": 48}),
}
OWN = {
    "vim": "backbone.fpn1, backbone.fpn2",
    "plain_mamba": "backbone.norm_layer0, backbone.norm_layer1, backbone.norm_layer2",
    "vmamba": "backbone.outnorm0, backbone.outnorm1, backbone.outnorm2, backbone.outnorm3",
}


def segmenter(family, **changes):
    name, sizes = SEGMENTERS[family]
    return vssm.create_model(name, **{**sizes, **HEADS, **changes})


def saved(family, folder, *, prefix="module.", **changes):
    """A classifier of 5 classes with weights of its own, and its file, wrapped as by training."""
    name, sizes = CLASSIFIERS[family]
    model = vssm.create_model(name, **{**sizes, "num_classes": 5, **changes})
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(-1, 1, generator=generator)
    path = folder / "classifier.pth"
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 300}, path)
    return model.state_dict(), path


@pytest.mark.parametrize("family", SEGMENTERS)
def test_the_backbone_alone(family, tmp_path):
    weights, path = saved(family, tmp_path)
    model = segmenter(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = vssm.load_checkpoint(model, path, backbone=True)
    after = model.state_dict()
    taken = {
        key.removeprefix("backbone."): value
        for key, value in weights.items()
        if f"backbone.{key.removeprefix('backbone.')}" in after and not key.endswith("pos_embed")
    }
    blocks = [key for key in taken if key.startswith("layers.")]
    assert len(blocks) == sum(key.startswith("backbone.layers.") for key in after)
    assert all(torch.equal(after[f"backbone.{key}"], value) for key, value in taken.items())
    loaded = {f"backbone.{key}" for key in taken} | {"backbone.pos_embed"} & set(after)
    assert report.num_tensors == len(loaded)
    assert all(torch.equal(after[key], before[key]) for key in after if key not in loaded)
    words = f"not in a classifier, the model's own: {OWN[family]}"
    assert words in str(report)
    assert report.own[-2:] == ("decode_head", "auxiliary_head")
    # Neither the classes of the file nor its head are the model's.
    assert model.labels is None
    assert any("head" in key for key in report.ignored)
    assert model.checkpoint.sha256 == report.sha256


@pytest.mark.parametrize(
    ("class_token", "rows"),
    [("none", ()), ("middle", (4,)), ("double", (0, 10))],
)
def test_class_tokens_leave_the_table_of_positions(class_token, rows, tmp_path):
    pool = {"pool": "mean"} if class_token == "none" else {}
    weights, path = saved("vim", tmp_path, class_token=class_token, **pool)
    model = segmenter("vim")
    report = vssm.load_checkpoint(model, path, backbone=True)
    table = weights["pos_embed"][0]
    patches = table[[row for row in range(len(table)) if row not in rows]]
    grid = patches.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    want = functional.interpolate(grid, size=(4, 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.backbone.pos_embed, want.reshape(1, 16, -1))
    assert report.adapted == ("pos_embed",)
    assert len([key for key in report.ignored if "cls_token" in key]) == len(rows)


def test_rotary_tables_are_of_the_grid(tmp_path):
    _, path = saved("vim", tmp_path, rope=True)
    model = segmenter("vim", rope=True)
    own = model.backbone.rope.freqs_cos.clone()
    report = vssm.load_checkpoint(model, path, backbone=True)
    assert torch.equal(model.backbone.rope.freqs_cos, own)
    assert "backbone.rope" in report.own


def test_files_that_do_not_fit(tmp_path):
    model = segmenter("vim")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, wide = saved("vim", tmp_path, prefix="", d_model=24)
    with pytest.raises(CheckpointError, match=r"misshapen: .*patch_embed\.proj\.weight \(file"):
        vssm.load_checkpoint(model, wide, backbone=True)
    _, shallow = saved("vim", tmp_path, depth=3)
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.3\."):
        vssm.load_checkpoint(model, shallow, backbone=True)
    weights, path = saved("vim", tmp_path)
    table = weights["pos_embed"]
    torch.save({**weights, "pos_embed": torch.cat([table, table], 1)[:, :14]}, path)
    with pytest.raises(CheckpointError, match="not a square grid with at most two class tokens"):
        vssm.load_checkpoint(model, path, backbone=True)
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"unexpected: fpn1\.0\.weight"):
        vssm.load_checkpoint(model, path, backbone=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_without_such_a_backbone(tmp_path):
    _, path = saved("vim", tmp_path)
    with pytest.raises(ValueError, match="backbone=True for Vim: only a segmenter's"):
        vssm.load_checkpoint(vssm.create_model("vim_tiny", **VIM), path, backbone=True)
    with pytest.raises(ValueError, match="leave new_head out"):
        vssm.load_checkpoint(segmenter("vim"), path, backbone=True, new_head=True)


def test_requests(tmp_path):
    file = tmp_path / "a.pth"
    with pytest.raises(ValueError, match="backbone=True without a checkpoint"):
        ModelSource("vim_tiny_upernet_ade20k", backbone=True)
    with pytest.raises(ValueError, match="leave new_head out"):
        ModelSource("vim_tiny_upernet_ade20k", file, backbone=True, new_head=True)
    classifier = ModelSource("vim_tiny", file, backbone=True)
    with pytest.raises(ValueError, match="a segmenter's backbone alone is begun"):
        FinetuneRequest(classifier, tmp_path, tmp_path, Recipe())
    FinetuneRequest(
        ModelSource("vim_tiny_upernet_ade20k", file, backbone=True),
        tmp_path,
        tmp_path,
        SceneRecipe(),
    )
