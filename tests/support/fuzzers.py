"""Every fuzzer of this repository; run as a program, one after the other with a table at the end.

    python tests/support/fuzzers.py --seconds 60                      all, a minute each
    python tests/support/fuzzers.py --inputs 100000 --only schedule   one, for so many inputs
    python tests/support/fuzzers.py --list                            their names

What this machine lacks is left out, and the table says what it takes. What was built and found lies
in build/fuzz/. Exit code 1: something broke a promise.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests/fuzz"
BUILD = ROOT / "build/fuzz"
READERS = (
    *("checkpoint", "safetensors header", "shard index", "model.json", "MANIFEST.json"),
    *("image", "schedule"),
)
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


class AbsentError(Exception):
    """What a fuzzer takes is not there."""


@dataclass(frozen=True)
class Limits:
    """When a fuzzer ends; 0 is no limit."""

    seconds: int
    inputs: int


@dataclass(frozen=True)
class Command:
    """A process that fuzzes, and exits with 0 if every promise held."""

    words: tuple[str | Path, ...]
    environment: dict[str, str] = field(default_factory=dict)


def _find(*names: str) -> str:
    for name in names:
        if found := shutil.which(name, path=_PATH):
            return found
    raise AbsentError(f"no {names[0]}")


def _run(command: Command) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command.words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **command.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        cwd=ROOT,
    )


def _built(folder: str, target: str, *options: str) -> Path:
    """A program of operators/CMakeLists.txt, in a build folder of its own; a minute or two."""
    where, cmake, ninja = BUILD / folder, _find("cmake"), _find("ninja")
    configure = ("-S", FUZZ / "operators", "-B", where, "-G", "Ninja")
    for words in (
        (cmake, *configure, f"-DCMAKE_MAKE_PROGRAM={ninja}", *options),
        (cmake, "--build", where, "--target", target),
    ):
        done = _run(Command(words))
        if done.returncode:
            raise RuntimeError(f"{where}: {done.stdout[-4000:]}")
    return where


def _operators(sanitizers: str, limits: Limits) -> Command:
    where = _built(sanitizers.replace(";", "-"), "vssm_fuzz", f"-DVSSM_SANITIZE={sanitizers}")
    calls, seconds = limits.inputs or 1 << 60, limits.seconds or 1 << 30
    return Command((where / "vssm_fuzz", "1", str(calls), str(seconds)))


def _operators_on_aarch64(limits: Limits) -> Command:
    """Cross-compiled, and run in an emulator of that processor."""
    compiler, emulator = (
        _find("aarch64-linux-gnu-g++"),
        _find("qemu-aarch64", "qemu-aarch64-static"),
    )
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    where = _built("aarch64", "vssm_fuzz", *target, f"-DCMAKE_CXX_COMPILER={compiler}")
    libc = _run(Command((compiler, "-print-file-name=libc.so.6"))).stdout.strip()
    calls, seconds = limits.inputs or 1 << 60, limits.seconds or 1 << 30
    root = Path(libc).resolve().parents[1]
    return Command((emulator, "-L", root, where / "vssm_fuzz", "1", str(calls), str(seconds)))


def _operators_by_coverage(limits: Limits) -> Command:
    compiler = _find("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))
    options = ("-DVSSM_SANITIZE=address;undefined", "-DVSSM_COVERAGE=ON")
    where = _built("coverage", "vssm_fuzz_coverage", *options, f"-DCMAKE_CXX_COMPILER={compiler}")
    (where / "corpus").mkdir(exist_ok=True)
    words = (where / "vssm_fuzz_coverage", where / "corpus", "-max_len=64", "-timeout=60")
    return Command((*words, *_libfuzzer(where, limits)))


def _adapter(limits: Limits) -> Command:
    """Tests of the operators in ONNX Runtime, which has its blocks from the sanitizer's malloc."""
    sanitizers = "address;undefined"
    folder = sanitizers.replace(";", "-")
    where = _built(folder, "vssm_onnxruntime", f"-DVSSM_SANITIZE={sanitizers}")
    compiler = os.environ.get("CXX", "c++").split()
    # libstdc++ too: a sanitizer that finds none when it is loaded has no exceptions later.
    named = [
        _run(Command((*compiler, f"-print-file-name={library}"))).stdout.strip()
        for library in ("libasan.so", "libstdc++.so")
    ]
    (library,) = where.rglob("libsanitized_vssm_onnxruntime.so")
    words = (sys.executable, FUZZ / "adapter.py", library)
    return Command(
        (*words, str(limits.inputs or 1 << 60), str(limits.seconds or 1 << 30)),
        # Python leaks on purpose, and what it leaks is not ours.
        {"LD_PRELOAD": " ".join(named), "ASAN_OPTIONS": "detect_leaks=0"},
    )


