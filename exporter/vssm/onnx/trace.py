"""How torch.export traces here: in silence, and without what nobody reads afterwards."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import torch
from torch.fx import config as fx_config

_NO_LINES: Final = "do_not_emit_stack_traces"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that it could translate too, such as torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def quick_traces() -> Iterator[None]:
    """Trace without the line of code of each node, and without the cache of fake tensors.

    Lines take a tenth of a trace. The cache saves little where the batch is a symbol: what it holds
    is made anew for each symbol's value, checked against itself, and costs more than the operators.
    """
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        if hasattr(fx_config, _NO_LINES):  # torch 2.11 cannot leave them out
            lines = getattr(fx_config, _NO_LINES)
            stack.callback(setattr, fx_config, _NO_LINES, lines)
            setattr(fx_config, _NO_LINES, True)
        yield
