"""The whole way on this machine: weights, pruning, ONNX, kernels, proof, measurement, a report.

First a small Vim trained on real handwritten digits (examples/vim_digits.safetensors), whose
accuracy can be counted, then full-size vim_tiny with seeded weights, whose speed matters.

    python examples/demo.py -o demo           about one minute on two cores
    python examples/demo.py -o demo --quick   fewer images and samples
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import digits
import numpy as np

import vssm

RUNS = (
    ("PyTorch", "torch", "reference"),
    ("ORT body", "ort-cpu", "body"),
    ("ORT kernel", "ort-cpu", "kernel"),
)
FULL_SIZE, FULL_SCHEDULE = "vim_tiny", "10:0.8"
_BATCH = 50


@dataclass
class Report:
    """Markdown that grows while the demo runs; every line is also printed."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        """Add a line and print it."""
        self.lines.append(text)
        print(text, flush=True)

    def table(self, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """Add a table."""
        self.say()
        self.say("| " + " | ".join(columns) + " |")
        self.say("|" + " --- |" * len(columns))
        for row in rows:
            self.say("| " + " | ".join(row) + " |")
        self.say()


def main() -> int:
    """Run the demo; 0 if everything agreed, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"))
    parser.add_argument("--quick", action="store_true", help="fewer images and samples")
    options = parser.parse_args()
    started = time.perf_counter()
    report = Report()
    report.say("# vssm demo")
    trained_digits(report, options.output, quick=options.quick)
    full_size(report, options.output, quick=options.quick)
    report.say(f"Done in {time.perf_counter() - started:.0f} s.")
    for failure in report.failures:
        report.say(f"FAILED: {failure}")
    page = options.output / "report.md"
    page.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    print(f"report: {page}")
    return 1 if report.failures else 0


def trained_digits(report: Report, output: Path, *, quick: bool) -> None:
    """Export the trained digits model dense and pruned, count its accuracy in every runtime."""
    report.say("\n## A trained model on real images: handwritten digits")
    files = digits.write_test_images(output / "digits_images", 100 if quick else None)
    labels = np.array([label for _, label in files])
    report.say(f"{len(files)} held-out images as PNG files in {output / 'digits_images'}")
    rows = []
    for name, schedule in (("dense", None), ("pruned", digits.SCHEDULE)):
        directory = output / f"digits_{name}"
        model = vssm.create_model(digits.MODEL_NAME, schedule=parsed(schedule), **digits.MODEL)
        vssm.load_checkpoint(model, digits.CHECKPOINT)
        vssm.export(model, directory, labels=[str(d) for d in range(10)], force=True)
        images = vssm.preprocess([path for path, _ in files], directory)
        predicted = {}
        for label, runtime, backend in RUNS:
            with vssm.open_session(directory, runtime, backend=backend) as session:
                predicted[label] = classes(session, images)
            accuracy = float((predicted[label] == labels).mean())
            same = int((predicted[label] == predicted["PyTorch"]).sum())
            rows.append((name, label, f"{accuracy:.2%}", f"{same} of {len(labels)}"))
            if same != len(labels):
                report.failures.append(f"digits {name}: {label} and PyTorch name other classes")
        prove(report, directory, images[:8])
    report.table(("model", "runtime", "accuracy", "classes as in PyTorch"), rows)
    measure(report, output / "digits_pruned", batches=(1,) if quick else (1, 8), quick=quick)


def full_size(report: Report, output: Path, *, quick: bool) -> None:
    """Export full-size vim_tiny pruned, prove and measure it against its dense twin."""
    report.say(f"\n## Full size: {FULL_SIZE}, tokens pruned {FULL_SCHEDULE}, seeded weights")
    directory = output / FULL_SIZE
    model = vssm.create_model(FULL_SIZE, schedule=parsed(FULL_SCHEDULE))
    artifact = vssm.export(model, directory, force=True)
    size = artifact.model_path.stat().st_size
    report.say(f"exported {artifact.model_path}, {size / 1e6:.1f} MB")
    prove(report, directory, None)
    measure(report, directory, batches=(1,), quick=quick)


def parsed(schedule: str | None) -> vssm.PruneSchedule | None:
    """The schedule of a text like "2:0.75,4:0.75"; None for a dense model."""
    return None if schedule is None else vssm.PruneSchedule.parse(schedule)


def classes(session: vssm.Session, images: np.ndarray) -> np.ndarray:
    """Top class of every image."""
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    return np.concatenate([session.run(batch)["logits"].argmax(1) for batch in batches])


def prove(report: Report, directory: Path, images: np.ndarray | None) -> None:
    """Compare the kernels with the float64 oracle."""
    found = vssm.check_parity(None, directory, images=images)
    kept = "".join(
        f", stage {i}: {a:.2%} of kept positions agree" for i, a in enumerate(found.kept_agreement)
    )
    verdict = "passed" if found.passed else "FAILED"
    report.say(
        f"parity of {directory.name} with the float64 oracle: largest error "
        f"{found.forced.relative:.1e} of the largest logit (allowed {found.forced.tolerance:.0e})"
        f"{kept}: {verdict}"
    )
    report.failures += [f"{directory.name}: {failure}" for failure in found.failures]


def measure(report: Report, directory: Path, *, batches: tuple[int, ...], quick: bool) -> None:
    """Time kernel, body and PyTorch loop, dense and pruned."""
    found = vssm.bench_directory(
        directory,
        batches=batches,
        samples=5 if quick else 21,
        progress=lambda step: print(f"  {step} ...", flush=True),
    )
    report.table(
        ("what ran, one thread", "batch", "median ms", "images/s", "times the floor"),
        [
            (
                row.subject,
                str(row.batch),
                f"{row.median_ms:.2f}",
                f"{row.images_per_s:.0f}",
                f"{row.over_floor:.1f}",
            )
            for row in found.rows
        ],
    )
    report.say(f"plot and details: {directory / 'bench.html'}")


if __name__ == "__main__":
    sys.exit(main())
