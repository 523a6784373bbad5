"""What the benchmark programs share: their options, the lines they write, and their deadline.

A program appends a JSON line for each thing it finds, so that what it had measured is kept when it
is stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.gpu.result import Absent, Ceilings, Row, Work
from benchmarks.gpu.timing import CudaClock, Times, one_line


class HasCase(Protocol):
    """What can say which case it is."""

    @property
    def case(self) -> dict[str, str | int]:
        """Texts and numbers by name."""
        ...


_Case = TypeVar("_Case", bound=HasCase)


@dataclass
class Report:
    """Where a program's findings go; `failures` are what must make the stage fail.

    Attributes:
        stage: the stage's name.
        path: file of JSON lines.
        seconds: how long the program may measure.
        quick: whether to leave out what is not needed for the targets.
    """

    stage: str
    path: Path
    seconds: float = 1e9
    quick: bool = False
    failures: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether its time is used up."""
        return time.monotonic() - self._start > self.seconds

    def each(self, cases: Iterable[_Case], run: Callable[[_Case], None]) -> None:
        """Run the cases in turn while there is time; one that breaks does not stop the others."""
        for found in cases:
            name = label(found.case)
            if self.over:
                self.absent(name, "the stage's time was over")
                continue
            try:
                run(found)
            except Exception as error:
                self.wrong(name, one_line(error))

    def machine(self, facts: dict[str, str]) -> None:
        """Add to what is known of the machine."""
        self._line({"machine": facts})

    def ceilings(self, found: Ceilings) -> None:
        """The card's rates."""
        self._line({"ceilings": asdict(found)})

    def absent(self, subject: str, reason: str) -> None:
        """A subject that is not measured."""
        self._line({"absent": asdict(Absent(self.stage, subject, reason))})

    def wrong(self, subject: str, reason: str) -> None:
        """A subject of ours that fails: no time of it is kept, and the stage fails."""
        self.absent(subject, reason)
        self.failures.append(f"{subject}: {reason}")

    def rows(
        self,
        case: dict[str, str | int],
        times: list[Times],
        check: Callable[[Times], tuple[float, float]],
        *,
        ours: Collection[str],
        work: Work,
    ) -> None:
        """A row for each subject; `check` gives the error of what it computed, and the allowed.

        A time of wrong numbers is not kept; where the subject is one of `ours`, the stage fails.
        """
        for taken in times:
            error, allowed = check(taken)
            if not error <= allowed:
                lost = self.wrong if taken.subject in ours else self.absent
                reason = f"its result errs by {error:.1e}, above {allowed:.1e}; its time is dropped"
                lost(f"{taken.subject}, {taken.cache}, {label(case)}", reason)
                continue
            found = Row(
                stage=self.stage,
                case=case,
                subject=taken.subject,
                cache=taken.cache,
                median_us=taken.percentile(50),
                p5_us=taken.percentile(5),
                p95_us=taken.percentile(95),
                samples=len(taken.taken),
                calls=taken.calls,
                error=error,
                allowed=allowed,
                work=work,
            )
            self._line({"row": asdict(found)})

    def _line(self, value: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(value)}\n")


def label(case: dict[str, str | int]) -> str:
    """A case as words: its texts, then its numbers by name."""
    texts = [v for v in case.values() if isinstance(v, str)]
    return " ".join([*texts, *(f"{k} {v}" for k, v in case.items() if not isinstance(v, str))])


def main(stage: str, run: Callable[[Report, Any], None]) -> None:
    """Parse the options, run, and end with an error where something of ours failed."""
    parser = argparse.ArgumentParser(description=f"gpu_check's stage {stage}")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    report = Report(stage, options.out, options.seconds, options.quick)
    run(report, CudaClock())
    for failure in report.failures:
        print(f"failed: {failure}")
    if report.failures:
        raise SystemExit(1)
