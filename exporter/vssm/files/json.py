"""Checked reading of JSON: every complaint names the field it is about."""

from __future__ import annotations

import dataclasses
import decimal
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from vssm.errors import ArtifactError
from vssm.files.atomic import atomic_write_bytes
from vssm.files.regular import JSON, read_regular
from vssm.files.text import is_plain, shown


def write_json(path: Path, value: Any) -> None:
    """Write a report, or what JSON can hold; infinity and NaN, which it lacks, as "inf", "nan".

    Raises:
        ArtifactError: the path cannot be written.
    """
    atomic_write_bytes(path, json_text(value).encode())


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return f"{json.dumps(_plain(value), indent=2, allow_nan=False)}\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_Result = TypeVar("_Result")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"\w[\w.:/-]{0,127}")
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,30})?")


_DIGITS = 20  # of an integer of 64 bits, with its sign
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


class FieldError(ValueError):
    """A field of a JSON file has a wrong type or value; the message starts with its path."""


@dataclass(frozen=True)
class Node:
    """One JSON value and the path that leads to it, such as `inputs[0].shape[1]`."""

    value: Any
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Node:
        """The root of a JSON text.

        NaN and Infinity, which JSON lacks, are refused, numbers that 64 bits cannot hold, and a
        key that comes twice, of which another reader may take the other value.
        """
        try:
            value = json.loads(
                text,
                parse_int=_integer,
                parse_constant=_refuse_constant,
                object_pairs_hook=_unique_keys,
            )
        except RecursionError:
            raise FieldError("its objects and lists are nested too deep") from None
        _check_numbers(value)
        return cls(value)

    def at(self, key: str) -> Node:
        """The member `key`, which must be there."""
        path = f"{self.path}.{key}" if self.path else key
        if not isinstance(self.value, dict):
            self._refuse("an object")
        if key not in self.value:
            raise FieldError(f"{path} is missing")
        return Node(self.value[key], path)

    def text(self, longest: int = 4096) -> str:
        """A string that is not empty, of visible characters alone and at most `longest` of them.

        What a file says is shown, compared and written elsewhere: no control character, mark of
        direction or lone surrogate may travel that way.
        """
        if not isinstance(self.value, str) or not self.value:
            self._refuse("a text that is not empty")
        if len(self.value) > longest or not is_plain(self.value):
            self._refuse(f"a text of at most {longest} characters, all of them visible")
        return str(self.value)

    def name(self) -> str:
        """A name such as `block_1.hidden`: letters, digits and `_ . : / -`, 128 of them at most."""
        if not isinstance(self.value, str) or not is_name(self.value):
            self._refuse("a name of at most 128 letters, digits and the signs _ . : / -")
        return str(self.value)

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self._refuse("true or false")
        return bool(self.value)

    def integer(self, low: int, high: int | None = None) -> int:
        """An integer of at least `low` and at most `high`."""
        value = self.value
        # In Python True is an int; in a file `true` is no number.
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse("an integer")
        if value < low or (high is not None and value > high):
            self._refuse(f"at least {low}" if high is None else f"in [{low}, {high}]")
        return int(value)

    def format_version(self, newest: int) -> int:
        """The version of the file's format, at most the newest that this vssm reads."""
        version = self.integer(1)
        if version > newest:
            raise FieldError(
                f"{self.path}={version} is newer than {newest}, the newest this vssm reads; update "
                "vssm"
            )
        return version

    def number(self, low: float, high: float) -> float:
        """A number of at least `low` and at most `high`."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse("a number")
        if not low <= value <= high:
            self._refuse(f"in [{low:g}, {high:g}]")
        return float(value)

    def choice(self, allowed: Collection[str]) -> str:
        """One of the texts `allowed`."""
        if not isinstance(self.value, str) or self.value not in allowed:
            self._refuse(f"one of {', '.join(allowed)}")
        return str(self.value)

    def sha256(self) -> str:
        """A SHA-256 in lower-case hexadecimal digits."""
        if not isinstance(self.value, str) or not _SHA256.fullmatch(self.value):
            self._refuse("64 lower-case hexadecimal digits")
        return str(self.value)

    def keep_ratio(self) -> str:
        """A decimal number in (0, 1], as a string: binary floats would change the keep counts."""
        if not isinstance(self.value, str) or not _DECIMAL.fullmatch(self.value):
            self._refuse("a decimal number written as a string")
        if not 0 < decimal.Decimal(self.value) <= 1:
            self._refuse("in (0, 1]")
        return str(self.value)

    def mapping(self) -> dict[str, Any]:
        """An object, unchecked inside."""
        if not isinstance(self.value, dict):
            self._refuse("an object")
        return dict(self.value)

    def entries(self, *, at_least: int = 0, file_names: bool = False) -> list[tuple[str, Node]]:
        """Members of an object; `file_names`: each key is a plain name inside the directory."""
        members = self.mapping()
        if len(members) < at_least:
            self._refuse(f"an object of at least {at_least} members")
        for key in members:
            # "../x" or "/x" in an edited file would make us read or delete outside the directory.
            inside = key not in {"", ".", ".."} and PurePosixPath(key).name == key
            if not key or not is_plain(key) or len(key) > 255 or (file_names and not inside):
                named = shown(repr(key), limit=80)
                raise FieldError(f"{self.path} has the key {named}, which is not a plain name")
        return [(key, self.at(key)) for key in members]

    def key_integer(self, low: int) -> int:
        """The last part of the path, an integer of at least `low` in its usual form."""
        key = self.path.rpartition(".")[2]
        # "01" would be the block "1" under a second key.
        if not key.isascii() or not key.isdigit() or str(int(key)) != key or int(key) < low:
            raise FieldError(f"{self.path}: {key!r} is not an integer of at least {low}")
        return int(key)

    def items(self, *, at_least: int = 0, exactly: int | None = None) -> list[Node]:
        """Elements of a list."""
        if not isinstance(self.value, list):
            self._refuse("a list")
        count = len(self.value)
        if count < at_least or (exactly is not None and count != exactly):
            raise FieldError(
                f"{self.path} has {count} elements instead of "
                + (f"at least {at_least}" if exactly is None else f"{exactly}")
            )
        return [Node(value, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def optional(self, parse: Callable[[Node], _Result]) -> _Result | None:
        """None for null, else what `parse` makes of the value."""
        return None if self.value is None else parse(self)

    def _refuse(self, rule: str) -> NoReturn:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise FieldError(f"{self.path or 'the file'}={shown} must be {rule}")


def is_name(text: str) -> bool:
    """Whether a text may name an input, an output or a value of the graph."""
    return _NAME.fullmatch(text) is not None


def _integer(text: str) -> float:
    """An integer of JSON; one of very many digits, which `int` takes long for, is infinite."""
    return int(text) if len(text) <= _DIGITS else math.inf


# Linked backwards: a path is spelled out only if there is a complaint about it.
_Way = tuple[Any, str] | None  # the path to a value, its last part at the end


def _check_numbers(root: Any) -> None:
    """Refuse numbers that no field can mean, wherever they are: 1e999, 10^400."""
    # A list in place of recursion, which would go as deep as the file nests.
    waiting: list[tuple[Any, _Way]] = [(root, None)]
    while waiting:
        value, way = waiting.pop()
        if isinstance(value, dict):
            waiting += [(entry, (way, f".{key}")) for key, entry in value.items()]
        elif isinstance(value, list):
            waiting += [(entry, (way, f"[{i}]")) for i, entry in enumerate(value)]
        elif (isinstance(value, float) and not math.isfinite(value)) or (
            isinstance(value, int) and not _LEAST <= value <= _MOST
        ):
            raise FieldError(f"{_path_of(way)} is a number that 64 bits cannot hold")


def _path_of(way: _Way) -> str:
    parts: list[str] = []
    while way is not None:
        way, part = way
        parts.append(part)
    return shown("".join(reversed(parts)).removeprefix(".") or "the file", limit=200)


def read_json(
    path: Path, parse: Callable[[Node], _Result], *, absent: str, damaged: str
) -> _Result:
    """What `parse` makes of a JSON file that this package wrote.

    Args:
        path: the file.
        parse: reads the fields; raises ValueError for a wrong one.
        absent: what it means that the file cannot be read, and the remedy.
        damaged: the remedy where it is no JSON, or `parse` refuses it.

    Raises:
        ArtifactError: the file cannot be read, or is not as it was written.
    """
    try:
        return parse(Node.parse(read_regular(path, limit=JSON).decode()))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {absent}") from error
    # ValueError is also what bytes that are no UTF-8, or no JSON, end in.
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or was edited: {error}; {damaged}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise FieldError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = Counter(keys).most_common(1)[0][0]  # in one pass, whatever their number
        raise FieldError(f"the key {shown(repr(twice), limit=80)} comes twice in one object")
    return found
