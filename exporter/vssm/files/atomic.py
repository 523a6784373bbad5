"""Writing files so that a reader never meets half of one, and hashing them.

Standard library only: both sides of the package use it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vssm.errors import ArtifactError
from vssm.files.regular import WEIGHTS, open_regular
from vssm.files.staging import held_name, sync, unwritable

# Weights may be larger than the memory, so no file is read whole to be hashed.
_CHUNK: Final = 1 << 20


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file's bytes, as 64 lower-case hexadecimal digits.

    Raises:
        OSError: the file cannot be read, or is a device or the like.
    """
    digest = hashlib.sha256()
    with open_regular(path, limit=WEIGHTS) as file:
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
    try:
        with held_name(target) as temporary:
            yield temporary
            # The bytes before the name: a loss of power must not leave a name without them.
            sync(temporary)
            os.replace(temporary, target)
            # A rename changes the directory, which has a sync of its own.
            sync(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error


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
    # Escaped, as a name may hold brackets, which glob would take for a pattern.
    for left in target.parent.glob(f".{glob.escape(target.name)}.vssm-*"):
        with contextlib.suppress(OSError):
            left.unlink()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, before the work that is to fill it.

    Raises:
        ArtifactError: it is no regular file (a rename would put one in place of a link such as
            /dev/stdout), or its directory is not there or not to be written to.
    """
    target = Path(path)
    reason = ""
    # `lexists`: a link that leads nowhere does not `exist`, but a rename would replace it.
    if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
        reason = "not a regular file"
    elif not target.parent.is_dir():
        reason = "its directory is not there"
    # The directory, not the file: a rename puts the new one in place of one that is read-only too.
    elif not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "no permission"
    if reason:
        raise unwritable(target, OSError(0, reason))


def check_apart(output: str | os.PathLike[str], **folders: Path | None) -> None:
    """Refuse an output inside a folder of images: the next run would take it for some of them.

    Raises:
        ValueError: it is in one, or is it; the message has the option that named the folder.
    """
    # Links resolved, as they lead out of a folder or into it.
    place = Path(output).resolve()
    for name, folder in folders.items():
        if folder is not None and folder.is_dir() and place.is_relative_to(folder.resolve()):
            raise ValueError(
                f"output={output} is inside {name}={folder}, so that the next run would take what "
                "is written for images; name a place outside"
            )


def check_files(**files: Path | None) -> None:
    """Refuse files that are not there, before the work that would read them last.

    Raises:
        ValueError: there is none; the message has the option that named it.
    """
    for name, path in files.items():
        if path is not None and not path.exists():
            raise ValueError(f"{name}={path} is not there; give a file that is")


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
