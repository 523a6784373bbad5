"""gpu_check.sh with stand-ins for the card, tools and scripts: its budget and its result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import results
from checkout import ROOT

ROW = {
    "table": "scans",
    "case": {"model": "vim_tiny", "dtype": "float16", "batch": 1, "seqlen": 197},
    "subject": "vssm auto",
    "cache": "warm",
    "median_us": 4.0,
    "work": {"exps": 0, "specials": 0, "bytes": 0},
}
# A Python that has every package, and answers for the scripts and for pytest: it notes the call,
# prints a line, does what CODE_<script> says.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m benchmarks.gpu.results"* | "-c import json"*) exec {sys.executable} "$@" ;;
  "-c import onnxruntime as o"*) exit "${{NO_ORT:-0}}" ;;
  "-c import "*) exit 0 ;;
esac
echo "$*" >> "$CALLS"
code="CODE_${{2##*.}}"
[[ "${{!code:-0}}" != sleep ]] || {{ echo $$ > "$CALLS.pid"; exec sleep 60; }}
[[ "$2" != benchmarks.gpu.scans ]] || echo '{json.dumps(ROW)}'
echo '{{"table": "cut in the middl'
exit "${{!code:-0}}"
"""
TOOL = """#!/usr/bin/env bash
case "$(basename "$0") $*" in
  "nvidia-smi "*) echo "NVIDIA H200, 9.0" ;;
  "compute-sanitizer --help") echo "  --kernel-name arg" ;;
  "compute-sanitizer "*) echo "$*" >> "$CALLS"; echo "${SAID:-}" ;;
  *) echo "$(basename "$0") $*" >> "$CALLS"; mkdir -p build/gpu ;;
esac
"""
TOOLS = ("nvidia-smi", "nvcc", "cmake", "ninja", "c++", "compute-sanitizer")


