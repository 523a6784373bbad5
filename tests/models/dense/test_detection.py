"""Detectors against the official code: keys, numbers, boxes, pruning, refusals."""

from __future__ import annotations

import math

import fill
import numpy as np
import pytest
import torch
from official_data import filled_model, fixture, manifest
from official_dense import (
    detector_cases,
    detector_images,
    detector_sizes,
    errors,
    micro_detector,
    official_boxes,
)
from torch.nn import functional

import vssm
from vssm import PruneSchedule
from vssm.errors import UnsupportedError
from vssm.models.cost import count
from vssm.models.dense.adapter import DeformableAttention, centres
from vssm.models.dense.detector import Detector
from vssm.models.dense.regions import DetectionRules, best_boxes, corner, read_regions
from vssm.models.registry import cards
from vssm.onnx.options import OUTPUTS

NAMES = [name for name, card in cards().items() if card.task == "detection"]
CASES = [(family, case) for family in ("vim", "plain_mamba") for case in detector_cases(family)]
# Of the largest value. Measured 1.7e-14, and 6.4e-15 on vmamba_tiny.
EXACT = 1e-9
ADAPTER = ("plain_mamba", "maskrcnn_groups2_64")


def _meta(name, **options):
    with torch.device("meta"):
        return vssm.create_model(name, **options)


def _details(family, case, schedule=None, **changes):
    model = micro_detector(family, case, schedule, **changes).double()
    with torch.no_grad():
        return model, model.forward_details(detector_images(family, case))


def test_every_detector_of_the_official_code():
    assert sorted(NAMES) == sorted(manifest("dense/detectors"))


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    document = manifest("dense/detectors")[name]
    model = _meta(name)
    assert isinstance(model, Detector)
    assert tuple(model.output_groups) == OUTPUTS["detection"]
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == document["keys"]
    assert sum(p.numel() for p in model.parameters()) == document["n_params"]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_official_numbers(family, case):
    model, found = _details(family, case)
    assert set(model.state_dict()) == set(detector_cases(family)[case]["keys"])
    worst = errors(f"dense/micro_{family}_det", f"{case}/", found.tensors)
    assert set(worst) == set(found.tensors)
    assert max(worst.values()) < EXACT
    assert tuple(x.shape[2:] for x in map(found.tensors.get, model.feature_names)) == (
        model.level_sizes
    )
    anchors = sum(rows * columns for rows, columns in model.level_sizes) * model.anchors
    classes = 7 if "retinanet" in case else 1
    assert found.logits.shape == (2, anchors, classes)
    first = found.tensors[model.dense_names[0]]
    assert torch.equal(found.logits[:, : model.anchors].flatten(1), first[:, :, 0, 0])


@pytest.mark.slow
def test_vmamba_tiny():
    name = "vmamba_tiny_maskrcnn_coco"
    model = filled_model(name, image_size=(96, 160)).double()
    x = torch.from_numpy(fill.make_input((1, 3, 96, 160), key="input_vmamba_tiny_det_96x160"))
    x = x.double()
    with torch.no_grad():
        worst = errors(f"dense/{name}", "96x160/", model.forward_details(x).tensors)
    assert len(worst) == 19
    assert max(worst.values()) < EXACT


def test_deformable_attention_by_hand():
    """One head and one level: each point is read where reference and offset say, zeros outside."""
    torch.manual_seed(0)
    attention = DeformableAttention(4, 1, 1).double()
    size, queries = (3, 5), 6
    value, query = torch.randn(1, 15, 4).double(), torch.randn(1, queries, 4).double()
    places = torch.rand(1, queries, 2).double() * 2 - 1
    with torch.no_grad():
        got = attention(query, places, value, [size])
        maps = attention.value_proj(value).transpose(1, 2).reshape(1, 4, *size)
        offsets = attention.sampling_offsets(query).reshape(queries, 4, 2)
        weights = attention.attention_weights(query).softmax(-1)[0]
        read = torch.zeros(1, queries, 4).double()
        for q in range(queries):
            for p in range(4):
                # In pixels, from the centre of the first.
                x, y = (
                    (places[0, q] + 1) / 2 * torch.tensor([5, 3]) + offsets[q, p] - 0.5
                ).tolist()
                for row in range(3):
                    for column in range(5):
                        near = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                        read[0, q] += weights[q, p] * near * maps[0, :, row, column]
        want = attention.output_proj(read)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_centres():
    like = torch.zeros((), dtype=torch.float64)
    assert centres((1, 2), like).tolist() == [[[-0.5, 0], [0.5, 0]]]
    assert centres((2, 1), like).tolist() == [[[0, -0.5], [0, 0.5]]]


