"""The official numbers, and models filled with the weights that they were made with."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from official import fill
from torch import Tensor, nn

import exporter
from exporter.models import VisionModel
from exporter.models.vim import Vim
from exporter.models.vim_config import VimConfig

OFFICIAL = Path(__file__).parent / "official"
_POOLS = {"mean": "mean", "max": "max", "none": "last"}


@functools.cache
def fixture(name: str) -> dict[str, np.ndarray]:
    """The arrays of official/NAME.npz, such as "vim_tiny" or "pruned/vim_tiny_gap"."""
    with np.load(OFFICIAL / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def manifest(name: str) -> dict[str, Any]:
    """official/NAME.keys.json."""
    document: dict[str, Any] = json.loads((OFFICIAL / f"{name}.keys.json").read_text("utf-8"))
    return document


def images(name: str = "vim_tiny", *, seed: int = fill.SEED, batch: int | None = None) -> Tensor:
    """The official images of a model or of "micro_vim", float32; `batch` sets their number."""
    document = manifest(name)
    shape = document["input_shape"]
    key = document["input_key"]
    return torch.from_numpy(fill.make_input((batch or shape[0], *shape[1:]), seed=seed, key=key))


def fill_weights(model: nn.Module) -> nn.Module:
    """Every entry of the state_dict as the official numbers have it."""
    state = model.state_dict()
    filled = _filled(tuple((key, tuple(value.shape)) for key, value in state.items()))
    model.load_state_dict({**state, **{k: torch.from_numpy(v) for k, v in filled.items()}})
    return model.eval()


def filled_model(name: str, **options: Any) -> VisionModel:
    """`exporter.create_model` with the official weights."""
    model: VisionModel = fill_weights(exporter.create_model(name, **options))
    return model


def micro_config(case: str, **changes: Any) -> VimConfig:
    """The configuration of a case of micro_vim under this package's names."""
    official = manifest("micro_vim")["cases"][case]["config"]
    names = {
        "image_size": "img_size",
        "patch_size": "patch_size",
        "stride": "stride",
        "depth": "depth",
        "d_model": "embed_dim",
        "d_state": "d_state",
        "num_classes": "num_classes",
        "bimamba": "bimamba_type",
        "divide_out": "if_divide_out",
        "rms_norm": "rms_norm",
        "rope": "if_rope",
        "rope_residual": "if_rope_residual",
    }
    fields: dict[str, Any] = {ours: official[theirs] for ours, theirs in names.items()}
    fields |= {
        "class_token": _class_token(official),
        "pool": _POOLS[official["final_pool_type"]],
        "bidirectional_layers": official.get("if_bidirectional", False),
        "rope_grid": official.get("pt_hw_seq_len", 14),
        "layer_scale": official.get("init_layer_scale"),
    }
    return VimConfig(**{**fields, **changes})


def micro_vim(case: str = "mid_div2", schedule: Any = None, **changes: Any) -> Vim:
    """A small Vim with the weights of its case, float32."""
    model = fill_weights(Vim(micro_config(case, **changes), schedule))
    assert isinstance(model, Vim)
    return model


def relative_error(got: Tensor | np.ndarray, want: Tensor | np.ndarray) -> float:
    """Largest difference over the largest magnitude wanted, in float64."""
    got, want = (np.asarray(x.detach() if isinstance(x, Tensor) else x, float) for x in (got, want))
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def _class_token(official: Mapping[str, Any]) -> str:
    if not official["if_cls_token"]:
        return "none"
    if official.get("use_double_cls_token"):
        return "double"
    return "middle" if official["use_middle_cls_token"] else "head"


@functools.lru_cache(maxsize=4)
def _filled(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    return fill.fill_state_dict(dict(shapes))
