"""The operators on torch's tensors, over CUDA kernels that run on the CPU."""

from __future__ import annotations

import torch

from vssm.ops.kernels import Kernels


class EmulatedKernels(Kernels):
    """Kernels of a build of plugins/emulation: CPU tensors stand for those of a device."""

    def launches_on(self, device: torch.device) -> bool:
        return True
