"""Reads hostile files in a process of its own, which dies where the reader takes too much.

    python read_under_limits.py FOLDER KIND[,KIND...] FIRST COUNT MOST

reads files of each kind made from COUNT seeds, and prints each that broke a promise: it took more
than 2 s and a second for each 10 MB (see `yardstick`), or more memory than the limit, or ended in
anything but a refusal or tensors.
"""

from __future__ import annotations

import itertools
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from hostile_files import MAKERS
from yardstick import too_slow

from vssm.checkpoints.load import load_checkpoint
from vssm.errors import CheckpointError

MEMORY = 400 << 20


def read(path: Path) -> tuple[str, float]:
    """How reading ends, in a word or in a whole traceback, and the seconds of this process."""
    started = time.process_time()
    try:
        load_checkpoint(torch.nn.Linear(4, 2), path)
        end = "loaded"
    except CheckpointError as error:
        message = str(error)
        end = "refused" if ";" in message and len(message) < 4000 else f"bad message: {message}"
        if "memory" in message or any(ord(c) < 32 for c in message):
            end = f"bad message: {message[:1000]!r}"
    except BaseException:
        end = traceback.format_exc()
    return end, time.process_time() - started


def main(folder: Path, kinds: list[str], first: int, count: int, most: int) -> None:
    """Print what broke a promise, then how many files were read of each kind."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for kind, seed in itertools.product(kinds, range(first, first + count)):
        path = folder / kind
        data = MAKERS[kind](random.Random(seed), most)
        path.write_bytes(data)
        end, seconds = read(path)
        if end not in {"loaded", "refused"} or too_slow(seconds, 2 + len(data) / 1e7):
            sys.stdout.write(f"{kind} seed {seed}, {len(data):,} bytes, {seconds:.1f} s: {end}\n")
    sys.stdout.write(f"read {count}\n")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(Path(sys.argv[1]), sys.argv[2].split(","), *map(int, sys.argv[3:]))
