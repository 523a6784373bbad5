"""Gathers what the steps of gpu_check.sh printed into one JSON file, and says what it shows.

    python -m benchmarks.gpu.results FOLDER FILE

FOLDER holds steps.jsonl (a line for each step) and what each step printed, FILE is written aside
and renamed. Needs numpy alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vssm.files.json import write_json

# The longest that a layer may take over its exponentials' floor, and so on: docs/performance.md.
OVER_FLOOR, LAYER_US, FASTER_LAYER = 1.4, 5.0, 2.0
FASTER_MODEL, FASTER_ENGINE, FASTER_PRUNED = 3.0, 4.0, 1.35
SHARE_OF_197 = {157: 0.83, 101: 0.55}
OVER_COPY, EXTRA_US, FASTER_GATHER = 1.3, 3.0, 3.0
AUTO, MAMBA = "vssm auto", "mamba-ssm"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A promise of the CUDA kernels: `measured` is None where a time that it takes is missing."""

    name: str
    asked: str
    measured: float | None
    verdict: str


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines of a file; what else was printed is passed over."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a test's output, or the line at which a step was stopped
        if isinstance(found, dict):
            yield found


def collect(folder: Path) -> dict[str, Any]:
    """What all steps found: the machine, the steps, rows, what is missing, the targets."""
    document: dict[str, Any] = {"steps": [], "rows": [], "not_measured": []}
    for line in read_lines(folder / "steps.jsonl"):
        if "step" in line:
            document["steps"].append(line)
        else:
            document |= line
    for step in document["steps"]:
        path = folder / f"{step['step']}.out"
        for line in read_lines(path) if path.is_file() else ():
            if "median_us" in line:
                document["rows"].append(line)
            elif "not_measured" in line:
                document["not_measured"].append(line)
            elif "table" in line:
                document |= {key: value for key, value in line.items() if key != "table"}
    document["targets"] = [asdict(t) for t in targets(document["rows"], document.get("ceilings"))]
    return document


def targets(rows: Sequence[Row], ceilings: Row | None) -> Iterator[Target]:
    """Every target: met, missed or not measured."""

    def find(table: str, subject: str, **case: str | int) -> Row | None:
        for row in rows:
            named = (row["table"], row["subject"], row["cache"]) == (table, subject, "warm")
            if named and case.items() <= row["case"].items():
                return row
        return None

    def time(table: str, subject: str, **case: str | int) -> float | None:
        row = find(table, subject, **case)
        return None if row is None else float(row["median_us"])

    def layer(subject: str, name: str, batch: int, seqlen: int = 197) -> float | None:
        case = {"model": name, "dtype": "float16", "batch": batch, "seqlen": seqlen}
        return time("scans", subject, **case)

    for name in ("vim_tiny", "vim_small"):
        row = find("scans", AUTO, model=name, dtype="float16", batch=128, seqlen=197)
        floor = None
        if row is not None and ceilings is not None:
            floor = 1e6 * row["work"]["specials"] / ceilings["ex2_per_s"]
        whole = layer(AUTO, name, 128)
        yield _at_most(f"{name} layer, batch 128: over its floor", _ratio(whole, floor), OVER_FLOOR)
        yield _at_most(f"{name} layer, batch 1: microseconds", layer(AUTO, name, 1), LAYER_US)
        for batch in (128, 1):
            faster = _ratio(layer(MAMBA, name, batch), layer(AUTO, name, batch))
            yield _at_least(f"{name} layer, batch {batch}: mamba-ssm's time", faster, FASTER_LAYER)
        for seqlen, share in SHARE_OF_197.items():
            part = _ratio(layer(AUTO, name, 128, seqlen), whole)
            yield _at_most(f"{name} layer: {seqlen} tokens' time over 197's", part, share)
        dense = {"model": name, "kind": "dense", "dtype": "float16", "batch": 128}
        theirs = time("models", MAMBA, **dense)
        faster = _ratio(theirs, time("models", "vssm", **dense))
        yield _at_least(f"{name}, batch 128: mamba-ssm's time", faster, FASTER_MODEL)
        faster = _ratio(theirs, time("engines", "tensorrt", **dense))
        yield _at_least(f"{name} in TensorRT: mamba-ssm's time", faster, FASTER_ENGINE)
    plain = {"model": "plain_mamba_l3", "dtype": "float16", "batch": 128}
    apart = time("scans", "vssm auto, a call a direction", **plain)
    faster = _ratio(apart, time("scans", AUTO, **plain))
    yield _at_least("plain_mamba_l3 layer: four calls' time", faster, FASTER_LAYER)
    yield _at_least("vim_small: dense over pruned", _pruned(rows), FASTER_PRUNED)
    for name, rows_copied in (("Gather", "the kept"), ("Scatter", "all")):
        ours = time("gathers", "vssm", operator=f"Token{name}")
        copy = time("gathers", f"copy of {rows_copied} rows")
        limit = None if copy is None else OVER_COPY * copy + EXTRA_US
        yield _at_most(f"{name.lower()}: over 1.3 copies and 3 us", _ratio(ours, limit), 1.0)
    ours = time("gathers", "vssm", operator="TokenGather")
    by_torch = _ratio(time("gathers", "torch.topk, sort, gather"), ours)
    yield _at_least("gather: torch.topk, sort and gather's time", by_torch, FASTER_GATHER)


def _pruned(rows: Sequence[Row]) -> float | None:
    """Time of vim_small over that of the pruned one, in PyTorch."""
    case = {"model": "vim_small", "dtype": "float16", "batch": 128}
    times = {
        str(row["case"]["kind"]).split()[0]: float(row["median_us"])
        for row in rows
        if row["table"] == "models" and row["subject"] == "vssm"
        if case.items() <= row["case"].items()
    }
    return _ratio(times.get("dense"), times.get("pruned"))


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _at_most(name: str, measured: float | None, limit: float) -> Target:
    return _target(name, f"at most {limit:g}", measured, measured is not None and measured <= limit)


def _at_least(name: str, measured: float | None, limit: float) -> Target:
    asked = f"at least {limit:g} times ours" if "'s time" in name else f"at least {limit:g}"
    return _target(name, asked, measured, measured is not None and measured >= limit)


def _target(name: str, asked: str, measured: float | None, met: bool) -> Target:
    verdict = "met" if met else "missed"
    return Target(name, asked, measured, "not measured" if measured is None else verdict)


def main(arguments: Sequence[str]) -> None:
    """Write the file and print the steps and the targets."""
    folder, path = map(Path, arguments)
    document = collect(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    for step in document["steps"]:
        print(f"{step['step']:<10} {step['status']:<8} {step['seconds']:>5} s  {step['reason']}")
    measured = [target for target in document["targets"] if target["measured"] is not None]
    for target in measured:
        shown = f"{target['measured']:.3g}"
        print(f"{target['name']:<46} {target['asked']:<24} {shown:>7}  {target['verdict']}")
    print(f"{len(document['targets']) - len(measured)} targets were not measured")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
