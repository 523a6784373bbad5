"""Protocol Buffers messages from a table of their fields, where no generated module is at hand.

The standard reader and printer of protobuf do the work, so a file means to us what it means to
every other program: fields that come twice, unknown ones and nesting included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Fields = Mapping[str, tuple[int, str]]
# Numbers of FieldDescriptorProto.Type; 11 and 14 below are messages and enums.
_SCALARS = {"string": 9, "bytes": 12, "int32": 5, "int64": 3, "uint64": 4, "bool": 8}


def message_types(package: str, messages: Mapping[str, Fields], **enums: Any) -> dict[str, Any]:
    """Classes of messages by name.

    Args:
        package: of the messages, to keep them apart from others of the same name.
        messages: name -> field -> (number, type); a type is a scalar's name, a message's or an
            enum's, with "*" behind it where the field is repeated. Fields left out of the table
            are kept unread.
        enums: name -> value's name -> number.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name=f"vssm/{package}.proto", package=f"vssm.{package}", syntax="proto2"
    )
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for label, number in values.items():
            enum.value.add(name=label, number=number)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add_field(message, field, number, kind, package=package, enums=enums)
    # Not the default pool, which everything in the process shares, the package onnx included.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {
        name: message_factory.GetMessageClass(find(f"vssm.{package}.{name}")) for name in messages
    }


def _add_field(
    message: Any, name: str, number: int, kind: str, *, package: str, enums: Mapping[str, Any]
) -> None:
    plain = kind.removesuffix("*")
    # Labels: 1 is optional, 3 is repeated.
    added = message.field.add(name=name, number=number, label=3 if kind != plain else 1)
    if plain in _SCALARS:
        added.type = _SCALARS[plain]
    else:
        added.type = 14 if plain in enums else 11
        added.type_name = f".vssm.{package}.{plain}"
