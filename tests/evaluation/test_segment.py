"""Whole, sliding and flipped inference of segmenters, against the official numbers and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import fill
import numpy as np
import pytest
import torch
from exports import micro_segmenter
from official_dense import cases, errors
from official_dense import micro_segmenter as official_segmenter
from torch.nn import functional

import vssm
from vssm.artifact.manifest import TensorInfo
from vssm.evaluation.segment import resize, slide, softmax, stride_of

EXACT = 1e-9  # measured 2.5e-15


@pytest.fixture(scope="module")
def official():
    """The official sliding windows: images, how they slide, and a segmenter in float64."""
    asked = cases("vim")["slide_64"]["slide"]
    model = official_segmenter("vim", "slide_64").double()
    x = fill.make_input(tuple(asked["shape"]), key=asked["key"]).astype(np.float64)

    def run(windows):
        with torch.no_grad():
            return model(torch.from_numpy(windows)).numpy()

    return x, run, (asked["crop"],) * 2, (asked["stride"],) * 2


def test_official_slide(official):
    x, run, window, stride = official
    seen = []
    found = slide(run, x, window, stride, progress=lambda *step: seen.append(step[1:]))
    assert seen == [(i, 4) for i in range(5)]
    scaled = resize(found, (90, 140))
    tensors = {
        "slide.seg_logits": found,
        "slide.rescaled_90x140": scaled,
        # The official numbers are of an image that is said to be mirrored: one half of the mean.
        "slide.probabilities_flip": softmax(scaled)[..., ::-1],
    }
    tensors = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    worst = errors("dense/micro_vim_upernet", "slide_64/", tensors)
    assert set(worst) == set(tensors)
    assert max(worst.values()) < EXACT


@pytest.mark.parametrize(("old", "new"), [((3, 5), (7, 4)), ((1, 2), (3, 9)), ((4, 4), (4, 8))])
def test_resize_is_bilinear(old, new):
    x = torch.randn(2, 3, *old, dtype=torch.float64, generator=torch.manual_seed(0))
    want = functional.interpolate(x, size=new, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize(x.numpy(), new), want.numpy(), rtol=0, atol=1e-14)


def test_a_pixel_gets_the_mean_of_its_windows():
    """Windows at 0, 2 and, moved back, 3; each says its own number."""
    numbers = iter((10.0, 20.0, 60.0))
    found = slide(
        lambda x: np.full((1, 1, 1, 1), next(numbers)), np.zeros((1, 3, 1, 6)), (1, 3), (1, 2)
    )
    assert found.ravel().tolist() == [10, 10, 15, 40, 40, 60]


def test_stride():
    assert stride_of((512, 512), None) == (341, 341)
    assert stride_of((4, 6), 2) == (2, 2)
    for wrong in (0, 7, (4, 7)):
        with pytest.raises(ValueError, match=r"stride=.* pixels between windows"):
            stride_of((6, 6), wrong)


class _Session:
    """The part of a session that is asked: what the file takes and gives, and a run."""

    def __init__(self):
        self.model = micro_segmenter("vmamba_tiny", None)
        sizes = ("batch", 3, *self.model.image_size)
        logits = TensorInfo("logits", "float32", ("batch", 7, *self.model.level_sizes[0]))
        self.manifest = SimpleNamespace(
            name="vmamba", inputs=[TensorInfo("images", "float32", sizes)], outputs=[logits]
        )

    def run(self, images):
        with torch.no_grad():
            return {"logits": self.model(torch.from_numpy(images)).numpy()}


@pytest.fixture(scope="module")
def session():
    return _Session()


def test_segment(session):
    """A window is 53 x 71; an image of that size is one window."""
    x = np.random.default_rng(0).standard_normal((1, 3, 60, 80)).astype(np.float32)
    window = x[..., :53, :71]
    one = vssm.segment(session, window, mode="whole")
    assert one.shape == (1, 7, 53, 71)
    assert np.array_equal(one, vssm.segment(session, window))
    np.testing.assert_allclose(one, resize(session.run(window)["logits"], (53, 71)), rtol=0, atol=0)
    larger = vssm.segment(session, x, stride=(30, 71), size=(30, 40), flip=True)
    assert larger.shape == (1, 7, 30, 40)
    np.testing.assert_allclose(larger.sum(1), 1, rtol=0, atol=1e-5)
    # The mean of an image and its mirrored self does not know which is which.
    mirrored = vssm.segment(session, x[..., ::-1], stride=(30, 71), size=(30, 40), flip=True)
    np.testing.assert_allclose(larger, mirrored[..., ::-1], rtol=0, atol=1e-6)
    assert larger.dtype == np.float32


def test_what_segment_refuses(session):
    x = np.zeros((1, 3, 60, 80), np.float32)
    for wrong in (x[..., :50, :], x[..., :70], x[0], x[:, :1]):
        with pytest.raises(ValueError, match=r"images\.shape=.* of at least 53 x 71"):
            vssm.segment(session, wrong)
    with pytest.raises(ValueError, match="with mode='whole' of exactly that"):
        vssm.segment(session, x, mode="whole")
    with pytest.raises(ValueError, match="mode='all' is not one of slide, whole"):
        vssm.segment(session, x, mode="all")
    features = _Session()
    features.manifest.outputs = [TensorInfo("level0", "float32", ("batch", 16, 14, 18))]
    with pytest.raises(ValueError, match="gives no logits of the places of an image"):
        vssm.segment(features, x)
