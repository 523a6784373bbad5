"""A directory put in place: exchanged or moved, interrupted at every step, raced, swept."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkout import PYTHONPATH, ROOT
from crashes import tree

from vssm.errors import ArtifactError
from vssm.files import staging
from vssm.files.atomic import atomic_path
from vssm.files.staging import settle, staged_directory, sweep

_CRASHES = """
import shutil, sys
from pathlib import Path
from crashes import crashes, forked, tree
from vssm.files import staging
from vssm.files.staging import settle, staged_directory

case, folder = sys.argv[1], Path(sys.argv[2])
out = folder / "out"
OLD = {"a": b"old", "b": b"old", "last": b"old"}
NEW = {"a": b"new", "c": b"new", "last": b"new"}
MINE = {"mine": b"mine", "sub": None, "sub/mine": b"mine"} if case == "others" else {}
if case == "unsupported":
    real = staging._rename
    staging._rename = lambda a, b, flag: flag != staging._EXCHANGE and real(a, b, flag)


def write(content):
    with staged_directory(out, replaceable=lambda _: ("a", "b", "c", "last"), last="last") as new:
        for name, data in content.items():
            (new / name).write_bytes(data)


def prepare():
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if case != "absent":
        write(OLD)
    for name, data in MINE.items():
        (out / name).mkdir() if data is None else (out / name).write_bytes(data)


def check(crash):
    before = tree(out) if out.is_dir() else None
    if case in {"exchanged", "absent"}:  # whole at any time, whoever looks
        assert before in ({**OLD} if case == "exchanged" else None, {**NEW}), (crash, before)
    if out.is_dir():
        settle(out)
        assert tree(out) in ({**OLD, **MINE}, {**NEW, **MINE}), (crash, tree(out))
    write(NEW)
    assert tree(out) == {**NEW, **MINE}, (crash, tree(out))
    assert [p.name for p in folder.iterdir()] == ["out"], crash


total = 0
for crash in crashes(lambda: write(NEW), prepare):
    check(crash)
    total = crash
