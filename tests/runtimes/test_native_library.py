"""Which of several builds in a source checkout is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vssm
from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library


def test_the_newest_build_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vssm, "__path__", [str(tmp_path / "exporter" / "vssm")])
    (tmp_path / "CMakeLists.txt").touch()
    with pytest.raises(RuntimeUnavailableError, match=r"libvssm\.so is in none of .*make setup"):
        find_library("vssm")
    # A build for fuzzing has sanitizers or is for another processor, be it the newest.
    for age, folder in enumerate(["fuzz/aarch64/plugins", "plugins", "wheel/plugins"]):
        library = tmp_path / "build" / folder / "libvssm.so"
        library.parent.mkdir(parents=True)
        library.touch()
        os.utime(library, (1000 - age, 1000 - age))
    assert find_library("vssm") == tmp_path / "build/plugins/libvssm.so"
    (tmp_path / "build/wheel/plugins/libvssm.so").touch()
    assert find_library("vssm") == tmp_path / "build/wheel/plugins/libvssm.so"
