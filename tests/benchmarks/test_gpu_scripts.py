"""The scripts of benchmarks/gpu on the CPU: the same code, small shapes, wall time.

The CPU's kernels stand in for CUDA's, the oracle for mamba-ssm's extension, stand-ins for TensorRT
and ONNX Runtime's CUDA session. What these times are is of no interest: that lines are written,
results checked and wrong ones dropped is.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import compiled, engines, gathers, models, ort, scans, shapes, timing
from benchmarks.gpu.models import Case
from benchmarks.gpu.native import VariantKernels
from benchmarks.gpu.report import label
from benchmarks.gpu.scans import Contender
from benchmarks.gpu.shapes import ScanShape
from benchmarks.gpu.timing import HostClock
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from gpu_check_cases import (
    CROSS,
    GROUP,
    PLAIN,
    PRUNED,
    VIM,
    Recorded,
    mamba_extension,
    micro_oracle,
)
from torch import Tensor

import vssm
from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library
from vssm.parity.compare import TOLERANCES
from vssm.runtimes.tensorrt import build as tensorrt_build

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HostClock:
    """Short samples, and a cache that two copies are too large for."""
    monkeypatch.setattr(timing, "SAMPLE_US", 0.01)
    found = HostClock()
    found.cache_bytes = 1
    return found


@pytest.fixture
def report() -> Recorded:
    return Recorded()


@functools.cache
def host_kernels() -> VariantKernels:
    return VariantKernels(find_library("vssm"))


def contenders(shape: ScanShape, given: list[dict[str, Tensor]]) -> list[Contender]:
    """What the script takes, but for Triton; the CPU's kernels have no variants."""
    found = [scans.ours(shape, given, host_kernels())]
    if shape is PLAIN:
        found.append(scans._separate(shape, given, host_kernels()))
    if shape.model.startswith("vim"):
        found.append(scans._mamba(given, mamba_extension()))
    return found


@pytest.mark.parametrize("shape", [VIM, PRUNED, PLAIN, CROSS, GROUP], ids=lambda s: s.model)
def test_scans(shape: ScanShape, clock: HostClock, report: Recorded) -> None:
    scans.case(report, clock, shape, functools.partial(contenders, shape))
    subjects = {"vssm auto"}
    subjects |= {scans.SEPARATE} if shape is PLAIN else set()
    subjects |= {scans.MAMBA} if shape.model.startswith("vim") else set()
    expected = {(s, c) for s in subjects for c in ("warm", "cold")}
    assert {(r["subject"], r["cache"]) for r in report.found} == expected
    assert all(r["samples"] >= 20 and r["case"] == shape.case for r in report.found)
    assert not report.failures
    assert len(report.lines) == len(report.found)


def test_the_contenders_of_a_scan() -> None:
    """Both variants and the automatic choice, and each baseline where it knows the shape."""

    def names(shape: ScanShape, triton: object = None) -> list[str]:
        given = [shapes.operands(shape, CPU)]
        baselines = scans.Baselines(mamba=mamba_extension(), triton=triton)
        made = scans._contenders(shape, given, kernels=host_kernels(), baselines=baselines)
        return [contender.name for contender in made]

    ours = ["vssm auto", "vssm throughput", "vssm latency"]
    assert names(VIM) == [*ours, scans.MAMBA]
    assert names(PLAIN, object()) == [*ours, scans.SEPARATE, scans.TRITON]
    assert names(CROSS) == ours


def test_wrong_numbers_have_no_time(clock: HostClock, report: Recorded) -> None:
    def made(given: list[dict[str, Tensor]]) -> list[Contender]:
        right = scans.ours(VIM, given, host_kernels())
        return [
            right,
            Contender("ours, off", lambda i: right.call(i) * 1.01),
            Contender("theirs, NaN", lambda i: right.call(i) * float("nan"), ours=False),
            Contender("theirs, broken", lambda _: given[99], ours=False),
        ]

    scans.case(report, clock, VIM, made)
    assert report.subjects == {"vssm auto"}
    reasons = report.absent_ones
    case = "vim_tiny float32 batch 2 seqlen 9 directions 2"
    assert reasons[f"theirs, broken, {case}"] == "IndexError: list index out of range"
    assert reasons[f"theirs, NaN, warm, {case}"].startswith("its result errs by inf, above 4.0e-05")
    assert reasons[f"ours, off, cold, {case}"].endswith("above 1.0e-05; its time is dropped")
    assert [f.partition(", vim")[0] for f in report.failures] == [
        "ours, off, warm",
        "ours, off, cold",
    ]