print(total)
"""


@pytest.mark.parametrize("case", ["absent", "exchanged", "others", "unsupported"])
def test_a_crash_at_every_step(tmp_path, case):
    """The old or the new directory is whole, and the next run leaves nothing behind."""
    environment = {**os.environ, "PYTHONPATH": f"{PYTHONPATH}:{ROOT / 'tests/support'}"}
    command = [sys.executable, "-c", _CRASHES, case, str(tmp_path / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6


def write(out, *, foreign=(), **content):
    ours = ("a", "b", "last")
    with staged_directory(out, replaceable=lambda _: ours, last="last") as new:
        for name in foreign:
            (out / name).write_text("mine")
        for name, text in content.items():
            (new / name).write_text(text)


def test_an_exchange_is_one_step_and_keeps_the_mode(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, a="old", last="old")
    out.chmod(0o750)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("moved one by one"))
    write(out, b="new", last="new")
    assert tree(tmp_path) == {"out": None, "out/b": b"new", "out/last": b"new"}
    assert out.stat().st_mode & 0o777 == 0o750


def test_the_current_directory_stays_the_same_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, a="old", last="old")
    before = out.stat().st_ino
    monkeypatch.chdir(out)
    write(".", b="new", last="new")
    assert out.stat().st_ino == before
    assert tree(tmp_path) == {"out": None, "out/b": b"new", "out/last": b"new"}


def test_what_comes_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    write(out, a="old", last="old")
    write(out, foreign=["mine"], b="new", last="new")
    assert tree(out) == {"b": b"new", "last": b"new", "mine": b"mine"}


def test_two_at_once_into_a_new_directory(tmp_path):
    out = tmp_path / "out"

    def loses():
        with staged_directory(out, replaceable=lambda _: (), last="last") as new:
            (new / "last").write_text("loser")
            write(out, last="winner")

    with pytest.raises(ArtifactError, match=r"out was written by another process meanwhile.*force"):
        loses()
    assert tree(tmp_path) == {"out": None, "out/last": b"winner"}


@pytest.mark.parametrize("inside", [False, True])
def test_two_at_once_into_an_empty_directory(tmp_path, inside):
    out = tmp_path / "out"
    out.mkdir()
    if inside:
        (out / "mine").write_text("mine")

    def replaceable(final):
        if (final / "last").exists():
            raise ArtifactError("there is one already")
        return ()

    def loses():
        with staged_directory(out, replaceable=replaceable, last="last") as new:
            (new / "last").write_text("loser")
            with staged_directory(out, replaceable=replaceable, last="last") as other:
                (other / "last").write_text("winner")

    with pytest.raises(ArtifactError, match=r"another process meanwhile.*: there is one already"):
        loses()
    assert (out / "last").read_text() == "winner"
    assert len(tree(tmp_path)) == 2 + inside


def test_a_staged_tree_replaces_what_it_may_and_is_synced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))

    def write(*names: str) -> None:
        with staged_directory(out, replaceable=lambda _: ["lib", "last"], last="last") as staging:
            for name in names:
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_text(name)

    write("lib/a", "last")
    (out / "mine").write_text("mine")
    synced.clear()
    write("lib/b", "model/c", "last")
    assert set(tree(out)) == {"lib", "lib/b", "model", "model/c", "last", "mine"}
    assert {p.stat().st_ino for p in out.rglob("*") if p.name != "mine"} <= set(synced)
    with pytest.raises(ArtifactError, match="holds mine, which is not ours to overwrite"):
        write("mine")
    assert (out / "lib/b").read_text() == "lib/b"


def leave(folder: Path, name: str) -> Path:
    left = folder / f".{name}.vssm-0123456789ab"
    (left / "new").mkdir(parents=True)
    (left / "new" / "a").write_text("half")
    return left


def test_what_dead_processes_left_is_swept_and_what_lives_is_not(tmp_path):
    dead, living = leave(tmp_path, "out"), leave(tmp_path, "other")
    (tmp_path / ".file.vssm-0123456789ab").write_text("half")
    for kept in (".out.vssm-0123456789a", "out.vssm-0123456789ab", ".vssm-0123456789ab"):
        (tmp_path / kept).write_text("not ours")
    (tmp_path / ".link.vssm-0123456789ab").symlink_to(tmp_path / ".out.vssm-0123456789a")
    os.mkfifo(tmp_path / ".pipe.vssm-0123456789ab")
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = set(tree(tmp_path))
    with atomic_path(tmp_path / "mine") as mine:
        sweep(tmp_path)
        assert mine.exists()
    gone = {dead.name, f"{dead.name}/new", f"{dead.name}/new/a", ".file.vssm-0123456789ab"}
    assert set(tree(tmp_path)) == before - gone | {"mine"}
    os.close(descriptor)
    write(tmp_path / "x", last="1")
    assert not living.exists()


def test_a_folder_that_another_program_has_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_PATIENCE", 0.05)
    left = leave(tmp_path, "out")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write(tmp_path / "out", last="1")
    assert left.exists()
    assert (tmp_path / "out/last").read_text() == "1"
    os.close(descriptor)


@pytest.mark.parametrize(
    ("names", "moved"), [('["../victim", "/etc/x", ".", ""]', "old"), ("{", "old"), ("7", "old")]
)
def test_a_hostile_journal_reaches_nothing_outside(tmp_path, names, moved):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim").write_text("outside")
    left = leave(out, "new")
    (left / moved).mkdir()
    (left / "journal").write_text(names)
    settle(out)
    assert (tmp_path / "victim").read_text() == "outside"


def test_a_journal_whose_folders_are_links(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    left = leave(out, "new")
    (left / "old").symlink_to(elsewhere)
    (left / "journal").write_text("[]")
    settle(out)
    assert (elsewhere / "secret").read_text() == "secret"
    assert not (out / "secret").exists()


def test_writers_and_sweepers_at_the_same_time(tmp_path):
    """Nobody sweeps what another thread or process is writing."""
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for turn in range(20):
                write(tmp_path / name, a=str(turn), last=name)
                sweep(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"out{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out{i}" for i in range(4)]
