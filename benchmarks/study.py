"""Small Vims on real images: removed, aligned and merged tokens over seeds, in pairs.

    python benchmarks/digit_folders.py digits OUT/digits
    python benchmarks/study.py OUT/digits -o OUT/run

Trains a dense Vim for each seed, then does what a user would: `vssm ablate` with one checkpoint a
seed, which measures every variant zero-shot, trains some of them further and measures these too.
FOLDER has `train` and `held_out`, each with one folder a class. One thread, deterministic; a run
that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

import vssm
from vssm.checkpoints.load import save_safetensors
from vssm.models.registry import families
from vssm.training.run import REPORT_FILE, WEIGHTS_FILE, has_run

_MODEL: Final = "vim_tiny"
_SIZES: Final[dict[str, Any]] = {
    **{"depth": 6, "d_model": 48, "d_state": 8, "patch_size": 4, "stride": 4, "num_classes": 10}
}
_SCHEDULE: Final = vssm.PruneSchedule.parse("2:0.7,3:0.7,4:0.7", conv="compact")
# Whatever a crop would cut off or a mirror turn round makes another digit.
_LIGHT: Final[dict[str, Any]] = {
    **{"ema": 0.0, "smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0},
    **{"rand_augment": False, "color_jitter": 0.0, "repeats": 1, "flip": 0.0},
    **{"min_lr": 1e-5, "weight_decay": 0.05},
}
_TUNED: Final = ("none", "gap", "none+position", "gap+position", "merge")
# Beside plain removal, which every row stands beside.
_QUESTIONS: Final = (
    ("alignment, convolution by position", "gap+position", "none+position"),
    ("by position, aligned", "gap+position", "gap"),
    ("merging, less plain removal by position", "merge", "none+position"),
    ("merging, less aligned by position", "merge", "gap+position"),
    ("merging aligned by sizes", "merge+size", "merge"),
)


def main() -> None:
    """Run what is missing, then write `study.md` and `study.csv`."""
    options = _options()
    torch.set_num_threads(1)  # sums in one order: the same weights every time
    start = time.perf_counter()

    def tell(phase: str, done: int, total: int, note: str = "", /) -> None:
        say(f"{phase}: {done:,} of {total:,} {note}")

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    dense = [_train_dense(options, seed, say) for seed in range(options.seeds)]
    sizes = {**_SIZES, "image_size": options.image_size}
    classes = sizes.pop("num_classes")
    source = vssm.ModelSource(
        _MODEL, checkpoint=dense[0], schedule=_SCHEDULE, num_classes=classes, options=sizes
    )
    training = vssm.AblationTraining(
        options.folder / "train",
        variants=options.finetune,
        recipe=vssm.Recipe(
            **{**_LIGHT, "batch": options.batch, "crop": options.crop},
            **{"epochs": options.further, "lr": 5e-4, "warm_up_epochs": 0},
        ),
        save_every=1000,
    )
    vssm.ablate(
        source,
        options.folder / "held_out",
        options.output,
        vssm.AblationOptions(seeds=1, ratios=(), checkpoints=dense[1:], training=training),
        progress=tell,
    )
    runs = _runs(json.loads((options.output / "ablation.json").read_text()))
    (options.output / "study.csv").write_text(_csv(runs))
    (options.output / "study.md").write_text(_markdown(runs))
    say(f"wrote {options.output / 'study.md'}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with train and held_out")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--crop", type=float, default=0.6, help="least share of an image's area")
    parser.add_argument("--epochs", type=int, default=28, help="from scratch")
    parser.add_argument("--further", type=int, default=6, help="epochs of each variant")
    parser.add_argument(
        "--finetune", default=_TUNED, type=lambda text: tuple(text.split(",")), metavar="VARIANTS"
    )
    return parser.parse_args()


def _train_dense(options: argparse.Namespace, seed: int, say: Any) -> Path:
    """Weights of the dense model; a seed decides the initial ones, the order and the crops."""
    output = options.output / f"dense-{seed}"
    if not (output / REPORT_FILE).exists():
        output.mkdir(parents=True, exist_ok=True)
        sizes = {**_SIZES, "image_size": options.image_size}
        build, config = families()["vim"].classes()
        torch.manual_seed(seed)
        initial = output / "initial.safetensors"
        save_safetensors(build(config(**sizes), None, name=_MODEL).state_dict(), initial)
        classes = sizes.pop("num_classes")
        recipe = vssm.Recipe(
            **{**_LIGHT, "batch": options.batch, "crop": options.crop, "seed": seed},
            **{"epochs": options.epochs, "warm_up_epochs": max(1, options.epochs // 9)},
            **{"lr": 2e-3, "warm_up_lr": 2e-4},
        )
        vssm.finetune(
            vssm.FinetuneRequest(
                vssm.ModelSource(_MODEL, checkpoint=initial, num_classes=classes, options=sizes),
                options.folder / "train",
                output,
                recipe,
                resume=has_run(output),
                resources=vssm.Resources(workers=0, save_every=1000),
            ),
            progress=lambda *step: say(f"dense, seed {seed}: {' '.join(map(str, step))}"),
        )
    return Path(output / WEIGHTS_FILE)


def _runs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every variant once, zero-shot before fine-tuned: key, label, MFLOPs, top-1 by seed."""
    found: dict[tuple[bool, str], dict[str, Any]] = {}
    for row in report["rows"]:
        if len(row["variants"]) > 1:  # draws of the random choice, several a seed
            continue
        key = (row["tuned"], row["variants"][0])
        found.setdefault(
            key,
            {
                "tuned": row["tuned"],
                "key": row["variants"][0],
                "label": row["label"],
                "mflops": [row["flops"][kind] / 1e6 for kind in ("published", "true")],
                "top1": [100 * share for share in row["top1s"]],
            },
        )
    return sorted(found.values(), key=lambda run: bool(run["tuned"]))


