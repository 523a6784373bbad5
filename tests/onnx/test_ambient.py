"""Exports and references do not depend on what torch is set to around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from compat_cases import SlowPath, built
from exports import exported, micro

import vssm
from vssm.ops.ambient import known_state


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)
        torch.set_float32_matmul_precision("highest")


def _everything(dtype: torch.dtype) -> ExitStack:
    """All at once, as an export takes seconds."""
    stack = ExitStack()
    for context in (
        torch.autocast("cpu", dtype=torch.bfloat16),
        _default(dtype),
        torch.device("meta"),
        torch.inference_mode(),
        _deterministic(),
    ):
        stack.enter_context(context)
    return stack


def _digest(artifact: vssm.artifact.directory.Artifact) -> str:
    return hashlib.sha256(artifact.model_path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def model() -> Any:
    with _default(torch.float64):
        return micro().float()


@pytest.fixture(scope="module")
def module() -> Any:
    return built(SlowPath)


@pytest.fixture(scope="module")
def usual(module, tmp_path_factory) -> tuple[str, str]:
    """Of an export that many tests share, perhaps of another process, and of one made here."""
    folder = tmp_path_factory.mktemp("usual")
    theirs = vssm.export_module(module, torch.zeros(2, 9, 12), folder / "theirs")
    return _digest(exported(folder, micro())), _digest(theirs)


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_exports_and_checks_are_the_same_under(dtype, model, module, usual, tmp_path) -> None:
    x = torch.zeros(2, 9, 12)
    with _everything(dtype):
        ours = vssm.export(model, tmp_path / "a")
        theirs = vssm.export_module(module, x, tmp_path / "b")
        reports = [
            vssm.check_parity(None, ours),
            vssm.check_parity(module, theirs),
        ]
        with vssm.open_session(ours, "torch") as session:
            images = np.zeros((1, *ours.image_shape), np.float32)
            logits = session.run(images)["logits"]
    assert (_digest(ours), _digest(theirs)) == usual
    assert [report.failures for report in reports] == [[]] * len(reports)
    with vssm.open_session(ours, "torch") as session:
        assert np.array_equal(session.run(images)["logits"], logits)


def test_what_was_set_is_set_again() -> None:
    with _default(torch.float64), torch.device("meta"), torch.autocast("cpu"), _deterministic():
        with known_state():
            assert torch.ones(1).dtype == torch.float32
            assert torch.ones(1).device.type == "cpu"
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.are_deterministic_algorithms_enabled()
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.ones(1).dtype == torch.float64
        assert torch.ones(1).device.type == "meta"
        assert torch.is_autocast_enabled("cpu")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
    with torch.inference_mode():
        with known_state():
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
