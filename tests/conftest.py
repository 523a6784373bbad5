"""Fixed seeds, one torch thread, and what is left out with its reason."""

from __future__ import annotations

import importlib.util
import os
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from command import Run

THREADS = 1
SEED = 0


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
    left_out = {}
    if not config.getoption("--slow"):
        left_out["slow"] = "takes long: run by `make test-all` (pytest --slow)"
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        left_out["gpu"] = "no NVIDIA GPU that this build of torch can use"
    for item in items:
        for name, reason in left_out.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    from command import Run  # not above: it needs every package of the command line

    monkeypatch.setenv("COLUMNS", "200")
    return Run(capsys, monkeypatch)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _has_gpu() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old warns: then there is none
        return torch.cuda.is_available()
