"""Runs the stages of gpu_check and keeps what they found in one JSON file, after every stage."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import result
from benchmarks.gpu.needs import nvidia_smi
from benchmarks.gpu.page import page, tables
from benchmarks.gpu.plan import GROUND, PROGRAMS, ROOT, WORK, environment, part_of, plan
from benchmarks.gpu.result import Document, StageResult
from benchmarks.gpu.stages import LEFT_OUT, Stage, run_stage
from benchmarks.gpu.targets import evaluate
from rich.console import Console

from vssm.commands.tables import table
from vssm.files.atomic import atomic_write_bytes
from vssm.files.json import FieldError, Node

CARD = "card"  # the entry of `machine` that says on which one a result was begun
NOT_ASKED = "not in --only"
NO_TIME = "its limit is more than was left of --seconds"
BLOCKED = "it needs the stage"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 where no stage failed, 1 where one did, 2 for bad usage."""
    options = _options(arguments)
    console = Console()
    names = [s.name for s in plan(options.quick)]
    if options.list:
        stages = plan(options.quick)
        rows = ((s.name, s.purpose, f"{s.limit_s:.0f}", f"{s.quick_s:.0f}") for s in stages)
        console.print(table("gpu_check", ("stage", "what", "limit, s", "with --quick"), rows))
        return 0
    if options.limit is not None and not (options.only and options.limit > 0):
        print(f"gpu_check: --limit={options.limit}: it needs --only, and seconds above 0")
        return 2
    only = options.only.split(",") if options.only else names
    unknown = sorted(set(only) - set(names))
    if unknown:
        print(f"gpu_check: --only={options.only}: no stage {', '.join(unknown)}; see --list")
        return 2
    try:
        document, path = _document(options)
    except (OSError, ValueError, FieldError) as error:
        print(f"gpu_check: --into={options.into} is no result of gpu_check: {error}")
        return 2
    if options.rest:
        only = _rest(document, only)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        run(document, path, only, console, seconds=options.seconds, limit=options.limit)
    finally:
        signal.signal(signal.SIGTERM, before)
    for shown in tables(document):
        console.print(shown)
    console.print(f"{path}\n{path.with_suffix('.md')}", soft_wrap=True)
    waiting = ", ".join(s.name for s in document.stages if _waits(s))
    if waiting:
        console.print(f"not run yet: {waiting}; --into this file --rest", soft_wrap=True)
    return 1 if any(s.status == "failed" for s in document.stages) else 0


def _stop(number: int, _: object) -> None:
    """End as on an error: what a stage has started is stopped, and the result is written."""
    sys.exit(128 + number)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what the targets need: 8 minutes")
    parser.add_argument("--only", metavar="STAGE,...", help="these stages alone")
    parser.add_argument("--list", action="store_true", help="the stages and their limits")
    into = "add to this result, or begin it; its other stages stay"
    parser.add_argument("--into", type=Path, metavar="FILE", help=into)
    rest = "what the result has not run yet, on the ground of build and baseline"
    parser.add_argument("--rest", action="store_true", help=rest)
    limit = "start no stage that may take longer than what is left of this"
    parser.add_argument("--seconds", type=float, default=1e9, metavar="N", help=limit)
    own = "seconds of each stage that --only names, in place of its own; not of the ground's"
    parser.add_argument("--limit", type=float, metavar="N", help=own)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def _document(options: argparse.Namespace) -> tuple[Document, Path]:
    """A new result or the one to go on with, and its path."""
    command = shlex.join(["benchmarks/gpu_check.sh", *sys.argv[1:]])
    now = datetime.datetime.now(datetime.timezone.utc)
    if options.into is not None and options.into.exists():
        document = result.load(options.into)
        document.command, document.finished = f"{document.command}; {command}", None
        document.quick = options.quick
        card = document.machine.get(CARD, "unknown")
        same = {"commit": (document.commit, _commit()), "card": (card, _card())}
        for what, (its, ours) in same.items():
            if its != ours:
                raise ValueError(f"its {what} is {its}, not {ours} as here; start a new one")
        return document, options.into
    document = Document(
        started=now.isoformat(timespec="seconds"),
        command=command,
        quick=options.quick,
        commit=_commit(),
        machine={CARD: _card()},
    )
    path = options.into or options.output / f"{_slug(_card())}-{now:%Y-%m-%d-%H%M}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return document, path


def _rest(document: Document, only: Sequence[str]) -> list[str]:
    """The stages that still wait; the ground, too, if there are any: a fresh machine lacks it."""
    ended = {s.name for s in document.stages if not _waits(s)}
    stages = [s.name for s in plan(document.quick) if s.limit(document.quick)]
    rest = [name for name in stages if name in only and name not in ended]
    return [*(name for name in GROUND if name not in rest), *rest] if rest else []


