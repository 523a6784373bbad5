"""The one JSON file that a run writes: its types, and the check that a file has them.

Times are microseconds of one call, on the device; a row is one subject of one case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vssm.files.atomic import atomic_write_bytes
from vssm.files.json import FieldError, Node

FORMAT = "vssm gpu_check"
VERSION = 1
STATUSES = ("ok", "failed", "skipped")
VERDICTS = ("met", "missed", "not measured")
CACHES = ("warm", "cold")


@dataclass(frozen=True)
class StageResult:
    """How one stage ended; `reason` says why where it is not ok, or what it left out."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    log_tail: str = ""


@dataclass(frozen=True)
class Ceilings:
    """What the card can do at the most, as measured.

    Attributes:
        ex2_per_s: evaluations of ex2.approx.ftz.f32 a second.
        copy_bytes_per_s: bytes read plus bytes written a second by a large copy.
        launch_us: an empty kernel inside a CUDA graph.
    """

    ex2_per_s: float
    copy_bytes_per_s: float
    launch_us: float


@dataclass(frozen=True)
class Work:
    """What one call must do at the least: exponentials, all special functions, bytes moved."""

    exps: int = 0
    specials: int = 0
    bytes: int = 0

    def floors_us(self, ceilings: Ceilings) -> dict[str, float]:
        """Microseconds of each at the card's measured rate."""
        return {
            "exp": 1e6 * self.exps / ceilings.ex2_per_s,
            "special": 1e6 * self.specials / ceilings.ex2_per_s,
            "bytes": 1e6 * self.bytes / ceilings.copy_bytes_per_s,
        }


@dataclass(frozen=True)
class Row:
    """Times of one subject; `case` names the shape, so that rows of a case may be compared.

    `error` is the largest difference from the reference over its largest magnitude, taken in the
    same run; `allowed` is what it had to stay below.
    """

    stage: str
    case: dict[str, str | int]
    subject: str
    cache: str
    median_us: float
    p5_us: float
    p95_us: float
    samples: int
    calls: int
    error: float
    allowed: float
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Absent:
    """A subject that was not measured, and why."""

    stage: str
    subject: str
    reason: str


@dataclass(frozen=True)
class Target:
    """One promise: what was asked, what was measured."""

    name: str
    asked: str
    measured: float | None
    verdict: str
    detail: str = ""


@dataclass
class Document:
    """Everything one run found out, in the order in which it did."""

    started: str
    command: str
    quick: bool
    commit: str
    finished: str | None = None
    machine: dict[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    stages: list[StageResult] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def forget(self, stage: str) -> None:
        """Drop what an earlier run of a stage left."""
        self.stages = [s for s in self.stages if s.name != stage]
        self.rows = [r for r in self.rows if r.stage != stage]
        self.absent = [a for a in self.absent if a.stage != stage]

    def write(self, path: Path) -> None:
        """Check the document, then write it aside and rename it."""
        value = {"format": FORMAT, "version": VERSION, **asdict(self)}
        parse(value)
        text = json.dumps(value, indent=1, allow_nan=False)
        atomic_write_bytes(path, f"{text}\n".encode())


def load(path: Path) -> Document:
    """Read a result.

    Raises:
        FieldError: it is not one; the message names the field.
    """
    return parse(json.loads(path.read_text(encoding="utf-8")))


def parse(value: Any) -> Document:
    """The document of a JSON value.

    Raises:
        FieldError: a field is missing, unknown or of a wrong type or value.
    """
    root = Node(value)
    root.at("format").choice([FORMAT])
    root.at("version").integer(VERSION, VERSION)
    _only(root, {"format", "version", *Document.__dataclass_fields__})
    return Document(
        started=root.at("started").text(),
        command=root.at("command").text(),
        quick=root.at("quick").flag(),
        commit=root.at("commit").text(),
        finished=root.at("finished").optional(Node.text),
        machine={key: node.text() for key, node in root.at("machine").entries()},
        ceilings=root.at("ceilings").optional(ceilings),
        stages=[_stage(node) for node in root.at("stages").items()],
        rows=[row(node) for node in root.at("rows").items()],
        absent=[absent(node) for node in root.at("absent").items()],
        targets=[_target(node) for node in root.at("targets").items()],
    )


def ceilings(node: Node) -> Ceilings:
    """The card's rates, each above zero."""
    return _typed(Ceilings, node, dict.fromkeys(Ceilings.__dataclass_fields__, _positive))


def row(node: Node) -> Row:
    """One measured row; its numbers must be in order."""
    made: Row = _typed(
        Row,
        node,
        {
            "stage": Node.text,
            "case": _case,
            "subject": Node.text,
            "cache": lambda n: n.choice(CACHES),
            **dict.fromkeys(("median_us", "p5_us", "p95_us"), _positive),
            **dict.fromkeys(("samples", "calls"), lambda n: n.integer(1)),
            **dict.fromkeys(("error", "allowed"), Node.number),
            "work": lambda n: _typed(
                Work, n, dict.fromkeys(Work.__dataclass_fields__, lambda m: m.integer(0))
            ),
        },
    )
    if not made.p5_us <= made.median_us <= made.p95_us:
        raise FieldError(f"{node.path}.median_us={made.median_us} is outside its percentiles")
    if not 0 <= made.error <= made.allowed:
        raise FieldError(f"{node.path}.error={made.error} is above allowed={made.allowed}")
    return made


def absent(node: Node) -> Absent:
    """One subject that was not measured."""
    made: Absent = _typed(Absent, node, dict.fromkeys(Absent.__dataclass_fields__, Node.text))
    return made


def _stage(node: Node) -> StageResult:
    made: StageResult = _typed(
        StageResult,
        node,
        {
            "name": Node.text,
            "status": lambda n: n.choice(STATUSES),
            "reason": _string,
            **dict.fromkeys(("seconds", "limit_s"), Node.number),
            "log_tail": _string,
        },
    )
    if made.status != "ok" and not made.reason:
        raise FieldError(f"{node.path}.reason is empty, but its status is {made.status}")
    return made


def _target(node: Node) -> Target:
    made: Target = _typed(
        Target,
        node,
        {
            **dict.fromkeys(("name", "asked"), Node.text),
            "measured": lambda n: n.optional(Node.number),
            "verdict": lambda n: n.choice(VERDICTS),
            "detail": _string,
        },
    )
    if (made.measured is None) != (made.verdict == "not measured"):
        raise FieldError(f"{node.path}.verdict={made.verdict!r} does not fit {made.measured}")
    return made


def _typed(kind: Any, node: Node, readers: Mapping[str, Callable[[Node], Any]]) -> Any:
    _only(node, readers)
    return kind(**{name: read(node.at(name)) for name, read in readers.items()})


def _only(node: Node, known: Any) -> None:
    unknown = sorted(set(node.mapping()) - set(known))
    if unknown:
        raise FieldError(f"{node.path or 'the file'} has unknown fields: {', '.join(unknown)}")


def _positive(node: Node) -> float:
    return node.number(above=0)


def _string(node: Node) -> str:
    if not isinstance(node.value, str):
        raise FieldError(f"{node.path}={node.value!r} must be a text")
    return node.value


def _case(node: Node) -> dict[str, str | int]:
    found = node.mapping()
    for key, value in found.items():
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise FieldError(f"{node.path}.{key}={value!r} must be a text or an integer")
    return found
