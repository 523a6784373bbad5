"""Bytes under a path that nobody can change, and libraries that stay what was read."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil

import pytest

from vssm.files.private import library_copy, private_path
from vssm.native_library import find_library
from vssm.runtimes.library import library_version


def test_the_bytes_are_there_and_nobody_changes_them():
    data = os.urandom(3 << 20)
    before = len(os.listdir("/proc/self/fd"))
    with private_path(data, "model.onnx") as path:
        with open(path, "rb") as file:
            assert file.read() == data
        with open(path, "r+b", buffering=0) as file:
            for change in (lambda: file.write(b"x"), lambda: os.truncate(file.fileno(), 1)):
                with pytest.raises(OSError, match="not permitted"):
                    change()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_library_runs_as_it_was_read(tmp_path):
    source = tmp_path / "lib.so"
    shutil.copyfile(find_library(), source)
    copy = library_copy(source)
    assert copy.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    source.write_bytes(b"something else")
    assert library_version(copy.path) == library_version(find_library())
    shutil.copyfile(find_library(), source)
    assert library_copy(source) == copy  # the same bytes are kept, and loaded, once
    assert ctypes.CDLL(copy.path)._handle == ctypes.CDLL(library_copy(source).path)._handle
    assert library_copy(find_library()).path == copy.path


def test_what_is_no_library_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a named pipe"):
        library_copy(tmp_path / "pipe")
