"""The operator table: name, inputs, outputs, types and attributes of every `vssm` operator.

The one Python copy of the contract. ONNX schemas, fake kernels, fallback bodies and tests read it;
`plugins/kernels/op_table.h` holds the C++ copy, and a test compares the two through
`describe_table()` and the library's `vssm_operator_table()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

DOMAIN: Final = "vssm"
OPERATOR_VERSION: Final = 1
MAX_D_STATE: Final = 256
MAX_CONV_WIDTH: Final = 32
MAX_CONV_SIDE: Final = 7
MAX_PLACES: Final = 2**31 - 1  # of a grid: positions are int32
FLOAT_TYPES: Final = ("float32", "float16", "bfloat16")
# Attributes that are switches: 0 or 1.
FLAGS: Final = frozenset({"delta_softplus", "params_by_step", "by_position", "activation"})
# Begins an axis that is either 1, for all, or as large as the symbol behind it.
SHARED: Final = "1|"
# What every node carries: TensorRT's parser finds the plugin by the node, not by the schema.
PLUGIN_ATTRIBUTES: Final = {"plugin_namespace": "vssm", "plugin_version": "1"}


@dataclass(frozen=True)
class OperandSpec:
    """One input or output.

    `dtype` is "float32", "int32" or a type variable ("T", "T0", "T1"). An axis of `shape` is a
    symbol, which has one size wherever it stands, or "1|symbol": that size, or 1 to share it.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(self.shape)}]"


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute; `default` None means that it must be given."""

    name: str
    kind: type[int] | type[float]
    default: int | float | None

    def __str__(self) -> str:
        default = "" if self.default is None else f"={self.default:g}"
        return f"{self.name}:{self.kind.__name__}{default}"


# Each is equal to itself alone: calls are looked up by their operator, and to hash all its fields
# would take longer than that.
@dataclass(frozen=True, eq=False)
class OperatorSpec:
    """One operator.

    `types` lists the allowed bindings of the type variables, sorted by name; `limits` the largest
    size of a symbol, where what the kernels hold sets one.
    """

    name: str
    inputs: tuple[OperandSpec, ...]
    outputs: tuple[OperandSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    types: tuple[tuple[str, ...], ...]
    limits: tuple[tuple[str, int], ...] = ()

    @property
    def type_variables(self) -> tuple[str, ...]:
        """Names of the type variables, sorted: ("T",), ("T0",) or ("T0", "T1")."""
        return tuple(sorted({o.dtype for o in self.inputs if o.dtype.startswith("T")}))

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """Inputs and attributes by name, given in order; defaults at the end may be left out."""
        names = (*(o.name for o in self.inputs), *(a.name for a in self.attributes))
        left_out = self.attributes[len(args) - len(self.inputs) :]
        return dict(zip(names, (*args, *(a.default for a in left_out)), strict=True))

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        outputs = ", ".join(map(str, self.outputs))
        attributes = ", ".join(map(str, self.attributes))
        types = " | ".join(",".join(t) for t in self.types)
        variables = ",".join(self.type_variables)
        return f"{self.name}({inputs}) -> ({outputs}) {{{attributes}}} {variables} in {types}"


_SCAN_INPUTS = (
    OperandSpec("u", "T", ("batch", "seqlen", "Ku", "d_inner")),
    OperandSpec("delta", "T", ("batch", "seqlen", "Kd", "d_inner")),
    # One decay for all states where its last axis is 1, as in Mamba-2.
    OperandSpec("A", "float32", ("Ka", "d_inner", "1|d_state")),
    OperandSpec("B", "T", ("batch", "seqlen", "Kb", "d_state")),
    OperandSpec("C", "T", ("batch", "seqlen", "Kc", "d_state")),
    OperandSpec("D", "float32", ("Ks", "d_inner")),
    OperandSpec("delta_bias", "float32", ("Kd", "d_inner")),
    OperandSpec("order", "int32", ("1|batch", "K", "seqlen")),
    OperandSpec("gap", "int32", ("1|batch", "K", "seqlen")),
)
_SCAN_OUTPUTS = (OperandSpec("y", "T", ("batch", "seqlen", "d_inner")),)
_SCAN_ATTRIBUTES = (
    AttributeSpec("delta_softplus", int, 1),
    AttributeSpec("params_by_step", int, 0),
    AttributeSpec("scale", float, 1.0),
    # 1 puts the directions of u, delta, B and C outside of the tokens, see `axes_of`.
    AttributeSpec("direction_axis", int, 2),
)
_ONE_TYPE = tuple((t,) for t in FLOAT_TYPES)
_SCAN_LIMITS = (("d_state", MAX_D_STATE),)
_GATHER_ATTRIBUTES = (
    AttributeSpec("num_keep", int, None),
    AttributeSpec("protected_position", int, -1),
)
_SCORE = OperandSpec("score", "float32", ("batch", "seqlen"))
_POSITION = OperandSpec("position", "int32", ("1|batch", "seqlen"))
_KEPT = OperandSpec("kept_position", "int32", ("batch", "num_keep"))


def _x(i: int) -> OperandSpec:
    return OperandSpec(f"x{i}", f"T{i}", ("batch", "seqlen", f"d{i}"))


def _y(i: int) -> OperandSpec:
    return OperandSpec(f"y{i}", f"T{i}", ("batch", "num_keep", f"d{i}"))


SELECTIVE_SCAN: Final = OperatorSpec(
    "SelectiveScan", _SCAN_INPUTS, _SCAN_OUTPUTS, _SCAN_ATTRIBUTES, _ONE_TYPE, _SCAN_LIMITS
)
GATED_SELECTIVE_SCAN: Final = OperatorSpec(
    "GatedSelectiveScan",
    (*_SCAN_INPUTS, OperandSpec("z", "T", ("batch", "seqlen", "d_inner"))),
    _SCAN_OUTPUTS,
    _SCAN_ATTRIBUTES,
    _ONE_TYPE,
    _SCAN_LIMITS,
)
SELECTIVE_SCAN_CONSTANT_GAP: Final = OperatorSpec(
    "SelectiveScanConstantGap",
    (*_SCAN_INPUTS, OperandSpec("delta0", "float32", ("Kd", "d_inner"))),
    _SCAN_OUTPUTS,
    _SCAN_ATTRIBUTES,
    _ONE_TYPE,
    _SCAN_LIMITS,
)
TOKEN_GATHER: Final = OperatorSpec(
    "TokenGather",
    (_SCORE, _POSITION, _x(0), _x(1)),
    (_KEPT, _y(0), _y(1)),
    _GATHER_ATTRIBUTES,
    (
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
    ),
)
TOKEN_GATHER1: Final = OperatorSpec(
    "TokenGather1",
    (_SCORE, _POSITION, _x(0)),
    (_KEPT, _y(0)),
    _GATHER_ATTRIBUTES,
    _ONE_TYPE,
)
TOKEN_CONV: Final = OperatorSpec(
    "TokenConv",
    (
        OperandSpec("x", "T", ("batch", "seqlen", "d_inner")),
        OperandSpec("weight", "float32", ("K", "d_inner", "width")),
        OperandSpec("bias", "float32", ("K", "d_inner")),
        _POSITION,
    ),
    # Directions outside of the tokens: a matrix product with a weight for each takes it as it is.
    (OperandSpec("y", "T", ("batch", "K", "seqlen", "d_inner")),),
    (AttributeSpec("by_position", int, 0), AttributeSpec("activation", int, 1)),
    _ONE_TYPE,
    # The first direction looks back, the second ahead.
    (("K", 2), ("width", MAX_CONV_WIDTH)),
)

TOKEN_CONV2D: Final = OperatorSpec(
    "TokenConv2D",
    (
        OperandSpec("x", "T", ("batch", "seqlen", "d_inner")),
        OperandSpec("weight", "float32", ("d_inner", "side", "side")),
        OperandSpec("bias", "float32", ("d_inner",)),
        _POSITION,
    ),
    (OperandSpec("y", "T", ("batch", "seqlen", "d_inner")),),
    (
        AttributeSpec("grid_height", int, None),
        AttributeSpec("grid_width", int, None),
        # d_inner, which a body cannot read off a shape: its Conv takes it from an attribute.
        AttributeSpec("group", int, None),
        AttributeSpec("by_position", int, 0),
        AttributeSpec("activation", int, 1),
    ),
    _ONE_TYPE,
    (("side", MAX_CONV_SIDE),),
)

TOKEN_SCATTER: Final = OperatorSpec(
    "TokenScatter",
    (
        OperandSpec("base", "T", ("batch", "full_seqlen", "d")),
        OperandSpec("x", "T", ("batch", "seqlen", "d")),
        _POSITION,
    ),
    (OperandSpec("y", "T", ("batch", "full_seqlen", "d")),),
    (),
    _ONE_TYPE,
)

SCAN_OPERATORS: Final = (SELECTIVE_SCAN, GATED_SELECTIVE_SCAN, SELECTIVE_SCAN_CONSTANT_GAP)
GATHER_OPERATORS: Final = (TOKEN_GATHER, TOKEN_GATHER1)
CONV_OPERATORS: Final = (TOKEN_CONV, TOKEN_CONV2D)
OPERATORS: Final = {
    op.name: op for op in (*SCAN_OPERATORS, *GATHER_OPERATORS, *CONV_OPERATORS, TOKEN_SCATTER)
}


def axes_of(operand: OperandSpec, direction_axis: int) -> tuple[str, ...]:
    """The symbols of an operand's axes in a node whose `direction_axis` is this; 2 as in the table.

    With 1, what has directions and tokens, (batch, seqlen, K, width), is (batch, K, seqlen, width):
    so it comes out of a matrix product with a weight for each direction, which then is not copied.
    """
    axes = operand.shape
    if direction_axis != 1 or len(axes) != 4 or not axes[2].startswith("K"):
        return axes
    return axes[0], axes[2], axes[1], axes[3]


def describe_table() -> str:
    """Text of the whole table, one operator a line, to compare with the native library's."""
    return "".join(f"{op}\n" for op in OPERATORS.values())
