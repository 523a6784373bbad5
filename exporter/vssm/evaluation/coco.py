"""A COCO-layout folder, which class each of its categories is, and average precision over it.

Source: Lin et al., arXiv:1405.0312. The numbers are those of pycocotools, which does the matching.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vssm.extras import explain_missing
from vssm.files.atomic import sha256_of

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_SHOWN: Final = 4
_MOST: Final = 100  # boxes of an image that count, as COCO has it
# What a file that is no such annotation ends in.
_MALFORMED: Final = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class CocoImage:
    """One image: its number and path below the root, and its size as the annotations have it."""

    number: int
    path: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFolder:
    """The images of one split and their annotations.

    Attributes:
        root: holds SPLIT and annotations/instances_SPLIT.json.
        split: such as val2017.
        images: sorted by their numbers.
        categories: by class of the model, the number and name of its category; a class that the
            annotations do not have is not there.
        rule: how categories were matched to classes, in words.
        truth: pycocotools' object of the annotations.
    """

    root: Path
    split: str
    images: tuple[CocoImage, ...]
    categories: Mapping[int, tuple[int, str]]
    rule: str
    truth: COCO

    def fingerprint(self) -> str:
        """SHA-256 over the annotations, and the paths and sizes in bytes of the images."""
        digest = hashlib.sha256(sha256_of(_annotations(self.root, self.split)).encode())
        for image in self.images:
            size = (self.root / image.path).stat().st_size
            digest.update(f"{image.path}\0{size}\n".encode())
        return digest.hexdigest()

    def has_masks(self) -> bool:
        """Whether every annotation says which pixels belong to its object."""
        return all(a.get("segmentation") for a in self.truth.dataset["annotations"])


@dataclass(frozen=True)
class Precision:
    """COCO's twelve numbers, of boxes or of masks; None where no object is of that size.

    Attributes:
        ap: mean over overlaps from 0.5 to 0.95.
        ap50: at an overlap of 0.5.
        ap75: at 0.75.
        ap_small: of objects below 32 x 32 pixels.
        ap_medium: from there to 96 x 96.
        ap_large: above.
        ar1: recall with one box an image.
        ar10: with ten.
        ar100: with a hundred.
        ar_small: with a hundred, of small objects.
        ar_medium: of medium ones.
        ar_large: of large ones.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None


def open_coco(
    root: Path, split: str, num_classes: int, *, labels: Sequence[str] | None
) -> CocoFolder:
    """The images of root/split with root/annotations/instances_split.json.

    Args:
        root: laid out as COCO.
        split: such as val2017.
        num_classes: classes of the model.
        labels: their names; None where it has none.

    Raises:
        ValueError: a file or folder is not there, is no such annotation, or it is not certain which
            category is which class.
        MissingPackageError: pycocotools is not installed.
    """
    file = _annotations(root, split)
    for path, there in ((root / split, Path.is_dir), (file, Path.is_file)):
        if not there(path):
            raise ValueError(
                f"images={root} is not laid out as COCO: there is no {path}; give the folder that "
                "holds SPLIT and annotations/instances_SPLIT.json, and the split with --split"
            )
    with explain_missing():
        from pycocotools.coco import COCO
    try:
        with _silent():
            truth = COCO(str(file))
        images = tuple(_image(truth.imgs[number], split) for number in sorted(truth.imgs))
        categories = [(int(c["id"]), str(c["name"])) for c in truth.cats.values()]
        # Looked at now: pycocotools would miss a field after hours, and pass over the rest in
        # silence, so that an object would be in no number.
        wrong = next(filter(None, map(partial(_fault, truth), truth.dataset["annotations"])), None)
    except _MALFORMED as error:
        raise ValueError(
            f"images: {file} is not a file of COCO's instances ({type(error).__name__}: {error}); "
            "give one with images, categories and annotations"
        ) from error
    if wrong is not None:
        raise ValueError(
            f"images: {file} has {wrong}; mend it, or give the annotations of these images"
        )
    missing = [image.path for image in images if not (root / image.path).is_file()]
    if missing or not images:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise ValueError(
            f"images={root}: {len(missing):,} of the {len(images):,} images of {file.name} are not "
            f"there{f': {shown}' if missing else ''}; give the folder with the images"
        )
    matched, rule = match_categories(categories, num_classes, labels)
    return CocoFolder(root, split, images, matched, rule, truth)


