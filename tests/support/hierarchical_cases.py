"""Small VMambas and GroupMambas that several test files share."""

from __future__ import annotations

from typing import Any

from official_data import fill_weights

import vssm
from vssm.models.base import VisionModel

# Two stages and odd maps: 9 x 13 and 5 x 7 tokens; groups of 3 and 5 channels.
SMALL: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": {"d_model": 16, "depths": (1, 1)},
    "vanilla_vmamba_tiny": {"d_model": 16, "depths": (1, 1)},
    "groupmamba_tiny": {
        "stem_width": 6,
        "widths": (12, 20),
        "depths": (1, 1),
        "mlp_ratios": (2, 2),
        "reduction": 4,
    },
}


def small(name: str, **changes: Any) -> VisionModel:
    """A small model of the family with weights whose scan matters."""
    size = {"image_size": (36, 52), "num_classes": 7, **changes}
    model = fill_weights(vssm.create_model(name, **{**SMALL[name], **size}))
    assert isinstance(model, VisionModel)
    return model
