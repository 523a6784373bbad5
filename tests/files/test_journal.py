"""Tests of `vssm.files.journal`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vssm.errors import ArtifactError
from vssm.files.journal import JsonJournal


class _Journal(JsonJournal[int]):
    what = "count"
    option = "-o"

    @staticmethod
    def to_json(entry: int) -> Any:
        return entry

    @staticmethod
    def from_json(document: Any) -> int:
        return int(document)


def test_a_journal_without_work_does_not_lock_other_options(tmp_path: Path) -> None:
    """A run that was stopped before its first batch has nothing that another one would lose."""
    path = tmp_path / "journal"
    _Journal(path, {"batch": "8"}).__exit__(None, None, None)
    with _Journal(path, {"batch": "4"}) as journal:
        journal.append(1)
    with pytest.raises(ArtifactError, match="of another count: batch=4, now 8"):
        _Journal(path, {"batch": "8"})
    with _Journal(path, {"batch": "4"}) as journal:
        assert journal.done == [1]
