"""Whether memory stays flat: many runs, many sessions, several threads, other processes.

    python benchmarks/long_runs.py [--runs 100000] [--opens 1000] [--runtime ort-cpu]

One JSON line a part. `before_mb` is the resident memory after a tenth of the work, `after_mb` that
at the end; every result is compared with the first. The model is a Vim of 37 tokens, pruned twice,
which is made where `--export` names none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import vssm
from vssm.artifact.directory import Artifact, open_artifact
from vssm.runtimes.session import Session
from vssm.types import Array

SIZES = {"image_size": 48, "patch_size": 8, "stride": 8, "depth": 3, "d_model": 20, "d_state": 5}


def memory_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def report(what: str, count: int, work: Callable[[], None]) -> None:
    """Do the work `count` times, and print what it cost."""
    begun = time.perf_counter()
    for _ in range(max(1, count // 10)):
        work()
    before = memory_mb()
    for _ in range(count - max(1, count // 10)):
        work()
    after = memory_mb()
    line = {"part": what, "count": count, "seconds": round(time.perf_counter() - begun, 1)}
    line |= {"before_mb": round(before, 1), "after_mb": round(after, 1)}
    print(json.dumps(line | {"growth_mb": round(after - before, 1)}), flush=True)


def check(session: Session, images: Array, expected: Array) -> None:
    """Run once.

    Raises:
        ValueError: the result is another than the first.
    """
    if not np.array_equal(session.run(images)["logits"], expected):
        raise ValueError("a later run gives another result")


def run_on_threads(session: Session, images: Array, expected: Array, *, runs: int) -> None:
    """The same from 8 threads at once."""
    faults: list[BaseException] = []

    def several() -> None:
        try:
            for _ in range(runs):
                check(session, images, expected)
        except BaseException as error:  # which would end this thread alone
            faults.append(error)

    threads = [threading.Thread(target=several) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def run_forked(session: Session, images: Array, expected: Array) -> None:
    """Run in a fork, with the session of this process.

    Raises:
        RuntimeError: the fork ended otherwise than by the expected result.
    """
    number = os.fork()
    if number == 0:
        code = 1
        try:
            check(session, images, expected)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    if code:
        raise RuntimeError(f"a fork ended with {code}")


def _in_a_new_process(directory: str, runtime: str, images: Array, expected: Array) -> None:
    with vssm.open_session(directory, runtime, threads=1) as session:
        check(session, images, expected)


def run_spawned(artifact: Artifact, runtime: str, images: Array, expected: Array) -> None:
    """Open and run in a new process.

    Raises:
        RuntimeError: it ended otherwise than by the expected result.
    """
    arguments = (str(artifact.directory), runtime, images, expected)
    process = multiprocessing.get_context("spawn").Process(target=_in_a_new_process, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a new process ended with {process.exitcode}")


def main() -> None:
    """Do every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--runtime", default="ort-cpu")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--opens", type=int, default=1_000)
    parser.add_argument("--processes", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.export is None:
            schedule = vssm.PruneSchedule({1: 0.7, 2: 0.8})
            model = vssm.create_model("vim_tiny", schedule=schedule, num_classes=7, **SIZES)
            artifact = vssm.export(model, Path(folder) / "export")
        else:
            artifact = open_artifact(asked.export)
        _, *shape = artifact.manifest.inputs[0].shape
        images = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
        with vssm.open_session(artifact, asked.runtime, threads=1) as session:
            expected = session.run(images)["logits"]
            report("runs of one session", asked.runs, lambda: check(session, images, expected))
            each = max(1, asked.runs // 800)
            threads = lambda: run_on_threads(session, images, expected, runs=each)  # noqa: E731
            report(f"8 threads, {8 * each} runs of one session", 100, threads)
            forked = lambda: run_forked(session, images, expected)  # noqa: E731
            report("forks with one session", asked.processes, forked)
            spawned = lambda: run_spawned(artifact, asked.runtime, images, expected)  # noqa: E731
            report("new processes beside a session", asked.processes // 4, spawned)

        def open_run_close() -> None:
            with vssm.open_session(artifact, asked.runtime, threads=1) as session:
                check(session, images, expected)

        report("open, run, close", asked.opens, open_run_close)


if __name__ == "__main__":
    sys.exit(main())
