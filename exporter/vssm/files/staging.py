"""A directory's content put in place as one: a reader finds the old or the new one, whole.

What is being written lies in a hidden work directory, `.NAME.vssm-ID`, which its process locks for
as long as it lives. A new directory appears by one rename. One that holds nothing else than what is
replaced is exchanged with the new one in one step, where the system can do that (Linux's
renameat2). Otherwise entries are moved one by one, under a journal that the next process to look at
the directory undoes if this one is killed. Work directories whose process is gone are deleted by
the next run in the same place.

Standard library only: both sides of the package use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from vssm.errors import ArtifactError
from vssm.files.regular import JSON, read_regular

_CANNOT_STORE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# As `_hidden` makes them: what does not match is never swept.
_WORK: Final = re.compile(r"\..+\.vssm-[0-9a-f]{12}")
_NEW, _OLD, _JOURNAL = "new", "old", "journal"
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2
_AT_FDCWD: Final = -100
_PATIENCE: Final = 1.0  # seconds that another process may hold the lock of a folder


def unwritable(path: Path, error: OSError) -> ArtifactError:
    """The error of a file or directory that cannot be written."""
    reason = error.strerror or str(error)
    return ArtifactError(
        f"output={path} cannot be written ({reason}); name a directory that you may write to, "
        "on a disk with room"
    )


@contextlib.contextmanager
def staged_directory(
    target: str | os.PathLike[str], *, replaceable: Callable[[Path], Collection[str]], last: str
) -> Iterator[Path]:
    """Yield an empty directory; what was written there takes its place in `target` on success.

    Args:
        target: the directory to write; its missing parents are made.
        replaceable: is asked of a `target` that is there; answers which entries of it may go, and
            raises ArtifactError where it must not be written to. Other entries are never touched.
        last: the entry that says what the directory is. Where entries are moved one by one, it
            goes first and comes last, so that nobody takes a mixture for a whole.

    Raises:
        ArtifactError: `target` is no directory, holds a foreign entry of the same name as a new
            one, was written by another process meanwhile, or cannot be written. Nothing was
            changed then.
    """
    final = Path(target).absolute()
    if final.is_dir():
        final = Path(os.path.realpath(final))  # a link stays, and what it leads to is replaced
        settle(final)
    sweep(final.parent)
    ours = _replaceable(final, replaceable)
    made = [] if ours is not None else _make_parents(final)
    try:
        with _work_directory(final, inside=ours is not None and not _all_ours(final, ours)) as work:
            yield work / _NEW
            # Before it is shown: a name must not survive a loss of power that its bytes did not.
            sync_tree(work / _NEW)
            _put_in_place(work, final, replaceable, exists=ours is not None, last=last)
    except BaseException as error:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _CANNOT_STORE:
            raise unwritable(final, error) from error
        raise


def sweep(folder: Path) -> None:
    """Delete what killed processes left half written in a folder; what still runs is left alone.

    Work inside an export or a bundle is for `settle`, which may have to undo it first.
    """
    for path in _dead(folder):
        if not (path / _JOURNAL).exists():
            _delete(path)


def settle(directory: Path) -> None:
    """Undo what a killed process has half moved inside `directory`, and delete what it left.

    Does nothing while that process lives, or where the directory cannot be written.
    """
    for path in _dead(directory):
        with contextlib.suppress(OSError):
            _undo(path, directory)
        if not (path / _JOURNAL).exists():
            _delete(path)


@contextlib.contextmanager
def held_name(path: Path) -> Iterator[Path]:
    """A new file under a hidden name beside `path`, locked; gone at the end, unless renamed."""
    hidden = _hidden(path)
    with _locked(path.parent):
        # A user's umask decides the mode, as it does for every other file; mkstemp would give 0600.
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _lock(descriptor)
    try:
        yield hidden
    finally:
        _delete(hidden)  # unless it was renamed
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for everything below a folder, and for the folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _replaceable(
    final: Path, replaceable: Callable[[Path], Collection[str]]
) -> Collection[str] | None:
    """The entries of `final` that may go; None if there is no `final` yet."""
    if not os.path.lexists(final):
        return None
    if not final.is_dir():
        raise ArtifactError(f"output={final} is not a directory; name another path")
    return replaceable(final)


def _make_parents(final: Path) -> list[Path]:
    """Make the missing parents of `final`; return them, outermost first."""
    missing = [parent for parent in final.parents if not parent.exists()][::-1]
    for i, parent in enumerate(missing):
        try:
            parent.mkdir()
        except OSError as error:
            for made in reversed(missing[:i]):
                made.rmdir()
            raise unwritable(final, error) from error
    return missing


def _all_ours(final: Path, ours: Collection[str]) -> bool:
    """Whether `final` may be exchanged whole: it holds nothing else, and can be renamed."""
    if set(os.listdir(final)).difference(ours) or final.is_mount() or _is_current(final):
        return False
    return os.access(final.parent, os.W_OK | os.X_OK)


def _is_current(final: Path) -> bool:
    """Whether a shell may stand in it, which would go on in the directory that was taken away."""
    try:
        return os.path.samefile(final, os.curdir)
    except OSError:
        return False


@contextlib.contextmanager
def _work_directory(final: Path, *, inside: bool) -> Iterator[Path]:
    """A locked work directory with an empty `new` in it; deleted at the end, wherever it is then.

    Inside an existing directory where that stays: from the parent of a mount point nothing can be
    renamed into it.
    """
    work = _hidden(final / _NEW if inside else final)
    try:
        with _locked(work.parent):
            work.mkdir()
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(descriptor)
    except OSError as error:
        raise unwritable(final, error) from error
    try:
        (work / _NEW).mkdir()
        yield work
    finally:
        # `_put_in_place` may have moved it inside. Where a journal is left, undoing has failed, and
        # the next process needs all of it to try again.
        for path in (work, final / work.name):
            if path.is_dir() and not (path / _JOURNAL).exists():
                _delete(path)
        os.close(descriptor)


def _put_in_place(
    work: Path,
    final: Path,
    replaceable: Callable[[Path], Collection[str]],
    *,
    exists: bool,
    last: str,
) -> None:
    """Show what was staged under `final`; it is asked once more what may be replaced there."""
    try:
        if not exists:
            _appear(work / _NEW, final)
            return
        ours = _still_replaceable(final, replaceable)
        _refuse_foreign(work, final, ours)
        if work.parent == final.parent:
            # What was there lies in `new` then, and goes with the work directory.
            if _all_ours(final, ours) and _exchange(work / _NEW, final):
                sync(final.parent)
                return
            work = work.rename(final / work.name)
        _replace_entries(work, final, ours, last)
    except OSError as error:
        raise unwritable(final, error) from error


def _still_replaceable(
    final: Path, replaceable: Callable[[Path], Collection[str]]
) -> Collection[str]:
    try:
        return _replaceable(final, replaceable) or ()
    except ArtifactError as error:
        raise ArtifactError(f"{_meanwhile(final)}: {error}") from error


def _meanwhile(final: Path) -> str:
    return f"output={final} was written by another process meanwhile, so this one changed nothing"


def _appear(new: Path, final: Path) -> None:
    """One rename, which never takes the place of what came meanwhile."""
    try:
        if not _rename(new, final, _NOREPLACE):
            new.rename(final)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
            raise
        raise ArtifactError(
            f"{_meanwhile(final)}; look at what is there, and name another directory, or run "
            "again with force=True (--force) to replace it"
        ) from error
    sync(final.parent)


def _refuse_foreign(work: Path, final: Path, ours: Collection[str]) -> None:
    new = sorted(os.listdir(work / _NEW))
    if foreign := [n for n in new if n not in ours and os.path.lexists(final / n)]:
        raise ArtifactError(
            f"output={final} holds {', '.join(foreign)}, which is not ours to overwrite; move it "
            "away, or name another directory"
        )


def _exchange(new: Path, final: Path) -> bool:
    """Whether the two directories were exchanged, the mode of the old one kept."""
    # The new one has the mode that the umask gave, not what the user chose for the old one.
    shutil.copymode(final, new)
    try:
        return _rename(new, final, _EXCHANGE)
    except OSError as error:
        if error.errno in {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}:
            return False  # a mount point, or a folder that this process may not rename in
        raise


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2; False where the system or the file system has no such flag."""
    # Python has no name for it; glibc has had one since 2.28.
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    # EINVAL is also how a file system says that it does not know the flag.
    if number in {errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(number, os.strerror(number), os.fspath(target))


def _replace_entries(work: Path, final: Path, ours: Collection[str], last: str) -> None:
    """Move the old entries out and the new ones in; the journal goes when all of it is done."""
    new = sorted(os.listdir(work / _NEW), key=lambda n: (n == last, n))
    (work / _OLD).mkdir()
    started = work / f"{_JOURNAL}.part"
    started.write_text(json.dumps(new), encoding="utf-8")
    sync(started)
    # By a rename, so that there is a whole journal or none; on the disk before anything moves.
    started.rename(work / _JOURNAL)
    sync(work)
    try:
        for name in sorted(ours, key=lambda n: (n != last, n)):
            if os.path.lexists(final / name):
                os.replace(final / name, work / _OLD / name)
        for name in new:
            os.replace(work / _NEW / name, final / name)
        sync(final)
    except BaseException:
        _undo(work, final)
        raise
    (work / _JOURNAL).unlink()
    sync(work)


def _undo(work: Path, final: Path) -> None:
    """Give back what `_replace_entries` took; to be undone twice does no harm."""
    parts = (work, work / _NEW, work / _OLD)
    # A link in place of a part would lead the moves below somewhere else.
    if not (work / _JOURNAL).exists() or any(p.is_symlink() or not p.is_dir() for p in parts):
        return
    try:
        new = [str(n) for n in json.loads(read_regular(work / _JOURNAL, limit=JSON))]
    except (ValueError, TypeError):
        return
    # The new ones out first, as old ones may come back under their names. The journal is a
    # file like any other: a name with a separator in it would lead outside.
    for name in (n for n in new if os.path.basename(n) == n and n not in {"", ".", ".."}):
        if not os.path.lexists(work / _NEW / name) and os.path.lexists(final / name):
            os.replace(final / name, work / _NEW / name)
    for name in os.listdir(work / _OLD):
        os.replace(work / _OLD / name, final / name)
    sync(final)
    (work / _JOURNAL).unlink()


def _hidden(path: Path) -> Path:
    """An unused hidden name in the same directory, so on the same file system, for a rename."""
    return path.with_name(f".{path.name}.vssm-{secrets.token_hex(6)}")


def _dead(folder: Path) -> Iterator[Path]:
    """What processes that are gone left in a folder; nobody else is given it at the same time."""
    with contextlib.suppress(OSError):
        if not _leftovers(folder):  # the usual case, without a lock
            return
        with _locked(folder) as locked:
            for path in _leftovers(folder) if locked else ():
                with _taken(path) as dead:
                    if dead:
                        yield path


def _leftovers(folder: Path) -> list[Path]:
    """What was or is being written in a folder, of this user."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_work(entry.name))
    # In a shared folder the work of other users is theirs to sweep.
    return [folder / name for name in names if (folder / name).lstat().st_uid == os.geteuid()]


def is_work(name: str) -> bool:
    """Whether an entry of this name is something that is being written, or was left of that."""
    return _WORK.fullmatch(name) is not None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process holds the folder's lock, so that nobody sweeps what is not locked yet.

    Where there are no locks, nothing is swept. Another program may lock the folder for its own
    ends: then work goes on without.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _PATIENCE
        while (held := _lock(descriptor)) is None and time.monotonic() < until:
            time.sleep(0.01)
        yield held is True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether the process that wrote `path` is gone; until the end nobody else finds it so."""
    status = path.lstat()
    # To open a pipe or a device of such a name could wait, or do something.
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield _lock(descriptor) is True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """True with the lock, which goes with the process; None if another has it; False: no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
