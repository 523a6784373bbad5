"""The baseline of everybody: mamba-ssm's selective-scan kernel, installed or built from a checkout.

MAMBA_SSM_SOURCE names a checkout of state-spaces/mamba; only the forward kernels of its
selective-scan extension are compiled, with that project's own flags. The kernel knows neither
directions nor gaps: a direction is a call of its own on operands (batch, d_inner, seqlen).
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vssm.errors import RuntimeUnavailableError

SOURCE_VARIABLE = "MAMBA_SSM_SOURCE"
FOLDER = "csrc/selective_scan"
BUILD = Path(__file__).resolve().parents[2] / "build" / "mamba_ssm"
_NAME = "selective_scan_cuda"
_FORWARD = (
    "selective_scan.cpp",
    "selective_scan_fwd_fp32.cu",
    "selective_scan_fwd_fp16.cu",
    "selective_scan_fwd_bf16.cu",
)
_NVCC = (
    "-O3",
    "-std=c++17",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
)
# The extension's Python binding names the backward pass, whose kernels take minutes to compile and
# are never called here: definitions that refuse stand in for them.
_BACKWARD = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <stdexcept>
#include <cuda_runtime_api.h>
#include "selective_scan.h"
template <typename T, typename W>
void selective_scan_bwd_cuda(SSMParamsBwd&, cudaStream_t) {
  throw std::runtime_error("built for inference: no backward pass");
}
#define INSTANTIATE(T)                                                            \\
  template void selective_scan_bwd_cuda<T, float>(SSMParamsBwd&, cudaStream_t);   \\
  template void selective_scan_bwd_cuda<T, c10::complex<float>>(SSMParamsBwd&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(at::Half)
INSTANTIATE(at::BFloat16)
"""


def load() -> Any:
    """The extension `selective_scan_cuda`: the one that was built here, or the installed one.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    if (BUILD / f"{_NAME}.so").is_file():
        sys.path.insert(0, str(BUILD))
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"mamba-ssm's kernel cannot be imported ({error}); pip install mamba-ssm, or name a "
            f"checkout of its sources with {SOURCE_VARIABLE} and run the step mamba of gpu_check.sh"
        ) from error


def build(folder: Path) -> None:
    """Compile the extension from csrc/selective_scan of a checkout into BUILD.

    Raises:
        RuntimeUnavailableError: the folder lacks a file.
    """
    absent = [name for name in (*_FORWARD, "selective_scan.h") if not (folder / name).is_file()]
    if absent:
        raise RuntimeUnavailableError(
            f"{SOURCE_VARIABLE}: {folder} lacks {', '.join(absent)}; name a checkout of "
            "state-spaces/mamba, version 1.2 or newer"
        )
    from torch.utils import cpp_extension

    folder = folder.resolve()  # the compiler runs elsewhere
    BUILD.mkdir(parents=True, exist_ok=True)
    # A build that was stopped leaves PyTorch's lock behind, which the next one would wait for.
    (BUILD / "lock").unlink(missing_ok=True)
    stub = BUILD / "no_backward.cpp"
    stub.write_text(_BACKWARD, encoding="utf-8")
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    cpp_extension.load(
        name=_NAME,
        sources=[*(str(folder / name) for name in _FORWARD), str(stub)],
        extra_include_paths=[str(folder)],
        extra_cflags=["-O3", "-std=c++17"],
        extra_cuda_cflags=list(_NVCC),
        build_directory=str(BUILD),
        with_cuda=True,
        verbose=True,
    )


def directions(operands: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Arguments of the extension's `fwd`, one tuple a direction there and back, contiguous.

    Gaps are left out: the kernel has no operand for them.
    """
    count = operands["order"].shape[1]
    return [_direction(operands, k) for k in range(count)]


