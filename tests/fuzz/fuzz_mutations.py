"""Strategies that damage valid files: byte by byte, and by the structure that their format has."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from hypothesis import strategies as st

Files = dict[str, bytes]

# Numbers at which something overflows, is negative, or claims more memory than there is.
NASTY_INTS = (0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**40, 2**60, 2**63 - 1, -(2**63))
NASTY_TEXTS = (
    "",
    "x",
    "\0",
    "a\nb\nTraceback (most recent call last):",
    "../../../etc/passwd",
    "/dev/zero",
    "\x1b[31m",
    "\ud800",
    "ü" * 3,
    "long" * 300,
)
# Placeholders in JSON for what Python itself would not write.
_DEEP, _DIGITS = "@deep@", "@digits@"
NASTY_VALUES: tuple[Any, ...] = (
    *NASTY_INTS,
    *NASTY_TEXTS,
    None,
    True,
    False,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    [],
    {},
    [[]],
    [None],
    {"x": None},
    _DEEP,
    _DIGITS,
)


# Copies: what is put into a file may be changed there.
nasty_values = st.sampled_from(NASTY_VALUES).map(copy.deepcopy)


@st.composite
def damaged_bytes(draw: Callable[..., Any], data: bytes) -> bytes:
    """Cut, flip, overwrite, insert, remove and repeat a few pieces."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(result)))
        length = draw(st.integers(1, 16))
        action = draw(st.sampled_from(("cut", "flip", "number", "noise", "remove", "repeat")))
        if action == "cut":
            del result[place:]
        elif action == "flip" and place < len(result):
            result[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "number":
            number = draw(st.sampled_from(NASTY_INTS)) % 2**64
            result[place : place + 8] = number.to_bytes(8, "little")
        elif action == "noise":
            result[place:place] = draw(st.binary(max_size=16))
        elif action == "remove":
            del result[place : place + length]
        elif action == "repeat":
            result[place:place] = result[place : place + length] * draw(st.integers(1, 3))
    return bytes(result)


@st.composite
def damaged_data(draw: Callable[..., Any], data: Any) -> Any:
    """Replace, remove, rename and repeat a few values of plain data."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(data))
        if not places:
            return draw(nasty_values)
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "wrap")))
        if action == "replace":
            holder[key] = draw(nasty_values)
        elif action == "remove":
            del holder[key]
        elif action == "wrap":
            holder[key] = [holder[key]] if draw(st.booleans()) else {"x": holder[key]}
        elif isinstance(holder, list):
            holder.insert(key, draw(st.just(holder[key]) | nasty_values))
        else:
            holder[draw(st.sampled_from(NASTY_TEXTS))] = draw(nasty_values)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """List where the values of plain data stand: their list or object, and their place in it."""
    if isinstance(data, dict | list):
        for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
            yield data, key
            yield from _places(value)


def to_text(data: Any) -> str:
    """Write plain data as JSON, with what Python itself would not write."""
    return (
        json.dumps(data)
        .replace(f'"{_DEEP}"', "[" * 50_000 + "]" * 50_000)
        .replace(f'"{_DIGITS}"', "1" * 5_000)
    )


@st.composite
def damaged_onnx(draw: Callable[..., Any], data: bytes) -> bytes:
    """Edit a few fields of a protobuf, whatever their type, so that it parses still."""
    proto = onnx.ModelProto.FromString(data)
    for _ in range(draw(st.integers(1, 3))):
        messages = list(_messages(proto))
        message = draw(st.sampled_from(messages))
        fields = [field for field, _ in message.ListFields()]
        # Fields that are not set are chosen as well: what is empty may be asked for an element.
        others = [f for f in message.DESCRIPTOR.fields if f.name != "metadata_props"]
        field = draw(st.sampled_from(fields if fields and draw(st.booleans()) else others))
        _edit(draw, message, field, messages)
    return proto.SerializeToString()


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if _is_repeated(field) else [value]:
                yield from _messages(inner)


def _is_repeated(field: Any) -> bool:
    # The newest protobuf has no label any more, and older ones no such attribute.
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == field.LABEL_REPEATED)


def _edit(draw: Callable[..., Any], message: Any, field: Any, messages: list[Any]) -> None:
    if not _is_repeated(field):
        if field.message_type is None:
            setattr(message, field.name, _scalar(draw, field, messages))
        elif draw(st.booleans()):
            message.ClearField(field.name)
        else:
            getattr(message, field.name).CopyFrom(_another(draw, field, messages))
        return
    values = getattr(message, field.name)
    action = draw(st.sampled_from(("remove", "add", "repeat", "swap", "clear")))
    if action == "clear":
        del values[:]
    elif action == "add" or not values:
        values.append(
            _scalar(draw, field, messages)
            if field.message_type is None
            else _another(draw, field, messages)
        )
    else:
        first, second = (draw(st.integers(0, len(values) - 1)) for _ in range(2))
        if action == "remove":
            del values[first]
        elif action == "repeat":
            values.append(values[first])
        else:
            # A protobuf's messages cannot be assigned: all are taken out and put back.
            order = list(range(len(values)))
            order[first], order[second] = second, first
            kept = [_copy(values[index]) for index in order]
            del values[:]
            values.extend(kept)


def _copy(value: Any) -> Any:
    if not hasattr(value, "CopyFrom"):
        return value
    fresh = type(value)()
    fresh.CopyFrom(value)
    return fresh


def _another(draw: Callable[..., Any], field: Any, messages: list[Any]) -> Any:
    """Return a copy of a message of the type that a field takes, or an empty one."""
    name = field.message_type.full_name
    fitting = [message for message in messages if message.DESCRIPTOR.full_name == name]
    empty = getattr(onnx, field.message_type.name, None)
    choices = [*map(_copy, fitting), *([empty()] if callable(empty) else [])]
    if not choices:
        return field.message_type._concrete_class()
    return draw(st.sampled_from(choices))


def _scalar(draw: Callable[..., Any], field: Any, messages: list[Any]) -> Any:
    kind = field.cpp_type
    if field.enum_type is not None:
        return draw(st.sampled_from([value.number for value in field.enum_type.values]))
    if kind == field.CPPTYPE_STRING:
        names = {name for m in messages if isinstance(m, onnx.NodeProto) for name in _names(m)}
        texts = [text for text in NASTY_TEXTS if text != "\ud800"]
        text = draw(st.sampled_from([*texts, *sorted(names)]))
        return text.encode() if field.type == field.TYPE_BYTES else text
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return draw(st.sampled_from((0.0, -1.0, 1e30, float("nan"), float("inf"))))
    bits = 32 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    low = -(2 ** (bits - 1)) if signed else 0
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return draw(st.sampled_from([n for n in NASTY_INTS if low <= n <= high] + [4, 5, 8, 13, 23]))


def _names(node: onnx.NodeProto) -> list[str]:
    return [*node.input, *node.output, node.op_type, *(a.name for a in node.attribute)]
