"""Operator inputs for tests, keyed by the operators' input names. Plain functions, seeded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vssm.ops.spec import GATHER_OPERATORS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What each scan takes beside the operands that all have.
EXTRA = {"SelectiveScan": "", "GatedSelectiveScan": "z", "SelectiveScanConstantGap": "delta0"}
GATHERS = [
    (spec.name, tuple(getattr(torch, name) for name in types))
    for spec in GATHER_OPERATORS
    for types in spec.types
]

# Sizes of scans that hurt: 1, primes, an edge of the blocks of 16 channels or steps and one past
# it, several blocks; every shared axis; every d_state with a kernel of its own, and the largest.
SCAN_SIZES: list[dict[str, Any]] = [
    {"seqlen": 1, "d_inner": 1, "d_state": 1, "directions": 1},
    {"seqlen": 2, "d_inner": 5, "d_state": 16, "directions": 2, "shared": "u"},
    {"seqlen": 63, "d_inner": 16, "d_state": 3, "directions": 4, "shared": "udACD"},
    {"seqlen": 64, "d_inner": 17, "d_state": 17, "directions": 1, "batch": 3},
    {"seqlen": 65, "d_inner": 100, "d_state": 16, "directions": 2, "batch": 2, "per_image": True},
    {"seqlen": 197, "d_inner": 48, "d_state": 16, "directions": 2, "order": "ends", "gap": "ones"},
    {"seqlen": 197, "d_inner": 16, "d_state": 8, "directions": 4, "shared": "u"},
    {"seqlen": 257, "d_inner": 17, "d_state": 1, "directions": 4, "batch": 2},
    {"seqlen": 33, "d_inner": 150, "d_state": 1, "directions": 4, "shared": "u"},
    {"seqlen": 20, "d_inner": 250, "d_state": 1, "directions": 2, "gap": "ones"},
    {"seqlen": 257, "d_inner": 16, "d_state": 64, "directions": 2, "shared": "BC", "gap": "large"},
    {"seqlen": 17, "d_inner": 5, "d_state": 256, "directions": 2, "shared": "AB", "batch": 2},
    {
        "seqlen": 64,
        "d_inner": 16,
        "d_state": 1,
        "directions": 1,
        "gap": "large",
        "batch": 2,
        "per_image": True,
    },
    {
        "seqlen": 63,
        "d_inner": 33,
        "d_state": 16,
        "directions": 4,
        "shared": "D",
        "batch": 3,
        "per_image": True,
    },
    # One decay for all states: tiles of states of every size, channels that have a step size each,
    # and whole heads; as PlainMamba shares its operands, too.
    {"seqlen": 33, "d_inner": 37, "d_state": 31, "directions": 2, "decay": "channel", "batch": 2},
    {"seqlen": 65, "d_inner": 48, "d_state": 64, "directions": 2, "decay": "head", "gap": "large"},
    {"seqlen": 17, "d_inner": 90, "d_state": 128, "directions": 1, "decay": "head"},
    {"seqlen": 9, "d_inner": 32, "d_state": 5, "directions": 4, "shared": "udACD", "decay": "head"},
]

# Directions that share step sizes, A and C, so that with params_by_step they go on together
# (PlainMamba); where gaps are "pairs", some agree and some do not. The last three only look like
# it: five directions, 65 states, a C for each direction.
TOGETHER_SIZES: list[dict[str, Any]] = [
    {
        "seqlen": 196,
        "d_inner": 33,
        "d_state": 16,
        "directions": 4,
        "shared": "udACD",
        "gap": "ones",
    },
    {"seqlen": 1, "d_inner": 1, "d_state": 1, "directions": 2, "shared": "udAC"},
    {"seqlen": 7, "d_inner": 16, "d_state": 3, "directions": 3, "shared": "dACD", "gap": "ones"},
    {"seqlen": 65, "d_inner": 17, "d_state": 17, "directions": 4, "shared": "udABCD", "batch": 2},
    {"seqlen": 63, "d_inner": 20, "d_state": 1, "directions": 4, "shared": "dAC", "gap": "pairs"},
    {
        "seqlen": 64,
        "d_inner": 40,
        "d_state": 16,
        "directions": 4,
        "shared": "udACD",
        "batch": 3,
        "per_image": True,
        "gap": "pairs",
    },
    {"seqlen": 40, "d_inner": 16, "d_state": 64, "directions": 3, "shared": "udAC", "gap": "large"},
    {"seqlen": 9, "d_inner": 5, "d_state": 4, "directions": 5, "shared": "udAC", "gap": "ones"},
    {"seqlen": 9, "d_inner": 5, "d_state": 65, "directions": 4, "shared": "udAC", "gap": "ones"},
    {"seqlen": 9, "d_inner": 5, "d_state": 16, "directions": 4, "shared": "udA", "gap": "pairs"},
]


def scan_case(
    *,
    seqlen: int = 64,
    d_inner: int = 16,
    d_state: int = 16,
    directions: int = 2,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    shared: str = "",
    order: str = "random",
    gap: str = "random",
    per_image: bool = False,
    decay: str = "state",
    extra: str = "",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of a scan operator.

    Args:
        seqlen: tokens.
        d_inner: channels.
        d_state: states of a channel.
        directions: K.
        batch: images.
        dtype: of u, delta, B, C and z.
        shared: the inputs whose K axis is 1, from the letters u, d(elta), A, B, C, D.
        order: "random", or "ends" for forward and backward in turn.
        gap: "random" (1 to 4), "large" (up to 10,000), "pairs" (1 or 2) or "ones".
        per_image: whether order and gap differ between images.
        decay: whose own A is: "state", "channel" (one for all its states), or "head", of 16
            channels that share step sizes, too.
        extra: "z", "delta0" or nothing: the tenth input.
        seed: of every number.
    """
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    def axis(letter: str) -> int:
        return 1 if letter in shared else directions

    images = batch if per_image else 1
    case = {
        "u": normal(batch, seqlen, axis("u"), d_inner).to(dtype),
        "delta": normal(batch, seqlen, axis("d"), d_inner).to(dtype),
        "A": -torch.exp(0.5 * normal(axis("A"), d_inner, d_state)) * torch.arange(1, d_state + 1),
        "B": normal(batch, seqlen, axis("B"), d_state).to(dtype),
        "C": normal(batch, seqlen, axis("C"), d_state).to(dtype),
        "D": normal(axis("D"), d_inner),
        "delta_bias": normal(axis("d"), d_inner) - 4.0,
        "order": _order(images, directions, seqlen, kind=order, make=make),
        "gap": _gap(images, directions, seqlen, kind=gap, make=make),
    }
    if extra == "z":
        case["z"] = normal(batch, seqlen, d_inner).to(dtype)
    elif extra == "delta0":
        case["delta0"] = torch.nn.functional.softplus(normal(axis("d"), d_inner) - 4.0)
    if decay != "state":
        case["A"] = case["A"][..., :1].contiguous()
    if decay == "head":
        first = torch.arange(d_inner) // 16 * 16
        case["A"] = case["A"][:, first]
        for name in {"delta", "delta_bias", "delta0"} & case.keys():
            case[name] = case[name][..., first]
    return case


