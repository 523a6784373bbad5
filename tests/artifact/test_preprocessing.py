"""Preprocessing against PIL used directly, and every kind of bad image."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import Manifest, Preprocessing, TensorInfo, write_manifest
from vssm.artifact.preprocessing import padded, preprocess, read_labels
from vssm.errors import ArtifactError

SPEC = Preprocessing.for_image_size(224)
SMALL = Preprocessing.for_image_size(32)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack(
        [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256], -1
    )
    return np.clip(base + rng.integers(-20, 20, base.shape), 0, 255).astype(np.uint8)


def expected(pixels: np.ndarray, size: int, resize: int) -> np.ndarray:
    """The official evaluation, written independently: PIL's resize, a slice, float64 arithmetic."""
    height, width = pixels.shape[:2]
    if width <= height:
        new = (resize, int(resize * height / width))
    else:
        new = (int(resize * width / height), resize)
    resized = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC))
    top = int(np.round((new[1] - size) / 2))  # numpy rounds halves to even, as torchvision does
    left = int(np.round((new[0] - size) / 2))
    crop = resized[top : top + size, left : left + size] / 255.0
    normal = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return normal.transpose(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (256, 256),
        (500, 375),
        (375, 500),
        (333, 257),
        (257, 333),
        (640, 64),
        (1, 1),
        (3, 7),
        (224, 224),
    ],
)
@pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["224", "32"])
def test_numbers(width, height, spec):
    pixels = picture(width, height)
    got = preprocess(pixels, spec)
    assert got.dtype == np.float32
    assert got.shape == (1, 3, *spec.crop)
    assert got.flags.c_contiguous
    want = expected(pixels, spec.crop[0], spec.resize)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_centre_crop_rounds_halves_to_even():
    spec = Preprocessing(resize=4, crop=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    for width in (5, 7, 9, 11):
        pixels = np.zeros((4, width, 3), np.uint8)
        pixels[:] = np.arange(width, dtype=np.uint8)[:, None]
        left = round((width - 4) / 2)
        got = preprocess(pixels, spec)[0, 0, 0] * 255
        np.testing.assert_array_equal(np.rint(got), np.arange(left, left + 4))


def test_oblong_crops_and_other_filters():
    spec = Preprocessing(resize=20, crop=(8, 20), interpolation="nearest")
    got = preprocess(picture(40, 20), spec)
    assert got.shape == (1, 3, 8, 20)
    for interpolation in ("bilinear", "bicubic"):
        other = Preprocessing(resize=13, crop=(8, 8), interpolation=interpolation)
        assert preprocess(picture(40, 20), other).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm", "jpg"])
def test_every_way_to_give_an_image(tmp_path, suffix):
    pixels = picture(50, 40)
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(path, **options)
    with Image.open(path) as file:
        loaded = np.asarray(file.convert("RGB"))
    want = preprocess(loaded, SMALL)
    np.testing.assert_array_equal(preprocess(path, SMALL), want)
    np.testing.assert_array_equal(preprocess(str(path), SMALL), want)
    np.testing.assert_array_equal(preprocess(Image.fromarray(loaded), SMALL), want)
    if suffix not in {"jpg", "gif"}:
        np.testing.assert_array_equal(loaded, pixels)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    # Both sides of the input count, and the longest that is allowed; halves are rounded up.
    [(200, 100, (20, 40)), (40, 80, (32, 16)), (10, 8, (32, 40)), (45, 20, (18, 40))],
)
def test_padding(width, height, size):
    spec = Preprocessing(40, (32, 44), interpolation="nearest", fit="pad")
    image = Image.new("RGB", (width, height), (255, 255, 255))
    whole, found = padded(image, spec)
    assert found == size
    assert whole.shape == (3, 32, 44)
    inside = np.zeros((32, 44), bool)
    inside[: size[0], : size[1]] = True
    white = (1 - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    np.testing.assert_array_equal(whole[:, inside], white[:, None].repeat(inside.sum(), 1))
    assert not whole[:, ~inside].any()
    np.testing.assert_array_equal(preprocess(image, spec), whole[None])


def test_an_image_that_would_vanish_is_refused():
    with pytest.raises(ValueError, match="image of 1000x1 would be 40x0 after resizing"):
        preprocess(Image.new("RGB", (1000, 1)), Preprocessing(40, (32, 44), fit="pad"))


def test_several_images(tmp_path):
    pixels = [picture(50, 40), picture(40, 50, seed=1)]
    Image.fromarray(pixels[1]).save(tmp_path / "a.png")
    got = preprocess([pixels[0], tmp_path / "a.png"], SMALL)
    assert got.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(got, np.concatenate([preprocess(p, SMALL) for p in pixels]))


def test_images_that_are_not_rgb(tmp_path):
    grey = picture(40, 40)[..., 0]
    rgb = np.stack([grey] * 3, -1)
    want = preprocess(rgb, SMALL)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "alpha.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "la.png")
    palette = Image.fromarray(grey)
    palette.putpalette([v for i in range(256) for v in (i, i, i)])
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(preprocess(path, SMALL), want, err_msg=path.name)
    binary = Image.fromarray(grey > 128)
    assert set(np.unique(preprocess(binary, Preprocessing(40, (40, 40), mean=(0.0,) * 3)))) == set(
        np.unique(preprocess(binary.convert("RGB"), Preprocessing(40, (40, 40), mean=(0.0,) * 3)))
    )
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert preprocess(cmyk, SMALL).shape == want.shape


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_without_a_known_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode}, whose range is not known; save it"):
        preprocess(Image.new(mode, (8, 8), 3), SMALL)


