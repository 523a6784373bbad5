"""`vssm visualize`: attention that is the scan itself, maps in their places, figures and page."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command import SIZES
from exports import MICRO, exported, images, micro, micro_plain
from PIL import Image

import vssm
from vssm.errors import MissingPackageError, UnsupportedError
from vssm.studies.figures import _joined, attention_figure, kept_figure
from vssm.studies.trace import readout_weights, trace
from vssm.studies.visualize import _left, _owners

_EXACT = 1e-12  # float64 sums of about a hundred terms; measured: below 1e-15
SUBJECTS = {
    "vim": micro,
    "vim plain": lambda: micro(rules={"alignment": "none"}),
    "vim constant": lambda: micro(rules={"alignment": "constant"}),
    "vim backward score": lambda: micro(rules={"score_direction": "backward"}),
    "vim dense": lambda: micro(None),
    "vim merged": lambda: micro(vssm.MergeSchedule(6, alignment="size")),
    "vim v1": lambda: micro(bimamba="v1"),
    "plain_mamba": micro_plain,
    "plain_mamba full": lambda: micro_plain(rules={"step_parameters": "full"}),
    "vmamba": lambda: vssm.create_model("vmamba_tiny_s1l8", image_size=32),
    "groupmamba": lambda: vssm.create_model("groupmamba_tiny", image_size=32),
}


def _traced(model):
    model = model.double()
    return model, trace(model, torch.from_numpy(images(model)).double())


@pytest.mark.parametrize("name", SUBJECTS)
def test_weights_times_inputs_are_the_scans_output(name):
    """sum_j w_j u_j plus the skip is the output at the readout, for every node of every block."""
    model, traced = _traced(SUBJECTS[name]())
    class_block = name == "groupmamba"  # its last: attention of a class token, on no map
    assert len(traced.blocks) == model.traced_blocks - class_block
    torch.manual_seed(0)
    for block in traced.blocks:
        for scan in block.scans:
            one = torch.zeros(block.position.shape, dtype=torch.float64)
            one[:, one.shape[1] // 2] = 1
            for readout in (one, torch.rand_like(one)):
                weights = readout_weights(scan, readout)
                inputs = scan.u.transpose(1, 2)  # (batch, 1 or K, seqlen, d_inner)
                skip = readout[:, None, :, None] * scan.skip[:, None] * inputs
                directions = scan.order.shape[1]
                found = (weights * inputs + skip.expand(-1, directions, -1, -1)).sum((1, 2))
                wanted = (readout[..., None] * scan.output()).sum(1)
                torch.testing.assert_close(found, wanted, rtol=_EXACT, atol=_EXACT)


def test_weights_are_the_derivative():
    """Token by token and channel by channel, not in the sum alone; gaps of the aligned scan."""
    _, traced = _traced(micro())
    scan = traced.blocks[-1].scans[0]
    readout = torch.isin(traced.blocks[-1].position, torch.tensor([18])).double()
    assert scan.gap.max() > 1
    u = scan.u.clone().requires_grad_()
    y = type(scan)(**{**vars(scan), "u": u}).output()
    (slope,) = torch.autograd.grad((readout[..., None] * y).sum(), u)
    skip = readout[..., None, None] * scan.skip
    found = readout_weights(scan, readout).transpose(1, 2) + skip
    torch.testing.assert_close(found, slope, rtol=_EXACT, atol=_EXACT)


def test_a_gap_decays_what_came_before():
    """Alignment takes weight from the tokens behind a gap; plain removal has other weights."""
    _, aligned = _traced(micro("1:0.5"))
    _, plain = _traced(micro("1:0.5", rules={"alignment": "none"}))
    here, there = aligned.blocks[1], plain.blocks[1]
    assert torch.equal(here.position, there.position)
    assert (here.attention() <= there.attention()).all()
    assert here.attention().sum() < 0.999 * there.attention().sum()


def test_importance_is_the_score_that_pruned():
    model, traced = _traced(micro())
    for number, stage in model.stages.items():
        score = traced.details.scores[stage.index]
        found = traced.blocks[number - 1].importance()
        torch.testing.assert_close(found, score, rtol=_EXACT, atol=_EXACT)


def test_maps_have_every_token_in_its_place():
    model, traced = _traced(micro())
    block = traced.blocks[-1]
    shown = block.on_grid(block.position)
    patches = np.array([p for p in range(37) if p != 18]).reshape(6, 6)
    kept = traced.details.kept_positions[-1]
    for image in range(2):
        wanted = np.where(np.isin(patches, kept[image]), patches, np.nan)
        np.testing.assert_array_equal(shown[image], wanted)
    assert shown.isnan().sum() == 2 * (37 - model.stages[2].num_keep)


def test_recording_changes_nothing():
    model = micro()
    array = torch.from_numpy(images(model))
    with torch.no_grad():
        before = model(array)
    assert torch.equal(trace(model, array).details.logits, before)
    with torch.no_grad():
        assert torch.equal(model(array), before)


def test_command_on_an_export(cli, tmp_path, picture):
    artifact = exported(tmp_path, micro())
    out = tmp_path / "shown"
    report = tmp_path / "numbers.json"
    code = cli("visualize", artifact.directory, picture, picture, "-o", out, "--json", report)
    assert code == 0, cli.out
    assert "10 PNG files" in cli.out
    numbers = json.loads(report.read_text())
    assert numbers == json.loads((out / "visualize.json").read_text())
    first = numbers["images"][0]
    assert list(first["variants"]) == ["dense", "plain removal", "aligned (gap)"]
    assert list(first["figures"]) == ["kept", "importance", "attention", "directions", "walks"]
    assert first["readout"] == "class token"
    aligned = first["variants"]["aligned (gap)"]
    array = vssm.preprocess(picture, artifact)
    found = micro().forward_details(torch.from_numpy(array))
    assert aligned["kept_positions"] == [k[0].tolist() for k in found.kept_positions]
    assert aligned["kept_as_last"] == [1, 1]
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 10
    assert "http" not in page
    for image in numbers["images"]:
        for file in image["figures"].values():
            with Image.open(out / file) as png:
                assert np.asarray(png.convert("L")).std() > 5


@pytest.mark.parametrize("name", ["plain_mamba_l1", "vmamba_tiny_s1l8"])
def test_command_by_name(cli, tmp_path, picture, name):
    sizes = ["--set=image_size=32", "--num-classes=4"]
    sizes += ["--set=depth=3", "--schedule=1:0.7"] if name.startswith("plain") else []
    assert cli("visualize", name, picture, "-o", tmp_path / "out", "--blocks=2", *sizes) == 0
    numbers = json.loads((tmp_path / "out" / "visualize.json").read_text())
    assert numbers["facts"]["weights"] == "seeded initial weights"
    assert numbers["images"][0]["readout"] == "mean over tokens"
    assert numbers["images"][0]["blocks"] == [2]
    assert ("kept" in numbers["images"][0]["figures"]) == name.startswith("plain")


def test_from_python(tmp_path, picture):
    """By the subject that finetune and ablate take; what comes back is what the file has."""
    sizes = {key: value for key, value in MICRO.items() if key != "num_classes"}
    subject = vssm.ModelSource("vim_tiny", schedule="1:0.5", num_classes=7, options=sizes)
    found = vssm.visualize(subject, [str(picture)], str(tmp_path / "out"))
    assert list(found["images"][0]["variants"]) == ["dense", "plain removal", "aligned (gap)"]
    assert json.loads((tmp_path / "out" / "visualize.json").read_text()) == found
    with pytest.raises(ValueError, match="tokens='masked' is a way to train; leave it out"):
        vssm.visualize(replace(subject, tokens="masked"), [picture], tmp_path)
    with pytest.raises(ValueError, match=r"block=4 is outside the model's blocks 1 to 3"):
        vssm.visualize(subject, [picture], tmp_path / "none", blocks=[1, 4])
    assert not (tmp_path / "none").exists()


def test_merged_patches_are_shown_as_one(tmp_path, picture):
    sizes = {key: value for key, value in MICRO.items() if key != "num_classes"}
    subject = vssm.ModelSource("vim_tiny", merge="6,start=1,every=1", num_classes=7, options=sizes)
    found = vssm.visualize(subject, [picture], tmp_path / "out", blocks=[3])
    entry = found["images"][0]
    assert found["facts"]["kept"] == "6 merged after every block"
    assert list(entry["figures"])[:2] == ["merged", "importance"]
    assert list(entry["variants"]) == ["dense", "merged, alignment none"]
    merged = entry["variants"]["merged, alignment none"]
    assert entry["variants"]["dense"]["merged"] == []
    # Every group is in its order, stands once among the tokens left, and two merges took 12.
    assert sum(len(group) - 1 for group in merged["merged"]) == 12
    left = set(merged["kept_positions"][1])
    assert all(len(left & set(group)) == 1 and sorted(group) == group for group in merged["merged"])


def test_what_was_pruned_or_dropped_is_in_no_token():
    prune = vssm.PruneSchedule({1: 0.5}, alignment="none")
    for schedule in (
        vssm.MergeSchedule(4, class_token="true", prune=prune),
        vssm.MergeSchedule(4, mode="drop"),
    ):
        model = micro(schedule)
        _, traced = _traced(model)
        owner = _owners(model, traced)[2]
        last = traced.details.kept_positions[-1][0].tolist()
        assert sorted(set(owner.tolist()) - {-1}) == sorted(last)
        joined = 4 if schedule.mode == "sum" else 0
        assert (owner >= 0).sum() == len(last) + joined


def test_groups_have_their_mean_colour_and_an_outline():
    picture = np.arange(2 * 8 * 8 * 3).reshape(8, 16, 3) / 384
    group = np.array([[0, 0, 2, 3], [4, 5, 0, -1]])
    shown = _joined(picture, group)
    areas = [(slice(0, 4), slice(0, 8)), (slice(4, 8), slice(8, 12))]
    mean = np.concatenate([picture[area].reshape(-1, 3) for area in areas]).mean(0)
    np.testing.assert_allclose(shown[1:3, 1:7], np.broadcast_to(mean, (2, 6, 3)))  # no edge inside
    np.testing.assert_array_equal(shown[0, :8], 1)
    np.testing.assert_array_equal(shown[:4, 7], 1)
    np.testing.assert_array_equal(shown[:4, 8:], picture[:4, 8:])
    assert not np.array_equal(shown[4:, 12:], picture[4:, 12:])  # faded: it went


HEADS = {"head_width": 8, "auxiliary_width": 8}
SEGMENTER = {
    **HEADS,
    "image_size": 64,
    "table_size": 64,
    "depth": 4,
    "d_model": 16,
    "taps": (1, 2, 3, 4),
}


@pytest.mark.parametrize(
    ("name", "changes", "schedule"),
    [
        ("vim_tiny", SEGMENTER, {1: 0.75, 3: 0.5}),
        ("plain_mamba_l1", SEGMENTER, {1: 0.75, 3: 0.5}),
        ("vmamba_tiny", {**HEADS, "image_size": 64, "depths": (1, 1, 1, 1), "d_model": 8}, None),
    ],
)
def test_where_tokens_of_a_segmenter_left(name, changes, schedule):
    schedule = None if schedule is None else vssm.PruneSchedule(schedule)
    model = vssm.create_model(f"{name}_upernet_ade20k", schedule=schedule, **changes)
    traced = trace(model, torch.from_numpy(images(model, 1)))
    assert len(traced.blocks) == model.traced_blocks
    left = _left(model, traced)
    if schedule is None:
        assert np.isnan(left).all()
        return
    first, last = (set(k[0].tolist()) for k in traced.details.kept_positions)
    for position, block in enumerate(left.ravel().tolist()):
        assert (position in last) == np.isnan(block)
        assert np.isnan(block) or block == (3 if position in first else 1)
    assert (left == 1).sum() == 4
    assert (left == 3).sum() == 6


@pytest.mark.slow
def test_page_of_a_segmenter(tmp_path, picture):
    source = vssm.ModelSource("vim_tiny_upernet_ade20k", schedule="1:0.75", options=SEGMENTER)
    numbers = vssm.visualize(source, [picture], tmp_path / "out", blocks=[2])
    (image,) = numbers["images"]
    assert list(image["figures"])[:2] == ["kept", "importance"]
    assert "What the head reads where tokens left" in (tmp_path / "out/index.html").read_text()
    shares = image["variants"]["dense"]["probabilities"]
    # Of 150 classes: the mean over the places.
    assert len(shares) == 150
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"is for detection, and .* classification and segment"):
        vssm.visualize(vssm.ModelSource("vmamba_tiny_maskrcnn_coco"), [picture], tmp_path / "other")


def test_refusals(cli, tmp_path, picture, monkeypatch):
    end = (picture, "-o", tmp_path / "out", *SIZES)
    masked = ("vim_tiny", *end, "--alignment=masked")
    cases = {
        "is neither a model nor the directory": ("vim", *end),
        "alignment='masked' leaves pruned": (*masked, "--schedule=1:0.5"),
        "alignment='gap' without a schedule prunes": ("vim_tiny", *end, "--alignment=gap"),
        "is hierarchical": ("vmamba_tiny_s1l8", *end[:3], "--schedule=1:0.5"),
        "block=4 is outside": ("vim_tiny", *end, "--blocks=4"),
        "has no default schedule": ("vim_base", *end, "--schedule=default"),
    }
    for message, arguments in cases.items():
        assert cli("visualize", *arguments) == 2
        assert message in cli.out
    assert cli("visualize", "vim_tiny", picture, "-o", picture, *SIZES) == 2
    assert f"output={picture} cannot be made (File exists); name another directory" in cli.out
    with pytest.raises(ValueError, match=r"images=\[\] holds no image"):
        vssm.visualize(vssm.ModelSource("vim_tiny"), [], tmp_path / "out")
    artifact = exported(tmp_path / "made", micro())
    assert cli("visualize", artifact.directory, *end[:3], "--num-classes=3") == 2
    assert "--num-classes out" in cli.out
    with pytest.raises(UnsupportedError, match="bidirectional_layers=True: every other"):
        trace(
            micro(None, bidirectional_layers=True, bimamba="none", depth=2),
            torch.zeros(1, 3, 48, 48),
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r'matplotlib .* pip install "vssm\[reports\]"'):
        vssm.visualize(vssm.ModelSource("vim_tiny"), [picture], tmp_path / "out")


def test_pruned_patches_are_seen():
    """In the kept figure they are purple, and nothing else of a grey picture is."""
    picture = np.full((32, 32, 3), 0.5)
    here = np.ones((4, 4), dtype=bool)
    whole = _purple(kept_figure(picture, {"a": [("all", here)]}))
    half = _purple(kept_figure(picture, {"a": [("half", here & (np.arange(4) < 2))]}))
    assert whole == 0
    assert half > 1000
    maps = {"block 1": {"a": np.where(here, 1.0, np.nan), "b": np.full((4, 4), np.nan)}}
    assert len(attention_figure(picture, maps, unit="%", title="a")) > 1000


def _purple(png):
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int(((pixels[..., 0] - pixels[..., 1]) > 40).sum())


def test_every_image_is_opened_before_the_first_is_drawn(tmp_path, picture):
    artifact, bad = exported(tmp_path / "export", micro()), tmp_path / "bad.png"
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        vssm.visualize(vssm.ModelSource(str(artifact.directory)), [picture, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()
