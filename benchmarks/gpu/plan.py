"""The stages of a run: what each starts, and how long it may take."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.mamba import BUILD, FOLDER, SOURCE_VARIABLE
from benchmarks.gpu.needs import OWN_FOLDER, find_tool, nvidia_smi
from benchmarks.gpu.stages import SkippedError, Stage

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu_check"  # logs and what the programs found so far
PROGRAMS = ("ceilings", "scans", "compiled", "gathers", "models", "ort", "engines")
TENSORRT = ("tensorrt", "engines")  # stages that are skipped where full TensorRT is not installed
# Stages that the others stand on, whose results lie under build/: a fresh machine lacks them.
GROUND = ("build", "baseline")
# Building an engine takes long: a stage of their own, not the sampled tests and the sanitizers.
_ENGINE_TESTS = frozenset({"test_tensorrt_engines.py"})
# These compile something or start other programs, which compute-sanitizer would watch as well.
_OTHER_PROCESSES = frozenset({"test_cuda_emulation.py", "test_tensorrt_plugin.py"})
_PYTEST = ROOT / "benchmarks" / "gpu" / "pytest.ini"
_FOUND_ERRORS = "77"  # compute-sanitizer's exit code then, unlike any of pytest's


def plan(quick: bool) -> list[Stage]:
    """Every stage in order; limits in seconds, in a whole run and with --quick."""

    def program(name: str, purpose: str, limit: float, quick_s: float) -> Stage:
        return Stage(name, purpose, limit, quick_s, partial(_program, name, quick), needs="build")

    def sanitizer(tool: str, quick_s: float) -> Stage:
        purpose = f"compute-sanitizer's {tool} over those tests"
        commands = partial(_sanitizer, tool)
        wrong = _IN_OUR_KERNELS if tool == "initcheck" else None
        return Stage(tool, purpose, 60, quick_s, commands, "build", _SUMMARY, wrong)

    return [
        Stage("build", "the native libraries for the card that is here", 170, 120, _build),
        program("ceilings", "exp2 rate, copy bandwidth, launch latency", 30, 20),
        Stage("tests", "every test that needs a GPU", 145, 50, _tests, "build", _SUMMARY),
        Stage("baseline", f"mamba-ssm's kernel from {SOURCE_VARIABLE}", 170, 100, _baseline),
        program("scans", "the scan against mamba-ssm and Triton", 145, 40),
        program("gathers", "the gather against torch.topk, sort and gather", 20, 15),
        program("models", "whole Vim models in PyTorch", 140, 45),
        sanitizer("memcheck", 45),
        sanitizer("racecheck", 45),
        sanitizer("initcheck", 0),
        sanitizer("synccheck", 0),
        program("compiled", "the scan against torch.compile", 90, 0),
        Stage("ort", "exports in ONNX Runtime", 50, 0, partial(_ort, quick), needs="build"),
        Stage("tensorrt", "the plugins' and engines' tests", 420, 0, _tensorrt, "build", _SUMMARY),
        Stage("engines", "whole Vim models in TensorRT", 360, 0, partial(_engines, quick), "build"),
    ]


_SUMMARY = r"(?m)^(?:sampled .* tests|.*\d+ passed.*|=+ .*SUMMARY: .*)$"
# How compute-sanitizer says where an access was: "at void vssm::kernel<...>(...)+0x70".
_IN_OUR_KERNELS = r"(?m)^=+\s+at .*vssm.*$"
_TOUCH = "import pathlib, sys; [f.touch() for f in pathlib.Path(sys.argv[1]).rglob('lib*.so')]"


def _build(_: float) -> list[list[str]]:
    folder = ROOT / "build" / "gpu"
    cmake = find_tool("cmake") or "cmake"
    options = [
        "-DVSSM_CUDA=ON",
        f"-DVSSM_CUDA_ARCHITECTURES={architecture()}-real",
        "-DVSSM_EMULATION=OFF",
    ]
    return [
        [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options],
        [cmake, "--build", str(folder), "-j", str(len(os.sched_getaffinity(0)))],
        [sys.executable, "-c", _TOUCH, str(folder)],  # of several builds the newest is loaded
    ]


def architecture() -> str:
    """The card's compute capability as CMake writes it, such as 90."""
    answer = nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader") or ""
    lines = answer.split()
    if not lines or not re.fullmatch(r"\d+\.\d+", lines[0]):
        raise OSError(f"nvidia-smi names no compute capability: {answer!r}")
    return lines[0].replace(".", "")


def _baseline(_: float) -> list[list[str]]:
    source = os.environ.get(SOURCE_VARIABLE)
    if not source:
        raise SkippedError(f"{SOURCE_VARIABLE} names no checkout of mamba-ssm")
    if not (Path(source) / FOLDER).is_dir():
        raise SkippedError(f"{SOURCE_VARIABLE}={source} has no {FOLDER}")
    BUILD.mkdir(parents=True, exist_ok=True)
    return [[sys.executable, "-m", "benchmarks.gpu.mamba"]]


