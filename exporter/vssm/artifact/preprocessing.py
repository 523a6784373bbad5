"""Image files to model input, exactly as the official evaluations do it; PIL and numpy alone.

Not named after its function: a submodule `vssm.preprocess` would hide `vssm.preprocess()`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import MAX_CROP, Manifest, Preprocessing, read_manifest
from vssm.files.regular import open_regular, read_regular
from vssm.files.text import is_plain, shown

ImageInput = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
_Taken = TypeVar("_Taken")
MAX_PIXELS: Final = 89_478_485  # PIL's own warning level: 256 MiB of RGB
_MAX_SIDE: Final = 65_535  # as JPEG's; a strip of one pixel's width costs as much by the row
_MAX_BYTES: Final = 1 << 30  # twice the largest image that is not compressed
_MAX_PIXELS_JPEG2000: Final = 30_000_000  # about 2 s
_MAX_PIXELS_SLOW: Final = 1_000_000  # 2 s, where Pillow decodes in Python
_MAX_BYTES_SLOW: Final = 8 << 20
_MAX_PIXEL_SCANS: Final = 10**9  # of a progressive JPEG: ten scans, the usual number, at MAX_PIXELS
# PIL would hand an EPS file to Ghostscript, and opens many formats that no photo comes in.
_FORMATS: Final = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_INTERPOLATION: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_MAX_LABELS: Final = 64 << 20  # bytes of a file of class names
# A class's number as the first or the last cell of a line.
_SPACED: Final = re.compile(r"^(\d{1,9})\s+\S")
_NUMBERED: Final = (
    _SPACED,
    re.compile(r"^[\"']?(\d{1,9})[\"']?\s*[,;:|\t]"),
    re.compile(r"[,;:|\t]\s*[\"']?(\d{1,9})[\"']?$"),
)
# What Pillow's decoders end in where bytes are damaged: no one class covers them.
_DAMAGED: Final = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
)
_REMEDY: Final = "give an image file (JPEG, PNG, WebP, ...) of usual size"


def preprocess(
    images: ImageInput | Sequence[ImageInput],
    spec: Preprocessing | Manifest | Artifact | str | os.PathLike[str],
) -> FloatArray:
    """Load, resize, crop or pad, and normalise images as the model was evaluated.

    The steps are torchvision's on PIL images, to the bit: RGB, shorter side to `spec.resize`,
    centre crop, / 255, minus mean, over std in float32; or, for detectors, as large as the input
    allows, normalised, and padded with zeros. An EXIF orientation is not applied
    (torchvision's loader ignores it, so the published accuracies do too); transparency is dropped;
    of several frames the first is used; 16-bit grey keeps its high byte, as PIL does with 16-bit
    colour.

    Args:
        images: one image or several: a path, a PIL image, or an array (height, width, 3) uint8 RGB.
        spec: what to do, or the export (or its manifest or directory) that says so.

    Returns:
        (images, 3, height, width) float32; one image gives a first axis of 1.

    Raises:
        ValueError: an image cannot be read, is too large or has a wrong shape or dtype.
        ArtifactError: `spec` is a directory without a valid `model.json`.
    """
    spec = preprocessing_of(spec)
    _check_crop(spec)
    # Not any sequence: a text is one path, and an array one image.
    several = images if isinstance(images, list | tuple) else [images]
    if not several:
        raise ValueError("images=[] holds no image; give one at least")
    out = np.empty((len(several), 3, *spec.crop), np.float32)
    for i, image in enumerate(several):
        opened = open_rgb(image, spec)
        out[i] = padded(opened, spec)[0] if spec.fit == "pad" else _middle(opened, spec)
    return out


def _middle(image: Image.Image, spec: Preprocessing) -> FloatArray:
    return _normalised(_cropped(_resized_image(image, spec), spec), spec)


def padded(image: Image.Image, spec: Preprocessing) -> tuple[FloatArray, tuple[int, int]]:
    """A whole RGB image in the input's top left corner, zeros beside and below it.

    Args:
        image: of any size.
        spec: with fit "pad".

    Returns:
        (3, height, width) float32 of the input's size, and (height, width) of the image in it.
    """
    part = normalised(image, spec)
    height, width = part.shape[1:]
    whole = np.zeros((3, *spec.crop), np.float32)
    whole[:, :height, :width] = part
    return whole, (height, width)


def image_files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, sorted, without hidden ones."""
    below = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [p for p in below if not any(q.startswith(".") for q in p.relative_to(folder).parts)]


def normalised(image: Image.Image, spec: Preprocessing) -> FloatArray:
    """A whole RGB image as (3, height, width) float32: resized and normalised, not cropped."""
    return _normalised(_resized_image(image, spec), spec)


def _normalised(image: Image.Image, spec: Preprocessing) -> FloatArray:
    mean = np.asarray(spec.mean, np.float32)
    std = np.asarray(spec.std, np.float32)
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def read_labels(
    path: str | os.PathLike[str], num_classes: int, *, name: str = "labels"
) -> tuple[str, ...]:
    """Class names from a file: one per line, a JSON list, or a JSON object keyed "0", "1", ...

    In an object a value may be a list that ends with the name, as in ImageNet's class index
    ({"0": ["n01440764", "tench"], ...}). The other way round will do, as torchvision's class_to_idx
    ({"tench": 0, ...}), and so will id2label in a config.json of transformers. Text is UTF-8. Lines
    that have the number of their class beside the name are refused, as they may be in another
    order.

    Args:
        path: the file.
        num_classes: classes of the model.
        name: what errors call the file.

    Raises:
        ValueError: the file cannot be read, or does not name `num_classes` classes.
    """
    try:
        # "-sig": editors on Windows put a byte order mark in front.
        text = read_regular(path, limit=_MAX_LABELS).decode("utf-8-sig")
        is_json = text.lstrip()[:1] in {"[", "{"}
        parsed = json.loads(text) if is_json else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{name}={path} cannot be read ({reason}); give a UTF-8 text file with one class name "
            "per line"
        ) from error
    names = _label_list(parsed, f"{name}={path}")
    while names and names[-1] == "":
        names.pop()  # A text file may end in empty lines.
    if len(names) != num_classes or "" in names:
        raise ValueError(
            f"{name}={path} names {sum(map(bool, names))} classes on {len(names)} lines, but the "
            f"model has {num_classes}; give the file of the data set that it was trained on"
            + (", without a heading" if len(names) == num_classes + 1 else "")
        )
    if not is_json:
        _refuse_numbered(names, f"{name}={path}")
    if foreign := [n for n in names if not is_plain(n)]:
        raise ValueError(
            f"{name}={path} has the class {shown(repr(foreign[0]), limit=80)}, which holds control "
            "or invisible characters; take them out"
        )
    return tuple(names)


