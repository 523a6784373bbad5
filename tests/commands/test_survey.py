"""`--survey` and `--dry-run`: what becomes of a model, without an export or in its own process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Run

from vssm.commands.survey import _MARK, _work

Capture = pytest.CaptureFixture[str]

MODEL = """
import os
import time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind="scan", width=4):
        super().__init__()
        from mamba_ssm import Mamba
        self.kind = kind
        self.mixer = Mamba(width, d_state=2) if kind == "scan" else nn.Linear(width, width)

    def forward(self, x):
        if self.kind == "dies":
            os._exit(7)
        if self.kind == "sleeps":
            time.sleep(600)
        return {"logits": self.mixer(x).mean(1), "features": x}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "surveyed"
    folder.mkdir()
    (folder / "surveyed_net.py").write_text(MODEL)
    yield folder
    # What one test imports in this process is another file than the next one's.
    sys.modules.pop("surveyed_net", None)


def test_dry_run_says_what_would_be_exported(
    cli: Run, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vssm.compat.export.trace_module", None)
    target, result = f"{repository}/surveyed_net.py:Net", tmp_path / "dry.json"
    options = ("--input", "1x5x4", "--dry-run", "--json", str(result))
    assert cli("export-module", target, *options) == 0, cli.out
    assert "would export: 1 selective scans" in cli.out
    assert "logits 1x4, features 1x5x4" in cli.out
    found = json.loads(result.read_text())
    assert found["outputs"] == {"logits": [1, 4], "features": [1, 5, 4]}
    assert cli("export-module", target, *options, "--set", "kind=linear") == 2
    assert "calls no selective scan" in cli.out
    assert cli("export-module", target, "--input", "1x5x4") == 2
    assert "-o DIR is missing" in cli.out


def test_a_row_of_a_model(repository: Path, tmp_path: Path, capsys: Capture) -> None:
    """What the process of an entry does, in this one: the last line says it all."""
    entry = {"name": "a scan", "target": "surveyed_net.py:Net", "input": "1x5x4"}
    good = _work(entry, repository, tmp_path / "a_scan", None)
    assert (good["reached"], good["scans"], good.get("why_not")) == ("agrees", 1, None)
    assert good["error"] < 2e-5
    assert (good["mixers"], good["blocks"]) == (1, 1)
    assert good["cpu_seconds"] > 0
    assert good["gigabytes"] > 0
    assert (tmp_path / "a_scan" / "model.onnx").is_file()
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last.removeprefix(_MARK)) == good


def test_survey_tells_every_model_apart(cli: Run, repository: Path, tmp_path: Path) -> None:
    dies = {"name": "dies", "target": "surveyed_net.py:Net", "input": "1x5x4"}
    survey, result = repository / "survey.json", tmp_path / "rows.json"
    survey.write_text(json.dumps([{**dies, "set": {"kind": "dies"}}]))
    options = ("--survey", str(survey), "-o", str(tmp_path / "out"), "--json", str(result))
    assert cli("export-module", *options) == 0, cli.out
    (row,) = json.loads(result.read_text())
    assert row["reached"] == "imports and builds"
    assert row["why_not"] == "it ended with 7"
    page = (tmp_path / "out" / "survey.md").read_text()
    assert page.count("\n") == 3
    # As many seconds as a process takes to begin, at least; none sleeps that long.
    survey.write_text(json.dumps([{**dies, "set": {"kind": "sleeps"}}]))
    assert cli("export-module", *options, "--time-limit", "1") == 0, cli.out
    assert json.loads(result.read_text())[0]["why_not"] == "not finished after 1 s"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "not a list of objects"),
        ('[{"name": "a"}]', "has no ['target']"),
        ('[{"name": "a", "target": "b:c", "size": 3}]', "'a' has ['size']; the keys are"),
        ('[{"name": "a", "target": "b:c"}, {"name": "a", "target": "b:c"}]', "have one name"),
    ],
)
def test_survey_file_is_checked_first(cli: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "survey.json").write_text(text)
    options = ("--survey", str(tmp_path / "survey.json"), "-o", str(tmp_path / "out"))
    assert cli("export-module", *options) == 2
    assert message in cli.out
    assert not (tmp_path / "out").exists()
