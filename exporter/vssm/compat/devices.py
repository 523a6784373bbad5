"""User code that names a GPU, where everything runs on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class OnTheCpu(TorchFunctionMode):
    """`x.cuda()`, `x.to("cuda")` and `device="cuda"` in the user's code mean the CPU.

    An export computes on the CPU, and where a number is computed does not change what it is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every function of torch goes through here."""
        if func is Tensor.cuda:
            return args[0]
        args, kwargs = tree_map(_here, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _here(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    is_name = isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
    return "cpu" if is_name else value
