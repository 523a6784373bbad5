"""Makes an export, a bundle and an image for `installed.py`: `make_export.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from exports import micro
from PIL import Image

import vssm
from vssm.bundle.make import BundleRequest, make_bundle


def make_export(folder: Path) -> None:
    """Write FOLDER/export, FOLDER/bundle and FOLDER/image.png."""
    artifact = vssm.export(micro(), folder / "export", force=True)
    make_bundle(artifact, folder / "bundle", BundleRequest(force=True))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")


if __name__ == "__main__":
    make_export(Path(sys.argv[1]))
