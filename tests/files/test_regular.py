"""Files that a user names: regular ones, of a size; nothing else is waited for or read."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from vssm.files.regular import open_regular, read_regular


def test_a_regular_file_is_opened_at_its_beginning(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with open_regular(path, limit=3) as file:
        assert file.read() == b"abc"
        assert not os.get_inheritable(file.fileno())
    assert read_regular(str(path), limit=3) == b"abc"
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", limit=3) == b"abc"


def test_a_file_beyond_its_limit_is_refused_unread(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes, more than the 1,000"):
        open_regular(path, limit=1000)


def test_a_size_that_is_not_that_of_the_content_is_refused():
    # The size of files in /proc is 0 whatever they hold.
    with pytest.raises(OSError, match="size changed"):
        read_regular("/proc/self/status", limit=5)


@pytest.mark.timeout(10)
def test_nothing_but_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for name, kind in (
            (tmp_path, "a directory"),
            (tmp_path / "pipe", "a named pipe"),
            (tmp_path / "link", "a named pipe"),
            (tmp_path / "socket", "a socket"),
            ("/dev/zero", "a device"),
        ):
            with pytest.raises(OSError, match=f"{kind}, not a regular file"):
                open_regular(name, limit=1 << 30)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent", limit=1)


@pytest.mark.timeout(10)
def test_a_name_that_changes_its_meaning_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: status)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="a named pipe"):
        open_regular(path, limit=10)
    assert len(os.listdir("/proc/self/fd")) == before
    assert stat.S_ISFIFO(os.lstat(path).st_mode)
