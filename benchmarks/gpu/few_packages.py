"""A pytest plugin: a test file is skipped, and named, if it needs an optional package.

Machines with a GPU often have few packages and no way to install more. What is not listed here is
an error, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

_OPTIONAL = frozenset({"PIL", "hypothesis", "matplotlib", "onnxruntime", "polygraphy", "sklearn"})
_MISSING = re.compile(r"ModuleNotFoundError: (?:No module named '|import of )(\w+)")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file that asks for an optional package; other errors stay errors."""
    report = yield
    missing = _MISSING.search(report.longreprtext)
    if report.failed and missing is not None and missing[1] in _OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report
