"""Which module of which upstream package has which of our functions: one table.

`Provided` modules know nothing else: an attribute they have not is an error that says so.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from opcode import opmap
from types import FrameType, ModuleType
from typing import Any, Final

import torch

from vssm.compat.packages import blocks, cross, layers, norms, scan, ssd, stand_ins
from vssm.errors import UnsupportedError

_DOCS: Final = "docs/compat.md lists what is there"


def not_supported(name: str, remedy: str) -> Any:
    """A function or class that may be imported, and refuses to be called."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - of the class below
        caller = _caller(sys._getframe(1))
        raise UnsupportedError(
            f"{name} (called by {caller}) is not supported by vssm.compat: {remedy}; {_DOCS}"
        )

    return type(name.rpartition(".")[2], (torch.nn.Module,), {"__init__": __init__})


def _caller(frame: FrameType) -> str:
    """Module and line of a frame."""
    return f"{frame.f_globals.get('__name__', '?')}, line {frame.f_lineno}"


_PREFILL = "it decodes token by token; export the forward pass over a whole sequence"
_MAMBA3 = "it is another recurrence; use the Mamba-1 or Mamba-2 variant of the model"
_INSIDE = (
    "it is the inside of mamba_ssm's Triton code; let the caller use the functions around it, for "
    "example with use_mem_eff_path=False"
)
_CLONE: Final = (
    "mamba_ssm is not installed and this part of it has no stand-in; give a clone of "
    "state-spaces/mamba, or the repository's own copy of it, with --path"
)
_COMPILED_CODE = (
    "it is compiled CUDA code; say which function around it is the selective scan with --scan "
    "MODULE:NAME=channels, or put one of ours in its place with report.replace"
)
_COMPILED_HERE = (
    "it is CUDA code that the repository compiles as it is imported, and no selective scan that "
    "vssm knows; if the function around it is one, say so with --scan MODULE:NAME=channels"
)


def _applied(function: Any) -> Any:
    """What files call as the `apply` of an autograd Function."""
    return type(function.__name__, (), {"apply": staticmethod(function)})


_SCAN: Final = {
    "selective_scan_fn": scan.selective_scan_fn,
    "selective_scan_ref": scan.selective_scan_fn,
    "mamba_inner_fn": blocks.mamba_inner_fn,
    "mamba_inner_ref": blocks.mamba_inner_fn,
    "mamba_inner_fn_no_out_proj": blocks.mamba_inner_fn_no_out_proj,
    "bimamba_inner_fn": blocks.bimamba_inner_fn,
    "bimamba_inner_ref": blocks.bimamba_inner_fn,
    "SelectiveScanFn": _applied(scan.selective_scan_fn),
    "MambaInnerFn": _applied(blocks.mamba_inner_fn),
    "MambaInnerFnNoOutProj": _applied(blocks.mamba_inner_fn_no_out_proj),
    "BiMambaInnerFn": _applied(blocks.bimamba_inner_fn),
}
_NORMS: Final = {
    "RMSNorm": norms.RMSNorm,
    "rms_norm_fn": norms.rms_norm_fn,
    "layer_norm_fn": norms.layer_norm_fn,
    "rms_norm_ref": norms.rms_norm_fn,
    "layer_norm_ref": norms.layer_norm_fn,
}
_SSD: Final = {
    "mamba_chunk_scan_combined": ssd.mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": ssd.mamba_split_conv1d_scan_combined,
    # Files may import these for a path of theirs that is not taken.
    **{
        name: not_supported(name, _INSIDE)
        for name in ("_mamba_chunk_scan_combined_fwd", "_mamba_chunk_scan_combined_bwd")
    },
}
_GATED_NORMS: Final = {
    "RMSNorm": norms.GatedRMSNorm,
    "LayerNorm": norms.GatedLayerNorm,
    "rmsnorm_fn": norms.gated_rms_norm,
    "rms_norm_ref": norms.gated_rms_norm,
    "layernorm_fn": norms.gated_layer_norm,
    **{name: not_supported(name, _INSIDE) for name in ("_layer_norm_fwd", "_layer_norm_bwd")},
}
_CONV: Final = {
    "causal_conv1d_fn": blocks.causal_conv1d_fn,
    "causal_conv1d_ref": blocks.causal_conv1d_fn,
    "causal_conv1d_update": not_supported("causal_conv1d_update", _PREFILL),
}
_UPDATE: Final = {
    "selective_state_update": not_supported("selective_state_update", _PREFILL),
}
# Functions: ours wherever `prefer` is "ours", whatever is installed.
FUNCTIONS: Final[dict[str, dict[str, Any]]] = {
    "mamba_ssm": _SCAN,
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm": _NORMS,
    "mamba_ssm.ops.triton.layernorm_gated": _GATED_NORMS,
    "mamba_ssm.ops.triton.selective_state_update": _UPDATE,
    "mamba_ssm.ops.triton.ssd_combined": _SSD,
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV,
}
# Compiled modules, so that the files that import them load; there is nothing in them to call.
_COMPILED: Final = re.compile(r"(selective_scan|causal_conv1d)_cuda\w*")


def compiled(name: str) -> dict[str, Any] | None:
    """What to provide for a compiled module of mamba_ssm's, causal_conv1d's or their copies'."""
    if not _COMPILED.fullmatch(name):
        return None
    calls = ("fwd", "causal_conv1d_fwd")
    return {call: not_supported(f"{name}.{call}", _COMPILED_CODE) for call in calls}


