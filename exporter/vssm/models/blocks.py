"""The blocks of a model, counted as they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vssm.types import Steps


@contextmanager
def counted_blocks(model: nn.Module, progress: Steps, phase: str) -> Iterator[None]:
    """Report each block that a run of the model enters: hooks see that, and no cheaper thing.

    Blocks are the entries of module lists; of lists in lists, the inner ones'.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    entries = dict.fromkeys(entry for found in lists for entry in found)
    blocks = [b for b in entries if not any(isinstance(m, nn.ModuleList) for m in b.modules())]
    total, entered = max(1, len(blocks)), 0

    def enter(*_: Any) -> None:
        nonlocal entered
        progress(phase, min(entered, total), total)
        entered += 1

    progress(phase, 0, total)
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        progress(phase, total, total)
