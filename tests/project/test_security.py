"""docs/security.md: every promise names a test that is there."""

from __future__ import annotations

import re

from checkout import ROOT


def test_every_promise_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    section = text.split("## What is checked")[1].split("\n## ")[0]
    promises = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(promises) >= 10
    for promise in promises:
        held_by = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", promise)
        assert held_by, promise
        for path, test in held_by:
            assert f"def {test or 'test_'}" in (ROOT / path).read_text(encoding="utf-8"), promise
