"""Train, prune, train further, compare, over seeds.

    python -m benchmarks.experiment -o OUT [--quick] [--only CASE]

One thread, deterministic; a run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.experiment import data, probes, report, why, work
from benchmarks.experiment.cases import CASES, DENSE, quick_cases

from vssm.training.run import WEIGHTS_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="two seeds of two small models")
    parser.add_argument("--only", help="this case alone")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order: the same weights every time
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    known = quick_cases() if options.quick else CASES
    if options.only not in {None, *(case.key for case in known)}:
        parser.error(f"--only={options.only} is none of {', '.join(case.key for case in known)}")
    found = []
    for case in known:
        if options.only in {None, case.key}:
            images = data.write(options.output / "digits", quick=options.quick)
            for seed in range(case.seeds):
                folder = options.output / case.key / str(seed)
                work.run_seed(case, seed, folder, images, say)
                weights = folder / DENSE / WEIGHTS_FILE
                held_out = work.held_out(case, images)
                why.explain(case, weights, held_out, folder / "why.json")
                probes.probe(case, weights, held_out, folder / "probes.json")
            found.append(report.collect(case, options.output / case.key))
    report.write(found, options.output)
    say(f"wrote {options.output / report.TABLES}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
