"""Fixed seeds, one torch thread, and what is left out with its reason."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from command import Run

THREADS = 1
SEED = 0
_GPU = pytest.StashKey[int]()
# Twenty seconds and more, and those above ten that would come last.
_LONG = ("project/test_docs", "onnx/test_export", "compat/test_export", "training/test_finetune")
_LONG += ("studies/test_runs", "onnx/test_segmenters", "plugins/test_exponents")
_LONG += ("plugins/tensorrt/test_plugin", "onnx/test_detectors", "compat/test_sizes")
_LONG += ("evaluation/test_evaluate", "onnx/test_plain_mamba", "runtimes/tensorrt/test_engine")
_LONG += ("commands/test_main", "quantization/test_quantize", "runtimes/tensorrt/test_files")
_LONG += ("studies/test_visualize", "studies/test_ablate", "training/test_scenes")
_FIRST = {f"{name}.py": number for number, name in enumerate(_LONG)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # for the processes that tests start
    if importlib.util.find_spec("hypothesis") is not None:  # machines with a GPU have few packages
        import hypothesis

        fixed = {"derandomize": True, "database": None, "deadline": None}
        hypothesis.settings.register_profile("fixed", **fixed)
        hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        reason = "takes long: run by `make test-all` (pytest --slow)"
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason=reason))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_gpu():
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.stash[_GPU] = len(gpu)
    # pytest-xdist hands out whole files: the long ones first, or one process ends late and alone.
    items.sort(
        key=lambda item: _FIRST.get(item.path.relative_to(Path(__file__).parent).as_posix(), 99)
    )


def pytest_collection_finish() -> None:
    # What is imported stays, and a trace makes objects by the million: to look through all of them
    # again and again took a sixth of the time of an export.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["gpu"] = session.config.stash.get(_GPU, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_GPU] = getattr(node, "workeroutput", {}).get("gpu", 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := config.stash.get(_GPU, 0):
        terminalreporter.write_line(
            f"left out: {count} tests for an NVIDIA GPU, which this machine or its torch has not"
        )


@pytest.fixture(autouse=True, scope="session")
def _exports(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["VSSM_TEST_EXPORTS"] = str(shared / "exports")  # see tests/support/exports.py


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """Nobody cuts the power meanwhile, and a disk takes 4 ms, several times an export."""
    with mock.patch("os.fsync", _fsync):
        yield


def _fsync(fd: int) -> None:
    os.fstat(fd)  # what is not open is an error still


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    if _has_gpu():
        torch.manual_seed(SEED)
    else:
        # torch.manual_seed writes down the whole stack for each kind of device that may come later:
        # 2 ms, which is more than most tests take.
        torch.default_generator.manual_seed(SEED)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    from command import Run  # not above: it needs every package of the command line

    monkeypatch.setenv("COLUMNS", "200")
    return Run(capsys, monkeypatch)


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark measures the machine for milliseconds in place of two seconds: its floors then
    say little. tests/bench/test_measure.py measures them as they are."""
    from vssm.bench import measure

    monkeypatch.setattr(measure, "_SIDE", 64)
    for name in ("exp2_rate", "product_rate"):
        quick = functools.partial(getattr(measure, name), seconds=0.002)
        monkeypatch.setattr(measure, name, quick)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@functools.cache
def _has_gpu() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old warns: then there is none
        return torch.cuda.is_available()