def test_a_model_that_was_in_float32_is_exact_again():
    """Nothing but weights is stored, so `float` and then `double` loses nothing."""
    model = micro_detector(*ADAPTER)
    x = detector_images(*ADAPTER)
    with torch.no_grad():
        found = model.float().double().forward_details(x).tensors
    worst = errors("dense/micro_plain_mamba_det", f"{ADAPTER[1]}/", found)
    assert max(worst.values()) < EXACT


@pytest.mark.parametrize("injector", ["all", "kept"])
@pytest.mark.parametrize(("family", "case"), [("vim", "rope_64"), ADAPTER])
def test_ratio_one_is_the_dense_model(family, case, injector):
    changes = {"injector": injector} if family == "plain_mamba" else {}
    _, pruned = _details(family, case, PruneSchedule({2: 1}), **changes)
    _, dense = _details(family, case)
    for name, value in dense.tensors.items():
        torch.testing.assert_close(pruned.tensors[name], value, rtol=0, atol=1e-12)


def test_pruned_places_between_groups():
    """Groups end after blocks 2, 3, 4, 5. What left stays as it was but for later injections."""
    kept_only = {"injector": "kept"}
    schedule = PruneSchedule({1: 0.75, 3: 0.5})
    _, dense = _details(*ADAPTER)
    _, frozen = _details(*ADAPTER, schedule, **kept_only)
    _, fed = _details(*ADAPTER, schedule)
    streams = [frozen.tensors[f"interaction{i}.x"] for i in range(4)]
    gone = torch.ones(2, 16, dtype=torch.bool)
    first, second = frozen.kept_positions
    left_first = gone.scatter(1, first, False)
    left_second = gone.scatter(1, second, False)
    for earlier, later, left in zip(
        streams, streams[1:], (left_first, left_second, left_second), strict=False
    ):
        assert torch.equal(earlier[left], later[left])
        assert not torch.equal(earlier[~left], later[~left])
    # Up to the first injection after a stage both are one model; then the places are fed again.
    assert torch.equal(streams[0], fed.tensors["interaction0.x"])
    assert not torch.equal(streams[1][left_first], fed.tensors["interaction1.x"][left_first])
    assert not torch.equal(streams[0], dense.tensors["interaction0.x"])


def test_a_vim_detectors_map_shows_what_left():
    _, found = _details("vim", "rope_64", PruneSchedule({2: 0.5}))
    _, zero = _details("vim", "rope_64", PruneSchedule({2: 0.5}, restore="zero"))
    kept = found.kept_positions[0][:, None].expand(-1, 48, -1)
    last, empty = (f.tensors["last_feat"].flatten(2) for f in (found, zero))
    assert torch.equal(last.gather(2, kept), empty.gather(2, kept))
    gone = torch.ones_like(last, dtype=torch.bool).scatter(2, kept, False)
    assert last[gone].all()
    assert not empty[gone].any()


RULES = {"level_proposals": 120, "proposals": 60, "most": 20}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_official_boxes(family, case):
    """The same boxes in the same order: to 3e-11 pixels, scores to 4e-13, masks to 1e-12."""
    numbers = fixture(f"dense/micro_{family}_det")
    model = micro_detector(family, case).double()
    rules = DetectionRules(score=0.5 if "retinanet" in case else 0.2, **RULES)
    with torch.no_grad():
        found = model.detect(
            detector_images(family, case), detector_sizes(family, case), rules=rules
        )
    for i, got in enumerate(found):
        want = official_boxes(family, case, numbers, i)
        assert np.array_equal(got.labels, want["labels"])
        np.testing.assert_allclose(got.boxes, want["boxes"], rtol=0, atol=1e-8)
        np.testing.assert_allclose(got.scores, want["scores"], rtol=0, atol=1e-9)
        masks = got.masks
        if masks is None:
            assert "retinanet" in case
            continue
        # mmdetection's numbers are in front of the sigmoid.
        masks = masks[:, None] if family == "vim" else masks.logit()
        assert (
            errors(f"dense/micro_{family}_det", f"{case}/", {f"masks{i}": masks})[f"masks{i}"]
            < 1e-9
        )