def _refuse_numbered(lines: Sequence[str], file: str) -> None:
    """Refuse a table with the number of each class: its lines may be in any order."""
    count = len(lines)
    for numbered in _NUMBERED:
        found = [numbered.search(line) for line in lines]
        numbers = [int(match[1]) for match in found if match]
        # "1 star", "2 stars" may well be names; "3 cat", "1 dog" are hardly.
        if numbered is _SPACED and numbers == sorted(numbers):
            continue
        if count > 1 and sorted(numbers) in (list(range(count)), list(range(1, count + 1))):
            raise ValueError(
                f"{file} is a table with a number in every line, such as {shown(lines[0])!r}; give "
                "the names alone, one per line in the order of the classes, or a JSON object keyed "
                'by class index, {"0": "NAME", ...}'
            )


def _label_list(parsed: Any, file: str) -> list[str]:
    if isinstance(parsed, dict):
        inner = parsed.get("id2label")  # of a config.json of transformers
        parsed = inner if isinstance(inner, dict) else parsed
        if sorted(map(str, parsed.values())) == sorted(map(str, range(len(parsed)))):
            parsed = {str(index): name for name, index in parsed.items()}  # class_to_idx
        try:
            parsed = [parsed[str(i)] for i in range(len(parsed))]
        except KeyError as error:
            raise ValueError(
                f"{file} has no key {error}; key the names by class index, from 0 on"
            ) from error
        parsed = [entry[-1] if isinstance(entry, list) and entry else entry for entry in parsed]
    if foreign := [entry for entry in parsed if not isinstance(entry, str)]:
        raise ValueError(f"{file} holds {foreign[0]!r}, which is not text; give names only")
    return [entry.strip() for entry in parsed]