class Compiled(ModuleType):
    """A module that a repository compiles when it is imported: its functions refuse to be called.

    Args:
        name: that it is compiled under.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return not_supported(f"{self.__name__}.{name}", _COMPILED_HERE)


# Files around them that need more packages: ours where `prefer` is "ours".
AROUND: Final[dict[str, dict[str, Any]]] = {
    "mamba_ssm.modules.mamba3": {"Mamba3": not_supported("Mamba3", _MAMBA3)},
    "mamba_ssm.utils.generation": {
        "GenerationMixin": stand_ins.Empty,
        "InferenceParams": not_supported("InferenceParams", _PREFILL),
    },
    "mamba_ssm.utils.hf": {
        name: not_supported(name, "it downloads; load a checkpoint file yourself")
        for name in ("load_config_hf", "load_state_dict_hf")
    },
}
# Packages and modules whose own files are used where they are there.
PACKAGES: Final[dict[str, dict[str, Any]]] = {
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {
        **{**_SCAN, **_NORMS, **_CONV},
        **{"Mamba": blocks.Mamba, "Block": layers.Block},
    },
    "mamba_ssm.modules.mamba2": {"Mamba2": ssd.Mamba2},
    "mamba_ssm.modules.block": {"Block": layers.BlockWithMlp},
    "mamba_ssm.modules.mlp": {"GatedMLP": layers.GatedMLP},
    "mamba_ssm.modules.mha": {"MHA": not_supported("MHA", _CLONE)},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": not_supported("MambaConfig", _CLONE)},
    "mamba_ssm.models.mixer_seq_simple": {
        name: not_supported(name, _CLONE)
        for name in ("MambaLMHeadModel", "MixerModel", "create_block", "_init_weights")
    },
    # What VMamba's first release compiles, and its followers import by this name.
    "selective_scan": dict.fromkeys(
        ("selective_scan_fn", "selective_scan_ref"), scan.ungated_scan_fn
    ),
    "mamba_ssm.utils": {},
}
_MAP: Final = (1, 2, 3, 4)
# Walks that user files define: class or function name, our form, the arguments that it has, and the
# shape of an operand to compare them with.
BY_NAME: Final[dict[str, tuple[Any, tuple[str, ...], tuple[int, ...]]]] = {
    "cross_scan_fn": (
        cross.cross_scan_fn,
        (*("x", "in_channel_first", "out_channel_first", "one_by_one", "scans", "force_torch"),),
        _MAP,
    ),
    "cross_merge_fn": (
        cross.cross_merge_fn,
        (*("y", "in_channel_first", "out_channel_first", "one_by_one", "scans", "force_torch"),),
        (1, 4, 2, 3, 4),
    ),
    "CrossScan.apply": (cross.cross_scan, ("x",), _MAP),
    "CrossMerge.apply": (cross.cross_merge, ("ys",), (1, 4, 2, 3, 4)),
    **{f"CrossScan_{n}.apply": (cross.one_walk(n)[0], ("x",), _MAP) for n in (1, 2, 3, 4)},
    **{
        f"CrossMerge_{n}.apply": (cross.one_walk(n)[1], ("ys",), (1, 1, 2, 3, 4))
        for n in (1, 2, 3, 4)
    },
}


# What a package's own __init__ would have imported from a file of the user's, if it is there.
LATER: Final = {
    ("mamba_ssm", "Mamba"): "mamba_ssm.modules.mamba_simple:Mamba",
    ("mamba_ssm", "Mamba2"): "mamba_ssm.modules.mamba2:Mamba2",
    ("mamba_ssm", "MambaLMHeadModel"): "mamba_ssm.models.mixer_seq_simple:MambaLMHeadModel",
}


class Provided(ModuleType):
    """A module that this package stands in for; what it has not fails with a message.

    Args:
        name: of the module.
        names: what it has.
        path: where its submodules lie, if any do.
        lenient: whether any other name may be imported, and only a call of it fails.
        missed: what was asked for and is not there is added to this list.
    """

    def __init__(
        self,
        name: str,
        names: dict[str, Any],
        path: list[str],
        *,
        lenient: bool = False,
        missed: list[str] | None = None,
    ) -> None:
        super().__init__(name, f"Provided by vssm.compat in the place of {name}.")
        self.__path__ = path  # a package: submodules come from the tables, or lie there
        self.__version__ = "0"
        self.__lenient = lenient
        self.__missed = [] if missed is None else missed
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) in LATER:
            return pkgutil.resolve_name(LATER[self.__name__, name])
        frame = sys._getframe(1)
        imported = frame.f_code.co_code[frame.f_lasti] == opmap["IMPORT_FROM"]
        # By attribute alone, `hasattr(timm, "layers")` would find everything.
        if imported and self.__lenient:
            setattr(self, name, _placeholder(self.__name__, name))
            return getattr(self, name)
        known = ", ".join(sorted(n for n in vars(self) if not n.startswith("_"))) or "nothing"
        message = (
            f"{self.__name__}.{name} (asked for by {_caller(frame)}) is unknown to "
            f"vssm.compat, which stands in for {self.__name__} here and has {known}; install "
            f"the package and use upstream(prefer='installed'), or take the import out; {_DOCS}"
        )
        # `from module import name` would say no more than "cannot import name".
        if imported:
            self.__missed.append(f"{self.__name__}.{name} ({_caller(frame)})")
            raise ImportError(message, name=self.__name__)
        raise AttributeError(message)


def _placeholder(module: str, name: str) -> Any:
    """What a file may import of an absent package, and not call."""
    # BACKBONES, MODELS: files decorate their classes with these as they are imported.
    if name.isupper():
        return stand_ins.Registry(name)
    return not_supported(f"{module}.{name}", "the package is not installed; install it")
