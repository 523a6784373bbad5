"""benchmarks/long_runs.py: memory stays flat, and other processes get the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import PYTHONPATH, ROOT
from exports import exported, micro

# What the allocator may keep for itself: measured up to 0.5 MB.
GROWTH_MB = 8


def _run(runs: int, opens: int, processes: int, *more: str) -> None:
    counts = (*more, "--runs", str(runs), "--opens", str(opens), "--processes", str(processes))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/long_runs.py", *counts],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 5
    for line in lines:
        assert line["growth_mb"] < GROWTH_MB, line


def test_a_few(tmp_path: Path) -> None:
    _run(300, 8, 2, "--export", str(exported(tmp_path, micro()).directory))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many() -> None:
    _run(100_000, 1_000, 20)