def preprocessing_of(
    spec: Preprocessing | Manifest | Artifact | str | os.PathLike[str],
) -> Preprocessing:
    """What an export, its manifest or its directory says of how images are prepared.

    Raises:
        ValueError: it says nothing.
    """
    if isinstance(spec, Preprocessing):
        return spec
    if isinstance(spec, Artifact):
        spec = spec.manifest
    manifest = spec if isinstance(spec, Manifest) else read_manifest(spec)
    if manifest.preprocessing is None and len(manifest.fed) > 1:
        names = ", ".join(one.name for one in manifest.fed)
        raise ValueError(
            f"spec: the export of {manifest.name} has the inputs {names}, and an image file is one "
            "input; run it by vssm.open_session"
        )
    if manifest.preprocessing is None:
        raise ValueError(
            f"spec: the export of {manifest.name} does not say how images are prepared; "
            "export it again with --imagenet, or pass a Preprocessing of your own"
        )
    return manifest.preprocessing


def _check_crop(spec: Preprocessing) -> None:
    height, width = spec.crop
    if max(height, width) > MAX_CROP:
        raise ValueError(
            f"crop={height}x{width} has a side above {MAX_CROP}, which no model here takes; give "
            "the sizes of the model's input"
        )
    if spec.fit == "crop" and spec.resize < max(height, width):
        raise ValueError(
            f"resize={spec.resize} is shorter than the crop {height}x{width}; "
            "make it at least as long"
        )


def _resized(size: tuple[int, int], spec: Preprocessing) -> tuple[int, int]:
    """Width and height after resizing; torchvision rounds the longer side down.

    Raises:
        ValueError: that would be more pixels than any image may have, or none.
    """
    width, height = size
    if spec.fit == "pad":
        scale = min(spec.resize / max(size), spec.crop[0] / height, spec.crop[1] / width)
        # mmcv's and detectron2's rounding.
        fitted = int(width * scale + 0.5), int(height * scale + 0.5)
        if min(fitted) < 1:
            raise ValueError(
                f"image of {width}x{height} would be {fitted[0]}x{fitted[1]} after resizing, so "
                "without a pixel; crop it to a less extreme shape"
            )
        return fitted
    longer = int(spec.resize * max(size) / min(size))
    resized = (spec.resize, longer) if width <= height else (longer, spec.resize)
    if longer * spec.resize > MAX_PIXELS:
        raise ValueError(
            f"image of {width}x{height} would be {resized[0]}x{resized[1]} after resizing, "
            f"more than {MAX_PIXELS} pixels; crop it to a less extreme shape"
        )
    return resized


def _resized_image(image: Image.Image, spec: Preprocessing) -> Image.Image:
    size = _resized(image.size, spec)
    if size == image.size:
        return image
    return image.resize(size, _INTERPOLATION[spec.interpolation])


def _cropped(image: Image.Image, spec: Preprocessing) -> Image.Image:
    height, width = spec.crop
    # torchvision's rule: round() to even.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def open_rgb(image: ImageInput, spec: Preprocessing | None = None) -> Image.Image:
    """Any input that `preprocess` takes as an RGB image of 8 bits a channel.

    Args:
        image: the input.
        spec: what will be done to it, so that what this would refuse is not decoded first.

    Raises:
        ValueError: it cannot be read, is too large or has a wrong shape or dtype.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        # Image.open decodes only when the pixels are asked for, which is here.
        with _refusing("image"):
            _check_pixels(image, "image")
            return _to_rgb(image, "image")
    if not isinstance(image, str | os.PathLike):
        raise TypeError(
            f"image={type(image).__name__} is not a path, PIL image or uint8 array; pass "
            "one of these"
        )
    name = f"image={os.fspath(image)}"
    with _open(image, name) as file:
        return decode_rgb(file, name, spec)


def decode_rgb(file: BinaryIO, name: str, spec: Preprocessing | None = None) -> Image.Image:
    """The image in an open file, or in bytes in memory, as RGB of 8 bits a channel.

    Args:
        file: can be sought in; at its beginning.
        name: what errors call the image.
        spec: as for `open_rgb`.

    Raises:
        ValueError: it cannot be read or is too large.
    """
    return _decoded(file, name, _to_rgb, spec)


def open_classes(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """The numbers (height, width) in an annotation of one channel, those of a palette unchanged.

    Raises:
        ValueError: it cannot be read, is too large or has several channels.
    """
    name = f"annotation={os.fspath(path)}"
    with _open(path, name) as file:
        return _decoded(file, name, _numbers, None)


def _open(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        return open_regular(path, limit=_MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be read as an image ({reason}); {_REMEDY}") from error


def _decoded(
    file: BinaryIO,
    name: str,
    take: Callable[[Image.Image, str], _Taken],
    spec: Preprocessing | None,
) -> _Taken:
    """What `take` makes of an image file, which is looked at before it is decoded."""
    # Formats are known only once their plugins are loaded. AVIF came with Pillow 11.3, and to
    # name one that Pillow does not have is a KeyError.
    Image.init()
    with (
        _refusing(name),
        Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN]) as opened,
    ):
        _check_pixels(opened, name)
        _check_effort(opened, name, file)
        if spec is not None:
            _resized(opened.size, spec)
        return take(opened, name)


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Say of whatever Pillow ends in that this image cannot be read, and why."""
    try:
        yield
    # The warning is an error only where the caller has made warnings errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large to decode safely ({error}); {_REMEDY}") from error
    except UnidentifiedImageError as error:
        # Pillow's text has the address of the file's object, another one in each run.
        raise ValueError(
            f"{name} cannot be read as an image (its format is not known here); {_REMEDY}"
        ) from error
    except _DAMAGED as error:
        # Our own refusals, which name the image already.
        if isinstance(error, ValueError) and str(error).startswith((name, "image of ")):
            raise
        raise ValueError(f"{name} cannot be read as an image ({error}); {_REMEDY}") from error


