"""One seed of one case: train, train further, evaluate. What is there is not done again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.experiment.cases import CLASSES, DENSE, FURTHER, Case
from benchmarks.experiment.data import HELD_OUT, TRAIN
from benchmarks.experiment.held import KEY, held_input

import vssm
from vssm import FinetuneRequest, ModelSource, PruneSchedule, Recipe, Resources
from vssm.artifact.manifest import Preprocessing
from vssm.checkpoints.load import save_safetensors
from vssm.evaluation.data import load, open_images
from vssm.files.json import write_json
from vssm.models import MODELS, VisionModel
from vssm.studies.measure import Cost, prepare
from vssm.studies.plan import GRID, Variant, make_plan
from vssm.training.loop import STATE_FILE
from vssm.training.run import REPORT_FILE, WEIGHTS_FILE

_BATCH = 64
_RANDOM_SEEDS = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """Batches of held-out images, and how many there are."""

    batches: Sequence[tuple[npt.NDArray[np.float32], Sequence[int]]]
    total: int


def variants(case: Case) -> dict[str, Variant]:
    """Every variant that the case's model has, by key: those of `vssm ablate`, and ours."""
    schedule = PruneSchedule.parse(case.schedule)
    plan = make_plan(schedule, seeds=_RANDOM_SEEDS, ratios=case.ratios)
    found = {v.key: v for v in plan.variants}
    found[KEY] = Variant(KEY, schedule)
    if case.model.startswith("plain_mamba"):  # whose convolution is over the grid already
        del found["masked"]
        return found
    if case.options.get("d_conv") == 1:
        return found
    for key in ("none", "gap", "constant", KEY):
        own = found[key].schedule
        if own is not None:
            found[key + GRID] = Variant(key + GRID, own.changed(conv="position"))
    return found


def build(case: Case, variant: Variant, weights: Path) -> tuple[VisionModel, Cost]:
    """The variant with these weights, on this package's kernels."""
    model = vssm.create_model(
        case.model, schedule=variant.schedule, num_classes=CLASSES, **case.options
    )
    vssm.load_checkpoint(model, weights)
    return prepare(variant, model, backend="kernel", device="cpu")


def held_out(case: Case, data: Path) -> Images:
    """The images, as `vssm evaluate` prepares them."""
    root = data / HELD_OUT
    pictures = open_images(root, CLASSES).pictures
    spec = Preprocessing.for_image_size(case.options["image_size"])
    cut = [pictures[i : i + _BATCH] for i in range(0, len(pictures), _BATCH)]
    batches = []
    for some in cut:
        loaded = load([str(root / p.path) for p in some], spec)
        if any(loaded.errors):
            raise ValueError(f"data={root} holds what is no image; remove the folder")
        batches.append((loaded.images, [p.target for p in some]))
    return Images(batches, len(pictures))


def run_seed(case: Case, seed: int, folder: Path, data: Path, say: Say) -> None:
    """Leave `accuracy.json`: right answers by trained and by deployed variant."""
    result = folder / "accuracy.json"
    if result.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    known, images = variants(case), held_out(case, data)
    initial = folder / "initial.safetensors"
    save_safetensors(_initial(case, seed).state_dict(), initial)
    scratch = replace(case.scratch, seed=seed)
    dense = folder / DENSE
    weights = {DENSE: _train(case, None, initial, recipe=scratch, output=dense, data=data)}
    say(f"{case.key}, seed {seed}: trained")
    for key in case.tuned:
        # The same images in the same order for each: differences are the variants'.
        recipe = replace(case.further, seed=1000 + seed)
        schedule = None if key == FURTHER else known[key].schedule
        with held_input(key):
            output = folder / key
            weights[key] = _train(
                case, schedule, weights[DENSE], recipe=recipe, output=output, data=data
            )
        say(f"{case.key}, seed {seed}: trained further as {key}")
    found = {
        trained: right(case, _deployed(case, trained, known), file, images)
        for trained, file in weights.items()
    }
    write_json(result, {"images": images.total, "right": found})
    say(f"{case.key}, seed {seed}: {_short(found, images.total)}")


def right(case: Case, some: Sequence[Variant], weights: Path, images: Images) -> dict[str, int]:
    """How many images each variant with these weights has right."""
    found = {}
    for variant in some:
        model, _ = build(case, variant, weights)
        with held_input(variant.key), torch.inference_mode():
            found[variant.key] = sum(
                int((model(torch.from_numpy(pixels)).argmax(1) == torch.tensor(classes)).sum())
                for pixels, classes in images.batches
            )
    return found


def costs(case: Case) -> dict[str, dict[str, int]]:
    """Multiply-adds of an image by variant."""
    found = {}
    for key, variant in variants(case).items():
        model = vssm.create_model(
            case.model, schedule=variant.schedule, num_classes=CLASSES, **case.options
        )
        found[key] = dataclasses.asdict(prepare(variant, model, backend="auto", device="cpu")[1])
    return found


def read(folder: Path) -> dict[str, Any]:
    """What `run_seed` left."""
    found: dict[str, Any] = json.loads((folder / "accuracy.json").read_text())
    return found


def _initial(case: Case, seed: int) -> VisionModel:
    """The dense model with weights of its own for each seed, and its steps scaled."""
    build_model, config, changes = MODELS[case.model]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_model(config(**{**changes, "num_classes": CLASSES, **case.options}))
    for name, value in model.state_dict().items():
        if ".dt_proj" in name and name.endswith(".bias") and case.step_factor != 1:
            step = torch.nn.functional.softplus(value) * case.step_factor
            value.copy_(step + torch.log(-torch.expm1(-step)))  # softplus's inverse
    return model


def _train(
    case: Case,
    schedule: PruneSchedule | None,
    start: Path,
    *,
    recipe: Recipe,
    output: Path,
    data: Path,
) -> Path:
    done, state = output / REPORT_FILE, output / STATE_FILE
    if not done.exists():
        subject = ModelSource(
            case.model, start, schedule=schedule, num_classes=CLASSES, options=case.options
        )
        work = Resources(workers=0, threads=1, save_every=1000)
        resume = state.exists()
        vssm.finetune(
            FinetuneRequest(subject, data / TRAIN, output, recipe, resume=resume, resources=work)
        )
    state.unlink(missing_ok=True)  # three times as large as the weights, of no more use
    return output / WEIGHTS_FILE


def _deployed(case: Case, trained: str, known: dict[str, Variant]) -> list[Variant]:
    """All of the dense weights' variants; of others their own, and what they might be taken for."""
    if trained == DENSE:
        return list(known.values())
    own = () if trained == FURTHER else (trained,)
    grid = ("none" + GRID, "gap" + GRID) if trained == "masked" else ()
    return [known[key] for key in dict.fromkeys((*own, DENSE, "none", "gap", *grid))]


def _short(found: dict[str, dict[str, int]], total: int) -> str:
    parts = [f"{key} {100 * n / total:.1f}" for key, n in found[DENSE].items()]
    own = [
        f"{key} {100 * counts[DENSE if key == FURTHER else key] / total:.1f}"
        for key, counts in found.items()
        if key != DENSE
    ]
    return f"zero-shot {', '.join(parts)}; trained so: {', '.join(own)}"
