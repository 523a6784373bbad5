"""Label maps and overlays of image files, by a session that says what each pixel's colour means."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vssm.artifact.data_sets import ADE20K
from vssm.artifact.manifest import Preprocessing, TensorInfo
from vssm.evaluation.label_maps import is_segmenter, write_label_maps

SPEC = Preprocessing(8, (8, 8), interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3)


class _ByColour:
    """Class 2 where red is more than a half, else class 0; of three."""

    manifest = SimpleNamespace(
        name="by_colour",
        inputs=[TensorInfo("images", "float32", ("batch", 3, 8, 8))],
        outputs=[TensorInfo("logits", "float32", ("batch", 3, 8, 8))],
        main_output=TensorInfo("logits", "float32", ("batch", 3, 8, 8)),
        preprocessing=SPEC,
    )

    def run(self, images):
        red = images[:, :1]
        return {"logits": np.concatenate([0.5 - red, np.full_like(red, -9), red - 0.5], axis=1)}


@pytest.fixture(autouse=True)
def _spec(monkeypatch):
    monkeypatch.setattr("vssm.evaluation.label_maps.preprocessing_of", lambda manifest: SPEC)


def _picture(path, width=24, height=16):
    """The left third is red."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 3, 0] = 255
    Image.fromarray(pixels).save(path)
    return path


def test_label_map_and_overlay(tmp_path):
    file = _picture(tmp_path / "red.png")
    (row,) = write_label_maps(_ByColour(), [file], tmp_path / "out", names=["sky", "sea", "rose"])
    with Image.open(row["labels"]) as image:
        labels = np.asarray(image)
    assert labels.shape == (16, 24)
    # Resized to a third and back: the edge may lie a pixel off.
    assert (labels[:, :7] == 2).all()
    assert (labels[:, 9:] == 0).all()
    assert [c["label"] for c in row["classes"]] == ["sky", "rose"]
    assert sum(c["share"] for c in row["classes"]) == pytest.approx(1)
    with Image.open(row["overlay"]) as image:
        assert image.size == (24, 16)
        # Half of the image, half of the class's colour.
        assert image.getpixel((0, 0)) == (127, 64, 0)
        assert image.getpixel((23, 15)) == (0, 0, 0)


class _Sky(_ByColour):
    """Of ADE20K's 150 classes the third, sky, everywhere."""

    manifest = SimpleNamespace(
        **{
            **vars(_ByColour.manifest),
            "outputs": [TensorInfo("logits", "float32", ("batch", 150, 8, 8))],
            "main_output": TensorInfo("logits", "float32", ("batch", 150, 8, 8)),
        }
    )

    def run(self, images):
        logits = np.zeros((len(images), 150, 8, 8), np.float32)
        logits[:, 2] = 1
        return {"logits": logits}


@pytest.mark.parametrize(
    ("names", "colour"), [(ADE20K, (6, 230, 230)), ([str(i) for i in range(150)], (0, 128, 0))]
)
def test_colours_go_by_the_names(tmp_path, names, colour):
    file = _picture(tmp_path / "black.png")
    (row,) = write_label_maps(_Sky(), [file], tmp_path / "out", names=names)
    assert row["classes"] == [{"class": 2, "label": names[2], "share": 1.0}]
    with Image.open(row["overlay"]) as image:
        assert image.getpixel((23, 15)) == tuple(part // 2 for part in colour)


def test_a_file_that_is_no_image(tmp_path):
    good, bad = _picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_text("no image")
    rows = write_label_maps(_ByColour(), [bad, good], tmp_path / "out")
    assert "cannot be read as an image" in rows[0]["error"]
    assert rows[1]["error"] is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "good.labels.png",
        "good.overlay.png",
    ]
    with pytest.raises(ValueError, match="cannot be read as an image"):
        write_label_maps(_ByColour(), [bad], tmp_path / "out")


def test_refusals(tmp_path):
    file = tmp_path / "x.png"
    with pytest.raises(ValueError, match="top=0 is below 1"):
        write_label_maps(_ByColour(), [file], tmp_path / "out", top=0)
    with pytest.raises(ValueError, match="two are called x but for folder and ending"):
        write_label_maps(_ByColour(), [file, tmp_path / "x.jpg"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_is_segmenter():
    assert is_segmenter(_ByColour.manifest)
    logits = TensorInfo("logits", "float32", ("batch", 3))
    assert not is_segmenter(SimpleNamespace(main_output=logits))
