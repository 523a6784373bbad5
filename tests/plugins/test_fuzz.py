"""Random calls of the C ABI against float64."""

from __future__ import annotations

import os
import shutil
import subprocess

from checkout import ROOT

from vssm.native_library import find_library

SOURCE = ROOT / "tests/plugins/fuzz/fuzz.cpp"


def _run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_random_calls_are_as_in_float64(tmp_path):
    library = find_library("vssm")
    compiler = (os.environ.get("CXX") or shutil.which("c++") or "g++").split()
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", f"-I{ROOT}", f"-Wl,-rpath,{library.parent}"]
    _run(*compiler, *flags, SOURCE, library, "-o", program)
    assert "fuzz: 20000 calls on baseline" in _run(program, 1, 20_000)
