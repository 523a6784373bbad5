"""The benchmark programs of gpu_check on the CPU: the same code, small shapes, wall time.

Our kernels are then the CPU's, or the CUDA kernels in emulation; mamba-ssm's extension is played by
the oracle. What these times are is of no interest: that rows are made, checked and dropped is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import compiled, gathers, models, scans, shapes, timing
from benchmarks.gpu.native import VariantKernels
from benchmarks.gpu.program import Report, label
from benchmarks.gpu.result import Work
from benchmarks.gpu.scans import Contender
from benchmarks.gpu.shapes import ScanShape
from benchmarks.gpu.timing import HostClock
from gpu_check_cases import CROSS, GROUP, PLAIN, PRUNED, VIM, lines, mamba_extension, micro_oracle
from torch import Tensor

import vssm
from vssm.native_library import find_library
from vssm.parity.compare import TOLERANCES

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HostClock:
    """Short samples, and a cache that two copies are too large for."""
    monkeypatch.setattr(timing, "SAMPLE_US", 0.01)
    found = HostClock()
    found.cache_bytes = 1
    return found


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("scans", tmp_path / "found.jsonl")


@functools.cache
def host_kernels() -> VariantKernels:
    return VariantKernels(find_library("vssm"))


def contenders(shape: ScanShape, given: list[dict[str, Tensor]]) -> list[Contender]:
    """What the program takes, but for Triton; the CPU's kernels have no variants."""
    found = [scans.ours(shape, given, host_kernels())]
    if shape is PLAIN:
        found.append(scans._separate(shape, given, host_kernels()))
    if shape.model.startswith("vim"):
        found.append(scans._mamba(given, mamba_extension()))
    return found


@pytest.mark.parametrize("shape", [VIM, PRUNED, PLAIN, CROSS, GROUP], ids=lambda s: s.model)
def test_scans(shape: ScanShape, clock: HostClock, report: Report) -> None:
    scans.case(report, clock, shape, functools.partial(contenders, shape))
    rows = lines(report, "row")
    subjects = {"vssm auto"}
    subjects |= {scans.SEPARATE} if shape is PLAIN else set()
    subjects |= {scans.MAMBA} if shape.model.startswith("vim") else set()
    expected = {(s, c) for s in subjects for c in ("warm", "cold")}
    assert {(r.subject, r.cache) for r in rows} == expected
    assert all(r.samples >= 20 and r.case == shape.case for r in rows)
    assert not report.failures
    assert not lines(report, "absent")


@pytest.mark.parametrize("shape", [PRUNED, PLAIN, CROSS, GROUP], ids=lambda s: s.model)
def test_every_variant_of_our_scan(shape: ScanShape, clock: HostClock, report: Report) -> None:
    """What the program makes of a shape, over the CUDA kernels in emulation."""
    made = functools.partial(
        scans._contenders,
        shape,
        kernels=VariantKernels(find_library("vssm_emulated"), emulated=True),
        baselines=scans.Baselines(mamba=mamba_extension()),
        quick=False,
    )
    scans.case(report, clock, shape, made)
    assert not report.failures
    subjects = {r.subject for r in lines(report, "row")}
    assert {"vssm auto", "vssm throughput", "vssm latency"} <= subjects
    assert (scans.MAMBA in subjects) == (shape is PRUNED)
    assert (scans.SEPARATE in subjects) == (shape is PLAIN)


def test_wrong_numbers_have_no_time(clock: HostClock, report: Report) -> None:
    def made(given: list[dict[str, Tensor]]) -> list[Contender]:
        right = scans.ours(VIM, given, host_kernels())
        return [
            right,
            Contender("ours, off", lambda i: right.call(i) * 1.01),
            Contender("theirs, NaN", lambda i: right.call(i) * float("nan"), ours=False),
            Contender("theirs, broken", lambda _: given[99], ours=False),
        ]

    scans.case(report, clock, VIM, made)
    assert {r.subject for r in lines(report, "row")} == {"vssm auto"}
    reasons = {a.subject: a.reason for a in lines(report, "absent")}
    case = "vim_tiny float32 batch 2 seqlen 9 directions 2"
    assert reasons[f"theirs, broken, {case}"] == "IndexError: list index out of range"
    assert reasons[f"theirs, NaN, warm, {case}"].startswith("its result errs by inf, above 4.0e-05")
    assert reasons[f"ours, off, cold, {case}"].endswith("above 1.0e-05; its time is dropped")
    assert [f.partition(", vim")[0] for f in report.failures] == [
        "ours, off, warm",
        "ours, off, cold",
    ]


