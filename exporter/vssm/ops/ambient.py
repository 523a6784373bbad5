"""Torch's settings of the process and the thread, kept out of exports and references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def known_state() -> Iterator[None]:
    """Torch as it is when a program starts, whatever the caller has set; also a decorator.

    No autocast, float32 and the CPU by default, no inference mode, no gradients, no demand for
    deterministic algorithms, float32 products in float32. All of it is as before afterwards.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    strict = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        # Where it is set already it would be asked at every call once more.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            torch.use_deterministic_algorithms(mode=False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(strict, warn_only=only_warn)
