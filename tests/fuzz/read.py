"""One reader of `tests/support/readers.py` on many generated inputs.

    python tests/fuzz/read.py "model.json" --inputs 100000
    python tests/fuzz/read.py "model.json" --seconds 60 --coverage FOLDER
    python tests/fuzz/read.py "model.json" --once FOLDER/crash-...

The first makes inputs by changes to the seeds; input N is the same at every run. The second lets
atheris look for inputs that reach new code, and keeps in FOLDER what it found and what broke a
promise; the third reads one of those again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT.parents[1] / "exporter")]


def main() -> int:
    """Run, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader")
    parser.add_argument("--inputs", type=int, default=1 << 62)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--coverage", type=Path)
    parser.add_argument("--once", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="PIL")  # which warns of what it mends in an image
    if asked.coverage:
        _cover(asked.reader, asked.coverage, asked.inputs, asked.seconds)
    from readers import READERS

    with tempfile.TemporaryDirectory() as folder:
        reader, around = READERS[asked.reader], Path(folder)
        seeds = reader.prepare(around)
        if asked.once:
            sys.stdout.write(f"{reader.check(around, asked.once.read_bytes())}\n")
            return 0
        return _mutate(asked.reader, around, seeds, asked.inputs, asked.seconds)


def _mutate(name: str, around: Path, seeds: list[bytes], inputs: int, seconds: float) -> int:
    from readers import READERS, mutate

    reader, ends = READERS[name], Counter[str]()
    deadline = time.monotonic() + seconds
    for number in range(inputs):
        if time.monotonic() > deadline:
            break
        data = mutate(random.Random(number), reader, seeds)
        try:
            ends[reader.check(around, data)] += 1
        except Exception:
            sys.stdout.write(f"{name}, input {number}: {traceback.format_exc()}\n{data[:500]!r}\n")
            return 1
    sys.stdout.write(f"{sum(ends.values())} inputs: {dict(ends)}\n")
    return 0


def _cover(name: str, corpus: Path, inputs: int, seconds: float) -> None:
    """Let atheris make the inputs; ends the process."""
    import atheris

    # What is imported here is followed; torch and numpy were not written here.
    with atheris.instrument_imports(include=["vssm", "pickletools", "zipfile", "json"]):
        from readers import LONGEST, READERS, mutate
    reader, around = READERS[name], Path(tempfile.mkdtemp(prefix="vssm-fuzz-"))
    seeds = reader.prepare(around)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        return mutate(rng, reader, [data, rng.choice(seeds)])[:most]

    options = [f"-artifact_prefix={corpus}/", f"-max_len={LONGEST}", "-seed=1", "-timeout=60"]
    options += [f"-runs={inputs}"] if inputs < 1 << 62 else []
    options += [f"-max_total_time={int(seconds)}"] if seconds < float("inf") else []
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)],
        lambda data: reader.check(around, data) and None,
        custom_mutator=change,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
