"""An ADE20K-layout folder: images, and for each of them a map of its pixels' classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vssm.artifact.preprocessing import image_files, open_classes

UNLABELLED: Final = 255  # in a map that was read; in its file it is 0, or 255 itself
_SHOWN: Final = 4

ClassMap = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """An image and its map of classes: paths below the root, with slashes."""

    image: str
    annotation: str


@dataclass(frozen=True)
class SceneFolder:
    """The scenes of one split.

    Attributes:
        root: holds images/SPLIT and annotations/SPLIT.
        split: the folder in both of them.
        scenes: sorted by the path of the image.
        notes: what else is there that one should know.
    """

    root: Path
    split: str
    scenes: tuple[Scene, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 over paths and sizes in bytes, of images and maps."""
        digest = hashlib.sha256()
        for scene in self.scenes:
            for path in (scene.image, scene.annotation):
                # Sizes, not contents: hashing every file would read the whole set first.
                digest.update(f"{path}\0{(self.root / path).stat().st_size}\n".encode())
        return digest.hexdigest()


def open_scenes(root: Path, split: str, *, name: str = "images") -> SceneFolder:
    """The images of root/images/split with their maps, root/annotations/split/....png.

    Args:
        root: laid out as ADE20K.
        split: such as "training" or "validation"; "." where there is no such folder between.
        name: what errors call the root: the option that it was given by.

    Raises:
        ValueError: a folder is not there, holds no images, or an image has no map.
    """
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise ValueError(_not_there(name, root, folder))
    files = [path.relative_to(images) for path in image_files(images)]
    if not files:
        raise ValueError(f"{name}={root} holds no images in {images}; give a split that does")
    missing = [file for file in files if not (maps / file).with_suffix(".png").is_file()]
    if missing:
        shown = ", ".join(str(file) for file in missing[:_SHOWN])
        raise ValueError(
            f"{name}={root} has no annotation for {len(missing):,} of {len(files):,} images: "
            f"{shown}{', ...' if len(missing) > _SHOWN else ''}; put the PNG file of the same name "
            f"into {maps}, or take the image out"
        )
    scenes = tuple(
        Scene(
            (images / file).relative_to(root).as_posix(),
            (maps / file).with_suffix(".png").relative_to(root).as_posix(),
        )
        for file in files
    )
    known = {scene.annotation for scene in scenes}
    alone = [p for p in image_files(maps) if p.relative_to(root).as_posix() not in known]
    notes = (f"annotations without an image are not read: {len(alone):,}",) if alone else ()
    return SceneFolder(root, split, scenes, notes)


def read_classes(path: Path, num_classes: int, size: tuple[int, int]) -> ClassMap:
    """The class of every pixel (height, width), from 0 on; `UNLABELLED` where there is none.

    In the file classes are counted from 1, and 0 is unlabelled, as ADE20K has it and mmsegmentation
    reads it with reduce_zero_label; so is 255.

    Args:
        path: an image of one channel.
        num_classes: of the model.
        size: (height, width) of the image that it belongs to.

    Raises:
        ValueError: it cannot be read, has another size, or holds a number that is no class.
    """
    numbers = open_classes(path)
    if numbers.shape != size:
        raise ValueError(
            f"annotation={path} has {numbers.shape[1]}x{numbers.shape[0]} pixels, its image "
            f"{size[1]}x{size[0]}; give the annotation of this image, at its own size"
        )
    wrong = (numbers > num_classes) & (numbers != UNLABELLED) | (numbers < 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"annotation={path} has the value {numbers[row, column]} in row {row}, column "
            f"{column}, but the model has the classes 1 to {num_classes}, and 0 is unlabelled; "
            "give annotations of the data set that it was trained on"
        )
    classes: ClassMap = (numbers.astype(np.int64) - 1).astype(np.uint8)  # of 0 this makes 255
    classes[numbers == UNLABELLED] = UNLABELLED
    return classes


def check_class_count(num_classes: int) -> None:
    """Refuse a model with more classes than a map can hold.

    Raises:
        ValueError: it has.
    """
    if num_classes >= UNLABELLED:
        raise ValueError(
            f"classes={num_classes} are more than the {UNLABELLED - 1} that annotations of 8 bits "
            "can hold; use vssm.segment and count yourself"
        )


def _not_there(name: str, root: Path, folder: Path) -> str:
    beside = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
    found = f"{folder.parent} holds {', '.join(beside) or 'no folders'}"
    return (
        f"{name}={root} is not laid out as ADE20K: {folder} is not a folder, and {found}; give the "
        "folder that holds images/SPLIT and annotations/SPLIT, and the split with --split"
    )
