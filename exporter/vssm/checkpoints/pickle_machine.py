"""A pickle machine without import and call: classes and functions named in a file stay names.

The standard library's `pickletools` splits the bytes into opcodes; what happens then is written
below, opcode by opcode. The only things made are plain containers, numbers and texts, records of
tensors and `Stub`s. Nothing here looks up a module or an attribute, or calls what is on the stack.

A pickle of a few bytes can describe a structure of 2**60 parts, each a reference to one before. So
every opcode here does work that is bounded by a constant or by what the file holds for it alone:
nothing is copied, compared, hashed or written out whose size the file does not have byte by byte
(`_key`, `find_global`, `apply`), and `MAX_STEPS` bounds their number. What is made takes
less than 300 bytes of memory for each byte of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final, TypeGuard

import torch

# A state dict with an optimiser's state takes about 25 steps a tensor.
MAX_STEPS: Final = 500_000
_MAX_ARGUMENTS: Final = 8  # of the functions that are known here
_MAX_DIMS: Final = 16
_MAX_COUNT: Final = 1 << 62
_MAX_NAME: Final = 256
_MAX_KEY: Final = 4096
_MAX_KEY_PARTS: Final = 8


@dataclass(frozen=True, slots=True)
class Stub:
    """Stands for an object, class or function that this machine does not make; keeps its name."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage named in the pickle: its key in the file, element type and count (unchecked)."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as the pickle describes it; its layout may still reach outside the storage."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A name of the allow-list, on the stack; frozen, so that no BUILD can alter what it does."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class of torch, as the element type it stands for."""

    dtype: torch.dtype


def find_global(name: str) -> object:
    """What a class or function of the file becomes: by exact name, never by import.

    Raises:
        ValueError: the name is longer than any that code has.
    """
    if len(name) > _MAX_NAME:
        raise ValueError(f"pickle names a class or function by {len(name)} characters")
    # pickletools puts a space between module and name.
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
        if len(args) > _MAX_ARGUMENTS:
            raise ValueError(f"pickle calls {name_of(target)} with {len(args)} arguments")
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
    if not (_is_layout(size) and _is_layout(stride) and len(size) == len(stride)):
        raise ValueError("pickle describes a tensor whose size and stride are not lists of counts")
    if not _is_count(offset):
        raise ValueError("pickle describes a tensor whose offset is not a count")
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def _is_layout(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and len(value) <= _MAX_DIMS and all(map(_is_count, value))


def _is_count(value: object) -> TypeGuard[int]:
    # Not isinstance: True is an int as well, and no size.
    return type(value) is int and 0 <= value < _MAX_COUNT


def _typed_tensor(args: tuple[Any, ...]) -> object:
    """_rebuild_tensor_v3: the same with a dtype before the metadata."""
    storage, offset, size, stride, requires_grad, hooks, dtype, *metadata = args
    if not isinstance(dtype, torch.dtype):
        return Stub(name_of(dtype))
    record = _tensor((storage, offset, size, stride, requires_grad, hooks, *metadata))
    if not isinstance(record, TensorRecord):
        return record
    return replace(record, dtype=dtype)


def _parameter(args: tuple[Any, ...]) -> object:
    """_rebuild_parameter(data, requires_grad, hooks[, state]): the data."""
    return args[0] if isinstance(args[0], TensorRecord) else Stub("torch.nn.parameter.Parameter")


def _subclass(args: tuple[Any, ...]) -> object:
    """_rebuild_from_type_v2(function, type, args, state): a tensor with attributes."""
    function, kind, arguments, _ = args
    plain = kind in (Known("torch Tensor"), Known("torch.nn.parameter Parameter"))
    # Not itself: a chain of these would be followed by as many calls.
    if plain and isinstance(function, Known) and function.name != _SUBCLASS:
        return apply(function, arguments)
    return Stub(name_of(kind))


_SUBCLASS: Final = "torch._tensor _rebuild_from_type_v2"
_BUILDERS: Final[dict[str, Callable[[tuple[Any, ...]], object]]] = {
    "builtins dict": _mapping,
    "__builtin__ dict": _mapping,
    "collections OrderedDict": _mapping,
    "collections defaultdict": _mapping,
    "collections Counter": _mapping,
    "torch Tensor": lambda _: Stub("torch.Tensor"),
    _SUBCLASS: _subclass,
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
        # Refused in the end, by a name that says why.
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}


class PickleMachine:
    """Runs the pickles of one file.

    Attributes:
        storages: the storages that they named, by key.
        unknown: names of the stubs that they named.
        steps: opcodes that may still be run.
    """

    def __init__(self) -> None:
        self.storages: dict[str, StorageRef] = {}
        self.unknown: set[str] = set()
        self.steps = MAX_STEPS
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> object:
        """Execute one pickle up to STOP, where the stream is left, and return the object.

        Raises:
            ValueError, LookupError, TypeError, OverflowError: the pickle is malformed, or takes
                more steps than a file may.
        """
        # `steps` goes on: the five pickles of a legacy file share one allowance.
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, arg, _ in pickletools.genops(stream):
            self.steps -= 1
            if self.steps < 0:
                raise ValueError(f"its pickle takes more than {MAX_STEPS:,} steps")
            if opcode.name == "STOP":
                return self.pop()
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise ValueError(f"pickle opcode {opcode.name} is not used by torch files")
            handler(self, arg)
        raise ValueError("the pickle has no end")

    def push(self, value: object) -> None:
        """Put `value` on the stack."""
        if isinstance(value, Stub):
            self.unknown.add(value.name)
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the top of the stack, which must lie above the last mark."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("pickle stack underflow")
        return self._stack.pop()

    def top(self) -> Any:
        """The top of the stack, left there."""
        self.push(value := self.pop())
        return value

    def mark(self) -> None:
        """Remember the height of the stack."""
        self._marks.append(len(self._stack))

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def discard(self) -> None:
        """POP: drop the last mark if nothing lies above it, else the top."""
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self.pop()

    def memoize(self, index: int | None) -> None:
        """Name the top of the stack; without an index, by the next free one."""
        self._memo[len(self._memo) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        """Push what `memoize` named."""
        self.push(self._memo[index])

    def store(self, pairs: list[Any]) -> None:
        """Put keys and values, in turns, into the mapping on top; a stub swallows them."""
        target = self.top()
        if isinstance(target, dict):
            target.update(_dictionary(pairs))
        elif not isinstance(target, Stub):
            raise TypeError(f"pickle stores items into a {type(target).__name__}")

    def extend(self, items: list[Any]) -> None:
        """Put items into the list on top; a stub swallows them."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stub):
            raise TypeError(f"pickle appends items to a {type(target).__name__}")

    def build(self) -> None:
        """BUILD: attributes and __setstate__ of every object are dropped, unread."""
        self.pop()
        if not isinstance(self.top(), Stub | dict | TensorRecord):
            raise TypeError(f"pickle sets the state of a {type(self.top()).__name__}")

    def resolve_storage(self) -> None:
        """BINPERSID: ("storage", type, key, location, count[, None]) becomes a `StorageRef`."""
        name = self.pop()
        # Its length first: a pattern with a star copies what it leaves over.
        short = name if isinstance(name, tuple) and len(name) <= _MAX_ARGUMENTS else ()
        match short:
            # A sixth entry is the legacy format's: None, unless the storage is part of another.
            case ("storage", StorageType(dtype), str(key), str(), numel, *view) if (
                view in ([], [None]) and _is_count(numel) and len(key) <= _MAX_NAME
            ):
                self.storages[key] = StorageRef(key, dtype, numel)
                self.push(self.storages[key])
            case ("storage", Stub(kind), *_):
                self.push(Stub(kind))
            case ("module", *_):
                self.push(Stub("pickled module with its source"))
            case _:
                raise ValueError("pickle names a storage in an unknown form")

    def reduce(self, arguments: int) -> None:
        """REDUCE, NEWOBJ, NEWOBJ_EX: take the arguments and what is to be called with them."""
        popped = [self.pop() for _ in range(arguments)][::-1]
        keywords = popped[1] if arguments == 2 else None
        target = self.pop()
        self.push(Stub(name_of(target)) if keywords else apply(target, popped[0]))