@dataclass
class Checkout:
    """A copy of what the script needs, and a machine with a card."""

    root: Path

    def command(self, *arguments: str, **env: str) -> dict[str, Any]:
        given = {
            **{k: v for k, v in os.environ.items() if k != "MAMBA_SSM_SOURCE"},
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(self.root / "bin/python"),
            "CALLS": str(self.root / "calls"),
            **env,
        }
        script = str(self.root / "benchmarks/gpu_check.sh")
        return {"args": ["bash", script, *arguments], "env": given, "text": True}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            **self.command(*arguments, **env), capture_output=True, check=False, timeout=300
        )

    @property
    def calls(self) -> str:
        return (self.root / "calls").read_text()

    @property
    def result(self) -> dict[str, Any]:
        (path,) = (self.root / "benchmarks/results").glob("nvidia-h200-*.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def steps(self) -> dict[str, str]:
        return {s["step"]: s["status"] for s in self.result["steps"]}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/gpu_check.sh", tmp_path / "benchmarks")
    for name in ("benchmarks/gpu", "exporter", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, text in {**dict.fromkeys(TOOLS, TOOL), "python": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return Checkout(tmp_path)


def test_everything_in_turn(checkout: Checkout) -> None:
    done = checkout.run("--seconds", "9999", MAMBA_SSM_SOURCE="/somewhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(checkout.steps.values()) == {"ok"}
    assert list(checkout.steps)[:6] == ["build", "tests", "ceilings", "mamba", "scans", "gathers"]
    assert "-DVSSM_CUDA_ARCHITECTURES=90-real" in checkout.calls
    assert "-m benchmarks.gpu.scans --seconds 125\n" in checkout.calls
    assert "tests/ops/test_gpu.py" in checkout.calls
    assert "--tool memcheck --error-exitcode 77 --kernel-name kns=vssm timeout" in checkout.calls
    assert "and not order_and_gap_of_any_value" in checkout.calls
    assert "--tool initcheck --show-backtrace no" in checkout.calls
    found = checkout.result
    assert found["gpu"] == "NVIDIA H200"
    assert found["rows"] == [ROW]  # and not the line that was cut off
    (met,) = [t for t in found["targets"] if t["verdict"] != "not measured"]
    assert (met["name"], met["measured"], met["verdict"]) == (
        "vim_tiny layer, batch 1: microseconds",
        4.0,
        "met",
    )
    assert "vim_tiny layer, batch 1: microseconds" in done.stdout


def test_what_no_longer_fits_is_skipped_and_said(checkout: Checkout) -> None:
    """A hundred seconds are left: enough for two of the three."""
    named = ("engines", "scans", "memcheck")
    done = checkout.run(*named, "--seconds", "5100", SECONDS="5000")
    assert done.returncode == 0, done.stderr
    assert checkout.steps == {"scans": "ok", "memcheck": "ok", "engines": "skipped"}
    (engines,) = [s for s in checkout.result["steps"] if s["step"] == "engines"]
    assert "s were left, and it takes at least 120" in engines["reason"]
    # The rest of the budget, less a sixth, in place of the usual 125 seconds.
    (budget,) = [line.split()[-1] for line in checkout.calls.splitlines() if "gpu.scans" in line]
    assert 40 < int(budget) <= 84


def test_no_time_at_all(checkout: Checkout) -> None:
    assert checkout.run("--seconds", "5").returncode == 0
    assert set(checkout.steps.values()) == {"skipped"}
    assert not checkout.calls


def test_ends(checkout: Checkout) -> None:
    """A step that fails or hangs does not stop the others; one whose time is over is no failure."""
    named = ("tests", "scans", "gathers", "models", "ort")
    codes = {"CODE_pytest": "124", "CODE_gathers": "1", "CODE_models": "137", "NO_ORT": "1"}
    done = checkout.run(*named, **codes)
    assert done.returncode == 1
    assert checkout.steps == {
        "tests": "cut",
        "scans": "ok",
        "gathers": "failed",
        "models": "failed",
        "ort": "skipped",
    }
    reasons = {s["step"]: s["reason"] for s in checkout.result["steps"]}
    assert reasons["gathers"].startswith("exit code 1: see ")
    assert reasons["models"] == "killed at its limit of 140 s"
    assert "onnxruntime-gpu" in reasons["ort"]


def test_initcheck_is_judged_by_what_it_says_of_our_kernels(checkout: Checkout) -> None:
    assert checkout.run("initcheck", SAID="=====     at void vssm::scan()+0x70").returncode == 1
    assert checkout.steps == {"initcheck": "failed"}


def test_a_build_that_fails_ends_it(checkout: Checkout) -> None:
    (checkout.root / "bin/cmake").write_text("#!/bin/sh\necho no compiler >&2; exit 1\n")
    done = checkout.run("build", "scans")
    assert done.returncode == 1
    assert "no compiler" in done.stdout
    assert checkout.steps == {"build": "failed"}


def test_a_stop_takes_along_what_it_started(checkout: Checkout) -> None:
    running = subprocess.Popen(**checkout.command("scans", CODE_scans="sleep"))
    pid = checkout.root / "calls.pid"
    for _ in range(600):
        if pid.is_file() and pid.read_text():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    for _ in range(100):
        if not Path(f"/proc/{pid.read_text().strip()}/cmdline").exists():
            return
        time.sleep(0.1)
    pytest.fail("what it started still runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scams",), "scams is no step; name some of build tests"),
        (("--seconds", "soon"), "--seconds=soon is no number"),
        (("--seconds",), "--seconds= is no number"),
        (("--output", "tests"), "--output=tests is there already"),
    ],
)
def test_wrong_usage(checkout: Checkout, arguments: tuple[str, ...], message: str) -> None:
    done = checkout.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not checkout.calls


def test_what_is_missing_is_named_before_anything_starts(checkout: Checkout) -> None:
    for python, message in (("/nowhere/python", "cannot be run"), ("false", "cannot be run")):
        done = checkout.run(PYTHON=python)
        assert (done.returncode, message in done.stderr) == (2, True)
    (checkout.root / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = checkout.run()
    assert done.returncode == 2
    assert "no NVIDIA GPU here" in done.stderr
    assert "run it on a machine with a GPU and its driver" in done.stderr
    assert not checkout.calls
    assert not (checkout.root / "benchmarks/results").exists()


def test_gpu_tests_load_with_few_packages(tmp_path: Path) -> None:
    """No test file asks for more than a machine with a GPU has, or it is skipped and named."""
    absent = ("hypothesis", "PIL", "polygraphy", "matplotlib", "sklearn", "onnxruntime", "rich")
    blocker = "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocker}", encoding="utf-8")
    path = [tmp_path, ROOT / "exporter", ROOT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/gpu/pytest.ini", "--rootdir", "."]
    command += ["-p", "benchmarks.gpu.few_packages", "-m", "gpu", "--collect-only"]
    files = ["tests/plugins/cuda", "tests/ops/test_gpu.py", "tests/runtimes/test_ort_cuda.py"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *files],
        capture_output=True,
        text=True,
        env={**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode in {0, 5}, done.stdout + done.stderr  # 5: none without a GPU
    assert "ERROR" not in done.stdout
    assert "SKIPPED [1] tests/runtimes/test_ort_cuda.py:0: onnxruntime is not" in done.stdout


def test_help() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_check.sh"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "gpu_check.sh [--seconds N]" in done.stdout


def test_targets_of_measured_rows() -> None:
    """Each target is met by times that fit it, and missed by slow ones."""

    def row(table: str, subject: str, microseconds: float, **case: Any) -> dict[str, Any]:
        work = {"specials": 1_000_000}
        case = {"dtype": "float16", "batch": 128, **case}
        found = {"table": table, "subject": subject, "cache": "warm", "case": case, "work": work}
        return {**found, "median_us": microseconds}

    def rows(ours: float) -> list[dict[str, Any]]:
        found = [
            row("scans", "vssm auto, a call a direction", 300, model="plain_mamba_l3"),
            row("scans", "vssm auto", ours, model="plain_mamba_l3"),
            row("gathers", "vssm", ours / 10, operator="TokenGather"),
            row("gathers", "vssm", ours / 10, operator="TokenScatter"),
            row("gathers", "copy of all rows", 10),
            row("gathers", "copy of the kept rows", 10),
            row("gathers", "torch.topk, sort, gather", 40),
        ]
        for model in ("vim_tiny", "vim_small"):
            for batch, taken in ((128, ours), (1, ours / 25)):
                case = {"model": model, "batch": batch, "seqlen": 197}
                found.append(row("scans", "vssm auto", taken, **case))
                found.append(row("scans", "mamba-ssm", 2.5 * taken * 100 / ours, **case))
            for seqlen, share in ((157, 0.8), (101, 0.5)):
                found.append(row("scans", "vssm auto", 100 * share, model=model, seqlen=seqlen))
            for kind, taken in (("dense", ours), ("pruned 5:0.8", 60)):
                found.append(row("models", "vssm", taken, model=model, kind=kind))
            found.append(row("models", "mamba-ssm", 400, model=model, kind="dense"))
            found.append(row("engines", "tensorrt", ours, model=model, kind="dense"))
        return found

    rates = {"ex2_per_s": 1e10}  # the floor is 100 us
    fast, slow = ([t.verdict for t in results.targets(rows(o), rates)] for o in (100, 250))
    assert set(fast) == {"met"}
    assert len(fast) == 21
    assert slow.count("missed") == 16
    assert {t.verdict for t in results.targets([], None)} == {"not measured"}
