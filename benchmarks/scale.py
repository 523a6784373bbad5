"""What Ray costs: one process and a cluster over the same images, start apart.

    python benchmarks/scale.py DIR [--images 10000] [--block 256] [--ray local] [--actors 2]

DIR is an export. Images are small JPEG files, made here; a list names each of them several times.
Each way runs so many images and three times as many. What two thirds took is a line's `seconds`,
and what is over is `start_s`: actors are ahead of the blocks on disk, so the blocks' own times say
nothing of the speed. The second pair of lines has blocks of one image: what a block costs. The
rows of a source are the same in all runs, or this ends with an error.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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


def run(directory: Path, source: Path, block: int, ray: RayOptions | None) -> tuple[float, str]:
    """Seconds of one run, and the hash of its rows."""
    output = source.with_suffix(".parquet")
    # As many processes as the cluster has actors: one loads, one runs.
    there = {"threads": 1, "workers": 1} if ray is None else {"threads": 1, "ray": ray}
    start = time.perf_counter()
    vssm.predict(directory, source, output, block=block, **there)
    return time.perf_counter() - start, sha256_of(output)


def lines(asked: argparse.Namespace, folder: Path, images: int, block: int) -> Iterator[str]:
    """A line each for one process, the cluster, and one process again."""
    ray = RayOptions(asked.ray, asked.actors)
    sources = [write_list(folder, count) for count in (images, 3 * images)]
    expected: list[str] = []
    for where in (None, ray, None):
        (short, few), (long, many) = (run(asked.directory, s, block, where) for s in sources)
        expected = expected or [few, many]
        if [few, many] != expected:
            raise SystemExit("the rows differ")
        yield json.dumps(
            {
                "where": "here" if where is None else f"ray, {asked.actors} actors",
                "images": 2 * images,
                "block": block,
                "start_s": round(short - (long - short) / 2, 2),
                "seconds": round(long - short, 2),
                "ms_a_block": round(1000 * (long - short) * block / (2 * images), 2),
            }
        )


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--ray", default="local")
    parser.add_argument("--actors", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for images, block in ((asked.images, asked.block), (asked.images // 20, 1)):
            for line in lines(asked, Path(folder), images, block):
                print(line, flush=True)


if __name__ == "__main__":
    main()
