"""Option texts of the command line to values."""

from __future__ import annotations

import json
from typing import Any


def integers(name: str, text: str) -> list[int]:
    """Read "1,8".

    Raises:
        ValueError: a part is no integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a list of integers; write 1,8") from None


def sizes(name: str, text: str) -> tuple[int, ...]:
    """Read "1x3x224x224".

    Raises:
        ValueError: a part is no integer from 1.
    """
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}={text!r} is not sizes from 1 joined by x; write 1x3x224x224")
    return tuple(map(int, parts))


def options(pairs: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value is JSON, or else a text; the last of a key counts.

    Raises:
        ValueError: a pair is malformed.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: is not KEY=VALUE; write for example image_size=384")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
