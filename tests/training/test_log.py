"""The log of a training run: TensorBoard beside it, and what is no log of ours."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from finetune_cases import request, write_pictures

import vssm
from vssm.errors import ArtifactError
from vssm.training.log import RunLog


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"))


class _StopError(Exception):
    pass


def _stop(phase, done, total, note=""):
    if (phase, done) == ("training, steps", 5):
        raise _StopError


def test_tensorboard_goes_on_where_the_state_is(data, tmp_path, monkeypatch):
    """In place of the package, which is optional: what it is told."""
    made = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars = folder, purge_step, []
            made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def flush(self):
            self.flushed = len(self.scalars)

        def close(self):
            self.closed = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("vssm.training.log.is_installed", lambda _: True)
    asked = replace(request(data, tmp_path, resources={"save_every": 3}), val=data)
    with pytest.raises(_StopError):
        vssm.finetune(asked, progress=_stop)
    assert vssm.finetune(replace(asked, resume=True)).tensorboard
    first, second = made
    assert first.folder == str(tmp_path / "tensorboard")
    assert (first.purge_step, second.purge_step) == (1, 4)
    assert first.flushed == 2 + 9  # before the first step, and all of the state's three
    assert first.closed
    assert second.closed
    losses = [value for name, value, _ in second.scalars if name == "train/loss"]
    log = np.loadtxt(tmp_path / "log.csv", delimiter=",", skiprows=1)
    assert losses == log[3:, 3].tolist()
    shares = [(value, step) for name, value, step in second.scalars if name == "val/top1"]
    rows = np.loadtxt(tmp_path / "validation.csv", delimiter=",", skiprows=1)
    assert shares == [(rows[1, 2], 7), (rows[2, 2], 14)]


def test_a_run_in_use_and_a_foreign_log_are_refused(data, tmp_path):
    with RunLog(tmp_path / "log.csv"), pytest.raises(ArtifactError, match="in use by another run"):
        vssm.finetune(request(data, tmp_path))
    (tmp_path / "log.csv").write_text("a diary\n")
    with pytest.raises(ArtifactError, match="is not a log of a training run"):
        vssm.finetune(request(data, tmp_path))
    assert (tmp_path / "log.csv").read_text() == "a diary\n"
