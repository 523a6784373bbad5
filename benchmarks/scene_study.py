"""A small Vim segmenter on composed scenes: ratios and ways to restore over seeds, in pairs.

    python benchmarks/digit_scenes.py OUT/scenes
    python -m benchmarks.scene_study OUT/scenes -o OUT/run

Trains a dense segmenter for each seed by `vssm finetune`, measures every variant with its weights
(zero-shot), trains every variant further from them and measures it again. One thread,
deterministic; a seed's results are written when it ends, and a run that was stopped goes on with
the same command. `--pictures FOLDER` draws the pictures of the page from the first seed.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from benchmarks.digit_scenes import LABELS, SIDE
from benchmarks.study import difference
from PIL import Image

import vssm
from vssm.artifact.preprocessing import normalised, open_rgb
from vssm.checkpoints.load import save_safetensors
from vssm.evaluation.scenes import open_scenes, read_classes
from vssm.evaluation.segment import best_classes
from vssm.evaluation.segmentation import Tally, image_areas
from vssm.models.base import ForwardDetails, VisionModel
from vssm.models.cost import count
from vssm.models.registry import families
from vssm.pruning.schedule import RESTORES
from vssm.training.run import REPORT_FILE, WEIGHTS_FILE, has_run
from vssm.types import Array

_MODEL: Final = "vim_tiny_upernet_ade20k"
_PATCH: Final = 8
_SIZES: Final[dict[str, Any]] = {
    **{"image_size": SIDE, "table_size": SIDE, "patch_size": _PATCH, "depth": 4, "d_model": 48},
    **{"d_state": 8, "taps": (1, 2, 3, 4), "head_width": 24, "auxiliary_width": 16},
}
# As the published schedules lie: after the first three of four taps.
_BLOCKS: Final = (1, 2, 3)
_RATIOS: Final = ("0.7", "0.5")
# What a scene shows is where it is and what: no mirrors, and small changes of size.
_LIGHT: Final[dict[str, Any]] = {
    **{
        "smallest": 0.9,
        "largest": 1.1,
        "uniform": 1.0,
        "flip": 0.0,
        "distortion": False,
        "weight_decay": 0.05,
    },
}
_BATCH: Final = 50  # scenes of a pass that only measures
_DRAWN: Final = 4  # held-out scenes of the picture


@dataclass(frozen=True)
class Variant:
    """What is pruned and how; ratio "1" is the dense model, which has no rules."""

    ratio: str
    restore: str
    alignment: str

    @property
    def schedule(self) -> vssm.PruneSchedule | None:
        """The schedule, None for the dense model."""
        if self.ratio == "1":
            return None
        ratios = dict.fromkeys(_BLOCKS, self.ratio)
        return vssm.PruneSchedule(ratios, restore=self.restore, alignment=self.alignment)

    def __str__(self) -> str:
        return "-".join(part for part in (self.ratio, self.restore, self.alignment) if part)


@dataclass(frozen=True)
class Row:
    """One variant of one seed.

    Attributes:
        weights: "zero-shot", the dense model's, or "fine-tuned", the variant's own.
        ratio: as `Variant`.
        restore: as `Variant`.
        alignment: as `Variant`.
        seed: of the initial weights, the order of the scenes and their augmentation.
        miou: over the held-out scenes, percent.
        seen: percent of the digits' pixels whose token stays to the end.
    """

    weights: str
    ratio: str
    restore: str
    alignment: str
    seed: int
    miou: float
    seen: float


DENSE: Final = Variant("1", "", "")


def variants(ratios: Sequence[str]) -> list[Variant]:
    """Dense, then every ratio with every way to restore, and with plain removal."""
    found = [DENSE]
    for ratio in ratios:
        found += [Variant(ratio, restore, "gap") for restore in RESTORES]
        found.append(Variant(ratio, "frozen", "none"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write `scenes.csv` and `scenes.md`."""
    options = _options(argv)
    torch.set_num_threads(1)  # sums in one order: the same weights every time
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    for seed in range(options.seeds):
        file = options.output / f"rows-{seed}.csv"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            found = list(_study(options, seed, say))
            file.write_text(to_csv(found))
        rows += read_rows(file)
        (options.output / "scenes.csv").write_text(to_csv(rows))
    (options.output / "scenes.md").write_text("\n".join(tables(rows)))
    if options.pictures is not None:
        draw(options)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="as digit_scenes.py writes it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=250, help="of the dense model, from scratch")
    parser.add_argument("--further", type=int, default=30, help="steps of each variant")
    parser.add_argument("--ratios", nargs="+", default=_RATIOS, metavar="RATIO")
    parser.add_argument("--pictures", type=Path, help="folder for two PNG files")
    return parser.parse_args(argv)


def _study(options: argparse.Namespace, seed: int, say: Callable[[str], None]) -> Iterator[Row]:
    """Everything of one seed."""
    scenes = Held.of(options.folder)
    dense = _train(options, seed, DENSE, None, say)
    for variant in variants(options.ratios):
        yield _row("zero-shot", variant, seed, dense, scenes)
    for variant in variants(options.ratios):
        tuned = _train(options, seed, variant, dense, say)
        yield _row("fine-tuned", variant, seed, tuned, scenes)