def test_wrong_selections_have_no_time(
    clock: HostClock, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathers, "by_topk", lambda given, keep: [g[:, :keep] for g in given[1:]])
    gathers.run(report, clock, host_kernels(), (2, 9, 4, 5))
    assert {r.subject for r in lines(report, "row")} == {gathers.OURS, gathers.COPY}
    assert {a.subject.partition(",")[0] for a in lines(report, "absent")} == {"torch.topk"}
    assert not report.failures


@pytest.mark.parametrize("library", ["vssm", "vssm_emulated"])
def test_gathers(library: str, clock: HostClock, report: Report) -> None:
    kernels = VariantKernels(find_library(library), emulated=library == "vssm_emulated")
    gathers.run(report, clock, kernels, (3, 9, 4, 5))
    rows = lines(report, "row")
    assert {r.subject for r in rows} == {gathers.OURS, gathers.TORCH, gathers.COPY}
    # scores and positions, kept positions, and the kept rows read and written once
    assert rows[0].work == Work(bytes=3 * 9 * 4 + 9 * 4 + 3 * 5 * 4 + 2 * 2 * 3 * 5 * 4 * 2)


def test_compiled(clock: HostClock, report: Report) -> None:
    def made(given: list[dict[str, Tensor]]) -> Iterable[Contender]:
        return compiled.contenders(VIM, host_kernels(), given, compiler=lambda f: f)

    scans.case(report, clock, VIM, made)
    assert {r.subject for r in lines(report, "row")} == {"vssm auto", *compiled.RECURRENCES}


@pytest.mark.parametrize("schedule", [None, "1:0.5"])
def test_models(schedule: str | None, clock: HostClock, report: Report) -> None:
    exact = micro_oracle(schedule)
    found = models.Case("vim_tiny", schedule, 3, "float32")
    models.case(report, clock, found, exact, mamba_extension())
    rows = {r.subject: r for r in lines(report, "row")}
    assert set(rows) == {models.OURS, models.MAMBA}
    assert rows[models.OURS].case["kind"] == ("dense" if schedule is None else "pruned 1:0.5")
    assert all(r.error < 1e-5 for r in rows.values())