def _waits(stage: StageResult) -> bool:
    """Whether a stage has not had its turn."""
    waits = stage.reason in (NOT_ASKED, NO_TIME, LEFT_OUT) or stage.reason.startswith(BLOCKED)
    return stage.status == "skipped" and waits


def run(
    document: Document,
    path: Path,
    only: Sequence[str],
    console: Console,
    *,
    seconds: float = 1e9,
    limit: float | None = None,
) -> None:
    """Run the stages named, writing the result and its page after each; none that may end late.

    `limit` takes the place of their own limits, but for the ground's.
    """
    start = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    env = environment()
    for planned in plan(document.quick):
        own = limit is None or planned.name in GROUND
        stage = planned if own else dataclasses.replace(planned, limit_s=limit, quick_s=limit)
        why = _not_now(document, stage, only, seconds - (time.monotonic() - start))
        if why is not None:
            if not any(s.name == stage.name and not _waits(s) for s in document.stages):
                document.forget(stage.name)
                document.stages.append(StageResult(stage.name, "skipped", why))
            continue
        console.print(f"{stage.name}: {stage.purpose} (limit {stage.limit(document.quick):.0f} s)")
        ended = _run_stage(document, stage, env, path)
        console.print(f"{stage.name}: {ended.status} {ended.reason}", markup=False, soft_wrap=True)
    document.finished = _now()
    _save(document, path)


def _not_now(document: Document, stage: Stage, only: Sequence[str], left: float) -> str | None:
    """Why a stage is not started, where it is not."""
    if stage.name not in only:
        return NOT_ASKED
    limit = stage.limit(document.quick)
    if not limit:
        return LEFT_OUT
    return NO_TIME if limit > left else None


def _run_stage(document: Document, stage: Stage, env: dict[str, str], path: Path) -> StageResult:
    """Run one, and write what it found however it ends."""
    document.forget(stage.name)
    ended = StageResult(stage.name, "failed", "did not end: the run was stopped")
    try:
        ended = _blocked(document, stage) or run_stage(
            stage, WORK / f"{stage.name}.log", quick=document.quick, env=env, cwd=ROOT
        )
    finally:
        if stage.name in PROGRAMS:
            ended = _collect(document, stage.name, ended)
        document.stages.append(ended)
        _save(document, path)
    return ended


def _blocked(document: Document, stage: Stage) -> StageResult | None:
    """A stage is skipped where one that it needs has failed."""
    needed = next((s for s in document.stages if s.name == stage.needs), None)
    if needed is None or needed.status != "failed":
        return None
    return StageResult(stage.name, "skipped", f"{BLOCKED} {stage.needs}, which failed")


def _collect(document: Document, name: str, ended: StageResult) -> StageResult:
    """Take over what a program has found; a line that is cut off or wrong makes the stage fail."""
    part = part_of(name)
    if ended.status == "skipped" or not part.is_file():
        return ended
    wrong = []
    for line in part.read_text(encoding="utf-8").splitlines():
        try:
            _take(document, json.loads(line))
        except ValueError as error:
            wrong.append(str(error))
    if not wrong:
        return ended
    reason = "; ".join(filter(None, [ended.reason, f"unreadable findings: {wrong[0]}"]))
    return StageResult(name, "failed", reason, ended.seconds, ended.limit_s, ended.log_tail)


def _take(document: Document, found: Any) -> None:
    node = Node(found)
    for key, value in node.mapping().items():
        if key == "row":
            document.rows.append(result.row(node.at(key)))
        elif key == "absent":
            document.absent.append(result.absent(node.at(key)))
        elif key == "ceilings":
            document.ceilings = result.ceilings(node.at(key))
        elif key == "machine":
            document.machine.update({k: v.text() for k, v in node.at(key).entries()})
        else:
            raise FieldError(f"{key}={value!r} is nothing that a program writes")


def _save(document: Document, path: Path) -> None:
    order = [s.name for s in plan(document.quick)]
    document.stages.sort(key=lambda s: order.index(s.name) if s.name in order else len(order))
    document.targets = evaluate(document)
    document.write(path)
    atomic_write_bytes(path.with_suffix(".md"), page(document).encode())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _commit() -> str:
    found = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"])
    return found or "no git checkout"


def _card() -> str:
    return (nvidia_smi("--query-gpu=name", "--format=csv,noheader") or "gpu").splitlines()[0]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "gpu"


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