@pytest.mark.parametrize(("family", "case"), [c for c in CASES if "retinanet" not in c[1]])
def test_official_proposals(family, case):
    numbers = fixture(f"dense/micro_{family}_det")
    model, found = _details(family, case)
    least = None if family == "vim" else -math.log(1000 / 16)
    for i, size in enumerate(detector_sizes(family, case)):
        dense = [found.tensors[name][i] for name in model.dense_names]
        pairs = list(zip(dense[::2], dense[1::2], strict=True))
        with torch.no_grad():
            limits = corner(torch.tensor(size, dtype=torch.float64))
            boxes, logits = model._proposals(pairs, limits, DetectionRules(**RULES), least)
        scores = logits if family == "vim" else logits.sigmoid()
        want = numbers[f"{case}/proposals{i}.f64"]
        assert len(boxes) == len(want)
        np.testing.assert_allclose(boxes, want[:, :4], rtol=0, atol=1e-8)
        np.testing.assert_allclose(scores, want[:, 4], rtol=0, atol=1e-9)


def test_official_heads_on_given_regions():
    """What RoIAlign reads of regions, with parts that lie outside, and what the heads say of it."""
    numbers, case = fixture("dense/micro_plain_mamba_det"), "maskrcnn_64x96"
    model, found = _details("plain_mamba", case)
    rois = torch.from_numpy(numbers[f"{case}/rois"]).double()
    read = {}
    for side in (7, 14):
        parts = []
        for image in (0, 1):
            levels = [found.tensors[name][image] for name in model.feature_names]
            parts.append(model.read(levels, rois[rois[:, 0] == image, 1:], side))
        read[side] = torch.cat(parts)
    with torch.no_grad():
        classes, deltas = model.roi_head.bbox_head(read[7])
        tensors = {"roi.feats": read[7], "roi.cls": classes, "roi.reg": deltas}
        tensors["roi.mask"] = model.roi_head.mask_head(read[14])
    worst = errors("dense/micro_plain_mamba_det", f"{case}/", tensors)
    assert set(worst) == set(tensors)
    assert max(worst.values()) < EXACT


def test_overlaps_by_hand():
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 3], [0, 0, 4, 2], [9, 9, 9, 9.0]])
    scores, one = torch.tensor([0.5, 0.9, 0.7, 0.1]), torch.zeros(4, dtype=torch.int64)
    # Best first: 1, then 2, whose overlap with 1 is 8 / 12, and 0, whose is 12 / 16.
    group = torch.tensor([0, 1, 2, 2])

    def found(some, group, overlap, most=9):
        kept = best_boxes(boxes[some], scores[some], group[some], overlap, groups=3, most=most)
        return kept.tolist()

    every = slice(4)
    assert found(every, one, 0.7) == [1, 2, 3]
    assert found(every, one, 0.5) == [1, 3]
    assert found(every, group, 0.1) == [1, 2, 0, 3]
    assert found(every, group, 0.1, most=2) == [1, 2]
    assert found(slice(0), one, 0.5) == []
    scores[1] = -math.inf
    assert found(every, one, 0.7) == [2, 0, 3]


def test_a_region_without_extent_reads_nothing():
    level = torch.ones(2, 5, 5)
    boxes = torch.tensor([[2.0, 2, 2, 2], [-40, -40, -20, -20], [0, 0, 5, 5]])
    found = read_regions([level], [1], boxes, 2, torch.zeros(3, dtype=torch.int64))
    assert not found[:2].any()
    assert found[2].tolist() == torch.ones(2, 2, 2).tolist()


def test_nothing_found():
    model = micro_detector("vim", "rope_64")
    with torch.no_grad():
        (found,) = model.detect(torch.zeros(1, 3, 64, 64), rules=DetectionRules(score=1.0))
    assert found.boxes.shape == (0, 4)
    assert found.masks.shape == (0, 28, 28)


