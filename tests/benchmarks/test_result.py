"""gpu_check's result file, the targets read from it, and its page."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import engines, gathers, models, page, result, scans, targets
from benchmarks.gpu.result import Absent, Document, StageResult, Work
from gpu_check_cases import RATES, document, row
from rich.console import Console

from vssm.files.json import FieldError


def full_document() -> Document:
    """Every target measured: on the limit where there is an even number."""
    rows = []
    for name in ("vim_tiny", "vim_small"):
        work = Work(exps=80_000_000, specials=100_000_000, bytes=1)
        layer = {"model": name, "dtype": "float16"}
        for batch, seqlen, ours in ((128, 197, 140.0), (128, 157, 115.0), (128, 101, 77.0)):
            case = {**layer, "batch": batch, "seqlen": seqlen}
            rows.append(row("vssm auto", ours, **case, work=work))
        rows.append(row("vssm throughput", 200.0, **layer, batch=128, seqlen=197))
        rows.append(row(scans.MAMBA, 280.0, **layer, batch=128, seqlen=197))
        rows.append(row("vssm auto", 5.0, **layer, batch=1, seqlen=197))
        rows.append(row(scans.MAMBA, 9.0, **layer, batch=1, seqlen=197))
        case = {"model": name, "kind": "dense", "dtype": "float16", "batch": 128}
        rows.append(row(models.OURS, 1350.0, stage="models", **case))
        rows.append(row(models.MAMBA, 4050.0, stage="models", **case))
        rows.append(row(engines.SUBJECT, 810.0, stage="engines", **case))
    case = {"model": "vim_small", "kind": "pruned 5:0.8", "dtype": "float16", "batch": 128}
    rows.append(row(models.OURS, 1000.0, stage="models", **case))
    case = {"model": "plain_mamba_l3", "dtype": "float16", "batch": 128}
    rows += [row("vssm auto", 100.0, **case), row(scans.SEPARATE, 190.0, **case)]
    rows.append(row(gathers.OURS, 16.0, stage="gathers", seqlen=197))
    rows.append(row(gathers.COPY, 10.0, stage="gathers", seqlen=197))
    rows.append(row(gathers.TORCH, 60.0, stage="gathers", seqlen=197))
    found = document(ceilings=RATES, rows=rows, machine={"gpu": "NVIDIA H100"})
    found.stages.append(StageResult("scans", "ok", "", 12.0, 150.0))
    found.absent.append(Absent("scans", "triton", "not installed | at all"))
    found.targets = targets.evaluate(found)
    return found


def test_targets_from_numbers() -> None:
    verdicts = {t.name: (t.measured, t.verdict) for t in targets.evaluate(full_document())}
    floor = "vim_tiny layer, batch 128: time over the exp floor"
    assert verdicts[floor] == (pytest.approx(1.4, rel=1e-9), "met")
    assert verdicts["vim_small layer, batch 1: microseconds"] == (5.0, "met")
    mamba = "vim_tiny layer, batch 128: faster than mamba-ssm's kernel"
    assert verdicts[mamba] == (2.0, "met")
    slow = "vim_tiny layer, batch 1: faster than mamba-ssm's kernel"
    assert verdicts[slow] == (1.8, "missed")
    assert verdicts["vim_tiny layer, batch 128: 157 tokens cost of 197"][1] == "met"
    assert verdicts["vim_tiny layer, batch 128: 101 tokens cost of 197"] == (0.55, "met")
    four = "plain_mamba_l3 layer, batch 128: four directions, faster than four scans"
    assert verdicts[four] == (1.9, "missed")
    assert verdicts["vim_small, batch 128, float16: pruned, faster than dense"] == (1.35, "met")
    whole = "vim_tiny, batch 128, float16: faster than PyTorch with mamba-ssm"
    assert verdicts[whole] == (3.0, "met")
    engine = "vim_tiny in TensorRT, batch 128, float16: faster than PyTorch with mamba-ssm"
    assert verdicts[engine] == (5.0, "met")
    copy = "gather 128 x 197 x 384, keep 157, two tensors: time over 1.3 copies + 3 us"
    assert verdicts[copy] == (1.0, "met")
    topk = "the same gather: faster than torch.topk, sort and gather"
    assert verdicts[topk] == (3.75, "met")


def test_targets_without_numbers() -> None:
    empty = targets.evaluate(document())
    assert len(empty) == 20
    assert {(t.measured, t.verdict) for t in empty} == {(None, "not measured")}
    cold = document(rows=[dataclasses.replace(r, cache="cold") for r in full_document().rows])
    assert {t.verdict for t in targets.evaluate(cold)} == {"not measured"}


def test_result_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    written = full_document()
    written.write(path)
    assert result.load(path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version=2 must be"),
        (lambda d: d.update(surplus=1), "unknown fields: surplus"),
        (lambda d: d.pop("stages"), "stages is missing"),
        (lambda d: d["rows"][0].update(cache="tepid"), "cache='tepid' must be one of warm, cold"),
        (lambda d: d["rows"][0].update(median_us=0), r"rows\[0\].median_us=0 must be"),
        (lambda d: d["rows"][0].update(p5_us=1e6), "is outside its percentiles"),
        (lambda d: d["rows"][0].update(error=1), "is above allowed"),
        (lambda d: d["rows"][0].update(samples=1.5), "must be an integer"),
        (lambda d: d["rows"][0]["case"].update(batch=None), "batch=None must be a text or"),
        (lambda d: d["rows"][0]["work"].update(exps=-1), "must be at least 0"),
        (lambda d: d["stages"][0].update(status="failed"), "reason is empty"),
        (lambda d: d["targets"][0].update(measured=None), "does not fit None"),
        (lambda d: d["ceilings"].update(ex2_per_s="fast"), "ceilings.ex2_per_s='fast' must be"),
    ],
)
def test_result_refuses(change: Any, message: str) -> None:
    value = {"format": result.FORMAT, "version": 1, **dataclasses.asdict(full_document())}
    assert result.parse(value)
    change(value)
    with pytest.raises(FieldError, match=message):
        result.parse(value)


def test_page() -> None:
    text = page.page(full_document())
    assert text.startswith("# gpu_check on NVIDIA H100\n")
    assert "| vim_tiny layer, batch 1: microseconds (inside a CUDA graph" in text
    assert "| vssm auto | warm | 140 | 140 to 140 | 25 | 1.75 | 1.4 | 2.8e+08 |" in text
    assert "| scans | triton | not installed \\| at all |" in text
    assert "- ex2 a second: 1e+12" in text
    layer = "vim_tiny float16 batch 128 seqlen 197"
    assert f"| {layer} | warm | 200 | - | 140 | 0.70 |" in text
    unfinished = page.page(document())
    assert "- finished: not finished" in unfinished
    assert "## Not measured" not in unfinished


def test_page_lists_every_row_and_stage() -> None:
    found = full_document()
    text = page.page(found)
    measured = text[text.index("## scans: ") :]
    assert measured.count("| warm |") == len(found.rows)
    assert "| scans | ok | 12 | 150 | - |" in text
    printed = io.StringIO()
    console = Console(width=200, file=printed)
    for shown in page.tables(found):
        console.print(shown)
    assert "missed" in printed.getvalue()
    assert "memcheck" not in printed.getvalue()
