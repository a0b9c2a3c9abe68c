"""Plain data of users' files: JSON parsed, and dataclasses built of it, every field checked."""

from __future__ import annotations

import collections.abc
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar

Built = TypeVar("Built")

# The whole numbers that NumPy and TVM hold, and those that a double does.
_LARGEST = {int: 2**63 - 1, float: 2**1023}

# Lists and objects within each other; what this package writes has about ten.
_DEEPEST = 100


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Returns
    -------
    object
        Plain data, whose texts can all be written as UTF-8.

    Raises
    ------
    ValueError
        With the reason in words. Python has other errors for what is nested too deeply, and none
        for halves of characters, which nothing can print.
    """
    try:
        data = json.loads(text)
        _check_depth(data)
        _check_characters(text, data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    except UnicodeError:
        raise ValueError("it holds text that is not UTF-8") from None
    except ValueError:
        # The only other one: Python reads whole numbers of a few thousand digits at most.
        raise ValueError("it holds a number with too many digits") from None
    return data


def _check_depth(data: Any) -> None:
    """Raise RecursionError where whoever walks through the data would."""
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, list | dict)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecursionError


def _check_characters(text: str | bytes, data: Any) -> None:
    """Raise UnicodeError for halves of characters, written as they are or as an escape."""
    if isinstance(text, str):
        text.encode("utf-8")
        escaped = "\\ud" in text.lower()
    else:
        escaped = b"\\ud" in text.lower()
    if escaped:
        json.dumps(data, ensure_ascii=False).encode("utf-8")


def build(kind: type[Built], data: Any) -> Built:
    """Build a dataclass of an object of JSON.

    Parameters
    ----------
    kind : type
        A dataclass whose fields are texts, numbers, truth values, mappings, tuples of such, other
        dataclasses, or None.
    data : object
        Lists stand for tuples.

    Raises
    ------
    ValueError
        With the reason in words, when a field is missing, unknown, or of another kind.
    """
    if isinstance(data, kind):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"{_shown(data)} stands where an object should")
    hints = _hints(typing.cast(Any, kind))
    for name in data:
        if name not in hints:
            raise ValueError(f"there is no field '{name}'")
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in data and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"the field '{item.name}' is missing")
    return kind(**{name: _convert(name, data[name], hints[name]) for name in data})


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Check a value against the type that a field is declared with; lists become tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (one for one in arguments if one is not type(None))
        return _convert(name, value, hint)
    if hint is Any:
        return value
    if origin is typing.Literal and value in arguments:
        return value
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value)
    if origin is tuple and isinstance(value, list | tuple):
        return _convert_all(name, value, arguments)
    if origin is collections.abc.Mapping and isinstance(value, Mapping):
        return {key: _convert(name, item, arguments[1]) for key, item in value.items()}
    # A float may be written as a whole number, and keeps that form: keys are digests of it.
    classes = (int, float) if hint is float else hint
    if origin is None and isinstance(value, classes) and isinstance(value, bool) == (hint is bool):
        if not isinstance(value, int) or abs(value) <= _LARGEST[float if hint is float else int]:
            return value
    raise ValueError(f"{_shown(value)} is no value of the field '{name}'")


def _convert_all(name: str, values: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if hints[-1] is Ellipsis:
        return tuple(_convert(name, value, hints[0]) for value in values)
    if len(values) != len(hints):
        raise ValueError(f"{_shown(values)} is no value of the field '{name}'")
    return tuple(_convert(name, value, hint) for value, hint in zip(values, hints, strict=True))


def _shown(value: Any) -> str:
    """Quote a value; a number of thousands of digits cannot even be printed."""
    if isinstance(value, int) and abs(value) > 2**64:
        return "a very large number"
    text = json.dumps(value, default=str) if isinstance(value, str | int | float) else ""
    return text[:60] or f"a {type(value).__name__}"