def match_categories(
    categories: Sequence[tuple[int, str]], num_classes: int, labels: Sequence[str] | None
) -> tuple[dict[int, tuple[int, str]], str]:
    """By class the number and name of its category, and how they were matched.

    Args:
        categories: number and name of each.
        num_classes: of the model.
        labels: their names; None where it has none.

    Raises:
        ValueError: they cannot be matched with certainty.
    """
    names = [name for _, name in categories]
    if labels is not None:
        strangers = sorted({*names} - {*labels})
        if strangers or len({*names}) < len(names) or not names:
            shown = ", ".join(map(repr, strangers[:_SHOWN] or names[:_SHOWN]))
            raise ValueError(
                f"categories: {shown} of {len(names)} are not among the model's {num_classes} "
                "class names, or stand there twice; give annotations of the data set that it was "
                "trained on"
            )
        by_name = {name: (number, name) for number, name in categories}
        found = {i: by_name[label] for i, label in enumerate(labels) if label in by_name}
        return found, f"{len(found)} categories, matched by name"
    if len(categories) != num_classes:
        raise ValueError(
            f"categories: {len(categories)} for the model's {num_classes} classes, which have no "
            "names; give annotations of the data set that it was trained on"
        )
    return dict(enumerate(sorted(categories))), "by the order of the categories' numbers"


def precision_of(
    folder: CocoFolder, rows: Sequence[Mapping[str, Any]], kind: str, numbers: Collection[int]
) -> tuple[Precision, dict[int, float | None]]:
    """COCO's numbers over some images, and the average precision of each category.

    Args:
        folder: the annotations.
        rows: what was found, in COCO's format of results.
        kind: "bbox" or "segm".
        numbers: of the images that count.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with _silent():
        if kind == "segm":
            # With a box beside it, pycocotools takes an object's size from that.
            rows = [{k: v for k, v in row.items() if k != "bbox"} for row in rows]
        found = folder.truth.loadRes([dict(row) for row in rows]) if rows else COCO()
        if not rows:  # loadRes looks at the first
            found.dataset = {**folder.truth.dataset, "annotations": []}
            found.createIndex()
        judge = COCOeval(folder.truth, found, kind)
        judge.params.imgIds = sorted(numbers)
        judge.params.maxDets = [1, 10, _MOST]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    # Over overlaps and recalls, of all sizes, with the most boxes.
    by_category = judge.eval["precision"][:, :, :, 0, -1]
    each = zip(judge.params.catIds, np.moveaxis(by_category, 2, 0), strict=True)
    means = {int(c): _known(p[p > -1].mean()) if (p > -1).any() else None for c, p in each}
    return Precision(*map(_known, judge.stats)), means


def _known(number: float) -> float | None:
    """A number of pycocotools, where -1 means that there is nothing to find."""
    return None if number < 0 else float(number)


def _fault(truth: COCO, annotation: Mapping[str, Any]) -> str | None:
    """What is wrong with an object, in words; None if nothing is."""
    image, category = annotation["image_id"], annotation["category_id"]
    box, _ = annotation["bbox"], (annotation["area"], annotation["iscrowd"])
    told = f"an object (id {annotation['id']})"
    if category not in truth.cats:
        return f"{told} of category {category}, which is not one of its {len(truth.cats)}"
    if image not in truth.imgs:
        return f"{told} in image {image}, which is not one of its {len(truth.imgs):,}"
    if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
        return f"{told} with the box {box}, which is not x, y and a width and height from 0 on"
    return None


def _annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _image(record: Mapping[str, Any], split: str) -> CocoImage:
    path = f"{split}/{record['file_name']}"
    return CocoImage(int(record["id"]), path, int(record["height"]), int(record["width"]))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
