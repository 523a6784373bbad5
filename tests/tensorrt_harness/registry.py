"""Drives the plugin libraries through a real plugin registry; run by test_registry.py.

Usage: python registry.py MODE LIBRARY, with a lean runtime of TensorRT on the path. The process
ends without TensorRT's own clean-up, which wants a GPU.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from typing import Any

import numpy as np
import tensorrt_lean_bindings as trt

from vssm.ops.spec import DOMAIN, OPERATORS

INT32, FLOAT32 = trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32
CAPABILITIES = {
    trt.PluginCapabilityType.CORE: "IPluginV3OneCore",
    trt.PluginCapabilityType.BUILD: "IPluginV3OneBuild",
    trt.PluginCapabilityType.RUNTIME: "IPluginV3OneRuntime",
}


def creator_of(name: str) -> Any:
    found = trt.get_plugin_registry().get_creator(name, "1", DOMAIN)
    assert found is not None, name
    return found


def create(name: str, fields: list[Any], phase: Any = trt.TensorRTPhase.BUILD) -> Any:
    return creator_of(name).create_plugin("a.node", trt.PluginFieldCollection(fields), phase)


def field(name: str, value: object, kind: Any = INT32, dtype: Any = np.int32) -> Any:
    return trt.PluginField(name, np.array(value, dtype).reshape(-1), kind)


def good_fields(name: str) -> list[Any]:
    return [
        field(a.name, 3 if a.default is None else a.default)
        if a.kind is int
        else field(a.name, a.default, FLOAT32, np.float32)
        for a in OPERATORS[name].attributes
    ]


def check_creators() -> None:
    registry = trt.get_plugin_registry()
    ours = [c for c in registry.all_creators if c.plugin_namespace == DOMAIN]
    assert sorted(c.name for c in ours) == sorted(OPERATORS)
    for name, spec in OPERATORS.items():
        creator = creator_of(name)
        assert isinstance(creator, trt.IPluginCreatorV3One)
        assert (creator.name, creator.plugin_version) == (name, "1")
        kinds = {int: INT32, float: FLOAT32}
        shown = [(f.name, f.type) for f in creator.field_names]
        assert shown == [(a.name, kinds[a.kind]) for a in spec.attributes]
        assert registry.get_creator(name, "1", "") is None
        assert registry.get_creator(name, "2", DOMAIN) is None


def check_plugins() -> list[Any]:
    """Every operator, built and read back; the plugins stay until the process ends."""
    kept = []
    for name in OPERATORS:
        for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
            plugin = create(name, good_fields(name), phase)
            assert plugin is not None, name
            for capability, kind in CAPABILITIES.items():
                face = plugin.get_capability_interface(capability)
                assert type(face).__name__.startswith(kind), (name, face)
            kept.append(plugin)
    for name, spec in OPERATORS.items():
        required = any(a.default is None for a in spec.attributes)
        assert (create(name, []) is None) == required
        # An engine holds all attributes.
        assert (create(name, [], trt.TensorRTPhase.RUNTIME) is None) == bool(spec.attributes)
    return kept


def check_refusals() -> None:
    keep = field("num_keep", 3)
    bad = {
        "TokenGather": [
            [field("num_keep", 0)],
            [field("num_keep", -1)],
            [field("num_keep", [3, 4])],
            [field("num_keep", 3, trt.PluginFieldType.INT64, np.int64)],
            [field("num_keep", 3, FLOAT32, np.float32)],
            [keep, field("protected_position", -2)],
            [keep, field("keep_ratio", 1)],
            [keep, keep],
            [field("protected_position", 1)],
        ],
        "SelectiveScan": [
            [field("delta_softplus", 2)],
            [field("params_by_step", -1)],
            [field("scale", 1)],
            [field("scale", math.nan, FLOAT32, np.float32)],
            [field("scale", math.inf, FLOAT32, np.float32)],
            [field("num_keep", 3)],
        ],
    }
    bad["TokenConv"] = [
        [field("by_position", 2)],
        [field("activation", -1)],
        [field("activation", 1, FLOAT32, np.float32)],
        [field("width", 4)],
    ]
    grid = [field(name, 3) for name in ("grid_height", "grid_width", "group")]
    bad["TokenConv2D"] = [grid[:2], [*grid, field("by_position", 2)], [*grid, grid[0]]]
    bad["TokenConv2D"] += [[field("grid_height", 0), *grid[1:]]]
    bad["TokenScatter"] = [[keep]]
    same = {"TokenGather1": "TokenGather", "GatedSelectiveScan": "SelectiveScan"}
    same["SelectiveScanConstantGap"] = "SelectiveScan"
    for name in OPERATORS:
        for fields in bad[same.get(name, name)]:
            assert create(name, fields) is None, (name, [f.name for f in fields])


def main(mode: str, library: str) -> None:
    if mode == "load_library":
        trt.get_plugin_registry().load_library(library)
    else:
        ctypes.CDLL(library)
    check_creators()
    kept = check_plugins()
    check_refusals()
    sys.stdout.write(f"TensorRT {trt.__version__}: {len(kept)} plugins\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
