"""Writing files so that a reader never meets half of one, and hashing them.

Standard library only: both sides of the package use it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from vssm.errors import ArtifactError

_CHUNK: Final = 1 << 20
_CANNOT_STORE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 lower-case hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there takes its place on success.

    On any error the temporary file goes and `path` stays as it was.

    Raises:
        ArtifactError: the directory cannot be written, or the disk is full.
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        # A user's umask decides the mode, as it does for every other file; mkstemp would give 0600.
        temporary.open("xb").close()
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        _discard(temporary)
        raise _unwritable(target, error) from error
    except BaseException:
        _discard(temporary)
        raise


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the whole new one.

    Raises:
        ArtifactError: the directory cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def discard_unfinished(path: str | os.PathLike[str]) -> None:
    """Delete what killed processes left of writing `path`; the caller keeps others from writing."""
    target = Path(path)
    for left in target.parent.glob(f".{glob.escape(target.name)}.vssm-*"):
        _discard(left)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, before the work that is to fill it.

    Raises:
        ArtifactError: it is no regular file (a rename would put one in place of a link such as
            /dev/stdout), or its directory is not there or not to be written to.
    """
    target = Path(path)
    reason = ""
    if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
        reason = "not a regular file"
    elif not target.parent.is_dir():
        reason = "its directory is not there"
    elif not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "no permission"
    if reason:
        raise _unwritable(target, OSError(0, reason))


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory and its missing parents, unless it is there.

    Raises:
        ArtifactError: it cannot be made: a file has that name, or the permission is missing.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"output={path} cannot be made ({error.strerror}); name another directory"
        ) from error


@contextlib.contextmanager
def staged_directory(
    target: str | os.PathLike[str], *, replaceable: Callable[[Path], Collection[str]], last: str
) -> Iterator[Path]:
    """Yield an empty directory; what was written there moves into `target` on success.

    A `target` that does not exist appears in one rename. In one that exists, the entries that may
    be replaced are set aside, the new ones moved in, and the old ones deleted; an error on the way
    puts them back. Other entries are never touched.

    Args:
        target: the directory to write; its missing parents are made.
        replaceable: is asked of a `target` that is there; answers which entries of it may go, and
            raises ArtifactError where it must not be written to.
        last: the entry that says what the directory is. It goes first and comes last, so that
            nobody takes a mixture for a whole.

    Raises:
        ArtifactError: `target` is no directory, holds a foreign entry of the same name as a new
            one, or cannot be written. Nothing was changed then.
    """
    final = Path(target).absolute()
    ours = _replaceable(final, replaceable)
    made = [] if ours is not None else _make_parents(final)
    # Inside an existing directory: from the parent of a mount point nothing can be renamed into it.
    staging = _beside(final if ours is None else final / "new")
    try:
        _make_directory(staging, final)
        yield staging
        _move_into_place(staging, final, ours=ours, last=last)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _CANNOT_STORE:
            raise _unwritable(final, error) from error
        raise


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
            raise _unwritable(final, error) from error
    return missing


def _make_directory(path: Path, final: Path) -> None:
    try:
        path.mkdir()
    except OSError as error:
        raise _unwritable(final, error) from error


def _move_into_place(
    staging: Path, final: Path, *, ours: Collection[str] | None, last: str
) -> None:
    """Make the staged files durable, then show them under `final`."""
    for path in staging.rglob("*"):
        _sync(path)
    try:
        if ours is None:
            staging.rename(final)
        else:
            _replace_entries(staging, final, ours, last)
            staging.rmdir()
        _sync(final)
    except OSError as error:
        raise _unwritable(final, error) from error


def _replace_entries(staging: Path, final: Path, ours: Collection[str], last: str) -> None:
    new = sorted((entry.name for entry in staging.iterdir()), key=lambda n: (n == last, n))
    foreign = [n for n in new if n not in ours and os.path.lexists(final / n)]
    if foreign:
        raise ArtifactError(
            f"output={final} holds {', '.join(foreign)}, which is not ours to overwrite; move it "
            "away, or name another directory"
        )
    old = _beside(final / "old")
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name in sorted(ours, key=lambda n: (n != last, n)):
            if os.path.lexists(final / name):
                _move(final / name, old / name, moved)
        for name in new:
            _move(staging / name, final / name, moved)
    except BaseException:
        for source, destination in reversed(moved):
            os.replace(destination, source)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _move(source: Path, destination: Path, moved: list[tuple[Path, Path]]) -> None:
    os.replace(source, destination)
    moved.append((source, destination))


def _beside(path: Path) -> Path:
    """An unused hidden name in the same directory, so on the same file system, for a rename."""
    return path.with_name(f".{path.name}.vssm-{secrets.token_hex(6)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    reason = error.strerror or str(error)
    return ArtifactError(
        f"output={path} cannot be written ({reason}); name a directory that you may write to, "
        "on a disk with room"
    )
