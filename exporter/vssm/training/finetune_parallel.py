"""The processes of a training run that torchrun started, or this one alone.

Gradients are averaged in one flat sum after the backward pass. DistributedDataParallel overlaps
the two, but lays its buckets out anew after the first step of a process, so that a run that goes
on after a stop would add in another order than one that was never stopped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from typing_extensions import Self

from vssm.errors import RuntimeUnavailableError, VssmError


class Group:
    """The processes of a run; a context manager. Alone, every method is free.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, a GPU for each process of a machine).

    Raises:
        ValueError: the device is neither.
        RuntimeUnavailableError: there is no such GPU.
    """

    def __init__(self, device: str) -> None:
        if device not in {"cpu", "cuda"}:
            raise ValueError(f"device={device!r} is neither cpu nor cuda; give one of them")
        self.world = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets these
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeUnavailableError(
                    "device='cuda': torch finds no GPU; train with device='cpu', or install a "
                    "build of torch for the driver of this machine"
                )
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    def __enter__(self) -> Self:
        if self.world > 1:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace each by its sum over the processes, in place."""
        if self.world == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a number over the processes."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            distributed.barrier()

    def agree(self, name: str, value: Any) -> None:
        """Refuse to go on where processes differ.

        Raises:
            VssmError: they do.
        """
        if self.world == 1:
            return
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            raise VssmError(
                f"{name}={found} differs between the processes; they must see the same files: "
                "start them with the same arguments on a shared file system"
            )
