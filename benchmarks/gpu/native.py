"""Our kernels on tensors as they are: in a variant of one's own choice, through the C ABI."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vssm.ops.kernels import Kernels
from vssm.ops.spec import OPERATORS

# ScanVariant of plugins/kernels/selective_scan.h. PyTorch's own operators take "auto".
VARIANTS = {"auto": 0, "throughput": 1, "latency": 2}


class VariantKernels(Kernels):
    """The library's kernels; operators come from their operands' names."""

    def scan_in(
        self, variant: str, operands: dict[str, Tensor], *, params_by_step: bool = False
    ) -> Tensor:
        """The scan (batch, seqlen, d_inner) in one of VARIANTS."""
        op = OPERATORS["GatedSelectiveScan" if "z" in operands else "SelectiveScan"]
        attributes = (1, int(params_by_step))
        args = (*operands.values(), *attributes)
        return self.run(op, args, variant=VARIANTS[variant])[0]

    def gathered(self, given: Sequence[Tensor], num_keep: int) -> list[Tensor]:
        """TokenGather of (score, position, x0, x1): kept positions, then the rows of each."""
        return list(self.run(OPERATORS["TokenGather"], (*given, num_keep, -1)))

    def scattered(self, given: Sequence[Tensor]) -> Tensor:
        """TokenScatter of (base, x, position)."""
        return self.run(OPERATORS["TokenScatter"], tuple(given))[0]
