"""Small models and checkpoint files that several tests use."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from vssm.checkpoints.load import load_checkpoint
from vssm.errors import CheckpointError

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))


class Bare(Backbone):
    """Keys as Vim has them: no prefix."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 5)


class Wrapped(nn.Module):
    """Keys as PlainMamba has them: `backbone.` and `head.fc`."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.ModuleDict({"fc": nn.Linear(4, 5)})


class Hook:
    """Stands for what mmcv keeps in `meta`."""

    def __init__(self):
        self.priority = 50


def weights(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (k, torch.randn(v.shape, generator=generator) if v.is_floating_point() else v + 3)
        for k, v in model.state_dict().items()
    )


def save(obj, path, *, legacy=False):
    torch.save(obj, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_loaded(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def assert_refused(model: nn.Module, path, *words: str, **options) -> str:
    """Loading fails with a message that holds every word, and leaves the model untouched."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, **options)
    assert_loaded(model, before)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert ";" in str(caught.value)  # the remedy
    return str(caught.value)
