"""The whole way on this machine: weights, pruning, ONNX, kernels, proof, measurement, a report.

First a small Vim trained on real handwritten digits (examples/vim_digits.safetensors), whose
accuracy can be counted, then full-size vim_tiny with seeded weights, whose speed matters.

    python examples/demo.py -o demo           about two minutes on two cores
    python examples/demo.py -o demo --quick   fewer images and samples
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
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
    fewer_bits(report, output, [path for path, _ in files], labels, quick=quick)
    measure(report, output / "digits_pruned", batches=(1,) if quick else (1, 8), quick=quick)


def fewer_bits(
    report: Report, output: Path, files: list[Path], labels: np.ndarray, *, quick: bool
) -> None:
    """The digits in float32, float16 and INT8: accuracy, size and time in one table."""
    report.say("The same in fewer bits; INT8 calibrated on training images alone")
    count = 32 if quick else 128
    training = digits.write_train_images(output / "digits_training", count)
    rows = []
    for name in ("pruned",) if quick else ("dense", "pruned"):
        full = output / f"digits_{name}"
        directories = {"float32": full, "float16": output / f"{full.name}_float16"}
        directories["int8"] = output / f"{full.name}_int8"
        schedule = parsed(digits.SCHEDULE if name == "pruned" else None)
        model = vssm.create_model(digits.MODEL_NAME, schedule=schedule, **digits.MODEL)
        vssm.load_checkpoint(model, digits.CHECKPOINT)
        vssm.export(model, directories["float16"], dtype="float16", force=True)
        request = vssm.QuantizeRequest(count=count)
        vssm.quantize(full, training, directories["int8"], request, force=True)
        images = vssm.preprocess(files, full)
        sizes = {kind: (path / "model.onnx").stat().st_size for kind, path in directories.items()}
        times = milliseconds(directories, images[:8], 5 if quick else 21)
        accuracy = {}
        for kind, directory in directories.items():
            with vssm.open_session(directory, threads=1) as session:
                accuracy[kind] = float((classes(session, images) == labels).mean())
            share = sizes[kind] / sizes["float32"]
            cells = (f"{accuracy[kind]:.2%}", f"{sizes[kind]:,}", f"{share:.2f}")
            rows.append((name, kind, *cells, f"{times[kind]:.2f}"))
        # One image more counts as one: of few images it is more than half a point.
        if accuracy["float32"] - accuracy["int8"] > max(0.005, 1 / len(labels)):
            report.failures.append(f"digits {name}: INT8 loses more than half a point")
        found = vssm.check_parity(None, directories["int8"], images=images[:16])
        report.failures += [f"digits {name} int8: {failure}" for failure in found.failures]
        if times["int8"] > times["float32"]:
            report.say(f"{name}: INT8 is slower than float32 on this machine")
    columns = ("model", "numbers", "accuracy", "bytes", "of float32", "ms, 8 images, one thread")
    report.table(columns, rows)


def milliseconds(
    directories: dict[str, Path], images: np.ndarray, samples: int
) -> dict[str, float]:
    """Median time of a run of each export, one sample each in turn."""
    times: dict[str, list[float]] = {kind: [] for kind in directories}
    with contextlib.ExitStack() as stack:
        sessions = {
            kind: stack.enter_context(vssm.open_session(directory, threads=1))
            for kind, directory in directories.items()
        }
        for sample in range(samples + 1):
            for kind, session in sessions.items():
                start = time.perf_counter()
                session.run(images)
                if sample > 0:  # the first one warms up
                    times[kind].append(1e3 * (time.perf_counter() - start))
    return {kind: float(np.median(taken)) for kind, taken in times.items()}


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
    # The convolution that the checkpoint was trained with.
    return None if schedule is None else vssm.PruneSchedule.parse(schedule, conv="compact")


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


def say_phases() -> Callable[..., None]:
    """Prints each phase of a long work once."""
    told: set[str] = set()

    def say(phase: str, done: int, total: int, note: str = "") -> None:
        line = f"  {phase} {note}".rstrip()
        if line not in told:
            print(f"{line} ...", flush=True)
            told.add(line)

    return say


def measure(report: Report, directory: Path, *, batches: tuple[int, ...], quick: bool) -> None:
    """Time kernel, body and PyTorch loop, dense and pruned."""
    found = vssm.bench_directory(
        directory,
        batches=batches,
        samples=5 if quick else 21,
        progress=say_phases(),
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