def test_gathers(clock: HostClock, report: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    gathers.run(report, clock, host_kernels(), (3, 9, 4, 5))
    timed = {(row["case"]["operator"], row["subject"]) for row in report.found}
    assert timed == {
        (operator, subject)
        for operator in (gathers.GATHER, gathers.SCATTER)
        for subject in (gathers.OURS, gathers.TORCH[operator], gathers.COPY[operator])
    }
    # Scores and positions, kept positions, and the kept rows read and written once; positions, and
    # all rows read, from one of the two, and written.
    moved = {
        gathers.GATHER: 3 * 9 * 4 + 9 * 4 + 3 * 5 * 4 + 2 * 2 * 3 * 5 * 4 * 2,
        gathers.SCATTER: 3 * 5 * 4 + 2 * 3 * 9 * 4 * 2,
    }
    for row in report.found:
        work = {"exps": 0, "specials": 0, "bytes": moved[row["case"]["operator"]]}
        assert row["work"] == work
    report.lines.clear()
    monkeypatch.setattr(gathers, "by_topk", lambda given, keep: [g[:, :keep] for g in given[1:]])
    monkeypatch.setattr(gathers, "by_scatter", lambda given: given[0])
    gathers.run(report, clock, host_kernels(), (2, 9, 4, 5))
    assert report.subjects == {gathers.OURS, *gathers.COPY.values()}
    wrong = {name.partition(",")[0] for name in report.absent_ones}
    assert wrong == {"torch.topk", "torch.scatter"}
    assert not report.failures


def test_compiled(clock: HostClock, report: Recorded) -> None:
    def made(given: list[dict[str, Tensor]]) -> list[Contender]:
        return list(compiled.contenders(VIM, host_kernels(), given, compiler=lambda f: f))

    scans.case(report, clock, VIM, made)
    assert report.subjects == {"vssm auto", *compiled.RECURRENCES}


@pytest.mark.parametrize("schedule", [None, "1:0.5"])
def test_models(schedule: str | None, clock: HostClock, report: Recorded) -> None:
    found = Case("vim_tiny", schedule, 3, "float32")
    models.case(report, clock, found, micro_oracle(schedule), mamba_extension())
    rows = {row["subject"]: row for row in report.found}
    assert set(rows) == {models.OURS, models.MAMBA}
    kind = "dense" if schedule is None else "pruned 1:0.5"
    assert rows[models.OURS]["case"]["kind"] == kind
    assert all(row["error"] < 1e-5 for row in rows.values())


def test_models_with_torch_compile(
    clock: HostClock, report: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    found = Case("vim_tiny", None, 1, "float16", compiled=True)
    models.case(report, clock, found, micro_oracle(None), mamba_extension())
    assert report.subjects == {models.OURS, models.COMPILED_SCAN, models.COMPILED_MODEL}
    assert {row["case"]["kind"] for row in report.found} == {"dense, torch.compile"}


def test_models_without_baselines(
    clock: HostClock, report: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    monkeypatch.setattr(models, "cases", lambda: [Case("vim_tiny", None, 2, "float32")])
    monkeypatch.setattr(models, "oracle", lambda name, schedule, device: micro_oracle(schedule))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # put back afterwards
    models.run(report, clock)
    assert torch.backends.cudnn.allow_tf32 is False  # torch.export asks, too: no error
    assert report.subjects == {models.OURS}
    assert "mamba-ssm's kernel cannot be imported" in report.absent_ones[models.MAMBA]


def test_a_model_of_other_numbers_has_no_time(clock: HostClock, report: Recorded) -> None:
    exact = micro_oracle(None)
    wrong = models.Oracle(exact.model, exact.images, exact.logits * 1.001)
    models.case(report, clock, Case("vim_tiny", None, 1, "float32"), wrong, None)
    assert not report.found
    assert len(report.failures) == 1


def test_halves_of_a_model_are_as_in_exports() -> None:
    model = micro_oracle(None).model
    twin = models.in_dtype(model, torch.float16)
    kinds = {name: p.dtype for name, p in twin.named_parameters()}
    assert kinds["layers.0.mixer.in_proj.weight"] == torch.float16
    assert kinds["layers.0.mixer.A_log"] == kinds["norm_f.weight"] == torch.float32
    assert model.head.weight.dtype == torch.float32
    assert {name: t.logits for name, t in TOLERANCES.items()} == models.LOGITS


class StandInSession:
    """What `ort.py` asks of a session with a GPU, without one."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def on_device(self, images: Any) -> StandInSession:
        self.batch = len(images)
        return self

    def device_ms(self, samples: int) -> list[float]:
        return [0.25] * samples

    def outputs(self) -> dict[str, Any]:
        return {"logits": self.logits.repeat(self.batch, 1)[: self.batch].float().numpy()}


def test_ort(report: Recorded) -> None:
    exact = micro_oracle(None)
    ort._measure(report, StandInSession(exact.logits), Case("m", None, 3, "float16"), exact)
    wrong = StandInSession(exact.logits * 1.1)
    ort._measure(report, wrong, Case("m", None, 3, "float16"), exact)
    (row,) = report.found
    assert (row["subject"], row["median_us"], row["samples"]) == (ort.SUBJECT, 250, timing.SAMPLES)
    assert len(report.failures) == 1


class Anywhere(dict[int, Any]):
    """Memory that PyTorch took, not the stand-in for CUDA."""

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and address > 0


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    cuda = FakeCuda()
    cuda.memory = Anywhere()
    package = FakeTensorRT(cuda)
    package.__spec__ = ModuleSpec("tensorrt", None)  # the exporter looks for what is installed
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    monkeypatch.setattr(tensorrt_build, "find_library", lambda _: find_library("vssm_onnxruntime"))
    return package


@pytest.mark.parametrize("schedule", [None, "1:0.5"], ids=["dense", "pruned"])
def test_engines(
    trt: FakeTensorRT, report: Recorded, clock: HostClock, tmp_path: Path, schedule: str | None
) -> None:
    found = Case("m", schedule, 3, "float16")
    engines.case(report, clock, found, micro_oracle(schedule), tmp_path)
    (row,) = report.found
    assert (row["subject"], row["case"]) == (engines.SUBJECT, found.case)
    assert not report.failures
    assert trt.configs[-1].profile.shapes["images"] == [(3, 3, 32, 32)] * 3
    assert trt.loaded  # with the plugins, or there would be no engine
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"


def test_a_wrong_engine_gives_no_time_and_each_is_tried(
    trt: FakeTensorRT, report: Recorded, clock: HostClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "oracle", lambda name, schedule, device: micro_oracle(None))
    real = engines.Engine.__call__
    monkeypatch.setattr(engines.Engine, "__call__", lambda self, i: 1.1 * real(self, i))
    cases = list(engines.cases())
    assert len(cases) == 6
    monkeypatch.setattr(engines, "cases", lambda: cases[1:2])
    engines.run(report, clock)
    assert not report.found
    assert "its result errs by" in report.failures.pop()
    trt.fail_build = True
    monkeypatch.setattr(engines, "cases", lambda: [cases[1], cases[4]])
    engines.run(report, clock)
    assert len(report.failures) == 2
    assert all("could not find any implementation" in text for text in report.failures)


def test_the_work_of_a_layer() -> None:
    """Vim-T by hand: at batch 128, 84 us of exponentials at 3.7e12 a second."""
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


def test_the_most_valuable_come_first_and_every_shape_is_new() -> None:
    layers = list(scans.cases())
    assert all(shape.dtype == "float16" for shape in layers[:9])
    assert len(set(layers)) == len(layers)
    assert {(s.batch, s.seqlen, s.dtype) for s in layers if s.model == "vim_small"} == {
        (b, n, d) for b in (1, 8, 32, 128) for n in (197, 157, 125, 101) for d in shapes.DTYPES
    }
    whole = list(models.cases())
    assert len(set(whole)) == len(whole) == 2 * 2 * 4 * 3 + 2 * 2
    assert [c.compiled for c in whole] == [False] * 48 + [True] * 4  # compiling takes minutes
    for case in whole:
        assert case.schedule is None or vssm.PruneSchedule.parse(case.schedule).ratios


def test_what_is_over_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "find_baselines", lambda report: scans.Baselines())
    late = Recorded(seconds=-1)
    scans.run(late, HostClock())
    assert len(late.absent_ones) == len(list(scans.cases()))
    first = "vim_tiny float16 batch 128 seqlen 197 directions 2"
    assert late.absent_ones[first] == "the -1 seconds were over"


def test_a_case_that_breaks_does_not_stop_the_others(report: Recorded) -> None:
    def run(shape: ScanShape) -> None:
        if shape is VIM:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
        report.absent(label(shape.case), "reached")

    report.each([VIM, PLAIN], run)
    assert list(report.absent_ones.values()) == [
        "OutOfMemoryError: CUDA out of memory.",
        "reached",
    ]
    assert len(report.failures) == 1


def test_the_library_of_the_cards_limits() -> None:
    try:
        library = ctypes.CDLL(str(find_library("vssm_gpu_bench")))
    except RuntimeUnavailableError as error:
        pytest.skip(f"built where there is a CUDA compiler: {error}")
    assert library.vssm_gpu_threads() == 256
    assert library.vssm_gpu_ex2_per_block() == 8 * 256
    assert library.vssm_gpu_nothing(None) == (0 if torch.cuda.is_available() else 1)
