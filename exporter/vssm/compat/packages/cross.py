"""VMamba's cross-scan and cross-merge: four walks over a map, by fixed index tables.

Source of the signatures: MzeroMiko/VMamba, classification/models/csm_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SCANS = (0, 1, 2)


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """A map as four sequences.

    Args:
        x: (batch, channels, height, width), or (batch, height, width, channels); with
            `one_by_one` (batch, 4, channels, height, width) or (batch, height, width, 4, channels).
        in_channel_first: which of the two.
        out_channel_first: the layout returned.
        one_by_one: each walk has a map of its own.
        scans: 0: rows, columns, and both reversed; 1: rows four times; 2: rows twice and reversed
            twice.
        force_torch: inert: nothing here is Triton.

    Returns:
        (batch, 4, channels, seqlen), or (batch, seqlen, 4, channels).
    """
    height, width = x.shape[-2:] if in_channel_first else x.shape[1:3]
    if not in_channel_first:
        x = x.movedim((1, 2), (-2, -1))
    rows = x.flatten(-2)
    table = _walks(height, width, scans, x.device)
    maps = [rows[:, k] if one_by_one else rows for k in range(4)]
    # By constant tables, not by transposes and flips: a pass turns a table around a scan into the
    # scan's order.
    y = torch.stack([m.index_select(-1, o) for m, o in zip(maps, table, strict=True)], dim=1)
    return y if out_channel_first else y.permute(0, 3, 1, 2)


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Four sequences back in place, and summed.

    Args:
        y: (batch, 4, channels, height, width), or (batch, height, width, 4, channels).
        in_channel_first: the layout returned.
        out_channel_first: the layout of y, as the scan before it returned it.
        one_by_one: keep the four walks apart.
        scans: as for `cross_scan_fn`.
        force_torch: inert: nothing here is Triton.

    Returns:
        (batch, channels, seqlen) or (batch, seqlen, channels); with `one_by_one`
        (batch, 4, channels, seqlen) or (batch, seqlen, 4, channels).
    """
    height, width = y.shape[-2:] if out_channel_first else y.shape[1:3]
    y = y.flatten(-2) if out_channel_first else y.flatten(1, 2).permute(0, 2, 3, 1)
    # The walks of the map turned on its side are the inverses: each place's step.
    table = _walks(width, height, scans, y.device)
    back = [y[:, k].index_select(-1, o) for k, o in enumerate(table)]
    if one_by_one:
        apart = torch.stack(back, dim=1)
        return apart if in_channel_first else apart.permute(0, 3, 1, 2)
    # As a tree of additions, not `sum`: that is what the pass that merges scans into one node looks
    # for.
    total = back[0] + back[1] + back[2] + back[3]
    return total if in_channel_first else total.transpose(1, 2)


def cross_scan(x: Tensor) -> Tensor:
    """`CrossScan.apply`: (batch, channels, height, width) to (batch, 4, channels, seqlen)."""
    return cross_scan_fn(x)


def cross_merge(ys: Tensor) -> Tensor:
    """`CrossMerge.apply`: (batch, 4, channels, height, width) to (batch, channels, seqlen)."""
    return cross_merge_fn(ys)


# GroupMamba scans each group of channels along one walk, where VMamba scans all along four.
def one_walk(number: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """`CrossScan_N.apply` and `CrossMerge_N.apply` of GroupMamba for walk `number` from 1.

    The first takes (batch, channels, height, width) to (batch, 1, channels, seqlen), the second
    (batch, 1, channels, height, width) back to (batch, channels, seqlen).
    """

    def scan(x: Tensor) -> Tensor:
        order = _walks(x.shape[2], x.shape[3], 0, x.device)[number - 1]
        return x.flatten(2).index_select(-1, order)[:, None]

    def merge(ys: Tensor) -> Tensor:
        # Height and width exchanged gives the inverse, as in `cross_merge_fn`.
        back = _walks(ys.shape[4], ys.shape[3], 0, ys.device)[number - 1]
        return ys[:, 0].flatten(2).index_select(-1, back)

    return scan, merge


def _walks(height: int, width: int, scans: int, device: torch.device) -> list[Tensor]:
    """The place of each step of each walk."""
    if scans not in _SCANS:
        raise ValueError(f"scans={scans} is not one of {_SCANS}; VMamba knows these")
    rows = torch.arange(height * width, device=device)
    columns = rows.reshape(height, width).t().flatten()
    if scans == 1:
        return [rows] * 4
    other = columns if scans == 0 else rows
    return [rows, other, rows.flip(0), other.flip(0)]
