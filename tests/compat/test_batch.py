"""Code that counts with the batch in Python: kept open where it can be, else the line is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compat_cases import SlowPath, built
from torch import Tensor, nn

import vssm
from vssm.compat.batch import symbolic_arithmetic
from vssm.errors import UnsupportedError

HEIGHT, WIDTH, WINDOW = 4, 6, 2


class _Windowed(nn.Module):
    """A mixer over windows, put together by the number of images that it counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = built(SlowPath)

    def forward(self, x: Tensor) -> Tensor:
        channels, tall, wide = x.shape[1], HEIGHT // WINDOW, WIDTH // WINDOW
        windows = x.view(len(x), channels, tall, WINDOW, wide, WINDOW).permute(0, 2, 4, 3, 5, 1)
        windows = self.mixer(windows.reshape(-1, WINDOW * WINDOW, channels))
        images = int(windows.shape[0] / (HEIGHT * WIDTH / WINDOW / WINDOW))
        whole = windows.reshape(images, tall, wide, WINDOW, WINDOW, -1).permute(0, 5, 1, 3, 2, 4)
        # A type is still a type, and a number a number, while sizes are symbolic.
        assert isinstance(channels, int)
        return whole.reshape(images, channels, int("4"), WIDTH).mean((2, 3))


class _Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = built(SlowPath)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mixer(x[i : i + 1]) for i in range(x.shape[0])])


def test_counted_batch_stays_open(tmp_path: Path) -> None:
    model = _Windowed().eval()
    artifact = vssm.export_module(model, torch.randn(1, 12, HEIGHT, WIDTH), tmp_path / "out")
    assert artifact.manifest.inputs[0].shape[0] == "batch"
    assert vssm.check_parity(None, artifact).passed
    x = torch.randn(5, 12, HEIGHT, WIDTH)
    with vssm.open_session(artifact) as session:
        got = session.run(x.numpy())["logits"]
    np.testing.assert_allclose(got, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_loop_over_images_is_named(tmp_path: Path) -> None:
    message = r"_Looping computes with the batch in Python.*test_batch\.py:\d+: .*--static-batch"
    with pytest.raises(UnsupportedError, match=message):
        vssm.export_module(_Looping().eval(), torch.randn(2, 9, 12), tmp_path / "out")


def test_int_and_len_are_python_s_own_again() -> None:
    names = globals()
    with symbolic_arithmetic(_Looping()):
        assert names["len"](torch.zeros(3, 2)) == 3
        assert names["len"]([1]) == 1
        assert names["int"]("7", 8) == 7
        assert issubclass(bool, names["int"])
    assert "len" not in names
    assert "int" not in names
