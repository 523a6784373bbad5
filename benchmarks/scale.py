"""What Ray costs: one process and a cluster over the same images, start apart.

    python benchmarks/scale.py DIR [--images 10000] [--block 256] [--ray local] [--actors 2]

DIR is an export. Images are small JPEG files, made here; a list names each of them several times.
Each row is one run of `vssm.predict`: `start_s` is until the first block was on disk, `seconds`
from there to the last one. Behind them are runs with blocks of one image: what a block costs. The
rows of a source are the same in all runs, or this ends with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vssm
from vssm.evaluation.scoring import RayOptions
from vssm.files.atomic import sha256_of

FILES = 64
SIDE = 64  # pixels
LOOK_S = 0.02


def write_list(folder: Path, images: int) -> Path:
    """A list of so many images, of `FILES` files in turn."""
    make = np.random.default_rng(0)
    for i in range(FILES):
        pixels = make.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    path = folder / f"{images}.txt"
    path.write_text("".join(f"{i % FILES}.jpg\n" for i in range(images)))
    return path


def run(directory: Path, source: Path, block: int, ray: RayOptions | None) -> dict[str, Any]:
    """One run, with the times at which its blocks came."""
    output = source.with_suffix(".parquet")
    came: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if output.with_name(f"{output.name}.blocks").is_dir():
                found = os.listdir(output.with_name(f"{output.name}.blocks"))
                for name in found:
                    if name[0].isdigit():
                        came.setdefault(name, time.perf_counter())

    watcher = threading.Thread(target=watch)
    start = time.perf_counter()
    watcher.start()
    try:
        # As many processes as the cluster has actors: one loads, one runs.
        there = {"threads": 1, "workers": 1} if ray is None else {"threads": 1, "ray": ray}
        report = vssm.predict(directory, source, output, block=block, **there)
    finally:
        over.set()
        watcher.join()
    first, last = min(came.values()), max(came.values())
    return {
        "where": "here" if ray is None else f"ray, {report.actors} actors",
        "images": report.images,
        "block": block,
        "start_s": round(first - start, 2),
        "seconds": round(last - first, 2),
        "ms_a_block": round(1000 * (last - first) / (len(came) - 1), 2),
        "sha256": sha256_of(output),
    }


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--ray", default="local")
    parser.add_argument("--actors", type=int, default=2)
    asked = parser.parse_args()
    ray = RayOptions(asked.ray, asked.actors)
    with tempfile.TemporaryDirectory() as folder:
        for images, block in ((asked.images, asked.block), (asked.images // 20, 1)):
            source = write_list(Path(folder), images)
            rows = [run(asked.directory, source, block, where) for where in (None, ray, None)]
            assert len({row.pop("sha256") for row in rows}) == 1, "the rows differ"
            for row in rows:
                print(json.dumps(row))


if __name__ == "__main__":
    main()
