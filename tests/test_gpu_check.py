"""gpu_check without a GPU: its stages, its result file, its targets, its page and its refusal."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.gpu import check, gathers, models, needs, page, plan, result, scans, targets
from benchmarks.gpu.result import Absent, Ceilings, Document, Row, StageResult, Work
from benchmarks.gpu.stages import GRACE_S, SkippedError, Stage, run_stage, tail
from exporter.json_fields import FieldError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
RATES = Ceilings(ex2_per_s=1e12, copy_bytes_per_s=2e12, launch_us=2.0)


def stage(*commands: list[str], name: str = "one", limit: float = 30, **options: Any) -> Stage:
    return Stage(name, "a test", limit, limit, lambda _: commands, **options)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def ran(tested: Stage, folder: Path, *, quick: bool = False) -> StageResult:
    log = folder / "stage.log"
    return run_stage(tested, log, quick=quick, env=os.environ, cwd=folder)


def row(subject: str, microseconds: float, *, stage: str = "scans", **case: Any) -> Row:
    work = case.pop("work", Work())
    return Row(
        stage=stage,
        case=case,
        subject=subject,
        cache=case.pop("cache", "warm"),
        median_us=microseconds,
        p5_us=microseconds,
        p95_us=microseconds,
        samples=25,
        calls=4,
        error=0.0,
        allowed=1e-3,
        work=work,
    )


def document(**fields: Any) -> Document:
    started = "2026-11-21T00:00:00+00:00"
    return Document(started, "benchmarks/gpu_check.sh", quick=False, commit="abc", **fields)


def test_a_stage_ends_well_and_says_what_it_covered(tmp_path: Path) -> None:
    tested = stage(
        python("print('sampled 3 of 9 tests')"), python("pass"), keep=r"(?m)^sampled .*$"
    )
    ended = ran(tested, tmp_path)
    assert (ended.status, ended.reason, ended.log_tail) == ("ok", "sampled 3 of 9 tests", "")


def test_a_failing_command_fails_the_stage_and_stops_it(tmp_path: Path) -> None:
    after = tmp_path / "after"
    tested = stage(
        python("import sys; print('a reason\\x1b[0m'); sys.exit(3)"),
        python(f"open({str(after)!r}, 'w')"),
    )
    ended = ran(tested, tmp_path)
    assert ended.status == "failed"
    assert ended.reason.endswith("ended with exit code 3")
    assert ended.log_tail == "a reason[0m"
    assert not after.exists()


def test_a_crash_names_its_signal(tmp_path: Path) -> None:
    ended = ran(stage(python("import os; os.abort()")), tmp_path)
    assert ended.reason.endswith("ended with signal 6")


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    ended = ran(stage(["/nowhere/tool"]), tmp_path)
    assert ended.status == "failed"
    assert ended.reason == "/nowhere/tool cannot be started: No such file or directory"


def test_the_limit_ends_a_stage_and_all_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
        import subprocess, sys, time
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(child)!r}, "w").write(str(grandchild.pid))
        print("begun", flush=True)
        time.sleep(60)
    """
    start = time.monotonic()
    ended = ran(stage(python(code), limit=2), tmp_path)
    assert time.monotonic() - start < 2 + GRACE_S + 5
    assert (ended.status, ended.reason) == ("failed", "stopped at its limit of 2 s")
    assert ended.log_tail == "begun"
    assert not alive(int(child.read_text()))