def test_exif_orientation_is_not_applied(tmp_path):
    pixels = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(preprocess(tmp_path / "a.png", SMALL), preprocess(pixels, SMALL))


def manifest(preprocessing: Preprocessing | None) -> Manifest:
    return Manifest(
        name="m",
        config={},
        inputs=(TensorInfo("images", "float32", ("batch", 3, 32, 32)),),
        outputs=(TensorInfo("logits", "float32", ("batch", 2)),),
        dtype="float32",
        opset=18,
        files={},
        operators={},
        versions={},
        preprocessing=preprocessing,
    )


def test_an_export_says_what_to_do(tmp_path):
    pixels = picture(50, 40)
    want = preprocess(pixels, SMALL)
    write_manifest(tmp_path, manifest(SMALL))
    for spec in (tmp_path, str(tmp_path), manifest(SMALL), Artifact(tmp_path, manifest(SMALL))):
        np.testing.assert_array_equal(preprocess(pixels, spec), want)
    with pytest.raises(ValueError, match="pass a Preprocessing"):
        preprocess(pixels, manifest(None))
    with pytest.raises(ArtifactError, match="not an export"):
        preprocess(pixels, tmp_path / "absent")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels, and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
def test_decompression_bombs_are_refused(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
    with pytest.raises(ValueError, match=r"image=.*bomb\.png .*; give an image file"):
        preprocess(tmp_path / "bomb.png", SMALL)


@pytest.fixture
def undecoded(monkeypatch):
    """No pixel of a file is decoded."""

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)


def text_ppm(width: int, height: int, values: int) -> bytes:
    return f"P3\n{width} {height}\n255\n".encode() + b"200 " * values


