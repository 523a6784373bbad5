"""Finds and loads the native libraries. Standard library only: both sides use it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import vssm
from vssm.errors import RuntimeUnavailableError

ORT_LIBRARY = "vssm_onnxruntime"


def find_library(name: str = ORT_LIBRARY) -> Path:
    """Path of the native library `name`, without prefix and suffix.

    Looks in `lib` of the installed package, then, in a source checkout, for the newest one that was
    built in `build` or in a folder of it. What lies deeper, such as builds for fuzzing, is for
    another machine or with checks.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    file = f"lib{name}.so"
    folders = [Path(folder) for folder in vssm.__path__]
    for folder in folders:
        if (folder / "lib" / file).is_file():
            return folder / "lib" / file
    built = [path for folder in folders for path in _built(folder.parents[1], file)]
    if not built:
        searched = ", ".join([*(str(f / "lib") for f in folders), *_build_folders(folders)])
        raise RuntimeUnavailableError(
            f"library={file} is in none of {searched}; build it with `make setup`, or "
            "`cmake -S . -B build && cmake --build build` in the checkout"
        )
    return max(built, key=lambda path: path.stat().st_mtime)


def _built(checkout: Path, file: str) -> Iterator[Path]:
    if (checkout / "CMakeLists.txt").is_file():
        for folder in ("", "*/"):
            yield from (checkout / "build").glob(f"{folder}plugins/**/{file}")


def _build_folders(folders: list[Path]) -> list[str]:
    return [
        str(f.parents[1] / "build") for f in folders if (f.parents[1] / "CMakeLists.txt").is_file()
    ]


@functools.lru_cache(maxsize=8)
def load_library(path: Path) -> ctypes.CDLL:
    """The library at `path`, loaded once.

    Raises:
        RuntimeUnavailableError: this machine cannot load it.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeUnavailableError(
            f"path={path} cannot be loaded ({error}); rebuild it on this machine with `make setup`"
        ) from error
