"""How gpu_check runs its stages, what they start, and how tests are sampled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from benchmarks.gpu import plan
from benchmarks.gpu.stages import GRACE_S, SkippedError, Stage, tail
from checkout import PYTHONPATH, ROOT
from gpu_check_cases import alive, python, ran, stage


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
    assert ended.reason.endswith("ended with exit code 3: a reason[0m")
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
    ended = ran(stage(python(code), limit=4), tmp_path)
    assert time.monotonic() - start < 4 + GRACE_S + 5
    assert (ended.status, ended.reason) == ("failed", "stopped at its limit of 4 s: begun")
    assert ended.log_tail == "begun"
    assert not alive(int(child.read_text()))


def test_reasons_for_leaving_a_stage_out(tmp_path: Path) -> None:
    def refuse(_: float) -> list[list[str]]:
        raise SkippedError("no compute-sanitizer")

    def no_answer(_: float) -> list[list[str]]:
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    failed = ran(Stage("one", "a test", 10, 10, no_answer), tmp_path)
    assert failed.status == "failed"
    assert failed.reason.startswith("cannot begin: Command 'nvidia-smi' timed out")
    left_out = ran(Stage("one", "a test", 10, 10, refuse), tmp_path)
    assert (left_out.status, left_out.reason) == ("skipped", "no compute-sanitizer")
    quick = ran(Stage("one", "a test", 10, 0, refuse), tmp_path, quick=True)
    assert (quick.status, quick.reason) == ("skipped", "left out by --quick")


def test_the_tail_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 20_000 + b"\n" + b"\xff\n" * 100)
    assert len(tail(log)) <= 6000
    assert len(tail(log).splitlines()) == 40


def test_lines_of_the_log_that_make_a_failure(tmp_path: Path) -> None:
    """initcheck watches every kernel; only what it says of ours counts."""
    wrong = plan._IN_OUR_KERNELS
    read = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at {}"
    theirs = read.format("void at::native::vectorized_kernel<4>(int)+0x70")
    ours = read.format("void vssm::selective_scan_latency<float, 4, 4>(vssm::ScanParams)+0x1f0")
    summary = "========= ERROR SUMMARY: 1 error"
    good = stage(
        python(f"print({theirs!r}, {summary!r}, sep='\\n')"), keep=plan._SUMMARY, wrong=wrong
    )
    ended = ran(good, tmp_path)
    assert (ended.status, ended.reason) == ("ok", summary)
    ended = ran(stage(python(f"print({ours!r}, {summary!r}, sep='\\n')"), wrong=wrong), tmp_path)
    assert ended.status == "failed"
    assert ended.reason.startswith("1 lines such as '=========     at void vssm::selective_scan_la")


def test_the_limits_keep_a_run_short() -> None:
    stages = plan.plan(quick=False)
    names = [s.name for s in stages]
    assert names.index("scans") < names.index("memcheck")  # what the targets need comes first
    assert set(plan.GROUND) <= set(names)
    assert all(s.limit(False) + 60 <= 600 for s in stages)  # the start of a call of ten minutes
    without = [s for s in stages if s.name not in plan.TENSORRT]
    assert sum(s.limit(False) for s in without) <= 20 * 60
    assert sum(s.limit(False) for s in stages) <= 33 * 60
    assert sum(s.limit(True) for s in stages) <= 8 * 60
    assert len({s.name for s in stages}) == len(stages)
    assert set(plan.PROGRAMS) <= {s.name for s in stages}
    assert {s.needs for s in stages} == {None, "build"}


def test_the_commands_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "architecture", lambda: "90")
    monkeypatch.setattr(plan, "find_tool", lambda name: f"/tools/{name}")
    helps = {"text": "--kernel-name {key1=val1}"}
    monkeypatch.setattr(
        plan.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, helps["text"], ""),
    )
    monkeypatch.delenv("MAMBA_SSM_SOURCE", raising=False)
    stages = {s.name: s for s in plan.plan(quick=True)}
    configure, build, touch = stages["build"].commands(100)
    assert touch[-1] == configure[configure.index("-B") + 1]
    assert "-DVSSM_CUDA_ARCHITECTURES=90-real" in configure
    assert build[:2] == ["/tools/cmake", "--build"]
    (memcheck,) = stages["memcheck"].commands(60)
    assert memcheck[2:6] == ["/tools/compute-sanitizer", "--tool", "memcheck", "--error-exitcode"]
    assert memcheck[7:9] == ["--kernel-name", "kns=vssm"]
    assert memcheck[memcheck.index("--sample-seconds") + 1] == "36.0"
    assert not {"test_cuda_emulation.py", "test_tensorrt_plugin.py"} & {
        Path(f).name for f in memcheck
    }
    assert "not order_and_gap_of_any_value" not in " ".join(memcheck)
    (racecheck,) = stages["racecheck"].commands(60)
    assert "not order_and_gap_of_any_value" in racecheck[racecheck.index("-k") + 1]
    helps["text"] = "--kernel-regex {key1=val1}"
    assert plan._name_filter("tool") == ["--kernel-regex", "kns=vssm"]
    helps["text"] = "--filter"
    assert plan._name_filter("tool") == []
    (initcheck,) = stages["initcheck"].commands(60)
    assert "--error-exitcode" not in initcheck
    assert "kns=vssm" not in initcheck  # the inputs that other kernels write count as well
    (program,) = stages["scans"].commands(40)
    assert program[-5:] == ["--out", str(plan.part_of("scans")), "--seconds", "24.0", "--quick"]
    with pytest.raises(SkippedError, match="MAMBA_SSM_SOURCE names no checkout"):
        stages["baseline"].commands(10)
    monkeypatch.setenv("MAMBA_SSM_SOURCE", "/nowhere")
    with pytest.raises(SkippedError, match="/nowhere has no csrc/selective_scan"):
        stages["baseline"].commands(10)
    for module, package in (("tensorrt", "tensorrt"), ("cuda", "cuda-bindings")):
        monkeypatch.setattr(
            plan.importlib.util, "find_spec", lambda n, gone=module: n != gone or None
        )
        for name in plan.TENSORRT:
            with pytest.raises(
                SkippedError, match=f"{package}, of full TensorRT, is not installed"
            ):
                stages[name].commands(100)
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda _: True)
    (tests,) = stages["tensorrt"].commands(420)
    assert "--slow" in tests
    assert tests[tests.index("--sample-seconds") + 1] == "300"
    assert "test_tensorrt_engines.py" in {Path(f).name for f in tests}
    assert not any("test_tensorrt_engines.py" in part for part in memcheck)
    (program,) = stages["engines"].commands(360)
    assert program[program.index("--seconds") + 1] == "240"
    monkeypatch.setattr(plan, "find_tool", lambda _: None)
    with pytest.raises(SkippedError, match="comes with the CUDA toolkit"):
        stages["racecheck"].commands(10)


def test_what_the_stages_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    monkeypatch.setattr(plan, "find_tool", lambda _: str(nvcc))
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("PYTHONPATH", "/other")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    env = plan.environment()
    assert env["PATH"] == f"/bin:{Path(sys.executable).parent}:{nvcc.parent}"
    assert env["PYTHONPATH"] == f"{ROOT}:/other"
    assert env["CUDA_HOME"] == str(nvcc.parent.parent)


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
        @pytest.mark.parametrize("i", range(8))
        def test_one(i):
            time.sleep(0.5)
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.sampling"]
    command += ["-p", "no:cacheprovider", "-c", str(plan._PYTEST), "--rootdir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        given = [*command, *options, str(tmp_path)]
        return subprocess.run(given, capture_output=True, text=True, env=env, check=False)

    cut = run("--sample-seconds", "2.5")
    assert cut.returncode == 0, cut.stdout
    ran_tests = int(cut.stdout.split("sampled ")[1].split()[0])
    assert 1 <= ran_tests <= 6
    assert "of 8 tests" in cut.stdout
    assert run("--sample-seconds", "-1").returncode == 5  # nothing was checked
    assert "sampled" not in run().stdout
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    assert run("--sample-seconds", "9").returncode == 2  # no excuse for that


def test_gpu_tests_need_few_packages(tmp_path: Path) -> None:
    """They load with what a machine with a GPU has: no Pillow, polygraphy, ONNX Runtime."""
    absent = ("hypothesis", "PIL", "polygraphy", "matplotlib", "sklearn", "onnxruntime")
    blocker = "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocker}", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [*plan._pytest(60), "--collect-only"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, check=False, timeout=300
    )
    assert done.returncode in {0, 5}, done.stdout + done.stderr  # 5: the sample is empty
    assert "ERROR" not in done.stdout
    assert "test_cuda_gather.py::" in done.stdout
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert all(line.endswith("is not installed") for line in skipped)
