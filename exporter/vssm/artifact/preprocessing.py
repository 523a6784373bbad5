"""Image files to model input, exactly as the official evaluations do it; PIL and numpy alone.

Not named after its function: a submodule `vssm.preprocess` would hide `vssm.preprocess()`.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import Manifest, Preprocessing, read_manifest

ImageInput = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
MAX_PIXELS: Final = 89_478_485  # PIL's own warning level: 256 MiB of RGB
# PIL would hand an EPS file to Ghostscript, and opens many formats that no photo comes in.
_FORMATS: Final = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_INTERPOLATION: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_DAMAGED: Final = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
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
    """Load, resize, crop and normalise images as the model was evaluated.

    The steps are torchvision's on PIL images, to the bit: RGB, shorter side to `spec.resize`,
    centre crop, / 255, minus mean, over std in float32. An EXIF orientation is not applied
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
    spec = _spec_of(spec)
    several = images if isinstance(images, list | tuple) else [images]
    if not several:
        raise ValueError("images=[] holds no image; give one at least")
    mean = np.asarray(spec.mean, np.float32)
    std = np.asarray(spec.std, np.float32)
    out = np.empty((len(several), 3, *spec.crop), np.float32)
    for i, image in enumerate(several):
        pixels = np.asarray(_resize_and_crop(open_rgb(image), spec), np.float32) / np.float32(255)
        out[i] = ((pixels - mean) / std).transpose(2, 0, 1)
    return out


def read_labels(
    path: str | os.PathLike[str], num_classes: int, *, name: str = "labels"
) -> tuple[str, ...]:
    """Class names from a file: one a line, a JSON list, or a JSON object keyed "0", "1", ...

    In an object a value may be a list that ends with the name, as in ImageNet's class index
    ({"0": ["n01440764", "tench"], ...}). Text is UTF-8.

    Args:
        path: the file.
        num_classes: classes of the model.
        name: what errors call the file.

    Raises:
        ValueError: the file cannot be read, or does not name `num_classes` classes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        parsed = json.loads(text) if text.lstrip()[:1] in {"[", "{"} else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}={path} cannot be read ({error}); give a UTF-8 text file, one class name a line"
        ) from error
    names = _label_list(parsed, f"{name}={path}")
    while names and names[-1] == "":
        names.pop()  # A text file may end in empty lines.
    if len(names) != num_classes or "" in names:
        raise ValueError(
            f"{name}={path} names {sum(map(bool, names))} classes on {len(names)} lines, but the "
            f"model has {num_classes}; give the file of the data set that it was trained on"
        )
    return tuple(names)


def _label_list(parsed: Any, file: str) -> list[str]:
    if isinstance(parsed, dict):
        try:
            parsed = [parsed[str(i)] for i in range(len(parsed))]
        except KeyError as error:
            raise ValueError(
                f"{file} has no key {error}; key the names by class index, from 0 on"
            ) from error
        parsed = [entry[-1] if isinstance(entry, list) and entry else entry for entry in parsed]
    if foreign := [entry for entry in parsed if not isinstance(entry, str)]:
        raise ValueError(f"{file} holds {foreign[0]!r}, which is no text; give names only")
    return [entry.strip() for entry in parsed]


def _spec_of(
    spec: Preprocessing | Manifest | Artifact | str | os.PathLike[str],
) -> Preprocessing:
    if isinstance(spec, Preprocessing):
        return spec
    if isinstance(spec, Artifact):
        spec = spec.manifest
    manifest = spec if isinstance(spec, Manifest) else read_manifest(spec)
    if manifest.preprocessing is None:
        raise ValueError(
            f"spec: the export of {manifest.name} does not say how images are prepared; "
            "export it again with --imagenet, or pass a Preprocessing of your own"
        )
    return manifest.preprocessing


def _resize_and_crop(image: Image.Image, spec: Preprocessing) -> Image.Image:
    height, width = spec.crop
    if spec.resize < max(height, width):
        raise ValueError(
            f"resize={spec.resize} is shorter than the crop {height}x{width}; "
            "make it at least as long"
        )
    # torchvision's rule: the longer side is rounded down.
    short, long = sorted(image.size)
    longer = int(spec.resize * long / short)
    size = (spec.resize, longer) if image.width <= image.height else (longer, spec.resize)
    if longer * spec.resize > MAX_PIXELS:
        raise ValueError(
            f"image of {image.width}x{image.height} would be {size[0]}x{size[1]} after resizing, "
            f"more than {MAX_PIXELS} pixels; crop it to a less extreme shape"
        )
    if size != image.size:
        image = image.resize(size, _INTERPOLATION[spec.interpolation])
    # torchvision's rule: round() to even.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def open_rgb(image: ImageInput) -> Image.Image:
    """Any input that `preprocess` takes as an RGB image of 8 bits a channel.

    Raises:
        ValueError: it cannot be read, is too large or has a wrong shape or dtype.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "image")
    if not isinstance(image, str | os.PathLike):
        raise TypeError(
            f"image={type(image).__name__} is no path, PIL image or uint8 array; pass one of these"
        )
    name = f"image={os.fspath(image)}"
    if os.path.exists(image) and not os.path.isfile(image) and not os.path.isdir(image):
        # A named pipe would be waited for, perhaps for ever.
        raise ValueError(f"{name} is a pipe or device, which has no whole image; {_REMEDY}")
    Image.init()
    try:
        with Image.open(image, formats=[f for f in _FORMATS if f in Image.OPEN]) as opened:
            return _to_rgb(opened, name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large to decode safely ({error}); {_REMEDY}") from error
    except _DAMAGED as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} cannot be read as an image ({error}); {_REMEDY}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}; {_REMEDY}"
        )
    if image.width * image.height == 0:
        raise ValueError(f"{name} has {image.width}x{image.height} pixels, so none; {_REMEDY}")
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
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "image array")