def _order(
    images: int, directions: int, seqlen: int, *, kind: str, make: torch.Generator
) -> Tensor:
    if kind == "random":
        rows = [torch.randperm(seqlen, generator=make) for _ in range(images * directions)]
    else:
        forward = torch.arange(seqlen)
        rows = [forward if k % 2 == 0 else forward.flip(0) for k in range(directions)] * images
    return torch.stack(rows).reshape(images, directions, seqlen).to(torch.int32)


def _gap(images: int, directions: int, seqlen: int, *, kind: str, make: torch.Generator) -> Tensor:
    shape = (images, directions, seqlen)
    if kind == "ones":
        return torch.ones(shape, dtype=torch.int32)
    end = {"random": 5, "large": 10_001, "pairs": 3}[kind]
    gap = torch.randint(1, end, shape, generator=make)
    gap[..., 0] = 0  # without effect at a first step
    return gap.to(torch.int32)


def gather_case(
    *,
    seqlen: int = 64,
    batch: int = 2,
    widths: tuple[int, ...] = (16, 8),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32),
    ties: bool = False,
    special: bool = False,
    shared_position: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of TokenGather, or of TokenGather1 when `widths` has one entry.

    Args:
        seqlen: tokens.
        batch: images.
        widths: of x0, x1.
        dtypes: of x0, x1.
        ties: scores from a handful of values.
        special: NaN, infinities, zeros of both signs and denormals among the scores.
        shared_position: one row of positions for all images.
        seed: of every number.
    """
    make = torch.Generator().manual_seed(seed)
    score = torch.randn((batch, seqlen), generator=make)
    if ties:
        score = (score * 2).round()
    if special:
        values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-42, -1e-42])
        pick = torch.randint(0, len(values), score.shape, generator=make)
        score = torch.where(torch.rand(score.shape, generator=make) < 0.7, values[pick], score)
    images = 1 if shared_position else batch
    places = [
        torch.randperm(3 * seqlen, generator=make)[:seqlen].sort().values for _ in range(images)
    ]
    case = {"score": score, "position": torch.stack(places).to(torch.int32)}
    for i, (width, dtype) in enumerate(zip(widths, dtypes, strict=False)):
        case[f"x{i}"] = torch.randn((batch, seqlen, width), generator=make).to(dtype)
    return case


# Sizes of convolutions that hurt: 1, primes, an edge of the blocks of 16 channels and one past it,
# a single tap, the width with a kernel of its own, and the largest.
CONV_SIZES: list[dict[str, Any]] = [
    {"seqlen": 1, "d_inner": 1, "width": 1, "directions": 1},
    {"seqlen": 2, "d_inner": 5, "width": 4, "batch": 2},
    {"seqlen": 31, "d_inner": 16, "width": 3, "directions": 1, "batch": 2, "kept": 0.5},
    {"seqlen": 197, "d_inner": 33, "width": 4, "kept": 0.7, "batch": 2},
    {"seqlen": 64, "d_inner": 48, "width": 4, "kept": 0.8, "batch": 3, "per_image": False},
    {"seqlen": 33, "d_inner": 17, "width": 32, "kept": 0.3},
]

# Grids that hurt: one place, one column, a single row, taps that cover the whole grid, and the
# sides with kernels of their own.
GRID_SIZES: list[dict[str, Any]] = [
    {"grid": (1, 1), "d_inner": 1, "side": 1},
    {"grid": (13, 1), "seqlen": 9, "d_inner": 17, "side": 3},
    {"grid": (1, 9), "seqlen": 7, "d_inner": 5, "side": 5, "batch": 2},
    {"grid": (3, 3), "seqlen": 5, "d_inner": 16, "side": 7, "batch": 2},
    {"grid": (12, 14), "seqlen": 80, "d_inner": 33, "side": 7, "batch": 2},
    {"grid": (8, 8), "seqlen": 40, "d_inner": 70, "side": 3, "batch": 2, "per_image": False},
    {"grid": (6, 7), "d_inner": 37, "side": 5},
]


def conv_case(
    *,
    seqlen: int = 40,
    d_inner: int = 16,
    width: int = 4,
    directions: int = 2,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    kept: float = 0.6,
    per_image: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of TokenConv.

    Args:
        seqlen: tokens of the list.
        d_inner: channels.
        width: taps.
        directions: 1 looks back, 2 ahead too.
        batch: images.
        dtype: of x.
        kept: the share of original positions that are in the list.
        per_image: whether positions differ between images.
        seed: of every number.
    """
    make = torch.Generator().manual_seed(seed)
    full = int(seqlen / kept)
    rows = [
        torch.randperm(full, generator=make)[:seqlen].sort().values
        for _ in range(batch if per_image else 1)
    ]
    return {
        "x": torch.randn((batch, seqlen, d_inner), generator=make).to(dtype),
        "weight": torch.randn((directions, d_inner, width), generator=make) / width**0.5,
        "bias": torch.randn((directions, d_inner), generator=make) / 4,
        "position": torch.stack(rows).to(torch.int32),
    }


