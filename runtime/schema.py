"""Configuration dataclasses from parsed JSON, strictly: unknown, missing and mistyped keys are errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from runtime.errors import ConfigError, printable

Section = TypeVar("Section")

_SHOWN = 60
"""Characters of a value that a message quotes."""
_QUOTED = 400
"""Characters of a text (another library's message, a list of names) that a message quotes."""


def section_from_json(cls: type[Section], data: Any, *, where: str) -> Section:
    """Build a (nested) dataclass from parsed JSON, strictly.

    Raises ConfigError naming the full key for anything unknown, missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: got {type(data).__name__}, expected an object")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key(s) {quote(', '.join(unknown), _SHOWN)}; known keys: {', '.join(fields)}"
        )
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = sorted(set(required) - set(data))
    if missing:
        raise ConfigError(f"{where}: missing key(s) {', '.join(missing)}")
    values = {name: convert(value, hints[name], where=f"{where}.{name}") for name, value in data.items()}
    return cls(**values)


def convert(value: Any, hint: Any, *, where: str) -> Any:
    """Return a JSON value as the annotated type: dataclass, tuple[X, ...], dict, Literal, X | None or a plain one."""
    if dataclasses.is_dataclass(hint):
        return section_from_json(cast(Any, hint), value, where=where)
    args = get_args(hint)
    if type(None) in args:
        inner = next(a for a in args if a is not type(None))
        return None if value is None else convert(value, inner, where=where)
    if getattr(hint, "__origin__", None) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: got {show(value)}, expected a list")
        return tuple(convert(v, args[0], where=f"{where}[{i}]") for i, v in enumerate(value))
    if getattr(hint, "__origin__", None) is Literal:
        require(value in args, where, value, f"one of {', '.join(map(repr, args))}")
        return value
    if getattr(hint, "__origin__", None) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: got {show(value)}, expected an object")
        return {key: convert(v, args[1], where=f"{where}.{quote(key, _SHOWN)}") for key, v in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 1e300, where, value, "a number below 1e300")
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: got {show(value)}, expected {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: got {show(value)}, expected a finite number")
    return value


def require(condition: bool, key: str, got: Any, expected: str) -> None:
    """Raise ConfigError that names the key, what it got and what is expected, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {show(got)}, expected {expected}")


def show(value: Any) -> str:
    """Return a value from a file for a message: on one line, control characters escaped, not longer than 60."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def quote(text: object, limit: int = _QUOTED) -> str:
    """Return text from outside for a message: control characters escaped, line breaks too, cut to `limit`."""
    line = printable(str(text)).replace("\n", "\\n")
    return line if len(line) <= limit else line[: limit - 3] + "..."
