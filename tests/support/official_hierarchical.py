"""VMamba and GroupMamba with the weights and the configurations of the official numbers."""

from __future__ import annotations

from typing import Any

import fill
import numpy as np
import torch
from official_data import fill_weights, fixture, manifest
from tolerances import relative_error
from torch import Tensor

from vssm.models.base import VisionModel
from vssm.models.groupmamba import GroupMamba, GroupMambaConfig
from vssm.models.vmamba import VMamba, VMambaConfig

_SCANS = {"v051d": "unidi", "v052d": "bidi"}


def case_of(family: str, case: str) -> dict[str, Any]:
    """A case of micro_vmamba or micro_groupmamba: config, input_hw, input_key, keys."""
    found: dict[str, Any] = manifest(f"micro_{family}")["cases"][case]
    return found


def micro_vmamba(case: str = "s1_rect", **changes: Any) -> VMamba:
    """A small VMamba with the weights of its case, float32."""
    document = case_of("vmamba", case)
    official = document["config"]
    forward = official["forward_type"]
    fields = {
        "image_size": tuple(document["input_hw"]),
        "depths": official["depths"],
        "d_model": official["dims"],
        "d_state": official["ssm_d_state"],
        "expand": official["ssm_ratio"],
        "conv_bias": official["ssm_conv_bias"],
        "gate": not forward.endswith("_noz"),
        "scan": _SCANS.get(forward.partition("_")[0], "cross"),
        "mlp_ratio": official["mlp_ratio"],
        "gated_mlp": official["gmlp"],
        "patch_embed": official["patchembed_version"],
        "downsample": official["downsample_version"],
        "pos_embed": official["posembed"],
        "num_classes": official["num_classes"],
    }
    model = fill_weights(VMamba(VMambaConfig(**{**fields, **changes})))
    assert isinstance(model, VMamba)
    return model


def micro_groupmamba(case: str = "rect", **changes: Any) -> GroupMamba:
    """A small GroupMamba with the weights of its case, float32."""
    document = case_of("groupmamba", case)
    official = document["config"]
    fields = {
        "image_size": tuple(document["input_hw"]),
        "stem_width": official["stem_hidden_dim"],
        "widths": official["embed_dims"],
        "depths": official["depths"],
        "mlp_ratios": official["mlp_ratios"],
        "distillation": official["distillation"],
        "num_classes": official["num_classes"],
    }
    model = fill_weights(GroupMamba(GroupMambaConfig(**{**fields, **changes})))
    assert isinstance(model, GroupMamba)
    return model


def case_images(family: str, case: str) -> Tensor:
    """The two images of a case, float32."""
    document = case_of(family, case)
    return torch.from_numpy(
        fill.make_input((2, 3, *document["input_hw"]), key=document["input_key"])
    )


def as_official(tokens: Tensor, shape: np.ndarray, *, channels_first: bool) -> np.ndarray:
    """Row-major tokens (batch, seqlen, channels) in an official layout and shape."""
    laid_out = tokens.transpose(1, 2) if channels_first else tokens
    return laid_out.reshape(shape.tolist()).numpy()


def official_error(name: str, tensor: str, got: Tensor) -> float:
    """Relative error of a tensor of a model against its float64 numbers, of the first images."""
    arrays = fixture(name)
    wanted = arrays.get(f"{tensor}.f64")
    if wanted is not None:
        return relative_error(got, wanted[: len(got)])
    shape = arrays[f"{tensor}.shape"]
    index = fill.sample_index(int(shape.prod()))
    shape = np.array([len(got), *shape[1:]])
    array = as_official(got, shape, channels_first=name.startswith("vmamba")).reshape(-1)
    index = index[index < array.size]
    return relative_error(array[index], arrays[f"{tensor}.f64.samples"][: len(index)])


def micro_error(family: str, case: str, tensor: str, got: Tensor) -> float:
    """Relative error of a tensor of a case."""
    arrays = fixture(f"micro_{family}")
    wanted = arrays[f"{case}/{tensor}"]
    if tensor == "logits":
        return relative_error(got, wanted)
    channels_first = case_of(family, case)["config"].get("norm_layer") == "ln2d"
    array = as_official(got, arrays[f"{case}/{tensor}.shape"], channels_first=channels_first)
    return relative_error(fill.sample(array, 1021), wanted)


def record(modules: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    """What these modules return, by name, once the model has run."""
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    return seen


def stage_ends(model: VisionModel) -> list[int]:
    """Index of the last block of every stage."""
    return [sum(model.config.depths[: i + 1]) - 1 for i in range(len(model.config.depths))]