def _numbers(image: Image.Image, name: str) -> npt.NDArray[Any]:
    if image.mode not in {"1", "L", "P"} and not image.mode.startswith("I"):
        raise ValueError(
            f"{name} has pixels of mode {image.mode}, not one number each; save it as PNG with one "
            "channel of 8 bits"
        )
    # "1" would be a map of true and false.
    numbers: npt.NDArray[Any] = np.array(image.convert("L") if image.mode == "1" else image)
    return numbers


def _check_pixels(image: Image.Image, name: str) -> None:
    """Refuse by the header, which is all that has been read so far."""
    shape = f"{name} has {image.width}x{image.height} pixels"
    if image.width * image.height == 0:
        raise ValueError(f"{shape}, so none; {_REMEDY}")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{shape}, more than {MAX_PIXELS}; {_REMEDY}")
    if max(image.size) > _MAX_SIDE:
        raise ValueError(f"{shape}, a side above {_MAX_SIDE}; {_REMEDY}")


def _check_effort(image: Image.Image, name: str, file: BinaryIO) -> None:
    """Refuse what a few bytes make slow: they cost by the pixel, not by the byte."""
    pixels, at = image.width * image.height, file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(at)
    if image.format == "JPEG2000" and pixels > _MAX_PIXELS_JPEG2000:
        raise ValueError(
            f"{name} has {image.width}x{image.height} pixels, more than {_MAX_PIXELS_JPEG2000}, "
            "the most of a JPEG 2000 file; save it as JPEG or PNG"
        )
    # Pillow decodes text PPM, deep PPM and run-length BMP in Python, a number at a time.
    slow = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    if slow and (pixels > _MAX_PIXELS_SLOW or size > _MAX_BYTES_SLOW):
        raise ValueError(
            f"{name} is {image.format} in a form that is slow to decode, with {pixels:,} pixels in "
            f"{size:,} bytes; save it as PNG, or in at most {_MAX_PIXELS_SLOW:,} pixels and "
            f"{_MAX_BYTES_SLOW:,} bytes"
        )
    if image.info.get("progressive"):
        scans = _count_scans(file)
        if pixels * scans > _MAX_PIXEL_SCANS:
            raise ValueError(
                f"{name} is a progressive JPEG of {pixels:,} pixels in {scans:,} scans, each over "
                "the whole image; save it with fewer, as usual"
            )


def _count_scans(file: BinaryIO) -> int:
    """How often a JPEG file may go over the image: at most as often as the marker stands in it."""
    at = file.tell()
    file.seek(0)
    scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(1 << 20), b""))
    file.seek(at)
    return scans


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # convert() would clip at 255, which turns a 16-bit image white.
        high = (np.asarray(image, np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError(
            f"{name} holds numbers of mode {image.mode}, whose range is not known; "
            "save it with 8 or 16 bits a channel"
        )
    if image.mode == "P":
        # The same colours by way of RGBA, without PIL's warning about transparent palettes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"image array has dtype {array.dtype} and shape {array.shape}, but must be uint8 and "
            "(height, width, 3) in RGB order; convert it"
        )
    image = Image.fromarray(np.ascontiguousarray(array))
    _check_pixels(image, "image array")
    return image
