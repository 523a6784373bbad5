"""The wheel of `make wheel` on every Python that it is for: `make wheel`, then `.venv/bin/nox`.

Each session installs the wheel with what it asks for, and runs it from an empty directory. An
interpreter that this machine lacks is skipped, and nox says so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
SUPPORT = ROOT / "tests/support"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

nox.needs_version = ">=2024.4.15"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"
nox.options.envdir = "build/nox"
# pyenv's own commands answer for versions that are not active, and then fail: its interpreters
# come before them.
_PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
_FOLDERS = [str(folder) for folder in sorted(_PYENV.glob("versions/3.*/bin"))]
os.environ["PATH"] = os.pathsep.join([*_FOLDERS, os.environ["PATH"]])


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Install the newest wheel in dist/, and run it."""
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        session.error("dist/ holds no wheel; run `make wheel` first")
    # An export needs torch, which is where nox itself runs; the wheel's environment has none.
    made = Path(session.create_tmp()).resolve()
    session.run(sys.executable, str(SUPPORT / "make_export.py"), str(made), external=True)
    session.install("--constraint", str(ROOT / "constraints.txt"), str(wheels[-1]))
    empty = made / "empty"
    empty.mkdir(exist_ok=True)
    session.chdir(empty)
    given = [str(made / name) for name in ("export", "bundle", "image.png")]
    apart = {"PYTHONPATH": None}  # which could show it a checkout
    session.run("python", "-W", "error", str(SUPPORT / "installed.py"), *given, env=apart)
