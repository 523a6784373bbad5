"""Whole models in ONNX Runtime on this CPU: what docs/performance.md and the README quote.

    python benchmarks/models.py [--only vim_tiny] [--samples 21] [--json FILE]

Each case is one `vssm bench` run: kernels, fallback bodies, the PyTorch loop (batch 1 only, it is
slow) and the dense twin of a pruned model, interleaved; ratios hold within a case.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import vssm
from vssm.commands.tables import bench_tables
from vssm.files.atomic import atomic_write_bytes

# Model, schedule, batch sizes, thread counts, whether the PyTorch loop is timed too.
CASES: tuple[tuple[str, str | None, tuple[int, ...], tuple[int, ...], bool], ...] = (
    ("vim_tiny", None, (1,), (1,), True),
    ("vim_tiny", "10:0.8", (1, 8), (1, 2), False),
    ("vim_small", "5:0.8,10:0.8,15:0.8", (1, 8), (1, 2), False),
    ("plain_mamba_l3", "default", (1,), (1,), False),
    ("vmamba_tiny_s1l8", None, (1,), (1,), False),
    ("groupmamba_tiny", None, (1,), (1,), False),
)


def main() -> None:
    """Run every case and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="cases of this model alone")
    parser.add_argument("--samples", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    reports = []
    for name, schedule, batches, threads, loop in CASES:
        if options.only not in {None, name}:
            continue
        report = bench(name, schedule, batches, threads, loop=loop, samples=options.samples)
        reports.append(asdict(report))
        for shown in bench_tables(report):
            console.print(shown)
    if options.json:
        atomic_write_bytes(options.json, f"{json.dumps(reports, indent=2)}\n".encode())


def bench(
    name: str,
    schedule: str | None,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    *,
    loop: bool,
    samples: int,
) -> Any:
    """Export one model with seeded weights and measure it."""
    parsed = None
    if schedule is not None:
        default = schedule == "default"
        parsed = vssm.default_schedule(name) if default else vssm.PruneSchedule.parse(schedule)
    model = vssm.create_model(name, schedule=parsed)
    with tempfile.TemporaryDirectory() as directory:
        vssm.export(model, Path(directory) / name)
        return vssm.bench_directory(
            Path(directory) / name,
            batches=batches,
            threads=threads,
            samples=samples,
            torch_loop=loop,
        )


if __name__ == "__main__":
    main()
