"""Tensors between guards in memory full of NaN, on any device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

GUARD = 256  # bytes before and after a tensor
POISON = 0xFF  # NaN in every float type, -1 in int32
_UNPOISON = "__asan_unpoison_memory_region"


@functools.lru_cache(maxsize=2)
def _sanitizer(function: str) -> Callable[..., None] | None:
    """A function of AddressSanitizer's, where it is in this process."""
    return getattr(ctypes.CDLL(None), function, None)


class Memory:
    """A contiguous tensor between guards, `shift` elements off the alignment of its buffer."""

    def __init__(self, tensor: Tensor, device: str, *, shift: int = 0) -> None:
        size = tensor.numel() * tensor.element_size()
        self.start = GUARD + shift * tensor.element_size()
        self.buffer = torch.full((self.start + size + GUARD,), POISON, dtype=torch.uint8)
        self.buffer = self.buffer.to(device)
        self.stop = self.start + size
        # Where numel() is 0, so is the view; the address still lies between the guards.
        self.tensor = self.buffer[self.start : self.stop].view(tensor.dtype).view(tensor.shape)

    @classmethod
    def of(cls, tensor: Tensor, device: str, *, shift: int = 0) -> Memory:
        memory = cls(tensor, device, shift=shift)
        memory.tensor.copy_(tensor)
        return memory

    @property
    def address(self) -> int:
        return self.buffer.data_ptr() + self.start

    def check(self, name: str) -> None:
        for guard in (self.buffer[: self.start], self.buffer[self.stop :]):
            assert bool((guard == POISON).all()), f"{name}: written outside its memory"

    def close(self, closed: bool) -> None:
        """Makes the guards an error to AddressSanitizer, where it runs, or memory again."""
        change = _sanitizer("__asan_poison_memory_region" if closed else _UNPOISON)
        if change is not None and self.buffer.device.type == "cpu":
            base = self.buffer.data_ptr()
            change(ctypes.c_void_p(base), ctypes.c_size_t(self.start))
            size = self.buffer.numel() - self.stop
            change(ctypes.c_void_p(base + self.stop), ctypes.c_size_t(size))
