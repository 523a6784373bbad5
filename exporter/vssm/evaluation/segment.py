"""Classes of the pixels of images of any size, by a segmenter that takes one size: `vssm.segment`.

Source: the whole, sliding and flipped inference of mmsegmentation's public code. Arrays alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from vssm.artifact.manifest import LOGITS
from vssm.errors import check_choice
from vssm.runtimes.session import Session
from vssm.types import Array, Steps

MODES: Final = ("slide", "whole")
_PHASE: Final = "segmenting windows"
_STRIP: Final = 64  # rows whose logits are resized at once

Size = tuple[int, int]
Run = Callable[[Array], Array]


def segment(
    session: Session,
    images: Array,
    *,
    mode: str = "slide",
    stride: int | Size | None = None,
    size: Size | None = None,
    flip: bool = False,
    progress: Steps = lambda *_: None,
) -> Array:
    """Logits of every pixel, or with `flip` probabilities; `.argmax(1)` are the classes.

    Args:
        session: of a segmenter's export with logits.
        images: (batch, 3, height, width) float32, normalised; at least as large as the model's.
        mode: "slide": windows of the model's size, whose logits are averaged where they overlap;
            "whole": the images have the model's size.
        stride: between windows, one number or (height, width); None for two thirds of a window,
            rounded down, as the official evaluation of ADE20K has it (341 of 512).
        size: (height, width) that the result is resized to; None for the images'.
        flip: average the probabilities with those of the mirrored images.
        progress: called with the windows done and their number.

    Returns:
        (batch, classes, height, width) float32.

    Raises:
        ValueError: an option or the images do not fit.
    """
    check_choice("mode", mode, MODES)
    window = _window(session)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] < window[0]:
        raise ValueError(_misfit(images, window))
    if images.shape[3] < window[1] or (mode == "whole" and images.shape[2:] != window):
        raise ValueError(_misfit(images, window))
    steps = stride_of(window, stride)

    def run(batch: Array) -> Array:
        return session.run(batch)[LOGITS]

    def logits(batch: Array) -> Array:
        found = slide(run, batch, window, steps, progress=progress)
        return found if size is None else resize(found, size)

    if not flip:
        return logits(images)
    mirrored = logits(np.ascontiguousarray(images[..., ::-1]))
    return (softmax(logits(images)) + softmax(mirrored)[..., ::-1]) / 2


def slide(
    run: Run,
    images: Array,
    window: Size,
    stride: Size,
    *,
    progress: Steps = lambda *_: None,
) -> Array:
    """Logits (batch, classes, height, width), the mean of all windows over a pixel.

    The last window of a row or column is moved back to the image's border instead of padded.

    Args:
        run: gives logits of (batch, 3, *window), of any smaller size.
        images: (batch, 3, height, width), at least as large as a window.
        window: (height, width).
        stride: between windows, likewise.
        progress: called with the windows done and their number.
    """
    height, width = images.shape[2:]
    corners = [
        (top, left)
        for top in _starts(height, window[0], stride[0])
        for left in _starts(width, window[1], stride[1])
    ]
    progress(_PHASE, 0, len(corners))
    total: Array | None = None
    count = np.zeros((height, width), np.int64)
    for done, (top, left) in enumerate(corners, start=1):
        rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
        found = resize(run(np.ascontiguousarray(images[..., rows, columns])), window)
        if total is None:
            total = np.zeros((*found.shape[:2], height, width), found.dtype)
        total[..., rows, columns] += found
        count[rows, columns] += 1
        progress(_PHASE, done, len(corners))
    if total is None:
        raise AssertionError("an image that is as large as a window has a window")
    # Logits are averaged, not probabilities, as in the official code.
    mean: Array = total / count.astype(total.dtype)
    return mean


def stride_of(window: Size, stride: int | Size | None) -> Size:
    """The stride in both directions.

    Raises:
        ValueError: it is not between 1 and the window, so that no pixel is left out.
    """
    if stride is None:
        return 2 * window[0] // 3, 2 * window[1] // 3
    both = (stride, stride) if isinstance(stride, int) else stride
    if any(not 1 <= step <= side for step, side in zip(both, window, strict=True)):
        raise ValueError(
            f"stride={stride} is outside 1 to the window of {window[0]} x {window[1]}: pixels "
            "between windows would have no class; give a smaller one"
        )
    return both


def resize(x: Array, size: Size) -> Array:
    """Maps (batch, channels, height, width) resized to `size`, bilinear, align_corners=False."""
    if x.shape[2:] == size:
        return x
    rows, columns = (_linear(o, n).astype(x.dtype) for o, n in zip(x.shape[2:], size, strict=True))
    resized: Array = rows @ x @ columns.T
    return resized


def best_classes(logits: Array, size: Size) -> Array:
    """The best class (height, width) of every pixel of one image, int64.

    Args:
        logits: (1, classes, ...) of any size, which is resized to `size`.
        size: (height, width).
    """
    rows, columns = (_linear(o, n) for o, n in zip(logits.shape[2:], size, strict=True))
    rows, columns = rows.astype(logits.dtype), columns.astype(logits.dtype).T
    best = np.empty(size, np.int64)
    # In strips: all classes of a large photograph would take gigabytes.
    for top in range(0, size[0], _STRIP):
        some = slice(top, top + _STRIP)
        best[some] = (rows[some] @ logits[0] @ columns).argmax(0)
    return best


def softmax(logits: Array) -> Array:
    """Probabilities of the classes, axis 1."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: Array = powers / powers.sum(1, keepdims=True)
    return shares


def _linear(old: int, new: int) -> Array:
    """(new, old): linear interpolation along one axis, the border repeated beyond it."""
    centre = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, None)
    first = np.minimum(np.floor(centre).astype(np.int64), old - 1)
    weight = centre - first
    matrix = np.zeros((new, old))
    matrix[np.arange(new), first] = 1 - weight
    # Where both are the border's place its whole weight stays there.
    matrix[np.arange(new), np.minimum(first + 1, old - 1)] += weight
    return matrix


def _starts(length: int, window: int, stride: int) -> list[int]:
    windows = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(windows)]


def _window(session: Session) -> Size:
    """The size of the images that the model takes."""
    logits = next((o for o in session.manifest.outputs if o.name == LOGITS), None)
    if logits is None or len(logits.shape) != 4:
        raise ValueError(
            f"session of {session.manifest.name} gives no logits of the places of an image; export "
            "a segmenter with --outputs logits or labels"
        )
    *_, height, width = session.manifest.inputs[0].shape
    return int(height), int(width)


def _misfit(images: Array, window: Size) -> str:
    return (
        f"images.shape={images.shape} is not (batch, 3, height, width) of at least {window[0]} x "
        f"{window[1]}, with mode='whole' of exactly that; resize the images, or export the model "
        "with another image_size"
    )
