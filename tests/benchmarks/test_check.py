"""gpu_check without a GPU: the whole run over stand-in stages, and its refusal to start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import check, needs, result
from benchmarks.gpu.result import StageResult
from checkout import PYTHONPATH, ROOT
from gpu_check_cases import RATES, alive, python, row, stage

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """check.py with its files in a temporary folder, and without a card's name."""
    monkeypatch.setattr(check, "WORK", tmp_path / "work")
    monkeypatch.setattr(check, "part_of", lambda name: tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(check, "_card", lambda: "NVIDIA H100 80GB HBM3")
    return tmp_path


def findings(folder: Path, name: str, *lines: dict[str, Any]) -> list[str]:
    """A command that writes what a program would."""
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    return python(f"open({str(folder / f'{name}.jsonl')!r}, 'w').write({text!r})")


def test_partial_results_are_kept(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = dataclasses.asdict(row("vssm auto", 5.0, model="vim_tiny", batch=1))
    lines = [{"machine": {"gpu": "a card"}}, {"ceilings": dataclasses.asdict(RATES)}]
    stages = [
        stage(python("pass"), name="build"),
        stage(findings(checkout, "ceilings", *lines), name="ceilings", needs="build"),
        stage(
            findings(checkout, "scans", {"row": good}),
            python("print('illegal memory access'); raise SystemExit(1)"),
            name="scans",
            needs="build",
        ),
        stage(python("raise SystemExit(1)"), name="gathers"),
    ]
    monkeypatch.setattr(check, "plan", lambda quick: stages)
    assert check.main(["--output", str(checkout / "results")]) == 1
    (path,) = (checkout / "results").glob("*.json")
    assert path.name.startswith("nvidia-h100-80gb-hbm3-2")
    found = result.load(path)
    assert [s.status for s in found.stages] == ["ok", "ok", "failed", "failed"]
    assert found.stages[2].log_tail == "illegal memory access"
    assert [r.median_us for r in found.rows] == [5.0]
    assert found.machine == {"card": "NVIDIA H100 80GB HBM3", "gpu": "a card"}
    assert found.ceilings == RATES
    assert found.finished is not None
    assert "# gpu_check on a card" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_going_on_with_a_result(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = dataclasses.asdict(row("vssm auto", 5.0, model="vim_tiny"))
    stages = [
        stage(python("raise SystemExit(1)"), name="build"),
        stage(findings(checkout, "scans", {"row": good}), name="scans", needs="build"),
    ]
    monkeypatch.setattr(check, "plan", lambda quick: stages)
    output = ["--output", str(checkout / "results")]
    assert check.main([*output, "--only", "build"]) == 1
    (path,) = (checkout / "results").glob("*.json")
    assert [s.reason for s in result.load(path).stages][1] == "not in --only"
    again = ["--into", str(path), "--only", "scans"]
    assert check.main(again) == 1
    reason = "it needs the stage build, which failed"
    assert [s.reason for s in result.load(path).stages][1] == reason
    stages[0] = stage(python("pass"), name="build")
    assert check.main(["--into", str(path), "--only", "build,scans"]) == 0
    assert check.main(again) == 0
    found = result.load(path)
    assert [s.status for s in found.stages] == ["ok", "ok"]
    assert len(found.rows) == 1
    monkeypatch.setattr(check, "_card", lambda: "NVIDIA H200")
    assert check.main(again) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "its card is NVIDIA H100 80GB HBM3, not NVIDIA H200 as here; start a new one" in shown
    monkeypatch.undo()
    path.write_text(path.read_text(encoding="utf-8").replace('"commit": "', '"commit": "x'))
    assert check.main(again) == 2


def test_a_run_in_several_calls(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each call starts what fits into its time, and the next goes on, on a machine made anew."""
    log = checkout / "log"

    def noted(name: str) -> list[str]:
        return python(f"open({str(log)!r}, 'a').write({name + ' '!r})")

    limits = {"build": 20, "tests": 30, "baseline": 10, "scans": 60, "gathers": 5, "slow": 1e6}
    stages = [stage(noted(name), name=name, limit=limit) for name, limit in limits.items()]
    stages[2] = dataclasses.replace(stages[2], quick_s=0)
    monkeypatch.setattr(check, "plan", lambda quick: stages)
    path = checkout / "results" / "one.json"
    calls = [
        ("build tests ", ["--quick", "--only", "build,tests,baseline"]),
        ("build baseline gathers ", ["--rest", "--seconds", "40"]),
        ("build baseline scans ", ["--rest", "--seconds", "100"]),
        ("build baseline ", ["--rest", "--seconds", "100"]),
    ]
    for expected, options in calls:
        log.unlink(missing_ok=True)
        assert check.main(["--into", str(path), *options]) == 0
        assert log.read_text() == expected
    found = result.load(path)
    assert [s.name for s in found.stages] == list(limits)
    assert [s.status for s in found.stages] == ["ok"] * 5 + ["skipped"]
    assert found.stages[-1].reason == check.NO_TIME
    assert "not run yet: slow; --into this file --rest" in capsys.readouterr().out
    wide = ["--only", "slow", "--limit", "30", "--seconds", "40"]
    assert check.main(["--into", str(path), *wide]) == 0
    assert log.read_text() == "build baseline slow "
    assert result.load(path).stages[-1].limit_s == 30
    stages.pop()
    found.stages.pop()
    found.write(path)
    log.unlink()
    assert check.main(["--into", str(path), "--rest"]) == 0
    assert not log.exists()


def test_a_stopped_run_leaves_a_result(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"row": dataclasses.asdict(row("vssm auto", 5.0, model="vim_tiny"))}
    findings_path = checkout / "scans.jsonl"

    def interrupted(*_: Any, **__: Any) -> StageResult:
        findings_path.write_text(f"{json.dumps(good)}\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "plan", lambda quick: [stage(name="scans")])
    monkeypatch.setattr(check, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.main(["--output", str(checkout / "results")])
    (path,) = (checkout / "results").glob("*.json")
    found = result.load(path)
    assert found.stages[0].reason == "did not end: the run was stopped"
    assert len(found.rows) == 1
    assert found.finished is None


def test_a_run_that_is_told_to_end_takes_its_stage_along(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
        import pathlib, sys
        sys.path.insert(0, {str(ROOT / "tests/support")!r})
        from benchmarks.gpu import check
        from gpu_check_cases import python, stage
        check.WORK = pathlib.Path({str(tmp_path / "work")!r})
        asleep = "import os, time; open({str(child)!r}, 'w').write(str(os.getpid()))"
        asleep += "; time.sleep(60)"
        check.plan = lambda quick: [stage(python(asleep), name="slow")]
        check.main(["--output", {str(tmp_path / "results")!r}])
    """
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    running = subprocess.Popen(python(code), env=env, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if child.is_file() and child.read_text():
            break
        time.sleep(0.1)
    running.terminate()
    assert running.wait(timeout=60) == 128 + 15
    assert not alive(int(child.read_text()))
    (path,) = (tmp_path / "results").glob("*.json")
    (ended,) = result.load(path).stages
    assert ended.reason == "did not end: the run was stopped"


@pytest.mark.parametrize("line", ['{"row": {', '{"row": {"stage": "scans"}}', '{"other": 1}'])
def test_findings_that_are_wrong(
    line: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = python(f"open({str(checkout / 'scans.jsonl')!r}, 'w').write({line!r})")
    monkeypatch.setattr(check, "plan", lambda quick: [stage(code, name="scans")])
    assert check.main(["--output", str(checkout / "results")]) == 1
    (path,) = (checkout / "results").glob("*.json")
    assert result.load(path).stages[0].reason.startswith("unreadable findings: ")


def test_bad_usage(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--limit", "100"]) == 2
    assert "--limit=100.0: it needs --only, and seconds above 0" in capsys.readouterr().out
    assert check.main(["--only", "scams"]) == 2
    assert "no stage scams; see --list" in capsys.readouterr().out
    (checkout / "other.json").write_text('{"format": "other"}')
    assert check.main(["--into", str(checkout / "other.json")]) == 2
    assert "is no result of gpu_check: format='other'" in capsys.readouterr().out
    assert check.main(["--list"]) == 0
    assert "racecheck" in capsys.readouterr().out


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)
    listed = script("--list", PATH=os.environ["PATH"])
    assert listed.returncode == 0, listed.stderr
    assert "memcheck" in listed.stdout


def script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=given, check=False
    )


@pytest.mark.skipif(needs.find_tool("nvidia-smi") is not None, reason="there is a driver here")
def test_the_script_stops_where_there_is_no_gpu() -> None:
    start = time.monotonic()
    stopped = script("--quick")
    assert time.monotonic() - start < 20
    assert stopped.returncode == 2
    assert "cannot run here, for want of" in stopped.stderr
    assert "an NVIDIA GPU and its driver (nvidia-smi is not in the PATH)" in stopped.stderr
    assert not list((ROOT / "benchmarks").glob("results/gpu-*"))


def test_the_script_names_a_python_that_is_not_there() -> None:
    stopped = script(PYTHON="/nowhere/python")
    assert stopped.returncode == 2
    assert "PYTHON=/nowhere/python is missing or older than 3.10" in stopped.stderr


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(needs, "find_tool", lambda name: None if name == "ninja" else name)
    monkeypatch.setattr(
        needs.importlib.util, "find_spec", lambda name: name != "onnxscript" or None
    )
    answers = {"nvidia-smi": "GPU 0: a card", sys.executable: "torch 2.13 finds no CUDA device"}
    monkeypatch.setattr(needs, "_output", lambda command: answers[command[0]])
    assert list(needs.missing()) == [
        "a PyTorch that can use the GPU (torch 2.13 finds no CUDA device)",
        "ninja, for the build",
        f"the Python package onnxscript, for export ({sys.executable})",
    ]
    assert needs.main() == 2
    assert "ninja, for the build" in capsys.readouterr().err
    answers["nvidia-smi"] = ""
    assert next(needs.missing()) == "an NVIDIA GPU (nvidia-smi -L lists none)"
    monkeypatch.setattr(needs, "missing", lambda: iter(()))
    assert needs.main() == 0
