"""How long `vssm` takes to answer what needs no model: one JSON line a command.

    python benchmarks/startup.py [--samples 7]

Each command runs in a process of its own. Seconds of CPU, user and system, are of the process
alone and so say the same on a busy machine, but for the caches that it shares; `wall` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

# The command, and the seconds of CPU that it may take on a machine at rest.
COMMANDS = {
    "vssm --help": (["--help"], 0.5),
    "vssm export --help": (["export", "--help"], 0.5),
    "vssm models": (["models"], 1.0),
    "vssm export --nonsense": (["export", "--nonsense"], 1.0),
    "vssm export vim_tinny": (["export", "vim_tinny", "-o", "out"], 1.0),
    "vssm export --set imagesize=3": (["export", "vim_tiny", "--set=imagesize=3", "-o", "x"], 1.0),
    "vssm export --dtype int8": (["export", "vim_tiny", "--dtype=int8", "-o", "x"], 1.0),
}


def measure(arguments: list[str], samples: int) -> tuple[list[float], list[float]]:
    """CPU and wall seconds of each run, after one that fills the caches."""
    command = [sys.executable, "-m", "vssm.commands.main", *arguments]
    cpu, wall = [], []
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(samples + 1):
            before, start = os.times(), time.perf_counter()
            subprocess.run(command, cwd=empty, capture_output=True, check=False)
            wall.append(time.perf_counter() - start)
            after = os.times()
            user = after.children_user - before.children_user
            cpu.append(user + after.children_system - before.children_system)
    return cpu[1:], wall[1:]


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=7)
    samples = parser.parse_args().samples
    for name, (arguments, limit) in COMMANDS.items():
        cpu, wall = measure(arguments, samples)
        row = {
            "command": name,
            "cpu_s": round(statistics.median(cpu), 3),
            "cpu_min_s": round(min(cpu), 3),
            "wall_s": round(statistics.median(wall), 3),
            "limit_s": limit,
            "samples": samples,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
