"""What the benchmark scripts share: JSON lines, a check behind every time, and a budget.

A script prints one JSON line for each thing it finds, so that what it had measured is kept when it
is stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from benchmarks.gpu.timing import Clock, CudaClock, Subject, Times, measure, one_line

Case = dict[str, str | int]


@dataclass(frozen=True)
class Work:
    """What one call must do at the least: exponentials, all special functions, bytes moved."""

    exps: int = 0
    specials: int = 0
    bytes: int = 0


class HasCase(Protocol):
    """What can say which case it is."""

    @property
    def case(self) -> Case:
        """Texts and numbers by name."""
        ...


_Case = TypeVar("_Case", bound=HasCase)


def _print(line: str) -> None:
    print(line, flush=True)  # what is printed stays, also of a script that is stopped


@dataclass
class Report:
    """Writes what a script finds; `failures` are what must make it end with an error.

    Attributes:
        table: the script's name, in every line.
        seconds: no case is begun later.
        write: takes a line.
    """

    table: str
    seconds: float = math.inf
    write: Callable[[str], object] = _print
    failures: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    def each(self, cases: Iterable[_Case], run: Callable[[_Case], None]) -> None:
        """Run the cases in turn while there is time; one that breaks does not stop the others."""
        for found in cases:
            name = label(found.case)
            if time.monotonic() - self._start > self.seconds:
                self.absent(name, f"the {self.seconds:g} seconds were over")
                continue
            try:
                run(found)
            except Exception as error:
                self.wrong(name, one_line(error))

    def measure(
        self,
        case: Case,
        subjects: Sequence[Subject],
        clock: Clock,
        check: Callable[[Times], tuple[float, float]],
        *,
        ours: Collection[str],
        work: Work | None = None,
        **how: Any,
    ) -> None:
        """Time the subjects of a case and write their rows.

        Args:
            case: what they compute, by name.
            subjects: what to time.
            clock: how.
            check: the error of what a subject computed, and the allowed one.
            ours: names of the subjects whose failure is an error.
            work: what every one of them must do at the least.
            **how: `copies` and `caches` of `timing.measure`.
        """

        def lost(name: str, why: str) -> None:
            tell = self.wrong if name in ours else self.absent
            tell(f"{name}, {label(case)}", why)

        self.rows(case, measure(subjects, clock, lost=lost, **how), check, ours=ours, work=work)

    def rows(
        self,
        case: Case,
        times: Iterable[Times],
        check: Callable[[Times], tuple[float, float]],
        *,
        ours: Collection[str],
        work: Work | None = None,
    ) -> None:
        """A line for each time; that of a wrong result is dropped, and is an error if ours."""
        for taken in times:
            error, allowed = check(taken)
            if not error <= allowed:  # not a number is wrong, too
                tell = self.wrong if taken.subject in ours else self.absent
                reason = f"its result errs by {error:.1e}, above {allowed:.1e}; its time is dropped"
                tell(f"{taken.subject}, {taken.cache}, {label(case)}", reason)
                continue
            self.line(
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
                work=asdict(work or Work()),
            )

    def absent(self, subject: str, reason: str) -> None:
        """Say that a subject is not measured, and why."""
        self.line(not_measured=subject, reason=reason)

    def wrong(self, subject: str, reason: str) -> None:
        """Say that a subject of ours fails: it has no time, and the script ends with an error."""
        self.absent(subject, reason)
        self.failures.append(f"{subject}: {reason}")

    def line(self, **found: Any) -> None:
        """Write anything else."""
        self.write(json.dumps({"table": self.table, **found}))


def label(case: Case) -> str:
    """A case as words: its texts, then its numbers by name."""
    texts = [v for v in case.values() if isinstance(v, str)]
    return " ".join([*texts, *(f"{k} {v}" for k, v in case.items() if not isinstance(v, str))])


def main(table: str, run: Callable[[Report, Any], None]) -> None:
    """Parse the options, run, and end with an error where something of ours failed."""
    parser = argparse.ArgumentParser(description=f"Prints the table {table} as JSON lines.")
    limit = "begin no case later; the most valuable come first"
    parser.add_argument("--seconds", type=float, default=math.inf, help=limit)
    report = Report(table, parser.parse_args().seconds)
    run(report, CudaClock())
    if report.failures:
        raise SystemExit("\n".join(f"failed: {failure}" for failure in report.failures))
