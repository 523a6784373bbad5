"""The command line, run in this process."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import typer.main
from exports import MICRO

from vssm.commands.main import main

SIZES = [f"--set={key}={json.dumps(value)}" for key, value in MICRO.items() if key != "num_classes"]
MODEL = ["vim_tiny", "--num-classes=7", *SIZES]
# For a test that needs no more than some export: it takes half of the time.
SHALLOW = [word.replace("depth=3", "depth=1") for word in MODEL]
# Made anew at each call otherwise, of the signatures of all commands: 70 ms.
_get_command = functools.cache(typer.main.get_command)


class Run:
    """Runs `vssm` in this process: `run(arguments)` gives the exit code.

    `raw` is what it said, `out` the same with single spaces.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.capsys, self.patch, self.out, self.raw = capsys, patch, "", ""
        patch.setattr(typer.main, "get_command", _get_command)

    def __call__(self, *arguments: object) -> int:
        self.patch.setattr(sys, "argv", ["vssm", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        else:
            code = 0
        captured = self.capsys.readouterr()
        self.raw = captured.out + captured.err
        self.out = " ".join(self.raw.split())
        return code