def _row(weights: str, variant: Variant, seed: int, file: Path, scenes: Held) -> Row:
    miou, seen = scenes.measure(_loaded(variant, file))
    return Row(weights, **asdict(variant), seed=seed, miou=miou, seen=seen)


def _train(
    options: argparse.Namespace,
    seed: int,
    variant: Variant,
    dense: Path | None,
    say: Callable[[str], None],
) -> Path:
    """Weights of a variant trained further, or of the dense model from a seed's initial ones."""
    output = _run_folder(options.output, seed, variant, tuned=dense is not None)
    if not (output / REPORT_FILE).exists():
        steps = {"iterations": options.steps, "lr": 3e-3, "warm_up_steps": options.steps // 9}
        if dense is not None:
            steps = {"iterations": options.further, "lr": 1e-3, "warm_up_steps": 0}
        begin = _initial(output, seed) if dense is None else dense
        source = vssm.ModelSource(
            _MODEL, begin, schedule=variant.schedule, num_classes=len(LABELS), options=_SIZES
        )
        recipe = vssm.SceneRecipe(batch=options.batch, seed=seed, **steps, **_LIGHT)
        request = vssm.FinetuneRequest(
            source,
            options.folder,
            output,
            recipe,
            resume=has_run(output),
            resources=vssm.Resources(workers=0, save_every=1000, threads=1),
        )
        name = f"seed {seed}, {output.name}"
        vssm.finetune(request, progress=lambda *step: say(f"{name}: {' '.join(map(str, step))}"))
    return output / WEIGHTS_FILE


def _run_folder(output: Path, seed: int, variant: Variant, *, tuned: bool) -> Path:
    return output / f"seed-{seed}" / (f"tuned-{variant}" if tuned else "dense")


def _initial(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    build, config = families()["vim_segmenter"].classes()
    torch.manual_seed(seed)
    file = folder / "initial.safetensors"
    state = build(config(**_SIZES, num_classes=len(LABELS)), None, name=_MODEL).state_dict()
    save_safetensors(state, file)
    return file


def _model(variant: Variant) -> VisionModel:
    return vssm.create_model(_MODEL, schedule=variant.schedule, num_classes=len(LABELS), **_SIZES)


def _loaded(variant: Variant, file: Path) -> VisionModel:
    model = _model(variant)
    vssm.load_checkpoint(model, file)
    return model


@dataclass(frozen=True)
class Held:
    """The held-out scenes: inputs (scenes, 3, side, side) and classes (scenes, side, side)."""

    images: torch.Tensor
    classes: Array

    @classmethod
    def of(cls, root: Path) -> Held:
        """The validation split, prepared as `vssm evaluate` does."""
        spec = _model(DENSE).preprocessing()
        folder = open_scenes(root, "validation")
        images = [normalised(open_rgb(root / scene.image), spec) for scene in folder.scenes]
        classes = [
            read_classes(root / scene.annotation, len(LABELS), (SIDE, SIDE))
            for scene in folder.scenes
        ]
        return cls(torch.from_numpy(np.stack(images)), np.stack(classes))

    def measure(self, model: VisionModel) -> tuple[float, float]:
        """Percent: mean intersection over union, and digits' pixels whose token stays."""
        tally, seen, all_digits = Tally(len(LABELS)), 0, 0
        batches = zip(self.images.split(_BATCH), _split(self.classes), strict=True)
        for images, classes in batches:
            found = _forward(model, images)
            for guess, truth in zip(_guesses(found), classes, strict=True):
                tally.add(image_areas(guess, truth, len(LABELS)))
            digits = _digits_by_token(classes)
            all_digits += int(digits.sum())
            kept = found.kept_positions[-1:] or [torch.arange(digits.shape[1]).expand(digits.shape)]
            seen += int(digits.gather(1, kept[0].long()).sum())
        return 100 * tally.means()[0], 100 * seen / all_digits


def _split(classes: Array) -> list[Array]:
    return [classes[i : i + _BATCH] for i in range(0, len(classes), _BATCH)]


@torch.inference_mode()
def _forward(model: VisionModel, images: torch.Tensor) -> ForwardDetails:
    return model.forward_details(images)


def _guesses(found: ForwardDetails) -> list[Array]:
    return [best_classes(logits[None], (SIDE, SIDE)) for logits in found.logits.numpy()]


def _digits_by_token(classes: Array) -> torch.Tensor:
    """Pixels of digits (scenes, tokens) under each token."""
    across = SIDE // _PATCH
    cells = (classes > 0).reshape(-1, across, _PATCH, across, _PATCH).sum((2, 4))
    return torch.from_numpy(cells.reshape(len(classes), -1))


def to_csv(rows: Sequence[Row]) -> str:
    """A line a row, under the names of its fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    for row in rows:
        *rest, miou, seen = asdict(row).values()
        writer.writerow([*rest, f"{miou:.4f}", f"{seen:.4f}"])
    return text.getvalue()


def read_rows(file: Path) -> list[Row]:
    """The rows of a file that `to_csv` made."""
    with file.open(newline="") as lines:
        return [
            Row(
                **{key: value for key, value in row.items() if key not in {"seed", "miou", "seen"}},
                seed=int(row["seed"]),
                miou=float(row["miou"]),
                seen=float(row["seen"]),
            )
            for row in csv.DictReader(lines)
        ]


def tables(rows: Sequence[Row]) -> list[str]:
    """What the ratios cost, then zero-shot and fine-tuned, in Markdown."""
    ratios = list(dict.fromkeys(row.ratio for row in rows if row.ratio != "1"))
    return [_costs(ratios), *(_results(rows, ratios, w) for w in ("zero-shot", "fine-tuned"))]


def _costs(ratios: Sequence[str]) -> str:
    lines = [
        "| ratio | tokens left | M multiply-adds: backbone | neck | head | whole | saved |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    whole = count(_model(DENSE)).true
    for ratio in ("1", *ratios):
        model = _model(Variant(ratio, "frozen", "gap"))
        cost = count(model)
        left = [stage.num_keep for stage in model.stages.values()] or [(SIDE // _PATCH) ** 2]
        backbone = cost.true - cost.neck - cost.head
        numbers = [f"{n / 1e6:.2f}" for n in (backbone, cost.neck, cost.head, cost.true)]
        name = "dense" if ratio == "1" else ratio
        lines.append(
            f"| {name} | {', '.join(map(str, left))} | {' | '.join(numbers)} | "
            f"{1 - cost.true / whole:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _results(rows: Sequence[Row], ratios: Sequence[str], weights: str) -> str:
    found: dict[Variant, list[float]] = {}
    seen: dict[Variant, list[float]] = {}
    for row in rows:
        if row.weights == weights:
            variant = Variant(row.ratio, row.restore, row.alignment)
            found.setdefault(variant, []).append(row.miou)
            seen.setdefault(variant, []).append(row.seen)
    lines = [
        f"| {weights} | mIoU % | less dense | less `frozen` | digits' pixels kept % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant in variants(ratios):
        base = Variant(variant.ratio, "frozen", "gap")
        cells = [
            _mean(found[variant]),
            "-" if variant == DENSE else difference(found[variant], found[DENSE]),
            "-" if variant in {DENSE, base} else difference(found[variant], found[base]),
            f"{statistics.fmean(seen[variant]):.0f}",
        ]
        lines.append(f"| {_name(variant)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(variant: Variant) -> str:
    if variant == DENSE:
        return "dense"
    removal = ", plain removal" if variant.alignment == "none" else ""
    return f"{variant.ratio}, `{variant.restore}`{removal}"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def draw(options: argparse.Namespace) -> None:
    """What the first seed's models say of some held-out scenes, and where tokens left."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    scenes, spec = Held.of(options.folder), _model(DENSE).preprocessing()
    images = scenes.images[:_DRAWN]
    ratio = options.ratios[len(options.ratios) // 2]
    maps = {"truth": list(scenes.classes[:_DRAWN])}
    for variant in (DENSE, *(Variant(ratio, restore, "gap") for restore in RESTORES)):
        folder = _run_folder(options.output, 0, variant, tuned=variant != DENSE)
        found = _forward(_loaded(variant, folder / WEIGHTS_FILE), images)
        maps[_name(variant).replace("`", "")] = _guesses(found)
    figure = Figure(figsize=(7.2, 1.25 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(maps), squeeze=False)
    colours = ListedColormap(["0.85", *(f"C{i}" for i in range(len(LABELS) - 1))])
    for number, row in enumerate(axes):
        pixels = images[number].permute(1, 2, 0).numpy() * spec.std + spec.mean
        row[0].imshow(pixels.clip(0, 1))
        for axis, classes in zip(row[1:], maps.values(), strict=True):
            axis.imshow(classes[number], cmap=colours, vmin=0, vmax=len(LABELS) - 1)
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("scene", *maps), strict=True):
        axis.set_title(title, fontsize=8)
    options.pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.pictures / "scenes.png", dpi=100)
    _shrink(options.pictures / "scenes.png")
    _draw_left(options, Variant(ratio, "frozen", "gap"))


def _draw_left(options: argparse.Namespace, variant: Variant) -> None:
    """The figure of `vssm visualize` for the first scene."""
    source = vssm.ModelSource(
        _MODEL,
        _run_folder(options.output, 0, variant, tuned=True) / WEIGHTS_FILE,
        schedule=variant.schedule,
        num_classes=len(LABELS),
        options=_SIZES,
    )
    scene = options.folder / open_scenes(options.folder, "validation").scenes[0].image
    picture = options.pictures / "scenes_left.png"
    with tempfile.TemporaryDirectory() as drawn:
        told = vssm.visualize(source, [scene], drawn, threads=1)
        shutil.copyfile(Path(drawn) / told["images"][0]["figures"]["left"], picture)
    _shrink(picture)


def _shrink(picture: Path) -> None:
    """In 128 colours, a third of the size."""
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