def test_models_with_torch_compile(
    clock: HostClock, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    found = models.Case("vim_tiny", None, 1, "float16", compiled=True)
    models.case(report, clock, found, micro_oracle(None), mamba_extension())
    rows = lines(report, "row")
    subjects = {models.OURS, models.COMPILED_SCAN, models.COMPILED_MODEL}
    assert {r.subject for r in rows} == subjects
    assert {r.case["kind"] for r in rows} == {"dense, torch.compile"}


def test_a_model_of_other_numbers_has_no_time(clock: HostClock, report: Report) -> None:
    exact = micro_oracle(None)
    wrong = models.Oracle(exact.model, exact.images, exact.logits * 1.001)
    models.case(report, clock, models.Case("vim_tiny", None, 1, "float32"), wrong, None)
    assert not lines(report, "row")
    assert len(report.failures) == 1


def test_halves_of_a_model_are_as_in_exports() -> None:
    model = micro_oracle(None).model
    twin = models.in_dtype(model, torch.float16)
    kinds = {name: p.dtype for name, p in twin.named_parameters()}
    assert kinds["layers.0.mixer.in_proj.weight"] == torch.float16
    assert kinds["layers.0.mixer.A_log"] == kinds["norm_f.weight"] == torch.float32
    assert model.head.weight.dtype == torch.float32
    assert {name: t.logits for name, t in TOLERANCES.items()} == models.LOGITS


def test_the_work_of_a_layer() -> None:
    """Vim-T at batch 128 by hand: PERFORMANCE's 84 us of exponentials at 3.7e12 a second."""
    layer = shapes.vim("vim_tiny", 1, "float16")
    work = layer.work(shapes.operands(layer, CPU))
    channels = 197 * 384
    assert work.exps == 2 * 16 * channels
    assert work.specials == work.exps + (2 * 2 + 2) * channels
    assert 1e6 * 128 * work.exps / 3.7e12 == pytest.approx(84, rel=0.01)
    streams = 2 * channels * (2 + 2 + 1 + 1) + 2 * 197 * 16 * 2 * 2
    weights = 4 * (2 * 384 * 16 + 2 * 384 * 2) + 4 * (2 * 197 * 2)
    assert work.bytes == streams + weights
    plain = shapes.plain_mamba_l3(1, "float16")
    assert plain.work(shapes.operands(plain, CPU)).exps == 16 * 196 * 896  # once for all four


def test_targets_come_first_and_every_shape_is_new() -> None:
    quick, full = list(scans.cases(quick=True)), list(scans.cases(quick=False))
    assert full[: len(quick)] == quick
    assert len(set(full)) == len(full)
    assert {(s.batch, s.seqlen, s.dtype) for s in full if s.model == "vim_small"} == {
        (b, n, d) for b in (1, 8, 32, 128) for n in (197, 157, 125, 101) for d in shapes.DTYPES
    }
    whole = list(models.cases(quick=False))
    assert len(set(whole)) == len(whole) == 2 * 2 * 4 * 3 + 2 * 2
    assert [c.compiled for c in whole] == [False] * 48 + [True] * 4  # compiling takes minutes
    assert whole[:6] == list(models.cases(quick=True))
    for case in whole:
        assert case.schedule is None or vssm.PruneSchedule.parse(case.schedule).ratios
    largest = [c for c in whole if (c.batch, c.dtype, c.compiled) == (128, "float16", False)]
    assert whole[:4] == largest


def test_what_is_over_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "find_baselines", lambda report: scans.Baselines())
    late = Report("scans", tmp_path / "found.jsonl", seconds=-1, quick=True)
    scans.run(late, HostClock())
    absent = lines(late, "absent")
    assert len(absent) == len(list(scans.cases(quick=True)))
    assert absent[0].subject == "vim_tiny float16 batch 128 seqlen 197 directions 2"
    assert absent[0].reason == "the stage's time was over"


def test_a_case_that_breaks_does_not_stop_the_others(report: Report) -> None:
    def run(shape: ScanShape) -> None:
        if shape is VIM:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
        report.absent(label(shape.case), "reached")

    report.each([VIM, PLAIN], run)
    assert [a.reason for a in lines(report, "absent")] == [
        "OutOfMemoryError: CUDA out of memory.",
        "reached",
    ]
    assert len(report.failures) == 1


def test_models_without_baselines(
    clock: HostClock, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    monkeypatch.setattr(
        models, "cases", lambda quick: [models.Case("vim_tiny", None, 2, "float32")]
    )
    monkeypatch.setattr(models, "oracle", lambda name, schedule, device: micro_oracle(schedule))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # put back afterwards
    models.run(report, clock)
    assert torch.backends.cudnn.allow_tf32 is False  # torch.export asks, too: no error
    assert [r.subject for r in lines(report, "row")] == [models.OURS]
    (absent,) = lines(report, "absent")
    assert absent.subject == models.MAMBA
    assert "mamba-ssm's kernel cannot be imported" in absent.reason


def test_the_oracle_of_a_model_leaves_the_model_alone() -> None:
    exact = models.oracle("vim_tiny", None, CPU)
    assert exact.logits.dtype == torch.float64
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}
    assert exact.model.backend == "auto"
