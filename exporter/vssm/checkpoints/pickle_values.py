"""What the pickle machine makes of the names in a torch file: records of tensors, else stubs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch


@dataclass(frozen=True)
class Stub:
    """Stands for an object, class or function that this machine does not make; keeps its name."""

    name: str


@dataclass(frozen=True)
class StorageRef:
    """A storage named in the pickle: its key in the file, element type and count (unchecked)."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it; layout fields are unchecked and may be anything."""

    storage: StorageRef
    dtype: torch.dtype
    offset: Any
    size: Any
    stride: Any


@dataclass(frozen=True)
class Known:
    """A name of the allow-list, on the stack; frozen, so that no BUILD can alter what it does."""

    name: str


@dataclass(frozen=True)
class StorageType:
    """A storage class of torch, as the element type it stands for."""

    dtype: torch.dtype


def find_global(name: str) -> object:
    """What a class or function of the file becomes: by exact name, never by import."""
    if name in _STORAGE_TYPES:
        return StorageType(_STORAGE_TYPES[name])
    if name in _DTYPES:
        return _DTYPES[name]
    return Known(name) if name in _BUILDERS else Stub(name.replace(" ", "."))


def apply(target: object, args: object) -> object:
    """What calling `target` would make: the allow-list's own builders run, all else is a stub."""
    if not isinstance(args, tuple):
        raise TypeError("pickle calls with arguments that are no tuple")
    if isinstance(target, Known):
        return _BUILDERS[target.name](args)
    return Stub(name_of(target))


def name_of(target: object) -> str:
    """Dotted name of a class or function of the file."""
    if isinstance(target, Stub):
        return target.name
    if isinstance(target, Known):
        return target.name.replace(" ", ".")
    raise TypeError(f"pickle calls a {type(target).__name__}")


def _mapping(args: tuple[Any, ...]) -> object:
    # defaultdict(factory), Counter(dict); Python 2's OrderedDict(list of pairs) is not taken.
    if any(isinstance(arg, list) for arg in args):
        return Stub("collections.OrderedDict of pairs")
    return args[-1] if args and isinstance(args[-1], dict) else {}


def _tensor(args: tuple[Any, ...]) -> object:
    """_rebuild_tensor(storage, offset, size, stride[, requires_grad, hooks[, metadata]])."""
    storage, offset, size, stride, *rest = args
    if not isinstance(storage, StorageRef):
        return Stub("tensor of a storage type without weights")
    if len(rest) > 2 and rest[2]:
        return Stub("tensor with a conjugate or negative bit")
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def _typed_tensor(args: tuple[Any, ...]) -> object:
    """_rebuild_tensor_v3: the same with a dtype before the metadata."""
    storage, offset, size, stride, requires_grad, hooks, dtype, *metadata = args
    if not isinstance(dtype, torch.dtype):
        return Stub(name_of(dtype))
    record = _tensor((storage, offset, size, stride, requires_grad, hooks, *metadata))
    if not isinstance(record, TensorRecord):
        return record
    return TensorRecord(record.storage, dtype, offset, size, stride)


def _parameter(args: tuple[Any, ...]) -> object:
    """_rebuild_parameter(data, requires_grad, hooks[, state]): the data."""
    return args[0] if isinstance(args[0], TensorRecord) else Stub("torch.nn.parameter.Parameter")


def _subclass(args: tuple[Any, ...]) -> object:
    """_rebuild_from_type_v2(function, type, args, state): a tensor with attributes."""
    function, kind, arguments, _ = args
    if kind in (Known("torch Tensor"), Known("torch.nn.parameter Parameter")):
        return apply(function, arguments)
    return Stub(name_of(kind))


_BUILDERS: Final[dict[str, Callable[[tuple[Any, ...]], object]]] = {
    "builtins dict": _mapping,
    "__builtin__ dict": _mapping,
    "collections OrderedDict": _mapping,
    "collections defaultdict": _mapping,
    "collections Counter": _mapping,
    "torch Tensor": lambda _: Stub("torch.Tensor"),
    "torch._tensor _rebuild_from_type_v2": _subclass,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _typed_tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter Parameter": _parameter,
}
_STORAGE_TYPES: Final = {
    f"{module} {name}Storage": dtype
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
} | {"torch.storage UntypedStorage": torch.uint8}
_DTYPES: Final = {
    f"torch {name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
