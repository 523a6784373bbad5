"""The one way to open a file that a user, or another file, names: regular files alone, of a size.

A named pipe would be waited for without end, and a device read without end. Standard library only:
both sides of the package use it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO, Final

# The most bytes that a file of each kind may have.
JSON: Final = 1 << 26  # model.json, engine.json, MANIFEST.json
ONNX: Final = (1 << 31) - 1  # protobuf's own limit; larger weights lie in a file beside it
WEIGHTS: Final = 1 << 40  # external data, weights.safetensors
LIBRARY: Final = 1 << 32
ENGINE: Final = 1 << 36

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | os.PathLike[str], *, limit: int) -> BinaryIO:
    """Open a regular file for reading, in an instant whatever `path` is.

    Links are followed, as the user's own may be; what counts is what is opened in the end.

    Args:
        path: the file.
        limit: the most bytes that a file of this kind may have.

    Returns:
        The file, at its beginning. It may grow, so read no more of it than `limit` bytes.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is larger than `limit`; `strerror`
            says which in words that fit behind the path, in brackets.
    """
    # Looked at before it is opened: opening some devices does something, such as rewinding a tape.
    _refuse(path, os.stat(path), limit)
    # Looked at once more when it is open, as the name may mean another file by then.
    # Without O_NONBLOCK a pipe would wait for a writer, without O_NOCTTY a terminal become ours.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    descriptor = os.open(path, flags)
    try:
        _refuse(path, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """The bytes of a regular file, read once.

    Raises:
        OSError: as `open_regular`, or its size changed while it was read.
    """
    with open_regular(path, limit=limit) as file:
        size = os.fstat(file.fileno()).st_size
        # One byte more than there should be: enough to see that the file has grown.
        data = file.read(size + 1)
    if len(data) != size:
        raise OSError(errno.EIO, "its size changed while it was read", os.fspath(path))
    return data


def _refuse(path: str | os.PathLike[str], status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "no file")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
    if status.st_size > limit:
        reason = f"{status.st_size:,} bytes, more than the {limit:,} that such a file may have"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
