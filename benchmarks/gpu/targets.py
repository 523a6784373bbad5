"""The promises of the CUDA kernels, held against the rows of a run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu import engines, gathers, models, scans
from benchmarks.gpu.result import Document, Row, Target

NAMES = ("vim_tiny", "vim_small")
OVER_FLOOR = 1.4
FASTER = 2.0
LAYER_US = 5.0
TOKENS = {157: 0.83, 101: 0.55}
MODEL_FASTER = 3.0
ENGINE_FASTER = 4.0
PRUNED_FASTER = 1.35
GATHER_OVER_COPY, GATHER_EXTRA_US = 1.3, 3.0
GATHER_FASTER = 3.0
_AUTO = f"{scans.OURS} auto"


@dataclass(frozen=True)
class _Rows:
    """The rows of a document by what they are of; warm unless said otherwise."""

    document: Document

    def time(
        self, stage: str, subject: str, cache: str = "warm", **case: str | int
    ) -> float | None:
        """The median of the one row that fits, None where there is none."""
        found = self.find(stage, subject, cache, **case)
        return None if found is None else found.median_us

    def find(self, stage: str, subject: str, cache: str = "warm", **case: str | int) -> Row | None:
        """The first row whose case has these entries."""
        for row in self.document.rows:
            named = (row.stage, row.subject, row.cache) == (stage, subject, cache)
            if named and case.items() <= row.case.items():
                return row
        return None


def evaluate(document: Document) -> list[Target]:
    """Every target of the issue, met, missed or not measured."""
    rows = _Rows(document)
    return [
        *_floors(rows),
        *_against_mamba(rows),
        *_lengths(rows),
        *_whole_models(rows),
        *_gathers(rows),
        *_engines(rows),
    ]


def _floors(rows: _Rows) -> Iterator[Target]:
    for name in NAMES:
        row = rows.find("scans", _AUTO, **_layer(name, 128))
        ceilings = rows.document.ceilings
        floor = None
        if row is not None and ceilings is not None:
            floor = row.work.floors_us(ceilings)["special"]
        yield _at_most(
            f"{name} layer, batch 128: time over the exp floor",
            OVER_FLOOR,
            _ratio(None if row is None else row.median_us, floor),
            detail="floor: scan, softplus and gate at the measured ex2 rate",
        )
    for name in NAMES:
        yield _at_most(
            f"{name} layer, batch 1: microseconds",
            LAYER_US,
            rows.time("scans", _AUTO, **_layer(name, 1)),
            detail="inside a CUDA graph, launch included, operands in the cache",
        )


def _against_mamba(rows: _Rows) -> Iterator[Target]:
    for name in NAMES:
        for batch in (128, 1):
            theirs = rows.time("scans", scans.MAMBA, **_layer(name, batch))
            ours = rows.time("scans", _AUTO, **_layer(name, batch))
            yield _at_least(
                f"{name} layer, batch {batch}: faster than mamba-ssm's kernel",
                FASTER,
                _ratio(theirs, ours),
                detail="two calls of theirs, without the sum of the directions",
            )
    case = {"model": "plain_mamba_l3", "dtype": "float16", "batch": 128}
    separate = rows.time("scans", scans.SEPARATE, **case)
    yield _at_least(
        "plain_mamba_l3 layer, batch 128: four directions, faster than four scans",
        FASTER,
        _ratio(separate, rows.time("scans", _AUTO, **case)),
    )


def _lengths(rows: _Rows) -> Iterator[Target]:
    for name in NAMES:
        full = rows.time("scans", _AUTO, **_layer(name, 128))
        for seqlen, share in TOKENS.items():
            part = rows.time("scans", _AUTO, **_layer(name, 128, seqlen))
            yield _at_most(
                f"{name} layer, batch 128: {seqlen} tokens cost of 197", share, _ratio(part, full)
            )


def _whole_models(rows: _Rows) -> Iterator[Target]:
    for name in NAMES:
        case = {"model": name, "kind": "dense", "dtype": "float16", "batch": 128}
        ours = rows.time("models", models.OURS, **case)
        yield _at_least(
            f"{name}, batch 128, float16: faster than PyTorch with mamba-ssm",
            MODEL_FASTER,
            _ratio(rows.time("models", models.MAMBA, **case), ours),
            detail="our layers with their scan, both under CUDA graphs",
        )
    small = {"model": "vim_small", "dtype": "float16", "batch": 128}
    dense = rows.time("models", models.OURS, kind="dense", **small)
    pruned = None
    for row in rows.document.rows:
        kind = str(row.case.get("kind", ""))
        if row.subject == models.OURS and kind.startswith("pruned"):
            pruned = rows.time("models", models.OURS, kind=kind, **small) or pruned
    yield _at_least(
        "vim_small, batch 128, float16: pruned, faster than dense",
        PRUNED_FASTER,
        _ratio(dense, pruned),
    )


def _engines(rows: _Rows) -> Iterator[Target]:
    for name in NAMES:
        case = {"model": name, "kind": "dense", "dtype": "float16", "batch": 128}
        yield _at_least(
            f"{name} in TensorRT, batch 128, float16: faster than PyTorch with mamba-ssm",
            ENGINE_FASTER,
            _ratio(
                rows.time("models", models.MAMBA, **case),
                rows.time("engines", engines.SUBJECT, **case),
            ),
            detail="whole models, both under CUDA graphs",
        )


def _gathers(rows: _Rows) -> Iterator[Target]:
    ours = rows.time("gathers", gathers.OURS)
    copy = rows.time("gathers", gathers.COPY)
    limit = None if copy is None else GATHER_OVER_COPY * copy + GATHER_EXTRA_US
    yield _at_most(
        "gather 128 x 197 x 384, keep 157, two tensors: time over 1.3 copies + 3 us",
        1.0,
        _ratio(ours, limit),
        detail="the copy moves the kept rows alone, in the same run",
    )
    yield _at_least(
        "the same gather: faster than torch.topk, sort and gather",
        GATHER_FASTER,
        _ratio(rows.time("gathers", gathers.TORCH), ours),
    )


def _layer(name: str, batch: int, seqlen: int = 197) -> dict[str, str | int]:
    return {"model": name, "dtype": "float16", "batch": batch, "seqlen": seqlen}


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _at_most(name: str, limit: float, measured: float | None, detail: str = "") -> Target:
    return _target(name, f"at most {limit:g}", measured, (operator.le, limit), detail=detail)


def _at_least(name: str, limit: float, measured: float | None, detail: str = "") -> Target:
    return _target(name, f"at least {limit:g}", measured, (operator.ge, limit), detail=detail)


def _target(
    name: str,
    asked: str,
    measured: float | None,
    rule: tuple[Callable[[float, float], bool], float],
    *,
    detail: str,
) -> Target:
    holds, limit = rule
    if measured is None:
        return Target(name, asked, None, "not measured", detail)
    return Target(name, asked, measured, "met" if holds(measured, limit) else "missed", detail)