def _reader(name: str, limits: Limits) -> Command:
    words: tuple[str | Path, ...] = (sys.executable, FUZZ / "read.py", name)
    if limits.seconds:
        words += ("--seconds", str(limits.seconds))
    if limits.inputs:
        words += ("--inputs", str(limits.inputs))
    if importlib.util.find_spec("atheris"):
        words += ("--coverage", BUILD / "readers" / name.replace(" ", "-"))
    return Command(words)


def _libfuzzer(found: Path, limits: Limits) -> tuple[str, ...]:
    runs = (f"-runs={limits.inputs}",) if limits.inputs else ()
    return (*runs, f"-max_total_time={limits.seconds}", f"-artifact_prefix={found}/", "-seed=1")


FUZZERS: dict[str, Callable[[Limits], Command]] = {
    "operators, address and undefined": lambda limits: _operators("address;undefined", limits),
    "operators, thread": lambda limits: _operators("thread", limits),
    "operators, libFuzzer": _operators_by_coverage,
    "operators, aarch64": _operators_on_aarch64,
    "operators in ONNX Runtime, address and undefined": _adapter,
    **{name: lambda limits, name=name: _reader(name, limits) for name in READERS},
}


@dataclass(frozen=True)
class Outcome:
    """How a fuzzer ended.

    Attributes:
        inputs: how many it made.
        passed: whether every promise held.
        output: what it printed.
    """

    inputs: int
    passed: bool
    output: str


def fuzz(name: str, limits: Limits) -> Outcome:
    """Build and run one.

    Raises:
        AbsentError: this machine lacks what it takes.
    """
    done = _run(FUZZERS[name](limits))
    counts = re.findall(r"(\d+) calls|(\d+) inputs|Done (\d+) runs", done.stdout)
    inputs = int("".join(counts[-1])) if counts else 0
    # None is a failure, too: it did not begin.
    return Outcome(inputs, done.returncode == 0 and inputs > 0, done.stdout)


def _line(name: str, limits: Limits) -> tuple[bool, str]:
    started = time.monotonic()
    try:
        outcome = fuzz(name, limits)
    except AbsentError as absent:
        return True, f"{name:50} left out: {absent}"
    if not outcome.passed:
        sys.stdout.write(f"{outcome.output[-12000:]}\n")
    end = "nothing found" if outcome.passed else "BROKEN: see above"
    seconds = time.monotonic() - started
    return outcome.passed, f"{name:50} {outcome.inputs:>9,} inputs, {seconds:5.0f} s: {end}"


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--only", choices=FUZZERS, action="append")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if asked.list:
        sys.stdout.write("\n".join(FUZZERS) + "\n")
        return 0
    if not (asked.seconds or asked.inputs):
        parser.error("say how long: --seconds, --inputs or both")
    every, lines = True, []
    for name in asked.only or FUZZERS:
        passed, line = _line(name, Limits(asked.seconds, asked.inputs))
        every, lines = every and passed, [*lines, line]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())