def _program(name: str, quick: bool, limit: float) -> list[list[str]]:
    part = part_of(name)
    part.unlink(missing_ok=True)
    seconds = str(max(limit - 30, 0.6 * limit))  # the rest: start, and the case it is at
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--out", str(part)]
    return [[*command, "--seconds", seconds, *(["--quick"] if quick else [])]]


def _ort(quick: bool, limit: float) -> list[list[str]]:
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError as error:
        raise SkippedError("onnxruntime-gpu, with the CUDA provider, is not installed") from error
    return _program("ort", quick, limit)


def _require_tensorrt() -> None:
    for module, package in (("tensorrt", "tensorrt"), ("cuda", "cuda-bindings")):
        if importlib.util.find_spec(module) is None:
            raise SkippedError(f"{package}, of full TensorRT, is not installed")


def _tensorrt(limit: float) -> list[list[str]]:
    _require_tensorrt()
    files = sorted((ROOT / "tests").glob("test_tensorrt_*.py"))
    return [_pytest(max(limit - 120, 0.6 * limit), "--slow", files=files)]  # a test: 2 minutes


def _engines(quick: bool, limit: float) -> list[list[str]]:
    _require_tensorrt()
    (command,) = _program("engines", quick, limit)
    command[command.index("--seconds") + 1] = str(max(limit - 120, 0.6 * limit))  # as above
    return [command]


def part_of(name: str) -> Path:
    """Where a program writes its findings."""
    return WORK / f"{name}.jsonl"


def gpu_tests(root: Path = ROOT) -> list[Path]:
    """The test files with a test for GPUs, but for engines; others may need absent packages."""
    marks = re.compile(r"\bmark\.gpu\b|^from cuda_device import|^import cuda_device", re.MULTILINE)
    files = sorted((root / "tests").rglob("test_*.py"))
    found = [f for f in files if marks.search(f.read_text(encoding="utf-8"))]
    return [f for f in found if f.name not in _ENGINE_TESTS]


def _pytest(seconds: float, *options: str, files: Sequence[Path] | None = None) -> list[str]:
    files = gpu_tests() if files is None else files
    if not files:
        raise SkippedError("no file under tests/ has a test marked gpu")
    plugins = ["-p", "benchmarks.gpu.sampling", "--sample-seconds", str(seconds)]
    config = ["-c", str(_PYTEST), "--rootdir", str(ROOT), "--continue-on-collection-errors"]
    return [
        sys.executable,
        "-m",
        "pytest",
        *config,
        *plugins,
        "-m",
        "gpu",
        *options,
        *map(str, files),
    ]


def _tests(limit: float) -> list[list[str]]:
    return [_pytest(max(limit - 30, 0.6 * limit))]


def _sanitizer(tool: str, limit: float) -> list[list[str]]:
    path = find_tool("compute-sanitizer")
    if path is None:
        raise SkippedError("compute-sanitizer is not there; it comes with the CUDA toolkit")
    command = [path, "--tool", tool]
    if tool == "initcheck":
        # The writes of PyTorch's own kernels count as well, so it watches every kernel. What those
        # read is not ours to judge: what it says of our kernels is looked for in the log.
        command += ["--show-backtrace", "no", "--print-limit", "10000"]
    else:
        command += ["--error-exitcode", _FOUND_ERRORS, *_name_filter(path)]
    # PyTorch's memory as single allocations, so that a step outside one is seen; graphs cannot be
    # captured then.
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    names = "not graph and not capture"
    if tool == "racecheck":  # tokens that are named twice are added to by two threads
        names += " and not order_and_gap_of_any_value"
    files = [f for f in gpu_tests() if f.name not in _OTHER_PROCESSES]
    return [[*alone, *command, *_pytest(0.6 * limit, "-k", names, files=files)]]


def _name_filter(path: str) -> list[str]:
    """What restricts it to our kernels: the option was renamed; nothing where it has neither."""
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60, check=False)
    options = ("--kernel-name", "--kernel-regex")
    known = [option for option in options if option in done.stdout + done.stderr]
    return [known[0], "kns=vssm"] if known else []


def environment() -> dict[str, str]:
    """What the stages see: this checkout, CUDA's tools, no caches inside the checkout's sources."""
    env = dict(os.environ)
    inherited = env.get("PYTHONPATH", "")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [inherited])])
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    folders = [env.get("PATH", ""), str(OWN_FOLDER)]
    nvcc = find_tool("nvcc")
    if nvcc is not None:
        folder = Path(nvcc).resolve().parent
        env.setdefault("CUDA_HOME", str(folder.parent))
        folders.append(str(folder))
    env["PATH"] = os.pathsep.join(folders)
    return env