def _direction(operands: dict[str, Tensor], k: int) -> tuple[Any, ...]:
    def steps(name: str) -> Tensor:
        x = operands[name]
        return turn(x[:, :, k % x.shape[2]].transpose(1, 2), k).contiguous()

    def weight(name: str) -> Tensor:
        x = operands[name]
        return x[k % x.shape[0]].contiguous()

    z = operands.get("z")
    gate = None if z is None else turn(z.transpose(1, 2), k).contiguous()
    groups = (steps("B")[:, None], steps("C")[:, None])
    return (
        steps("u"),
        steps("delta"),
        weight("A"),
        *groups,
        weight("D"),
        gate,
        weight("delta_bias"),
    )


def turn(x: Tensor, k: int) -> Tensor:
    """Steps of (batch, width, seqlen) in the order of direction k: forward, backward."""
    return x.flip(-1) if k % 2 else x


def run(extension: Any, prepared: list[tuple[Any, ...]]) -> list[Tensor]:
    """The gated result (batch, d_inner, seqlen) of every direction, in its own order."""
    # fwd gives y, the states, and y gated where there is a gate.
    return [extension.fwd(*given, True)[0 if given[6] is None else 2] for given in prepared]


def joined(results: list[Tensor]) -> Tensor:
    """The sum over directions in token order, (batch, seqlen, d_inner)."""
    total = sum(turn(y, k).float() for k, y in enumerate(results))
    return total.transpose(1, 2)  # type: ignore[union-attr]


def scan(extension: Any) -> Any:
    """A stand-in for `vssm.ops.operators.selective_scan` in a Vim, over the extension.

    A gap g of a step is put into its operands, which is exact: the step g dt, the input u / g, and
    the skip beside the kernel.
    """

    def selective_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        D: Tensor,
        delta_bias: Tensor,
        order: Tensor,
        gap: Tensor,
        z: Tensor | None = None,
        delta0: Tensor | None = None,
        scale: float = 1.0,
        backend: str = "auto",  # what computes is this
    ) -> Tensor:
        if delta0 is not None or order.shape[1] > 2:
            raise ValueError("mamba-ssm runs Vim's scans alone: there and back, no constant gap")
        dense = gap.shape[0] == 1
        total: Any = 0
        for k in range(order.shape[1]):
            # The extension wants channels outside: its time holds copies that a model made for it
            # would not need.
            x, dt = (turn(t[:, :, k % t.shape[2]].transpose(1, 2), k) for t in (u, delta))
            groups = [turn(t[:, :, k % t.shape[2]].transpose(1, 2), k)[:, None] for t in (B, C)]
            bias, skip = delta_bias[k % len(delta_bias)], D[k % len(D)]
            if dense:
                y = _forward(extension, [x, dt, *groups], A[k % len(A)], (skip, bias))
            else:
                span = torch.cat([torch.ones_like(gap[:, k, :1]), gap[:, k, 1:]], -1)[:, None]
                step = (span * functional.softplus(dt.float() + bias[:, None])).to(x.dtype)
                spread = (x / span).to(x.dtype)
                y = _forward(extension, [spread, step, *groups], A[k % len(A)], None)
                y = y + skip[:, None] * x
            total = total + turn(y, k)
        total = scale * total.transpose(1, 2)
        return (total if z is None else total * functional.silu(z)).to(u.dtype)

    return selective_scan


def _forward(
    extension: Any, streams: list[Tensor], A: Tensor, skip_and_bias: tuple[Tensor, Tensor] | None
) -> Tensor:
    """u, delta, B, C; without skip and bias, delta is the step size itself."""
    skip, bias = skip_and_bias or (None, None)
    u, delta, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in streams)
    softplus = skip_and_bias is not None
    result: Tensor = extension.fwd(u, delta, A, B, C, skip, None, bias, softplus)[0]
    return result


if __name__ == "__main__":
    build(Path(os.environ[SOURCE_VARIABLE]) / FOLDER)
    print(f"built {load().__file__}")
