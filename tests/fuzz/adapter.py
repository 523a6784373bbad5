"""Random calls of the operators in ONNX Runtime, through the library that is named.

    python tests/fuzz/adapter.py LIBRARY CALLS SECONDS

For a library that was built with sanitizers: what it writes outside its memory is theirs to find.
Here, results are compared with float64, and a breach of the contract must be refused.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT.parents[1] / "exporter")]

import native  # noqa: E402
import torch  # noqa: E402
from cases import (  # noqa: E402
    EXTRA,
    conv_case,
    gather_case,
    grid_case,
    scan_case,
    scan_reference_arguments,
    scatter_case,
)
from tolerances import SCAN_TOLERANCE, relative_error  # noqa: E402

from vssm.ops import reference  # noqa: E402
from vssm.ops.spec import SCAN_OPERATORS  # noqa: E402


def call_scan(rng: random.Random) -> None:
    """One scan, or one with a token that is not there."""
    name = rng.choice(SCAN_OPERATORS).name
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    case = scan_case(
        seqlen=rng.choice((1, 2, 7, 16, 17, 33)),
        d_inner=rng.choice((1, 5, 16, 17, 33)),
        d_state=rng.choice((1, 3, 16, 17)),
        directions=rng.randrange(1, 5),
        batch=rng.randrange(1, 3),
        dtype=dtype,
        shared="".join(letter for letter in "udABCD" if rng.random() < 0.4),
        gap=rng.choice(("random", "large", "pairs", "ones")),
        per_image=rng.random() < 0.3,
        extra=EXTRA[name],
        seed=rng.randrange(1 << 30),
    )
    attributes = {"params_by_step": rng.randrange(2), "scale": rng.choice((0.5, 1.0))}
    threads = rng.randrange(1, 4)
    if rng.random() < 0.1:
        case["order"] = case["order"] + case["order"].shape[-1]
        try:
            native.run_operator(name, case, threads=threads, **attributes)
        except RuntimeError:
            return
        raise AssertionError(f"{name} took an order that names no token")
    got = native.run_operator(name, case, threads=threads, **attributes)["y"].double()
    expected = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    error = relative_error(got, expected)
    # A few numbers may cancel where a whole case of the tests does not.
    if not error <= 8 * SCAN_TOLERANCE[dtype]:
        raise AssertionError(f"{name}: error {error:.1e} of {dtype}")


def call_gather(rng: random.Random) -> None:
    """One gather, of one or two tensors."""
    name, widths = rng.choice((("TokenGather", (17, 8)), ("TokenGather1", (33,))))
    seqlen, seed = rng.choice((2, 7, 33, 64)), rng.randrange(1 << 30)
    case = gather_case(seqlen=seqlen, widths=widths, seed=seed, special=rng.random() < 0.3)
    num_keep = rng.randrange(1, seqlen + 1)
    outputs = native.run_operator(name, case, num_keep=num_keep)
    kept = outputs["kept_position"]
    if kept.shape[1] != num_keep or not (kept.diff(dim=1) > 0).all():
        raise AssertionError(f"{name} kept {kept.tolist()}")


def call_conv(rng: random.Random) -> None:
    """One convolution, or one whose positions do not ascend."""
    seqlen = rng.choice((1, 2, 7, 16, 17, 33))
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    case = conv_case(
        seqlen=seqlen,
        d_inner=rng.choice((1, 5, 16, 17, 33, 130)),
        width=rng.choice((1, 2, 3, 4, 5, 9, 32)),
        directions=rng.randrange(1, 3),
        batch=rng.randrange(1, 3),
        dtype=dtype,
        kept=rng.choice((0.2, 0.6, 1.0)),
        per_image=rng.random() < 0.5,
        seed=rng.randrange(1 << 30),
    )
    attributes = {"by_position": rng.randrange(2), "activation": rng.randrange(2)}
    threads = rng.randrange(1, 4)
    if seqlen > 1 and rng.random() < 0.1:
        case["position"] = case["position"].flip(1)
        attributes["by_position"] = 1
        try:
            native.run_operator("TokenConv", case, threads=threads, **attributes)
        except RuntimeError:
            return
        raise AssertionError("TokenConv took positions that do not ascend")
    got = native.run_operator("TokenConv", case, threads=threads, **attributes)["y"].double()
    expected = reference.token_conv(**scan_reference_arguments(case), **attributes)
    error = relative_error(got, expected)
    if not error <= 8 * SCAN_TOLERANCE[dtype]:
        raise AssertionError(f"TokenConv: error {error:.1e} of {dtype}")


def call_grid(rng: random.Random) -> None:
    """One convolution over a grid, or one with a position outside of it."""
    grid = (rng.choice((1, 3, 8)), rng.choice((1, 4, 9, 14)))
    places = grid[0] * grid[1]
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    case, attributes = grid_case(
        grid=grid,
        seqlen=rng.choice((places, rng.randrange(1, places + 1))),
        d_inner=rng.choice((1, 5, 16, 17, 33, 130)),
        side=rng.choice((1, 3, 5, 7)),
        batch=rng.randrange(1, 3),
        dtype=dtype,
        per_image=rng.random() < 0.5,
        seed=rng.randrange(1 << 30),
    )
    attributes["activation"] = rng.randrange(2)
    threads = rng.randrange(1, 4)
    if attributes["by_position"] and rng.random() < 0.1:
        case["position"][0, -1] = rng.choice((places, -1, 2**31 - 1))
        try:
            native.run_operator("TokenConv2D", case, threads=threads, **attributes)
        except RuntimeError:
            return
        raise AssertionError("TokenConv2D took a position outside of the grid")
    got = native.run_operator("TokenConv2D", case, threads=threads, **attributes)["y"].double()
    expected = reference.token_conv2d(**scan_reference_arguments(case), **attributes)
    error = relative_error(got, expected)
    if not error <= 8 * SCAN_TOLERANCE[dtype]:
        raise AssertionError(f"TokenConv2D: error {error:.1e} of {dtype}")


def call_scatter(rng: random.Random) -> None:
    """One scatter, or one with a position that is no row of its base."""
    full_seqlen = rng.choice((1, 2, 7, 33, 64))
    case = scatter_case(
        full_seqlen=full_seqlen,
        seqlen=rng.randrange(1, full_seqlen + 1),
        width=rng.choice((1, 5, 16, 33)),
        batch=rng.randrange(1, 4),
        dtype=rng.choice((torch.float32, torch.float16, torch.bfloat16)),
        per_image=rng.random() < 0.5,
        ascending=rng.random() < 0.5,
        seed=rng.randrange(1 << 30),
    )
    threads = rng.randrange(1, 4)
    if rng.random() < 0.1:
        case["position"][0, -1] = rng.choice((-1, full_seqlen))
        try:
            native.run_operator("TokenScatter", case, threads=threads)
        except RuntimeError:
            return
        raise AssertionError("TokenScatter took a position that is no row of base")
    got = native.run_operator("TokenScatter", case, threads=threads)["y"]
    if not torch.equal(got, reference.token_scatter(**case)):
        raise AssertionError("TokenScatter moved other rows")


def main(library: Path, calls: int, seconds: float) -> None:
    """Call until either is used up, each call from a seed of its own."""
    native.find_library = lambda: library
    deadline, done = time.monotonic() + seconds, 0
    while done < calls and time.monotonic() < deadline:
        rng = random.Random(done)
        os.environ["VSSM_CPU_ISA"] = rng.choice(ISAS)
        try:
            rng.choice(CALLS)(rng)
        except BaseException:
            sys.stdout.write(f"adapter: call {done}\n")
            raise
        done += 1
    sys.stdout.write(f"{done} calls on {' '.join(ISAS)}\n")


ISAS = native.available_isas()
CALLS = (call_gather, call_conv, call_grid, call_scatter, call_scan, call_scan, call_scan)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