def alive(process: int) -> bool:
    """Whether it still runs; a zombie that nobody has asked for does not."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_reasons_for_leaving_a_stage_out(tmp_path: Path) -> None:
    def refuse(_: float) -> list[list[str]]:
        raise SkippedError("no compute-sanitizer")

    left_out = ran(Stage("one", "a test", 10, 10, refuse), tmp_path)
    assert (left_out.status, left_out.reason) == ("skipped", "no compute-sanitizer")
    quick = ran(Stage("one", "a test", 10, 0, refuse), tmp_path, quick=True)
    assert (quick.status, quick.reason) == ("skipped", "left out by --quick")


def test_the_tail_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 20_000 + b"\n" + b"\xff\n" * 100)
    assert len(tail(log)) <= 6000
    assert len(tail(log).splitlines()) == 40


def test_the_limits_keep_a_run_short() -> None:
    stages = plan.plan(quick=False)
    assert sum(s.limit(False) for s in stages) <= 20 * 60
    assert sum(s.limit(True) for s in stages) <= 8 * 60
    assert len({s.name for s in stages}) == len(stages)
    assert set(plan.PROGRAMS) <= {s.name for s in stages}
    assert {s.needs for s in stages} == {None, "build"}


def test_the_commands_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "architecture", lambda: "90")
    monkeypatch.setattr(plan, "find_tool", lambda name: f"/tools/{name}")
    monkeypatch.setattr(plan, "_name_filter", lambda _: "--kernel-name")
    monkeypatch.delenv("MAMBA_SSM_SOURCE", raising=False)
    stages = {s.name: s for s in plan.plan(quick=True)}
    configure, build = stages["build"].commands(100)
    assert "-DVSSM_CUDA_ARCHITECTURES=90-real" in configure
    assert build[:2] == ["/tools/cmake", "--build"]
    (memcheck,) = stages["memcheck"].commands(60)
    assert memcheck[2:6] == ["/tools/compute-sanitizer", "--tool", "memcheck", "--error-exitcode"]
    assert memcheck[7:9] == ["--kernel-name", "kns=vssm"]
    assert memcheck[memcheck.index("--sample-seconds") + 1] == "36.0"
    (initcheck,) = stages["initcheck"].commands(60)
    assert "kns=vssm" not in initcheck  # the inputs that other kernels write count as well
    (program,) = stages["scans"].commands(40)
    assert program[-5:] == ["--out", str(plan.part_of("scans")), "--seconds", "24.0", "--quick"]
    with pytest.raises(SkippedError, match="MAMBA_SSM_SOURCE names no checkout"):
        stages["baseline"].commands(10)
    monkeypatch.setenv("MAMBA_SSM_SOURCE", "/nowhere")
    with pytest.raises(SkippedError, match="/nowhere has no csrc/selective_scan"):
        stages["baseline"].commands(10)
    monkeypatch.setattr(plan, "find_tool", lambda _: None)
    with pytest.raises(SkippedError, match="comes with the CUDA toolkit"):
        stages["racecheck"].commands(10)


def test_gpu_tests_are_found_by_their_mark(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text("pytestmark = pytest.mark.gpu\n")
    (folder / "test_b.py").write_text("from cuda_device import DEVICES\n")
    (folder / "test_c.py").write_text("import hypothesis\n")
    assert [f.name for f in plan.gpu_tests(tmp_path)] == ["test_a.py", "test_b.py"]
    assert any(f.name.startswith("test_cuda") for f in plan.gpu_tests())


def test_sampled_tests(tmp_path: Path) -> None:
    (tmp_path / "test_many.py").write_text(
        textwrap.dedent("""
        import time, pytest
        @pytest.mark.parametrize("i", range(6))
        def test_one(i):
            time.sleep(0.4)
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.sampling"]
    command += ["-p", "no:cacheprovider", "-c", str(plan._PYTEST), "--rootdir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        given = [*command, *options, str(tmp_path)]
        return subprocess.run(given, capture_output=True, text=True, env=env, check=False)

    cut = run("--sample-seconds", "1")
    assert cut.returncode == 0, cut.stdout
    ran_tests = int(cut.stdout.split("sampled ")[1].split()[0])
    assert 1 <= ran_tests <= 4
    assert "of 6 tests" in cut.stdout
    assert run("--sample-seconds", "-1").returncode == 5  # nothing was checked
    assert "sampled" not in run().stdout


def full_document() -> Document:
    """Every target measured: on the limit where there is an even number."""
    rows = []
    for name in ("vim_tiny", "vim_small"):
        work = Work(exps=80_000_000, specials=100_000_000, bytes=1)
        layer = {"model": name, "dtype": "float16"}
        for batch, seqlen, ours in ((128, 197, 140.0), (128, 157, 115.0), (128, 101, 77.0)):
            case = {**layer, "batch": batch, "seqlen": seqlen}
            rows.append(row("vssm auto", ours, **case, work=work))
        rows.append(row(scans.MAMBA, 280.0, **layer, batch=128, seqlen=197))
        rows.append(row("vssm auto", 5.0, **layer, batch=1, seqlen=197))
        rows.append(row(scans.MAMBA, 9.0, **layer, batch=1, seqlen=197))
        case = {"model": name, "kind": "dense", "dtype": "float16", "batch": 128}
        rows.append(row(models.OURS, 1350.0, stage="models", **case))
        rows.append(row(models.MAMBA, 4050.0, stage="models", **case))
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
    copy = "gather 128 x 197 x 384, keep 157, two tensors: time over 1.3 copies + 3 us"
    assert verdicts[copy] == (1.0, "met")
    topk = "the same gather: faster than torch.topk, sort and gather"
    assert verdicts[topk] == (3.75, "met")


def test_targets_without_numbers() -> None:
    empty = targets.evaluate(document())
    assert len(empty) == 18
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
    unfinished = page.page(document())
    assert "- finished: not finished" in unfinished
    assert "## Not measured" not in unfinished


def test_page_lists_every_row_and_stage() -> None:
    found = full_document()
    text = page.page(found)
    assert text.count("| warm |") == len(found.rows)
    assert "| scans | ok | 12 | 150 | - |" in text
    printed = io.StringIO()
    console = Console(width=200, file=printed)
    for shown in page.tables(found):
        console.print(shown)
    assert "missed" in printed.getvalue()
    assert "memcheck" not in printed.getvalue()
