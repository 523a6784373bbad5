"""A convolution of tokens against its oracle in float64, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from cases import scan_reference_arguments
from tolerances import HALF_FACTOR, SCAN_TOLERANCE
from torch import Tensor


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def check_convolution(
    run: Callable[[dict[str, Tensor], Mapping[str, Any]], Tensor],
    oracle: Callable[..., Tensor],
    case: dict[str, Tensor],
    flags: Iterable[Mapping[str, Any]],
) -> None:
    """Compare y for each set of attributes; half types with PyTorch's own error as well."""
    dtype = case["x"].dtype
    for given in flags:
        want = oracle(**scan_reference_arguments(case), **given)
        error = relative(run(case, given), want)
        assert error <= SCAN_TOLERANCE[dtype], given
        if dtype != torch.float32:
            assert error <= HALF_FACTOR * relative(oracle(**case, **given), want)
