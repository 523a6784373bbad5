"""What stands around or inside a model when its tensors are not under its own keys.

Wrappers of training frameworks leave parts in the keys; parametrisations and quantisation replace
the weights by others. The same words serve for modules that are handed over and for files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from torch import Tensor, nn

# Names of children under which wrappers hold the module: DataParallel and its kind, torch.compile,
# FSDP (also of old), activation checkpointing, Lightning's Fabric.
WRAPPER_PARTS: Final = frozenset(
    {
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module"),
        *("_checkpoint_wrapped_module", "_forward_module"),
    }
)
_FRAMEWORKS: Final = ("torch", "lightning", "pytorch_lightning", "deepspeed", "accelerate")
# Ends of keys that no plain state dict has, what makes them, and what takes them away.
_REPLACED: Final = (
    (
        r"(^|\.)parametrizations\..+\.original\d*$",
        "a parametrisation",
        "remove it with torch.nn.utils.parametrize.remove_parametrizations(module, name)",
    ),
    (r"_u$", "spectral_norm", "remove it with torch.nn.utils.remove_spectral_norm(module)"),
    (r"_[gv]$", "weight_norm", "remove it with torch.nn.utils.remove_weight_norm(module)"),
    (
        r"_(orig|mask)$",
        "a pruning mask (torch.nn.utils.prune)",
        "make it permanent with torch.nn.utils.prune.remove(module, name)",
    ),
    (
        r"(^|\.)(lora_\w+|base_layer)(\.|$)",
        "LoRA adapters",
        "merge them with model.merge_and_unload()",
    ),
    (
        r"_packed_params(\.|$)",
        "packed weights (PyTorch's quantisation)",
        "take the float model that was quantised",
    ),
    (
        r"(^|\.)_?flat_param$",
        "FSDP's flat parameters",
        "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict and "
        "StateDictOptions(full_state_dict=True)",
    ),
)


def explain_keys(keys: Iterable[str]) -> str | None:
    """What replaced the weights, by the keys that it left, and the remedy; None for nothing."""
    listed = list(keys)
    for pattern, name, remedy in _REPLACED:
        # The end tells, and the time that a pattern takes must not grow with a stranger's key.
        if found := [key for key in listed if re.search(pattern, key[-200:])]:
            return f"it has {name} in place of weights ({found[0][:200]!r}); {remedy}"
    return None


def wrapper_part(module: nn.Module) -> str | None:
    """The attribute under which a framework's wrapper holds the module; None for other modules."""
    if type(module).__module__.partition(".")[0] not in _FRAMEWORKS:
        return None
    return next((name for name, _ in module.named_children() if name in WRAPPER_PARTS), None)


def refuse_wrapper(model: nn.Module) -> None:
    """Refuse a wrapper around a model.

    Raises:
        TypeError: `model` is one.
    """
    if (part := wrapper_part(model)) is not None:
        raise TypeError(
            f"model={type(model).__name__} is a wrapper around the model; pass model.{part}"
        )


def refuse_packed(model: nn.Module) -> None:
    """Refuse a model whose weights are packed, as quantised modules hold them.

    Raises:
        ValueError: a weight is no tensor with values of its own.
    """
    for key, value in model.state_dict().items():
        if key.rpartition(".")[2] == "_extra_state":
            continue
        # Packed modules store their parts as tuples and dtypes; torchao subclasses the tensor.
        if not isinstance(value, Tensor) or value.is_quantized or type(value) is not Tensor:
            raise ValueError(
                f"model: {key} is a {type(value).__name__}, not plain numbers: packed weights, as "
                "quantised modules hold them; export the float model that was quantised, or "
                "quantise the exported file"
            )


def refuse_replaced(model: nn.Module, own: Iterable[str]) -> None:
    """Refuse a model in which something stands around a block or in place of its weights.

    Args:
        model: the model.
        own: the keys that it has by its configuration.

    Raises:
        ValueError: there is such a thing.
    """
    for name, module in model.named_modules():
        if (part := wrapper_part(module)) is not None:
            raise ValueError(
                f"model: {name} is wrapped in {type(module).__name__}; put {name}.{part} in its "
                "place"
            )
    known = set(own)
    if seen := explain_keys(key for key in model.state_dict() if key not in known):
        raise ValueError(f"model: {seen}")
