"""What the commands of the docs' pages find: tiny models of the printed names, and made files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import MICRO, MICRO_HEADS, MICRO_SEGMENTERS, exported, micro
from PIL import Image

import vssm
from vssm.models import registry
from vssm.training.recipe import Recipe
from vssm.training.scene_recipe import SceneRecipe

CLASSES = int(MICRO["num_classes"])
_VIM = {"image_size": 32, "stride": 16, "depth": 2, "d_model": 16, "d_state": 4}
# 17 tokens, and as many blocks as there are before the one that the README prunes after.
_README = {"patch_size": 56, "stride": 56, "depth": 10, "d_model": 16, "d_state": 4}
_SEGMENTER = {
    **{**MICRO_SEGMENTERS["vim"], **MICRO_HEADS, "image_size": 64},
    # The page prunes after block 18.
    **{"depth": 18, "d_model": 12, "taps": (6, 12, 17, 18)},
}
_SEGMENTER.pop("num_classes")


def make_tiny_readme(patch: pytest.MonkeyPatch) -> None:
    """The README's vim_tiny: a few wide patches of its 224 x 224, and the block it prunes after."""
    _shrink(patch, {"vim_tiny": {"changes": _README}})


def make_tiny(patch: pytest.MonkeyPatch, *, dense: bool) -> None:
    """The models of the pages' names are tiny, and the recipes' default numbers small.

    `dense`: the segmenter and the detector too, which take longer.
    """
    tiny: dict[str, dict[str, Any]] = {"vim_small": {"changes": _VIM, "schedule": "1:0.7"}}
    if dense:
        tiny["vim_tiny_upernet_ade20k"] = {"changes": _SEGMENTER}
        tiny["vim_tiny_cascade_mask_rcnn_coco"] = {"changes": _detector()}
    _shrink(patch, {name: {"num_classes": CLASSES, **card} for name, card in tiny.items()})
    _change_defaults(patch, Recipe, {"epochs": 1, "batch": 4})
    _change_defaults(patch, SceneRecipe, {"warm_up_steps": 1})
    published = {"vim_tiny_upernet_ade20k": {"iterations": 2, "batch": 2}}
    patch.setattr("vssm.training.scene_recipe._PUBLISHED", published)


def _shrink(patch: pytest.MonkeyPatch, cards: Mapping[str, dict[str, Any]]) -> None:
    """Change these models' cards, in a copy of the families, to which a page may add some."""
    families = dict(registry.families())
    for name, changes in cards.items():
        family = families[registry.family_of(name).name]
        card = replace(family.cards[name], **changes)
        families[family.name] = replace(family, cards={**family.cards, name: card})
    patch.setattr(registry, "_families", families)


def _detector() -> dict[str, Any]:
    from official_dense import micro_detector

    told = {"level_proposals": 120, "proposals": 60, "most": 20, "score": 0.2}
    config = asdict(micro_detector("vim", "rope_96_padded", **told).config)
    return {key: value for key, value in config.items() if key != "num_classes"}


def _change_defaults(patch: pytest.MonkeyPatch, recipe: type[Any], numbers: dict[str, Any]) -> None:
    names = [field.name for field in fields(recipe)]
    values = dict(zip(names, recipe.__init__.__defaults__, strict=True))
    patch.setattr(recipe.__init__, "__defaults__", tuple({**values, **numbers}.values()))


def make_files(folder: Path, *, export: bool) -> None:
    """Data sets, checkpoints and, if asked for, an export under the names that pages give them."""
    for part, count in (("train", 2), ("val", 1)):
        for name in range(CLASSES):
            for number in range(count):
                _picture(folder / "imagenet" / part / f"n{name:08}" / f"{number}.png", (40, 48))
    for part, count in (("training", 2), ("validation", 1)):
        for number in range(count):
            scene = folder / "ADEChallengeData2016" / "images" / part / f"{number}.jpg"
            _picture(scene, (70, 80))
            numbers = np.random.default_rng(0).integers(0, CLASSES + 1, (70, 80), dtype=np.uint8)
            place = folder / "ADEChallengeData2016" / "annotations" / part
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers).save(place / f"{number}.png")
    _coco(folder / "coco")
    model = vssm.create_model("vim_small", schedule=vssm.default_schedule("vim_small"))
    for name in ("vim_s.pth", "seed0.pth", "seed1.pth"):
        torch.save({"model": model.state_dict()}, folder / name)
    if export:
        exported(folder, micro())  # as `out`; other tests make it too


def make_dense(folder: Path) -> None:
    """Checkpoints of the segmenter, of a classifier for its backbone, and of the detector."""
    sizes = {key: _SEGMENTER[key] for key in ("image_size", "depth", "d_model")}
    begun = vssm.create_model("vim_tiny", num_classes=CLASSES, **sizes)
    torch.save({"model": begun.state_dict()}, folder / "vim_t_midclstok.pth")
    for name, file in (
        ("vim_tiny_upernet_ade20k", "upernet.pth"),
        ("vim_tiny_cascade_mask_rcnn_coco", "cascade.pth"),
    ):
        torch.save({"state_dict": vssm.create_model(name).state_dict()}, folder / file)


def _picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.as_posix().encode()[-20:])
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _coco(root: Path) -> None:
    _picture(root / "val2017" / "1.jpg", (32, 48))
    one = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 10], "area": 200}
    box = [4, 4, 24, 4, 24, 14, 4, 14]
    document = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 32, "width": 48}],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)],
        "annotations": [{**one, "iscrowd": 0, "segmentation": [box]}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
