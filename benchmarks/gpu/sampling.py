"""A pytest plugin (-p benchmarks.gpu.sampling): as many tests as the time allows, in mixed order.

Test files that cannot be loaded for want of a package that a machine with a GPU need not have are
skipped, and named. A sanitizer slows kernels a hundredfold: the order is drawn from a fixed seed,
so that a cut-off leaves a sample of everything, and how many ran is printed last.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Generator

import pytest

_SEED = 0
_OPTIONAL = frozenset({"PIL", "hypothesis", "matplotlib", "onnxruntime", "polygraphy", "sklearn"})
_MISSING = re.compile(r"ModuleNotFoundError: (?:No module named '|import of )(\w+)")
_LEFT_OUT = "the sampled time is over"


def pytest_addoption(parser: pytest.Parser) -> None:
    """--sample-seconds."""
    parser.addoption("--sample-seconds", type=float, default=None, help="start no test after this")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock where a limit is given."""
    seconds = config.getoption("--sample-seconds")
    if seconds is not None:
        config.pluginmanager.register(Sample(seconds), "vssm-sample")


class Sample:
    """Mixes the tests, and leaves out those that would start too late."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.ran = self.left_out = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Skip a file that asks for an optional package; other errors stay errors."""
        report = yield
        missing = _MISSING.search(report.longreprtext)
        if report.failed and missing is not None and missing[1] in _OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The same mixed order every time."""
        random.Random(_SEED).shuffle(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Leave a test out when the time is over."""
        if time.monotonic() > self.end:
            self.left_out += 1
            pytest.skip(_LEFT_OUT)
        if item.get_closest_marker("skip") is None:
            self.ran += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What the sample was."""
        total = self.ran + self.left_out
        terminalreporter.write_line(f"sampled {self.ran} of {total} tests")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """No test run means that nothing was checked."""
        if exitstatus == pytest.ExitCode.OK and not self.ran:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
