"""What the commands write, refuse to write, and show; many images; a fault's exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import MODEL, SHALLOW, Run
from exports import exported, micro, shared_traces
from finetune_cases import write_pictures


def test_what_cannot_be_written_is_refused_at_once(
    cli: Run, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link.json"
    link.symlink_to("/dev/null")
    monkeypatch.setattr("vssm.parity.check.check_parity", None)  # not reached
    for path, reason in (
        (tmp_path, "not a regular file"),
        (link, "not a regular file"),
        (tmp_path / "no/x.json", "its directory is not there"),
    ):
        assert cli("check", tmp_path, "--json", path) == 2
        assert reason in cli.out
    assert link.is_symlink()


def test_nothing_is_written_among_the_images(cli: Run, tmp_path: Path) -> None:
    """The next run, or a stopped one that goes on, would take it for a class or an image."""
    out = exported(tmp_path, micro()).directory
    data = write_pictures(tmp_path / "data")
    link = tmp_path / "link"
    link.symlink_to(data)
    before = sorted(data.rglob("*"))
    results = [str(tmp_path / f"{n}.csv") for n in "ab"]
    for file in results:
        Path(file).write_text("")
    cases: dict[str, list[object]] = {
        "source": ["predict", out, data, "-o", data / "n1" / "found.parquet"],
        "data": ["finetune", *MODEL, "--data", data, "-o", link / "trained"],
        "val": ["finetune", *MODEL, "--data", out, "--val", data, "-o", data / "trained"],
        "images": ["ablate", out, data, "-o", data / "ablation"],
        "train": ["ablate", out, out, "--train", data, "-o", data / "new" / "ablation"],
    }
    compare = ["compare", *results, "--images", data, "-o", data]
    quantize = ["quantize", out, data, "-o", data / "int8"]
    for name, arguments in [*cases.items(), ("images", compare), ("images", quantize)]:
        assert cli(*arguments) == 2
        assert f"is inside {name}={data}, so that the next run" in cli.out, cli.out
    assert sorted(data.rglob("*")) == before


def test_a_check_shows_its_result_where_it_cannot_be_kept(cli: Run, tmp_path: Path) -> None:
    out = exported(tmp_path, micro()).directory
    (out / "parity.json").mkdir()  # as on a read-only file system
    assert cli("check", out) == 0
    assert "parity.json was not written" in cli.out
    assert "passed" in cli.out


def test_many_images_run_in_parts_and_names_stay_as_they_are(
    cli: Run, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.runtimes.ort import OrtCpuSession

    sizes: list[int] = []
    good = OrtCpuSession.run

    def counted(session: OrtCpuSession, x: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(x))
        return good(session, x)

    monkeypatch.setattr(OrtCpuSession, "run", counted)
    names = ["one", ":smile:", "[red]three[/]", "four", "five", "six", "seven"]
    out = exported(tmp_path, micro(), labels=names).directory
    odd = tmp_path / "[b]ü[" / "nothing].png"
    odd.parent.mkdir()
    odd.write_bytes(picture.read_bytes())
    assert cli("run", out, *[odd] * 20, "--top=7") == 0
    assert sizes == [16, 4]
    assert "[red]three[/]" in cli.out
    assert ":smile:" in cli.out
    assert "[b]ü[/nothing].png" in cli.out
    assert cli("export", *MODEL, "--checkpoint", odd, "-o", tmp_path / "x") == 2
    assert "[b]ü[/nothing].png" in cli.out


def test_logits_that_are_no_numbers_are_no_answer(
    cli: Run, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.runtimes.ort import OrtCpuSession

    out = exported(tmp_path, micro(None)).directory
    nothing = {"logits": np.full((1, 7), np.nan, np.float32)}
    monkeypatch.setattr(OrtCpuSession, "run", lambda *_: nothing)
    assert cli("run", out, picture) == 2
    assert "picture.png has logits that are NaN or infinite" in cli.out
    nothing["logits"] = np.full((4, 7), np.nan, np.float32)
    assert cli("check", out, "--json", tmp_path / "check.json") == 1
    strict = json.loads((tmp_path / "check.json").read_text(), parse_constant=pytest.fail)
    assert strict["free_logits"]["error"] == "inf"


def test_a_fault_is_no_failed_check(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> None:
        raise RuntimeError("loose screw")

    monkeypatch.setattr("vssm.models.describe_models", fault)
    assert cli("models") == 3
    assert "loose screw" in cli.out
    assert "please report it" in cli.out


def test_memory_that_ran_out_is_no_fault(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("vssm.models.describe_models", fails)
    assert cli("models") == 2
    assert "error: not enough memory (RuntimeError: [enforce fail" in cli.out
    assert "take a smaller model" in cli.out


@shared_traces()
def test_a_new_export_takes_the_old_reports_away(cli: Run, tmp_path: Path) -> None:
    out = exported(tmp_path, micro()).directory
    for report in ("parity.json", "bench.json", "bench.html"):
        (out / report).write_text("of the old export")
    assert cli("export", *SHALLOW, "-o", out, "--force") == 0
    assert {p.name for p in out.iterdir()} == {"model.json", "model.onnx", "weights.safetensors"}


def test_titles_are_as_wide_as_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from vssm.commands.tables import show, table

    title = "wider than its table"
    show(table(title, ("a", "b"), [(1, 2)]))
    assert capsys.readouterr().out.splitlines()[0] == title


def test_tables_fit_a_terminal(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vssm.bench.measure import BenchReport, MachineRates, Timing
    from vssm.commands.tables import bench_tables, console, show

    row = Timing(
        "ort kernel, dense", 8, 2, 1234.56, 1300.1, 1200.0, 21, 1234.5, 123.45, 10.01, "", 1e-7
    )
    report = BenchReport(
        [row], MachineRates(1e9, 1e9, {2: 1e9}), {"MatMul": 1.0}, None, {"cpu": "x"}
    )
    monkeypatch.setattr(console, "width", 80)
    show(*bench_tables(report))
    lines = capsys.readouterr().out.splitlines()
    assert any("ort kernel, dense" in line and "1e-07" in line for line in lines)
    assert max(map(len, lines)) <= 80