def _csv(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["weights,variant,seed,top1"]
    for run in runs:
        weights = "fine-tuned" if run["tuned"] else "zero-shot"
        lines += [f"{weights},{run['key']},{i},{top1:.4f}" for i, top1 in enumerate(run["top1"])]
    return "\n".join(lines) + "\n"


def _markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Accuracies beside plain removal's of the same seed, and differences of other pairs."""
    named = {(run["tuned"], run["key"]): run["top1"] for run in runs}
    lines = []
    for tuned, title in ((False, "zero-shot"), (True, "fine-tuned")):
        lines += [
            f"| {title} | MFLOPs, published rule | true | top-1 % | less plain removal |",
            "| --- | --- | --- | --- | --- |",
        ]
        for run in runs:
            if run["tuned"] == tuned:
                plain = None if run["key"] in {"dense", "none"} else named[tuned, "none"]
                lines.append(
                    f"| {run['label'].removesuffix(', fine-tuned')} | {run['mflops'][0]:.2f} | "
                    f"{run['mflops'][1]:.2f} | {statistics.fmean(run['top1']):.2f} ± "
                    f"{statistics.stdev(run['top1']):.2f} | {difference(run['top1'], plain)} |"
                )
        lines.append("")
    lines += ["| question | zero-shot | fine-tuned |", "| --- | --- | --- |"]
    for question, one, other in _QUESTIONS:
        cells = [difference(named.get((t, one)), named.get((t, other))) for t in (False, True)]
        lines.append(f"| {question} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def difference(values: Sequence[float] | None, others: Sequence[float] | None) -> str:
    """Mean ± standard error over seeds, 95 % interval by Student's t; bold without zero in it."""
    if values is None or others is None:
        return "-"
    from scipy import stats  # takes a second to import, for this one number

    each = [a - b for a, b in zip(values, others, strict=True)]
    middle, error = statistics.fmean(each), statistics.stdev(each) / math.sqrt(len(each))
    reach = error * float(stats.t.ppf(0.975, len(each) - 1))
    mark = "**" if error > 0 and abs(middle) > reach else ""
    return (
        f"{mark}{middle:+.2f}{mark} ± {error:.2f} ({middle - reach:+.2f} to {middle + reach:+.2f})"
    )


if __name__ == "__main__":
    main()
