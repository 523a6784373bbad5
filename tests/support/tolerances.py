"""Largest errors that the native kernels may make, over the largest magnitude of the output."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Against the float64 oracle on the same (rounded) inputs. Measured over plugins/onnxruntime's
# test_operators.py, all instruction sets: float32 3.3e-7, float16 4.6e-4, bfloat16 3.1e-3; rounding
# the output alone costs a half type up to 4.9e-4 and 3.9e-3.
SCAN_TOLERANCE = {torch.float32: 6e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}

# Half precision must be as good as PyTorch's own: error at most this many times that of the
# reference run in that type.
HALF_FACTOR = 2.0

# Pieces of the kernels. exp(dt A), over its value; and 1 - exp(dt A), over its value, beyond the
# 2^-24 that rounding the decay costs: this error multiplies up over a long sequence.
DECAY_TOLERANCE = 6e-7  # measured 4.9e-7
ONE_MINUS_DECAY_TOLERANCE = 8e-7  # measured 5.0e-7, its mean 6.5e-7 (baseline)
SOFTPLUS_TOLERANCE = 3.5e-7  # measured 3.3e-7 (AVX-512), 2.9e-7

# The CUDA scans keep SCAN_TOLERANCE in emulation (measured there: float32 3.6e-7, float16 4.6e-4,
# bfloat16 3.5e-3), where exp2 is exact. A GPU's ex2 errs by up to two units in the last place of
# every decay. Measured in emulation over plugins/cuda/test_scan.py with such errors put in,
# float32: 1.3e-6 where they are drawn, 2.2e-6 and 3.8e-6 where every ex2 is one unit and two too
# large, the worst that may be; half types as without. To be set anew from the first run on a GPU.
GPU_SCAN_TOLERANCE = SCAN_TOLERANCE | {torch.float32: 4e-6}

# Gradients against float64 autograd of the oracle, over the largest magnitude of each. Measured
# over test_scan_backward.py, all instruction sets: float32 3.0e-6; half types round each once.
GRADIENT_TOLERANCE = {torch.float32: 6e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}

# Over test_exponents.py, where one input takes every exponent of its type: over the sum of the
# magnitudes of a result's terms. Measured, all instruction sets and the bodies: float32 5.9e-7,
# half types what their rounding costs. CUDA in emulation: 2.7e-6 at a step size of e^-80, where the
# argument of exp2 is rounded. Gradients, over the largest of a channel: 7.9e-6.
EXPONENT_TOLERANCE = SCAN_TOLERANCE | {torch.float32: 8e-7}
GPU_EXPONENT_TOLERANCE = GPU_SCAN_TOLERANCE
EXPONENT_GRADIENT_TOLERANCE = 1e-5


def relative_error(got: Tensor | np.ndarray, want: Tensor | np.ndarray) -> float:
    """Largest difference over the largest magnitude wanted, in float64."""
    found, wanted = (
        np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, np.float64)
        for x in (got, want)
    )
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.maximum(np.abs(wanted).max(), 1e-30))
