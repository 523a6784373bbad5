"""Speed of evaluate, finetune and ablate on two cores of which other work keeps one busy.

    python benchmarks/busy_core.py FOLDER [--rounds 3]

FOLDER is made, with images and an export in it. Each command runs with its defaults, with threads
and workers set by hand, and with OpenMP's own waiting, in turns; the best of its rounds counts,
as other work only ever takes speed away. Prints a table: images a second, loading included, by the
command's own report; of ablate, seconds of the whole command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MODEL = ["vim_tiny", "--num-classes=10", "--set=depth=4", "--set=image_size=96"]
_SCHEDULE = ["--schedule", "2:0.8,3:0.8"]
_CORES = 2
# What a user may have set, and what this measures.
_OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "defaults": ([], {}),
    "1 thread, no worker": (["--threads=1", "--workers=0"], {}),
    "1 thread, 1 worker": (["--threads=1", "--workers=1"], {}),
    "2 threads, no worker": (["--threads=2", "--workers=0"], {}),
    # libgomp's own number of rounds where nothing is set.
    "2 threads that spin, 2 workers": (
        ["--threads=2", "--workers=2"],
        {"GOMP_SPINCOUNT": "300000"},
    ),
}
_BY_HAND = [way for way in _WAYS if way[0].isdigit()]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"folder={options.folder} exists; name a new one")
    cores = sorted(os.sched_getaffinity(0))[:_CORES]
    os.sched_setaffinity(0, cores)  # which the commands inherit
    commands = _prepare(options.folder)
    with _busy(cores[-1]):
        found: dict[tuple[str, str], float] = {}
        for number in range(options.rounds):
            for name, command in commands.items():
                for index, (way, (arguments, environment)) in enumerate(_WAYS.items()):
                    out = options.folder / f"{name}-{number}-{index}.json"
                    speed = _speed(name, [*command, *arguments], environment, out)
                    found[name, way] = max(speed, found.get((name, way), 0.0))
                    print(f"round {number + 1}, {name}, {way}: {speed:.3g}", file=sys.stderr)
    print("| command | " + " | ".join(_WAYS) + " | defaults over the best by hand |")
    print("| --- " * (len(_WAYS) + 2) + "|")
    for name in commands:
        row = [found[name, way] for way in _WAYS]
        best = max(found[name, way] for way in _BY_HAND)
        # Of ablate the time, for which a speed of whole runs a second says little.
        cells = [f"{1 / speed:.1f} s" if name == "ablate" else f"{speed:.1f}" for speed in row]
        print(f"| {name} | {' | '.join(cells)} | {row[0] / best:.2f} |")


def _prepare(folder: Path) -> dict[str, list[str]]:
    """Images and an export, and the commands that run on them."""
    digits = Path(__file__).with_name("digit_folders.py")
    subprocess.run([sys.executable, digits, "digits", folder], check=True)
    export, train, held_out = folder / "export", folder / "train", folder / "held_out"
    _vssm("export", *_MODEL, *_SCHEDULE, "-o", export)
    few = _some(held_out, folder / "few", 20)  # an ablation runs two dozen models on every image
    training = [
        "--data",
        str(_some(train, folder / "some", 2)),
        "--epochs=1",
        "--batch=32",
        "--classes=text",
    ]
    return {
        "evaluate": ["evaluate", str(export), str(held_out), "--restart", "--classes=text"],
        "finetune": ["finetune", *_MODEL, *_SCHEDULE, *training],
        "ablate": ["ablate", str(export), str(few), "--classes=text"],
    }


def _some(images: Path, folder: Path, nth: int) -> Path:
    """Every nth image."""
    for file in sorted(images.glob("*/*.png"))[::nth]:
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / file.parent.name / file.name).symlink_to(file.absolute())
    return folder


def _speed(name: str, command: list[str], environment: dict[str, str], out: Path) -> float:
    """Images a second; of ablate the whole command's part of a second."""
    place = [] if name == "evaluate" else ["-o", out.with_suffix("")]
    start = time.perf_counter()
    _vssm(*command, *place, "--json", out, environment=environment)
    seconds = time.perf_counter() - start
    if name == "ablate":
        return 1 / seconds
    report = json.loads(out.read_text())
    return float(report.get("trained", report)["images_per_s"])


def _vssm(*arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    own = {key: value for key, value in os.environ.items() if key not in _OWN}
    command = [sys.executable, "-m", "vssm.commands.main", *map(str, arguments)]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**own, **(environment or {})}
    )


@contextmanager
def _busy(core: int) -> Iterator[None]:
    """Another process that never rests, on one core."""
    program = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
