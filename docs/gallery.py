"""Draws the pictures of gallery/, which gallery.md shows, with the digits example's weights.

    python docs/gallery.py

A minute on a CPU. `vssm visualize` and `ablate` draw them; here they only get fewer colours.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from PIL import Image

import vssm

_DOCS: Final = Path(__file__).parent
_PICTURES: Final = _DOCS / "gallery"
_MERGED: Final = vssm.MergeSchedule(r=5)
sys.path.insert(0, str(_DOCS.parent / "examples"))

import digits  # noqa: E402 - it lies in examples/


def exported(folder: Path, schedule: vssm.PruneSchedule | vssm.MergeSchedule) -> Path:
    """The digits model with a schedule, exported."""
    model = vssm.create_model(digits.MODEL_NAME, schedule=schedule, **digits.MODEL)
    vssm.load_checkpoint(model, digits.CHECKPOINT)
    return vssm.export(model, folder, labels=[str(digit) for digit in range(10)]).directory


def held_out(folder: Path) -> Path:
    """The images that the model was not trained with, a folder a class."""
    for path, label in digits.write_test_images(folder / "all"):
        place = folder / "classes" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)
    return folder / "classes"


def keep(drawn: Path, name: str) -> None:
    """Put a picture beside the page, small."""
    picture = Image.open(drawn).convert("RGB").quantize(128)
    picture.save(_PICTURES / f"{name}.png", optimize=True)


def main() -> None:
    """Export, let the commands draw, and keep what the page shows."""
    _PICTURES.mkdir(exist_ok=True)
    seven = _DOCS.parent / "examples/data/digit_7.png"
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        pruned = exported(
            work / "pruned", vssm.PruneSchedule.parse(digits.SCHEDULE, conv="compact")
        )
        vssm.visualize(vssm.ModelSource(str(pruned)), [seven], work / "pruned_pictures")
        for figure in ("importance", "attention", "walks"):
            keep(work / f"pruned_pictures/1_{seven.stem}_{figure}.png", figure)
        merged = exported(work / "merged", _MERGED)
        vssm.visualize(vssm.ModelSource(str(merged)), [seven], work / "merged_pictures")
        keep(work / f"merged_pictures/1_{seven.stem}_merged.png", "merged")
        vssm.ablate(vssm.ModelSource(str(pruned)), held_out(work / "images"), work / "ablation")
        keep(work / "ablation/accuracy_flops.png", "accuracy_flops")


if __name__ == "__main__":
    main()
