"""Engines of full TensorRT with our plugins, on a GPU: built, proved and loaded by the command."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorrt_build import ROOT, real_library

SCHEDULE = ("--schedule", "5:0.8,10:0.8,15:0.8")
FAMILIES = ("vim_tiny", "vim_small", "plain_mamba_l1", "vmamba_tiny_s1l8", "groupmamba_tiny")
PRUNES = {"vim_tiny", "vim_small", "plain_mamba_l1"}
EXPORTS = [
    pytest.param(name, dtype, pruned, id=f"{name} {dtype} {'pruned' if pruned else 'dense'}")
    for name in FAMILIES
    for dtype in ("float32", "float16", "bfloat16")
    for pruned in ((False, True) if name in PRUNES else (False,))
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt") is None,
        reason="full TensorRT is not installed: pip install tensorrt cuda-bindings",
    ),
]


def _vssm(*arguments: object, **variables: str) -> None:
    """The command in a process of its own, which must succeed: `check` fails when parity does."""
    code = "import sys; from exporter.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"vssm {arguments}: {done.returncode}\n{done.stdout}{done.stderr}")


@pytest.mark.parametrize(("name", "dtype", "pruned"), EXPORTS)
def test_engine_agrees_with_pytorch(name: str, dtype: str, pruned: bool, tmp_path: Path) -> None:
    """Any batch of the profile; the session replays a CUDA graph for each."""
    real_library()
    out = tmp_path / "out"
    _vssm("export", name, *(SCHEDULE if pruned else ()), "--dtype", dtype, "-o", out)
    _vssm("engine", out, "--batch", "1,4,8")
    _vssm("check", out, "--runtime", "tensorrt")


def test_engine_carries_its_plugins(tmp_path: Path) -> None:
    """Loaded in a process that has no plugin library of its own."""
    real_library()
    out = tmp_path / "out"
    _vssm("export", "vim_tiny", *SCHEDULE, "--dtype", "float16", "-o", out)
    _vssm("engine", out, "--batch", "1,4,8", "--serialize-plugins")
    _vssm("run", out, ROOT / "examples" / "data" / "digit_7.png", "--runtime", "tensorrt")
