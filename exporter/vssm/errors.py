"""Exceptions that callers may want to catch; everything else is a ValueError or TypeError."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

_SIGNATURES: Final = " The following argument types are supported"
_LONGEST: Final = 300


class VssmError(Exception):
    """Base of the package's own exceptions; the command line turns it into exit code 2."""


class CheckpointError(VssmError):
    """A checkpoint cannot be read, or does not fit the model."""


class ArtifactError(VssmError):
    """An exported directory is missing something, was changed, or cannot be written."""


class RuntimeUnavailableError(VssmError):
    """A runtime, provider or native library that was asked for is not there."""


class MissingPackageError(VssmError, ImportError):
    """A package that only some functions need is not installed; the message names the extra."""


class UnsupportedError(VssmError):
    """What was asked for is well-formed, but this model or runtime cannot do it."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """What to append to an error: the known word that is closest, or nothing if none is."""
    import difflib  # only where something is wrong already

    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def reason(error: BaseException) -> str:
    """What another library's error says, in one line and without what it appends for its authors.

    torch appends hints at its own logs, pybind the C++ signatures of the function, both whole
    screens below the sentence that says what is wrong.
    """
    first = next(iter(str(error).strip().splitlines()), "").partition(_SIGNATURES)[0]
    first = re.split(r"[^.]*\bTORCH_\w+", first)[0].strip()
    return f"{type(error).__name__}: {first[:_LONGEST]}" if first else type(error).__name__


def check_least(least: float, **values: float | None) -> None:
    """Refuse numbers below `least`; None, which stands for a default, passes.

    Raises:
        ValueError: one is below it; the message has its name.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is below {least}; give {least} or more")


def check_most(most: float, **values: float | None) -> None:
    """Refuse numbers above `most`, with which a machine would be busy for ever.

    Raises:
        ValueError: one is above it; the message has its name.
    """
    for name, value in values.items():
        if value is not None and value > most:
            raise ValueError(f"{name}={value} is above {most}; give {most} or less")


def check_several(**values: object) -> None:
    """Refuse one text or path where several are taken: a text would be read letter by letter.

    Raises:
        TypeError: one is given; the message has its name.
    """
    for name, value in values.items():
        if isinstance(value, str | os.PathLike):
            raise TypeError(f"{name}={value!r} is one text; give a list")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        ValueError: it is none of them; the message names the closest.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        hint = did_you_mean(value, allowed) or "; choose one of these"
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}{hint}")