def grid_case(
    *,
    grid: tuple[int, int] = (7, 6),
    seqlen: int | None = None,
    d_inner: int = 16,
    side: int = 3,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    per_image: bool = True,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Inputs of TokenConv2D, and the attributes it must have.

    Args:
        grid: its height and width.
        seqlen: tokens of the list; None for one at every place.
        d_inner: channels.
        side: of the square of taps.
        batch: images.
        dtype: of x.
        per_image: whether positions differ between images.
        seed: of every number.
    """
    make = torch.Generator().manual_seed(seed)
    places = grid[0] * grid[1]
    seqlen = places if seqlen is None else seqlen
    rows = [
        torch.randperm(places, generator=make)[:seqlen].sort().values
        for _ in range(batch if per_image else 1)
    ]
    case = {
        "x": torch.randn((batch, seqlen, d_inner), generator=make).to(dtype),
        "weight": torch.randn((d_inner, side, side), generator=make) / side,
        "bias": torch.randn(d_inner, generator=make) / 4,
        "position": torch.stack(rows).to(torch.int32),
    }
    return case, {
        "grid_height": grid[0],
        "grid_width": grid[1],
        "group": d_inner,
        "by_position": int(seqlen < places),
    }


# Sizes of scatters that hurt: 1, everything, nothing but one, primes, edges of a warp and a block.
SCATTER_SIZES: list[dict[str, Any]] = [
    {"full_seqlen": 1, "seqlen": 1, "width": 1},
    {"full_seqlen": 2, "seqlen": 1, "width": 5, "batch": 33},
    {"full_seqlen": 33, "seqlen": 33, "width": 8, "batch": 2},
    {"full_seqlen": 197, "seqlen": 138, "width": 24, "batch": 3},
    {"full_seqlen": 257, "seqlen": 64, "width": 3, "batch": 2, "per_image": False},
    {"full_seqlen": 64, "seqlen": 32, "width": 87, "batch": 2, "ascending": False},
]


def scatter_case(
    *,
    full_seqlen: int = 40,
    seqlen: int = 25,
    width: int = 16,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    per_image: bool = True,
    ascending: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of TokenScatter.

    Args:
        full_seqlen: rows of base.
        seqlen: rows that are put over it.
        width: of both.
        batch: images.
        dtype: of both.
        per_image: whether positions differ between images.
        ascending: whether positions rise from row to row.
        seed: of every number.
    """
    make = torch.Generator().manual_seed(seed)
    rows = [
        torch.randperm(full_seqlen, generator=make)[:seqlen]
        for _ in range(batch if per_image else 1)
    ]
    if ascending:
        rows = [row.sort().values for row in rows]
    return {
        "base": torch.randn((batch, full_seqlen, width), generator=make).to(dtype),
        "x": torch.randn((batch, seqlen, width), generator=make).to(dtype),
        "position": torch.stack(rows).to(torch.int32),
    }


def small_case(
    name: str, *, batch: int = 2, seqlen: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Inputs of any operator, whose images share what they may, and the attributes it must have."""
    if name == "TokenConv":
        return conv_case(
            seqlen=seqlen, d_inner=3, width=3, batch=batch, dtype=dtype, per_image=False
        ), {}
    if name == "TokenConv2D":
        sizes = {"grid": (2, seqlen), "seqlen": seqlen, "d_inner": 3, "batch": batch}
        return grid_case(**sizes, dtype=dtype, per_image=False)
    if name == "TokenScatter":
        sizes = {"full_seqlen": 2 * seqlen, "seqlen": seqlen, "batch": batch}
        return scatter_case(**sizes, dtype=dtype, per_image=False), {}
    if name.startswith("TokenGather"):
        dtypes = (dtype, dtype if dtype == torch.float64 else torch.float32)
        widths = (16, 8) if name == "TokenGather" else (16,)
        case = gather_case(
            batch=batch, seqlen=seqlen, widths=widths, dtypes=dtypes, shared_position=True
        )
        return case, {"num_keep": 3}
    extra = {"GatedSelectiveScan": "z", "SelectiveScanConstantGap": "delta0"}.get(name, "")
    sizes = {"d_inner": 3, "d_state": 2, "batch": batch}
    return scan_case(seqlen=seqlen, extra=extra, dtype=dtype, **sizes), {}


def scan_reference_arguments(case: dict[str, Tensor]) -> dict[str, Any]:
    """A case in float64, as keyword arguments of the operator in vssm.ops.reference."""
    return {
        name: value.double() if value.is_floating_point() else value for name, value in case.items()
    }
