"""The names and colours of ADE20K and COCO, and when a model has them."""

from __future__ import annotations

import pytest

from vssm.artifact.data_sets import (
    ADE20K,
    ADE20K_COLOURS,
    COCO,
    COCO_CATEGORIES,
    names_of,
    palette_of,
    voc_colours,
)


def test_the_published_counts_and_ends():
    assert (len(ADE20K), len(set(ADE20K)), len(ADE20K_COLOURS)) == (150, 150, 150)
    assert (ADE20K[0], ADE20K[12], ADE20K[149]) == ("wall", "person", "flag")
    assert (ADE20K_COLOURS[2], ADE20K_COLOURS[149]) == ((6, 230, 230), (92, 0, 255))
    assert (len(set(COCO)), len(set(COCO_CATEGORIES))) == (80, 80)
    assert (COCO[0], COCO[79], COCO_CATEGORIES[79]) == ("person", "toothbrush", 90)
    assert list(COCO_CATEGORIES) == sorted(COCO_CATEGORIES)
    # COCO leaves ten numbers out.
    assert {*range(1, 91)} - {*COCO_CATEGORIES} == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@pytest.mark.parametrize(
    ("model", "classes", "names"),
    [
        ("vim_tiny_upernet_ade20k", 150, ADE20K),
        ("vim_tiny_upernet_ade20k", 7, None),  # made for other data
        ("vmamba_base_maskrcnn_coco", 80, COCO),
        ("vim_tiny", 150, None),
    ],
)
def test_names_go_by_the_data_set_and_the_count(model, classes, names):
    assert names_of(model, classes) == names


def test_colours_go_by_the_names():
    assert palette_of(list(ADE20K), 256) == ADE20K_COLOURS
    assert palette_of(COCO, 80) == palette_of(None, 80) == voc_colours(80)


def test_vocs_colours_differ():
    found = voc_colours(256)
    assert len(set(found)) == 256
    assert found[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert found[255] == (224, 224, 192)