def run_length_bmp(width: int, height: int) -> bytes:
    """A run a row, so a few bytes for each."""
    rows = (b"\xff\x00" * (width // 255) + b"\x00\x00") * height + b"\x00\x01"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(info) + 1024
    return struct.pack("<2sIII", b"BM", start + len(rows), 0, start) + info + bytes(1024) + rows


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "jpeg", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of_size(1, 89_000_000), r"has 1x89000000 pixels, a side above 65535; give"),
        (png_of_size(65_536, 1), r"has 65536x1 pixels, a side above 65535; give"),
        (png_of_size(1, 60_000), r"image of 1x60000 would be 256x15360000 after resizing"),
        (text_ppm(1500, 1500, 3), r"is PPM in a form that is slow .* 2,250,000 pixels .* save it"),
        (text_ppm(10, 10, 3_000_000), r"is PPM in a form that is slow .* 12,000,013 bytes; save"),
        (b"P6\n1500 1500\n100\n" + bytes(9), r"is PPM in a form that is slow to decode"),
        (run_length_bmp(2550, 1000), r"is BMP in a form that is slow .* 2,550,000 pixels"),
        (jpeg_of_scans(1500, 500), r"progressive JPEG of 2,250,000 pixels in 510 scans, each"),
    ],
    ids=["strip", "row", "thin", "text", "comments", "deep", "runs", "scans"],
)
def test_slow_images_are_refused_by_their_header(tmp_path, undecoded, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess(tmp_path / "a", SPEC)


def test_jpeg2000_costs_more_by_the_pixel(tmp_path, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.jp2")
    assert preprocess(tmp_path / "a.jp2", SMALL).shape == (1, 3, 32, 32)
    monkeypatch.setattr("vssm.artifact.preprocessing._MAX_PIXELS_JPEG2000", 3_599)
    with pytest.raises(ValueError, match=r"60x60 pixels, more than 3599, the most of a JPEG 2000"):
        preprocess(tmp_path / "a.jp2", SMALL)


def test_small_images_of_slow_forms_are_read(tmp_path):
    pixels = picture(40, 50)
    want = preprocess(pixels, SMALL)
    (tmp_path / "a.ppm").write_text("P3\n40 50\n255\n" + " ".join(map(str, pixels.ravel())))
    np.testing.assert_array_equal(preprocess(tmp_path / "a.ppm", SMALL), want)
    (tmp_path / "a.bmp").write_bytes(run_length_bmp(255, 20))
    assert preprocess(tmp_path / "a.bmp", SMALL).shape == (1, 3, 32, 32)
    (tmp_path / "a.jpg").write_bytes(jpeg_of_scans(64, 0))
    assert preprocess(tmp_path / "a.jpg", SMALL).shape == (1, 3, 32, 32)


def test_a_crop_beyond_any_model_is_refused():
    """Before room is made for it, which would be 48 GiB."""
    with pytest.raises(ValueError, match=r"crop=65536x65536 has a side above 4096"):
        preprocess(picture(8, 8), Preprocessing(resize=65536, crop=(65536, 65536)))


def test_labels_are_of_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"labels=.*pipe cannot be read \(a named pipe, not a"):
        read_labels(tmp_path / "pipe", 2)


def test_extreme_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image of 60000x1 would be .* after resizing"):
        preprocess(np.zeros((1, 60_000, 3), np.uint8), SPEC)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x80\x04K\x01.", b"\xff\xd8\xff\xe0", EPS])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"image=.*a\.jpg cannot be read as an image .*; give"):
        preprocess(tmp_path / "a.jpg", SMALL)


def test_a_damaged_avif_is_no_fault(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = io.BytesIO()
    Image.fromarray(picture(12, 9)).save(content, "AVIF")
    head, mark, data = content.getvalue().partition(b"mdat")
    (tmp_path / "a.avif").write_bytes(head + mark + b"\xff" * len(data))
    with pytest.raises(ValueError, match=r"a\.avif cannot be read as an image"):
        preprocess(tmp_path / "a.avif", SMALL)


def test_missing_files_and_directories(tmp_path):
    for path in (tmp_path / "absent.jpg", tmp_path):
        with pytest.raises(ValueError, match=f"image={path} cannot be read as an image"):
            preprocess(path, SMALL)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
def test_truncated_images(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(buffer, kind)
    data = buffer.getvalue()
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 40)):
        (tmp_path / "a").write_bytes(data[:length])
        try:
            # A file cut behind its last pixel is whole.
            assert preprocess(tmp_path / "a", SMALL).shape == (1, 3, 32, 32)
        except ValueError as error:
            assert "cannot be read as an image" in str(error)  # noqa: PT017 - either end is right
            refused += 1
    assert refused > 20


def test_an_image_that_pillow_has_not_decoded_yet(tmp_path):
    """Image.open looks at the header alone; what is wrong behind it comes up here."""
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    refused = pytest.raises(ValueError, match=r"image cannot be read as an image .*truncated")
    with Image.open(tmp_path / "cut.png") as cut, refused:
        preprocess(cut, SMALL)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(ValueError, match="must be uint8 and"):
        preprocess(array, SMALL)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="holds no image"):
        preprocess([], SMALL)
    with pytest.raises(TypeError, match="image=int is not a path"):
        preprocess(3, SMALL)
    with pytest.raises(ValueError, match="resize=10 is shorter than the crop 32x32"):
        preprocess(picture(8, 8), Preprocessing(resize=10, crop=(32, 32)))
    with pytest.raises(ValueError, match="0x8 pixels"):
        preprocess(Image.new("RGB", (0, 8)), SMALL)


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n",
        "cat\r\ndog\r\n\r\n",
        "\ufeffcat\ndog",
        json.dumps(["cat", "dog"]),
        json.dumps({"1": "dog", "0": "cat"}),
        json.dumps({"0": ["n02", "cat"], "1": ["n01", "dog"]}),
        json.dumps({"dog": 1, "cat": 0}),
        json.dumps({"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}),
    ],
)
def test_labels(tmp_path, text):
    (tmp_path / "labels").write_bytes(text.encode())
    assert read_labels(tmp_path / "labels", 2) == ("cat", "dog")


@pytest.mark.parametrize("names", [["1 star", "2 stars"], ["0", "1"], ["7,5", "9,5"]])
def test_names_may_have_numbers(tmp_path, names):
    (tmp_path / "labels").write_text("\n".join(names))
    assert read_labels(tmp_path / "labels", 2) == tuple(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n", "names 1 classes on 1 lines, but the model has 2; give"),
        (b"cat\n\ndog\n", "names 2 classes on 3 lines"),
        (b"cat\n\n", "names 1 classes"),
        (b"", "names 0 classes"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1, 2]", "holds 1, which is not text"),
        (b'{"0": "cat", "2": "dog"}', "no key '1'"),
        (b'{"0": "cat", "1": []}', r"holds \[\], which is not text"),
        (b'["cat"', "cannot be read"),
        (b"1,cat\n0,dog\n", "a table with a number in every line, such as '1,cat'"),
        (b"\xef\xbb\xbf2;cat\r\n1;dog\r\n", "a table with a number"),
        (b'"0"\t"cat"\n"1"\t"dog"\n', "a table with a number"),
        (b"cat,n01,1\ndog,n02,0\n", "a table with a number"),
        (b"0: cat\n1: dog\n", "a table with a number"),
        (b"1 cat\n0 dog\n", "a table with a number"),
        (b"name\ncat\ndog\n", "trained on, without a heading"),
        (b'{"cat": 0, "dog": 2}', "no key '0'"),
        (b'{"cat": 0, "dog": 0}', "no key '0'"),
        (b'{"id2label": 3}', "no key"),
    ],
)
def test_bad_labels(tmp_path, content, message):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels", 2)
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "absent", 2)
