"""Writing all or nothing."""

from __future__ import annotations

import hashlib
import os
import stat

import pytest
from crashes import tree

from vssm.errors import ArtifactError
from vssm.files.atomic import atomic_path, atomic_write_bytes, sha256_of


def test_sha256_of_reads_in_pieces(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "b")


def test_atomic_write(tmp_path):
    atomic_write_bytes(tmp_path / "a", b"one")
    atomic_write_bytes(tmp_path / "a", b"two")
    assert tree(tmp_path) == {"a": b"two"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_file_on_errors(tmp_path, error):
    atomic_write_bytes(tmp_path / "a", b"old")

    def half():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        half()
    assert tree(tmp_path) == {"a": b"old"}


def test_atomic_write_to_a_place_that_is_none(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "absent" / "a", tmp_path / "file" / "a", tmp_path / "directory"):
        with pytest.raises(ArtifactError, match=f"output={path} cannot be written .*; name"):
            atomic_write_bytes(path, b"x")
    assert tree(tmp_path) == {"file": b"", "directory": None}
