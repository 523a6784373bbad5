"""Names that are no friend of a terminal, in every place that a command takes one from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import PYTHONPATH
from command import MODEL, Run
from exports import micro, shared_traces
from PIL import Image
from rich.table import Table
from safetensors.torch import save_file

import vssm
from vssm.files.terminal import Terminal

# Turns red, clears the screen, sets the title, turns the direction, hides, is no text.
HOSTILE = "x\x1b[31m\x1b[2J\x1b]0;t\x07\u202etxt\u2066\u200b\x9b1m"
SHOWN = r"x\x1b[31m\x1b[2J\x1b]0;t\x07\u202etxt\u2066\u200b\x9b1m"
SURROGATE = "bad\udcff"  # what Python makes of the byte 0xFF in a file's name


def clean(run: Run) -> bool:
    """Whether nothing that it said is invisible or controls the terminal."""
    return not [c for c in run.raw if unicodedata.category(c)[0] == "C" and c != "\n"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in a folder of a hostile name."""
    folder = tmp_path_factory.mktemp("export") / HOSTILE
    with shared_traces():
        return vssm.export(micro(), folder).directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 class folders and images of hostile names, one damaged image among them."""
    root = tmp_path_factory.mktemp("pictures") / HOSTILE
    for label in range(7):
        folder = root / f"{label}{HOSTILE}"
        folder.mkdir(parents=True)
        pixels = np.full((50, 50, 3), 30 * label, np.uint8)
        Image.fromarray(pixels).save(folder / f"{HOSTILE}.png")
    (root / f"0{HOSTILE}" / f"{HOSTILE}damaged.png").write_bytes(b"no image")
    return root


def test_runs_on_hostile_names(cli: Run, out: Path, pictures: Path, tmp_path: Path) -> None:
    image = pictures / f"0{HOSTILE}" / f"{HOSTILE}.png"
    odd = tmp_path / f"{SURROGATE}.png"
    shutil.copyfile(image, odd)
    bundle = tmp_path / HOSTILE
    for command, code in (
        (("check", out), 0),
        (("run", out, image, odd, "--json", tmp_path / "run.json"), 0),
        (("evaluate", out, pictures, "--results", tmp_path / "all.csv"), 0),
        (("visualize", out, image, "-o", tmp_path / f"seen{HOSTILE}"), 0),
        (("bundle", out, "-o", bundle), 0),
        (("bundle", "--verify", bundle), 0),
    ):
        assert cli(*command) == code, (command[0], cli.raw)
        assert clean(cli), (command[0], cli.raw)
    page = next((tmp_path / f"seen{HOSTILE}").glob("*.html")).read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e", "\u200b"} & set(page)


def test_images_whose_names_are_no_text(
    cli: Run, out: Path, pictures: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(pictures, tmp_path / "odd"))
    (odd / f"0{HOSTILE}" / f"{SURROGATE}.png").write_bytes(b"")
    assert cli("evaluate", out, odd, "--results", tmp_path / "all.csv") == 2
    assert clean(cli)
    assert r"bad\udcff.png" in cli.out


def test_refusals_name_what_they_refuse(cli: Run, out: Path, tmp_path: Path) -> None:
    """Every error is one line that shows the name, escaped, and the exit code is 2."""
    hostile, odd = tmp_path / f"{HOSTILE}\nfake: passed", tmp_path / SURROGATE
    weights = tmp_path / "keys.safetensors"
    save_file({HOSTILE: torch.zeros(1)}, weights)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([HOSTILE, *"bcdefg"]), encoding="utf-8")
    hostile.write_bytes(b"no file of any kind")
    odd.write_bytes(b"no file of any kind")
    new = tmp_path / "new"
    for command in (
        ("check", hostile),
        ("check", odd),
        ("run", hostile, hostile),
        ("run", out, hostile),
        ("run", out, odd),
        ("run", out, odd, "--labels", odd),
        ("bench", odd),
        ("engine", odd),
        ("evaluate", out, hostile),
        ("evaluate", odd, odd),
        ("bundle", odd, "-o", new),
        ("bundle", "--verify", odd),
        ("bundle", out, "-o", new, "--name", HOSTILE),
        ("bundle", out, "-o", new, "--labels", labels),
        ("visualize", out, odd, "-o", new),
        ("ablate", odd, odd, "-o", new),
        ("finetune", *MODEL, "--data", odd, "-o", new),
        ("export", HOSTILE, "-o", new),
        ("export", *MODEL, "-o", new, "--checkpoint", weights),
        ("export", *MODEL, "-o", new, "--checkpoint", odd),
        ("export", *MODEL, "-o", new, "--checkpoint", hostile),
        ("export", *MODEL, "-o", new, "--labels", labels),
        ("export", *MODEL, "-o", new, "--labels", odd),
        ("export", *MODEL, "-o", odd),
        ("export-module", f"{HOSTILE}:x", "-o", new),
    ):
        assert cli(*command) == 2, (command, cli.raw)
        assert clean(cli), (command, cli.raw)
        assert any(part in cli.out for part in (SHOWN[:4], r"bad\udcff", "export-module")), (
            command,
            cli.raw,
        )
        assert "\nfake: passed" not in cli.raw
        assert "codec" not in cli.raw


def test_hostile_texts_in_model_json(cli: Run, out: Path, tmp_path: Path) -> None:
    document = json.loads((out / "model.json").read_text())
    for field, value in (
        ("name", HOSTILE),
        ("labels", [HOSTILE, *"bcdefg"]),
        ("dtype", HOSTILE),
        ("weights", SURROGATE),
        ("versions", {HOSTILE: "1"}),
        ("files", {HOSTILE: "0" * 64}),
        ("outputs", [{**document["outputs"][0], "name": HOSTILE}]),
    ):
        folder = tmp_path / field
        shutil.copytree(out, folder)
        (folder / "model.json").write_text(json.dumps({**document, field: value}))
        for command in (("check", folder), ("bundle", folder, "-o", tmp_path / "new")):
            assert cli(*command) == 2, cli.raw
            assert clean(cli), cli.raw
            assert field in cli.out


@shared_traces()
def test_a_checkpoint_of_an_odd_name(cli: Run, tmp_path: Path) -> None:
    weights = tmp_path / f"{SURROGATE}.safetensors"
    save_file(dict(micro(None).state_dict()), tmp_path / "plain")
    (tmp_path / "plain").rename(weights)
    out = tmp_path / "out"
    assert cli("export", *MODEL, "-o", out, "--checkpoint", weights) == 0, cli.raw
    assert clean(cli)
    assert r"bad\udcff.safetensors" in cli.out
    document = json.loads((out / "model.json").read_text())
    assert document["checkpoint"]["file"] == r"bad\udcff.safetensors"


def test_a_fault_shows_no_control_characters(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from vssm.runtimes import doctor

    def fails(*_: Any, **__: Any) -> None:
        raise KeyError(HOSTILE + SURROGATE)

    monkeypatch.setattr(doctor, "examine", fails)
    assert cli("doctor") == 3
    assert clean(cli)
    assert "Traceback" in cli.out


def test_whatever_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    console = Terminal(width=100)
    table = Table("name")
    table.add_row(HOSTILE)
    for what in (HOSTILE, Text(HOSTILE + SURROGATE), Text.assemble((HOSTILE, "red")), table):
        console.print(what)
    console.print(HOSTILE, soft_wrap=True)
    said = capsys.readouterr().out
    assert not [c for c in said if unicodedata.category(c)[0] == "C" and c != "\n"]
    assert said.count(SHOWN) == 3
    assert said.count(SHOWN.replace(r"\x07", "")) == 2  # a Text has lost its bells before
    widths = {len(line) for line in said.splitlines() if line[:1] in "┃│┏└┡"}
    assert len(widths) == 1  # escapes are part of the layout


def test_termination_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM while an export is written ends it as an interrupt does."""
    command = [sys.executable, "-m", "vssm.commands.main", "export", *MODEL, "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 300
        while not list(tmp_path.iterdir()) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []
