"""`--key` and `--new-head` reach every command with `--checkpoint`, and what was done is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command import SHALLOW, Run
from exports import MICRO
from PIL import Image

import vssm


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of a model of 20 classes, beside those of a teacher."""
    wide = vssm.create_model("vim_tiny", **{**MICRO, "depth": 1, "num_classes": 20})
    state = {f"student.net.{key}": value for key, value in wide.state_dict().items()}
    state |= {f"teacher.{key}": value for key, value in wide.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def commands(folder: Path) -> dict[str, list[str]]:
    picture = folder / "pictures" / "a" / "a.png"
    picture.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    out = f"--output={folder / 'out'}"
    return {
        "export": ["export", *SHALLOW, out],
        "visualize": ["visualize", SHALLOW[0], str(picture), *SHALLOW[1:], out],
        "ablate": ["ablate", SHALLOW[0], str(picture.parents[1]), *SHALLOW[1:], out],
        "finetune": ["finetune", *SHALLOW, f"--data={picture.parents[1]}", out],
        "export-module": ["export-module", "vssm.models:create_model", out],
    }


@pytest.mark.parametrize("name", ["export", "visualize", "ablate", "finetune", "export-module"])
def test_every_command_has_them(cli: Run, tmp_path: Path, name: str) -> None:
    line = commands(tmp_path)[name]
    for given, word in (("--key=student", "key='student'"), ("--new-head", "new_head=True")):
        assert cli(*line, given) == 2
        assert f"{word} without a checkpoint; give --checkpoint FILE" in cli.out


@pytest.mark.parametrize("name", ["export", "visualize"])
def test_what_was_done_is_said(cli: Run, tmp_path: Path, checkpoint: Path, name: str) -> None:
    line = [*commands(tmp_path)[name], f"--checkpoint={checkpoint}"]
    assert cli(*line) == 2
    assert "several sets of this model's weights, under student.net and teacher" in cli.out
    assert cli(*line, "--key=state_dict.student") == 2
    assert "--new-head" in cli.out
    assert cli(*line, "--key=state_dict.student", "--new-head") == 0, cli.out
    for words in ("under 'state_dict.student'", "prefix 'net.' stripped", "(20, 20), left out"):
        assert words in cli.out
