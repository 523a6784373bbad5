"""Reports as JSON files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vssm.files.atomic import atomic_write_bytes


def write_json(path: Path, value: Any) -> None:
    """Write a report, or what JSON can hold; infinity and NaN, which it lacks, as "inf", "nan".

    Raises:
        ArtifactError: the path cannot be written.
    """
    atomic_write_bytes(path, f"{json.dumps(_plain(value), indent=2, allow_nan=False)}\n".encode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
