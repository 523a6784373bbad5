"""An environment that has what `pip install vssm` brings, and nothing else."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

from checkout import ROOT
from packaging.requirements import Requirement

_tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = _tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = [Requirement(line).name for line in PROJECT["dependencies"]]


def light_environment(home: Path, packages: Iterable[str]) -> Path:
    """Make a virtual environment in `home` that shows these packages of ours, with what they need.

    Links in place of an installation: half a second, and no network.

    Returns:
        Its site-packages.
    """
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python3*/site-packages")
    todo, seen = list(packages), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    return site
