"""An environment that has what `pip install vssm` brings, and nothing else."""

from __future__ import annotations

import importlib.metadata
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement


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
