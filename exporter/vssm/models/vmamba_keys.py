"""VMamba's checkpoints of other times: names, layouts and position maps made today's."""

from __future__ import annotations

import re
from typing import Final

from torch import Tensor
from torch.nn import functional

from vssm.errors import CheckpointError
from vssm.models.layers import wide

# The first release; then the one-file code of March 2025.
_NAMES: Final = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"\.op\.x_proj\.weight$", ".op.x_proj_weight"),
    (r"\.op\.dt_projs\.weight$", ".op.dt_projs_weight"),
)
_LINEARS: Final = re.compile(
    r"\.(in_proj|out_proj|fc1|fc2|reduction)\.weight$|^classifier\.head\.weight$"
)
_DIRECTIONS: Final = 4


def adapt_keys(state: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of any official VMamba file under today's keys and shapes.

    Args:
        state: tensors by their names in the file.
        grid: (height, width) of the first stage's map, for a position map.

    Raises:
        CheckpointError: two entries come to one name.
    """
    adapted: dict[str, Tensor] = {}
    for old, value in state.items():
        key = old
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        if key in adapted or (key != old and key in state):
            raise CheckpointError(
                f"key={old!r} is an older name of {key!r}, which the file has too; "
                "save one model's state_dict()"
            )
        adapted[key] = _reshaped(key, value, grid)
    return adapted


def _reshaped(key: str, value: Tensor, grid: tuple[int, int]) -> Tensor:
    if value.dim() == 4 and value.shape[2:] == (1, 1) and _LINEARS.search(key):
        return value.flatten(1)
    by_direction = key.endswith(("x_proj_weight", "dt_projs_weight")) and value.dim() == 2
    if by_direction and value.shape[0] % _DIRECTIONS == 0:
        return value.reshape(_DIRECTIONS, -1, value.shape[1])
    if key == "pos_embed" and value.dim() == 4 and tuple(value.shape[2:]) != grid:
        table = functional.interpolate(wide(value), size=grid, mode="bicubic", align_corners=False)
        return table.to(value.dtype)
    return value
