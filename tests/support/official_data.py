"""The official numbers, and models filled with the weights that they were made with."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import fill
import numpy as np
import torch
from checkout import ROOT
from tolerances import relative_error
from torch import Tensor, nn

import vssm
from vssm.models.base import VisionModel
from vssm.models.plain_mamba import PlainMamba, PlainMambaConfig
from vssm.models.vim import Vim, VimConfig

OFFICIAL = ROOT / "tests" / "official"
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
    """`vssm.create_model` with the official weights."""
    model: VisionModel = fill_weights(vssm.create_model(name, **options))
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


def plain_mamba_config(case: str, **changes: Any) -> PlainMambaConfig:
    """The configuration of a case of micro_plain_mamba, for the images that it was run with."""
    document = manifest("micro_plain_mamba")["cases"][case]
    official = document["config"]
    fields: dict[str, Any] = {
        "image_size": document["input_hw"],
        "patch_size": official["patch_size"],
        "depth": official["num_layers"],
        "d_model": official["embed_dims"],
        "d_state": official["layer_cfgs"]["mamba_cfg"]["d_state"],
        "stem_convs": official["num_convs_patch_embed"],
        "layers_with_dwconv": official["layers_with_dwconv"],
        "num_classes": 10,
    }
    return PlainMambaConfig(**{**fields, **changes})


def micro_plain_mamba(
    case: str = "odd_odd_3x5", schedule: Any = None, *, name: str = "plain_mamba", **changes: Any
) -> PlainMamba:
    """A small PlainMamba, float32: the backbone has the weights of its case, the head others."""
    model = PlainMamba(plain_mamba_config(case, **changes), schedule, name=name)
    fill_weights(model.head)
    fill_weights(model.backbone)
    return model.eval()


def plain_mamba_images(case: str) -> Tensor:
    """The official images of a case of micro_plain_mamba, float32."""
    document = manifest("micro_plain_mamba")["cases"][case]
    shape = (2, 3, *document["input_hw"])
    return torch.from_numpy(fill.make_input(shape, key=document["input_key"]))


def shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Sizes of tensors by their keys."""
    return {key: list(value.shape) for key, value in state.items()}


def wanted_shapes(document: Mapping[str, Any]) -> dict[str, list[int]]:
    """The same of what has "keys" in a manifest."""
    return {key: entry["shape"] for key, entry in document["keys"].items()}


def check_keys(model: nn.Module, name: str) -> None:
    """A model has the official keys and sizes, and they are filled as they were there."""
    document = manifest(name)
    assert shapes(model.state_dict()) == wanted_shapes(document)
    assert sum(p.numel() for p in model.parameters()) == document["n_params"]
    assert all(fill.rule(k, e["shape"]) == e["fill"] for k, e in document["keys"].items())


def error_of(name: str, tensor: str, got: Tensor) -> float:
    """Relative error of a tensor of a model, of the official shape."""
    wanted, array = fixture(name), got.numpy()
    assert array.shape == tuple(wanted[f"{tensor}.shape"])
    stored = wanted.get(f"{tensor}.f64")
    if stored is None:
        array, stored = fill.sample(array), wanted[f"{tensor}.f64.samples"]
    return relative_error(array, stored)


def _class_token(official: Mapping[str, Any]) -> str:
    if not official["if_cls_token"]:
        return "none"
    if official.get("use_double_cls_token"):
        return "double"
    return "middle" if official["use_middle_cls_token"] else "head"


@functools.lru_cache(maxsize=4)
def _filled(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    return fill.fill_state_dict(dict(shapes))