def test_what_detect_refuses():
    model = micro_detector("vim", "rope_64")
    for sizes in ([(64, 64), (1, 1)], [(65, 64)], [(64, 0)]):
        with pytest.raises(ValueError, match=r"sizes=.* give the height and width of each"):
            model.detect(torch.zeros(1, 3, 64, 64), sizes)
    with pytest.raises(ValueError, match=r"overlap=1\.5 is outside \[0, 1\]"):
        DetectionRules(overlap=1.5)
    with pytest.raises(ValueError, match="most=0 is below 1"):
        DetectionRules(most=0)


def test_region_heads():
    """The heads take what RoIAlign gives: (regions, channels, 7, 7), and 14 for masks."""
    generator = torch.manual_seed(0)
    box, mask = (torch.randn(3, 32, side, side, generator=generator) for side in (7, 14))
    vim = micro_detector("vim", "rope_64").roi_heads
    adapter = micro_detector(*ADAPTER).roi_head
    with torch.no_grad():
        classes, deltas = vim.box_predictor[2](vim.box_head[2](box))
        assert (classes.shape, deltas.shape) == ((3, 8), (3, 4))
        assert vim.mask_head(mask).shape == (3, 7, 28, 28)
        classes, deltas = adapter.bbox_head(box)
        assert (classes.shape, deltas.shape) == ((3, 8), (3, 28))
        assert adapter.mask_head(mask).shape == (3, 7, 28, 28)


def test_cost_of_the_dense_head():
    """RetinaNet's: two towers of two convolutions, and two last ones, at every place."""
    model = micro_detector("plain_mamba", "retinanet_128x96")
    places = 16 * 12 + 8 * 6 + 4 * 3 + 2 * 2 + 1
    tower, last = 9 * 32 * 32, 9 * 32 * (7 * 9 + 4 * 9)
    assert count(model).head == places * (4 * tower + last)
    laterals = (16 * 12 + 8 * 6 + 4 * 3) * 48 * 32
    assert count(model).neck == laterals + places * tower


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vim_tiny_cascade_mask_rcnn", {"image_size": 16}, "no place in level p5"),
        ("plain_mamba_adapter_l1_maskrcnn", {"image_size": (800, 1333)}, "not a multiple of 32"),
        ("plain_mamba_adapter_l1_maskrcnn", {"attention_heads": 5}, "do not divide d_model=192"),
        ("plain_mamba_adapter_l1_maskrcnn", {"groups": (6, 12, 24)}, "groups=.* are not four"),
        ("plain_mamba_adapter_l1_maskrcnn", {"head": "fcos"}, "is not one of mask_rcnn, retina"),
        ("plain_mamba_adapter_l1_maskrcnn", {"injector": "none"}, "is not one of all, kept"),
        ("vmamba_tiny_maskrcnn", {"neck_width": 0}, "neck_width=0 is below 1"),
        ("vmamba_tiny_maskrcnn", {"image_size": 3}, "smaller than patch_size=4"),
        ("vim_tiny_cascade_mask_rcnn", {"image_size": 15}, "smaller than patch_size=16"),
        ("vim_tiny_cascade_mask_rcnn", {"score": 2.0}, r"score=2.0 is outside \[0, 1\]"),
        ("plain_mamba_adapter_l1_retinanet", {"most": 0}, "most=0 is below 1"),
    ],
)
def test_a_wrong_option_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        _meta(f"{name}_coco", **options)


def test_schedules_that_are_refused():
    with pytest.raises(UnsupportedError, match="hierarchical"):
        _meta("vmamba_tiny_maskrcnn_coco", schedule=PruneSchedule({2: 0.8}))
    with pytest.raises(UnsupportedError, match="restore='zero': between the adapter's groups"):
        micro_detector(*ADAPTER, PruneSchedule({2: 0.8}, restore="zero"))


def test_down_sampling_is_half_the_size():
    """A mean of each four is what bilinear resizing by a half gives."""
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    want = functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(functional.avg_pool2d(x, 2), want, rtol=0, atol=1e-15)