def _find_on_stack(machine: PickleMachine) -> object:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError("pickle names a global by something else than texts")
    # Copies of a long text could be asked for at every opcode.
    if len(name) > _MAX_NAME or len(module) > _MAX_NAME:  # before they are joined
        raise ValueError("pickle names a class or function by a text that is too long")
    return find_global(f"{module} {name}")


def _apply_first(items: list[Any]) -> object:
    return apply(items[0], tuple(items[1:]))


def _dictionary(pairs: list[Any]) -> dict[Any, Any]:
    return {_key(k): v for k, v in zip(pairs[::2], pairs[1::2], strict=True)}


def _key(key: Any) -> Any:
    """A key as it is, once hashing and comparing it is known to be quick and to end.

    A tuple's hash is not remembered: one that is nested, or long, is computed at every use, and a
    nest a million deep overflows the C stack. Two long texts that are equal are compared at every
    use, and a long integer is hashed at every use.
    """
    parts = key if isinstance(key, tuple) and len(key) <= _MAX_KEY_PARTS else (key,)
    if not all(map(_is_plain_key, parts)):
        raise TypeError(f"pickle uses a {type(key).__name__} of this form as a key")
    return key


def _is_plain_key(part: object) -> bool:
    if isinstance(part, str | bytes):
        return len(part) <= _MAX_KEY
    if isinstance(part, int):
        return part.bit_length() <= 64
    return isinstance(part, float | Stub | torch.dtype | None)


_Handler = Callable[[PickleMachine, Any], None]
_VALUES = (
    "INT LONG LONG1 LONG4 BININT BININT1 BININT2 STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "FLOAT BINFLOAT"
)
_HANDLERS: Final[dict[str, _Handler]] = {
    **dict.fromkeys(_VALUES.split(), PickleMachine.push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), PickleMachine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), PickleMachine.recall),
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda m, code: m.push(Stub(f"extension {code}"))),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push([]),  # no weights are in sets, and hashing items costs
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.discard(),
    "POP_MARK": lambda m, _: m.pop_mark().clear(),
    "DUP": lambda m, _: m.push(m.top()),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push((m.pop(),)),
    "TUPLE2": lambda m, _: m.push((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m, _: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    "DICT": lambda m, _: m.push(_dictionary(m.pop_mark())),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.store([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.store(m.pop_mark()),
    "GLOBAL": lambda m, name: m.push(find_global(name)),
    "STACK_GLOBAL": lambda m, _: m.push(_find_on_stack(m)),
    "REDUCE": lambda m, _: m.reduce(1),
    "NEWOBJ": lambda m, _: m.reduce(1),
    "NEWOBJ_EX": lambda m, _: m.reduce(2),
    "INST": lambda m, name: m.push(apply(find_global(name), tuple(m.pop_mark()))),
    "OBJ": lambda m, _: m.push(_apply_first(m.pop_mark())),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.resolve_storage(),
}
