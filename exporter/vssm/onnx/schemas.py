"""ONNX schemas of the operators: types, attributes, and shape inference that refuses bad nodes.

Everything is read from the operator table. `onnx.checker`, `onnx.shape_inference` and the torch
exporter see the operators after `register_schemas()`.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import onnx
from onnx import TensorProto, TypeProto, helper

from vssm.ops.spec import (
    DOMAIN,
    FLAGS,
    MAX_PLACES,
    OPERATOR_VERSION,
    OPERATORS,
    PLUGIN_ATTRIBUTES,
    SHARED,
    AttributeSpec,
    OperandSpec,
    OperatorSpec,
    axes_of,
)

_Size: TypeAlias = int | str | None  # known, symbolic, unknown
_ELEMENT_TYPES = {
    "float32": (TensorProto.FLOAT, "tensor(float)"),
    "float16": (TensorProto.FLOAT16, "tensor(float16)"),
    "bfloat16": (TensorProto.BFLOAT16, "tensor(bfloat16)"),
    "int32": (TensorProto.INT32, "tensor(int32)"),
}


def register_schemas() -> None:
    """Make onnx know every operator of domain "vssm"; calling it again changes nothing."""
    for spec in OPERATORS.values():
        if not onnx.defs.has(spec.name, DOMAIN):
            onnx.defs.register_schema(_schema(spec))


def _schema(spec: OperatorSpec) -> Any:
    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        spec.name,
        DOMAIN,
        OPERATOR_VERSION,
        str(spec),
        inputs=[parameter(o.name, _type_string(o), ", ".join(o.shape)) for o in spec.inputs],
        outputs=[parameter(o.name, _type_string(o), ", ".join(o.shape)) for o in spec.outputs],
        type_constraints=[
            (variable, sorted({_ELEMENT_TYPES[types[i]][1] for types in spec.types}), "")
            for i, variable in enumerate(spec.type_variables)
        ],
        attributes=[
            *(_schema_attribute(a) for a in spec.attributes),
            *(_default_attribute(name, value) for name, value in PLUGIN_ATTRIBUTES.items()),
        ],
    )
    schema.set_type_and_shape_inference_function(lambda context: _infer(spec, context))
    return schema


def _type_string(operand: OperandSpec) -> str:
    return _ELEMENT_TYPES[operand.dtype][1] if operand.dtype in _ELEMENT_TYPES else operand.dtype


def _schema_attribute(spec: AttributeSpec) -> Any:
    if spec.default is not None:
        return _default_attribute(spec.name, spec.default)
    kinds = onnx.defs.OpSchema.AttrType
    kind = kinds.INT if spec.kind is int else kinds.FLOAT
    return onnx.defs.OpSchema.Attribute(spec.name, kind, "", required=True)


def _default_attribute(name: str, value: int | float | str) -> Any:
    return onnx.defs.OpSchema.Attribute(name, helper.make_attribute(name, value), "")


def _infer(spec: OperatorSpec, context: Any) -> None:
    """Shape inference of one node: check what is known, then set the outputs.

    A ValueError goes through onnx to the caller in every mode; onnx's own InferenceError would be
    dropped outside strict mode.
    """
    try:
        node = _Node(spec, context)
        node.check_attributes()
        node.read_inputs()
        node.check_sizes()
        node.set_outputs()
    except ValueError as error:
        raise ValueError(f"{DOMAIN}.{spec.name} ({context.get_display_name()}): {error}") from None


class _Node:
    """What is known about one node: sizes of the table's symbols and bindings of its types."""

    def __init__(self, spec: OperatorSpec, context: Any) -> None:
        self.spec = spec
        self.context = context
        self.sizes: dict[str, _Size] = {}
        self.types: dict[str, str] = {}
        self.direction_axis = 2
        self.attributes: dict[str, int | float] = {}  # those whose values are known
        self._named_by: dict[str, str] = {}  # symbol -> operand that gave its size
        self._shared: list[tuple[str, str, int]] = []  # operand, symbol and size of "1|symbol" axes

    def check_attributes(self) -> None:
        """Refuse values outside the contract; a missing required one too."""
        for attribute in self.spec.attributes:
            value = self._attribute(attribute)
            if value is None:
                continue
            self.attributes[attribute.name] = value
            if attribute.name in FLAGS and value not in {0, 1}:
                raise ValueError(f"{attribute.name}={value} must be 0 or 1")
            if attribute.name == "direction_axis":
                if value not in {1, 2}:
                    raise ValueError(f"direction_axis={value} must be 1 or 2")
                self.direction_axis = int(value)
            if attribute.name == "scale" and not math.isfinite(value):
                raise ValueError(f"scale={value} must be finite")
            if attribute.name == "protected_position" and value < -1:
                raise ValueError(f"protected_position={value} must be a position, or -1 for none")
            if attribute.name == "num_keep":
                self.sizes["num_keep"] = int(value)

    def read_inputs(self) -> None:
        """Bind the type variables and the sizes; operands of unknown type or rank are passed by."""
        count = self.context.get_num_inputs()
        if count != len(self.spec.inputs):
            names = ", ".join(o.name for o in self.spec.inputs)
            raise ValueError(f"{count} inputs given, must be {len(self.spec.inputs)}: {names}")
        for i, operand in enumerate(self.spec.inputs):
            given = self.context.get_input_type(i)
            if given is None or not given.HasField("tensor_type"):
                continue
            self._bind_type(operand, given.tensor_type.elem_type)
            if given.tensor_type.HasField("shape"):
                self._bind_shape(operand, [_size(d) for d in given.tensor_type.shape.dim])

    def check_sizes(self) -> None:
        """The rules that join several operands."""
        sizes = self.sizes
        for symbol, size in sizes.items():
            if isinstance(size, int) and size < 1 and symbol not in {"batch", "num_keep"}:
                raise ValueError(f"{symbol}={size} of {self._named_by[symbol]} must be at least 1")
        self._check_directions()
        for name, symbol, size in self._shared:
            full = sizes.get(symbol)
            if size != 1 and isinstance(full, int) and size != full:
                raise ValueError(
                    f"{name} has {symbol} {size}, must be 1 (shared) or {symbol}={full}"
                )
        for symbol, most in self.spec.limits:
            size = sizes.get(symbol)
            if isinstance(size, int) and size > most:
                raise ValueError(
                    f"{symbol}={size} is outside [1, {most}], what the kernels hold; "
                    "use a model with a smaller one"
                )
        self._check_grid()
        num_keep, seqlen, rows = (sizes.get(s) for s in ("num_keep", "seqlen", "full_seqlen"))
        if isinstance(rows, int) and isinstance(seqlen, int) and seqlen > rows:
            raise ValueError(
                f"seqlen={seqlen} is outside [1, {rows}], the rows of base; give fewer tokens, or "
                "the base that they are of"
            )
        limit = seqlen if isinstance(seqlen, int) else None
        if isinstance(num_keep, int) and (num_keep < 1 or (limit and num_keep > limit)):
            raise ValueError(
                f"num_keep={num_keep} is outside [1, {limit or 'seqlen'}], the tokens of this "
                "layer; derive it from keep_ratio with PruneSchedule.num_keep()"
            )

    def set_outputs(self) -> None:
        """Types and shapes of the outputs, as far as they are known."""
        for i, operand in enumerate(self.spec.outputs):
            dtype = self.types.get(operand.dtype, operand.dtype)
            if dtype not in _ELEMENT_TYPES:
                continue
            shape = [self.sizes.get(symbol) for symbol in operand.shape]
            inferred: TypeProto = helper.make_tensor_type_proto(_ELEMENT_TYPES[dtype][0], shape)
            self.context.set_output_type(i, inferred)

    def _attribute(self, spec: AttributeSpec) -> int | float | None:
        given = self.context.get_attribute(spec.name)
        if given is None and spec.default is None:
            raise ValueError(f"attribute {spec.name} is missing and has no default")
        if given is None or given.ref_attr_name:
            return None
        return int(given.i) if spec.kind is int else float(given.f)

    def _bind_type(self, operand: OperandSpec, element_type: int) -> None:
        if element_type == TensorProto.UNDEFINED:
            return
        names = {number: name for name, (number, _) in _ELEMENT_TYPES.items()}
        dtype = names.get(element_type, TensorProto.DataType.Name(element_type).lower())
        if operand.dtype in _ELEMENT_TYPES:
            if dtype != operand.dtype:
                raise ValueError(f"{operand.name} is {dtype}, must be {operand.dtype}; cast it")
            return
        bound = {**self.types, operand.dtype: self.types.get(operand.dtype, dtype)}
        variables = self.spec.type_variables
        fits = any(
            all(bound.get(v, t) == t for v, t in zip(variables, types, strict=True))
            for types in self.spec.types
        )
        if dtype != bound[operand.dtype] or not fits:
            allowed = " | ".join(", ".join(types) for types in self.spec.types)
            raise ValueError(
                f"{operand.name} is {dtype}, but ({', '.join(variables)}) must be one of "
                f"{allowed}, the same for every operand of one variable; cast it"
            )
        self.types = bound

    def _bind_shape(self, operand: OperandSpec, shape: list[_Size]) -> None:
        symbols = axes_of(operand, self.direction_axis)
        if len(shape) != len(symbols):
            raise ValueError(
                f"{operand.name} has shape {_text(shape)} of rank {len(shape)}, must be "
                f"({', '.join(symbols)})"
            )
        for symbol, size in zip(symbols, shape, strict=True):
            if symbol.startswith(SHARED):
                whole = symbol.removeprefix(SHARED)
                self._shared += [(operand.name, whole, size)] if isinstance(size, int) else []
                continue
            known = self.sizes.get(symbol)
            if isinstance(known, int) and isinstance(size, int) and known != size:
                raise ValueError(
                    f"{operand.name} has shape {_text(shape)}: {symbol}={size} differs from "
                    f"{symbol}={known} of {self._named_by[symbol]}; they must be equal"
                )
            if _knowledge(size) > _knowledge(known):
                self.sizes[symbol], self._named_by[symbol] = size, operand.name

    def _check_directions(self) -> None:
        directions = self.sizes.get("K")
        if not isinstance(directions, int):
            return
        for symbol, size in self.sizes.items():
            if symbol.startswith("K") and isinstance(size, int) and size not in {1, directions}:
                raise ValueError(
                    f"{symbol}={size} of {self._named_by[symbol]} must be 1 (shared) or "
                    f"K={directions}, the directions of order; a body would wrap silently"
                )

    def _check_grid(self) -> None:
        """What a grid's attributes say of each other and of the sizes."""
        known = [self.attributes.get(n) for n in ("grid_height", "grid_width", "group")]
        if None in known:
            return
        height, width, group = (int(value or 0) for value in known)
        places = height * width
        if min(height, width) < 1 or places > MAX_PLACES:
            raise ValueError(
                f"grid_height={height}, grid_width={width} must be at least 1 and make "
                f"{MAX_PLACES} places at most"
            )
        seqlen, side, d_inner = (self.sizes.get(n) for n in ("seqlen", "side", "d_inner"))
        by_position = self.attributes.get("by_position", 0)
        if isinstance(seqlen, int) and (seqlen > places or (seqlen < places and not by_position)):
            most = "at most " if by_position else ""
            raise ValueError(
                f"seqlen={seqlen} must be {most}{places}, the places of the grid; say by_position "
                "where tokens are missing"
            )
        if isinstance(side, int) and side % 2 == 0:
            raise ValueError(f"side={side} is even, so that no tap is its centre; give an odd one")
        if isinstance(d_inner, int) and group != d_inner:
            raise ValueError(f"group={group} must be d_inner={d_inner}")


def _size(dimension: Any) -> _Size:
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    return str(dimension.dim_param) or None


def _knowledge(size: _Size) -> int:
    return 2 if isinstance(size, int) else int(size is not None)


def _text(shape: list[_Size]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
