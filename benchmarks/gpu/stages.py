"""Runs one stage: a command with a time limit, its log kept, its end told in a StageResult."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.result import StageResult

TAIL_LINES = 40
TAIL_CHARACTERS = 6000
GRACE_S = 5.0
LEFT_OUT = "left out by --quick"


class SkippedError(Exception):
    """A stage cannot run here; the message says why."""


@dataclass(frozen=True)
class Stage:
    """A step of the run.

    Attributes:
        name: what `--only` names.
        purpose: one line for the list.
        limit_s: seconds it may take in a whole run.
        quick_s: the same with --quick; 0 leaves it out.
        commands: what to run, from the seconds it may use; SkippedError where it cannot run.
        needs: a stage without which this one says nothing.
        keep: lines of the log, as a regular expression, that tell what a good run covered.
        wrong: lines of the log, likewise, that make it a failure however its commands ended.
    """

    name: str
    purpose: str
    limit_s: float
    quick_s: float
    commands: Callable[[float], Sequence[Sequence[str]]]
    needs: str | None = None
    keep: str | None = None
    wrong: str | None = None

    def limit(self, quick: bool) -> float:
        """Seconds it may take."""
        return self.quick_s if quick else self.limit_s


def run_stage(
    stage: Stage, log: Path, *, quick: bool, env: Mapping[str, str], cwd: Path
) -> StageResult:
    """Run a stage's commands in turn until one fails or the time is over."""
    limit = stage.limit(quick)
    if not limit:
        return StageResult(stage.name, "skipped", LEFT_OUT)
    start = time.monotonic()
    try:
        commands = stage.commands(limit)
    except SkippedError as skipped:
        return StageResult(stage.name, "skipped", str(skipped), limit_s=limit)
    except (OSError, subprocess.SubprocessError) as error:
        return StageResult(stage.name, "failed", f"cannot begin: {error}", limit_s=limit)
    reason = ""
    with log.open("wb") as sink:
        for command in commands:
            left = limit - (time.monotonic() - start)
            reason = _run(command, sink.fileno(), left, limit=limit, env=env, cwd=cwd)
            if reason:
                break
    seconds = round(time.monotonic() - start, 1)
    reason = reason or _complaint(stage, log)
    if reason:
        end = tail(log)
        last = end.rstrip().rpartition("\n")[2][:200]
        said = f"{reason}: {last}" if last else reason
        return StageResult(stage.name, "failed", said, seconds, limit, end)
    return StageResult(stage.name, "ok", _covered(stage, log), seconds, limit)


def _covered(stage: Stage, log: Path) -> str:
    return "; ".join(_lines(stage.keep, log))


def _complaint(stage: Stage, log: Path) -> str:
    found = _lines(stage.wrong, log)
    return f"{len(found)} lines such as {found[0].strip()!r}" if found else ""


def _lines(pattern: str | None, log: Path) -> list[str]:
    if pattern is None:
        return []
    return re.findall(pattern, log.read_text(encoding="utf-8", errors="replace"))


def _run(
    command: Sequence[str],
    sink: int,
    left: float,
    *,
    limit: float,
    env: Mapping[str, str],
    cwd: Path,
) -> str:
    """Why a command failed, empty where it did not."""
    try:
        # A session of its own: what it started ends with it.
        process = subprocess.Popen(
            list(command), stdout=sink, stderr=sink, env=dict(env), cwd=cwd, start_new_session=True
        )
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    try:
        code = process.wait(timeout=max(left, 0.0))
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit:g} s"
    finally:
        _end(process)
    if code == 0:
        return ""
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{Path(command[0]).name} ended with {ended}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all it has started: first politely, so that it can put its files away."""
    for sent, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


def tail(log: Path) -> str:
    """The last lines of a log, without control characters but line ends and tabs."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = text.replace("\r", "\n").splitlines()[-TAIL_LINES:]
    kept = "\n".join(lines)[-TAIL_CHARACTERS:]
    return "".join(c for c in kept if c in "\n\t" or c.isprintable())
