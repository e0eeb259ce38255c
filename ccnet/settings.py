"""Settings from a file, and what each setting means.

A TOML or YAML file holds what the command line takes: `preset`, `annotations`, `classes`, `features`, `out`, and
settings as sections or with a dot. Values may be text as on the command line.

    preset = "unav100"              preset: unav100
    annotations = "mine.json"       annotations: mine.json
    [model]                         model:
    num_classes = 12                  num-classes: 12
    [time_base]                     time_base.fps: 30
    fps = 30
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ccnet.config import PRESETS, Config, nearest_key, preset, with_overrides
from runtime.errors import ConfigError
from runtime.files import open_input
from runtime.packages import import_package
from runtime.schema import quote, show

RUN_KEYS = ("preset", "annotations", "classes", "features", "out")
"""What a file may say besides settings."""
_LARGEST, _DEEPEST = 1 << 16, 8
"""Bytes, and sections and lists inside each other: all settings take 3 kB, and YAML is read 100 kB a second."""
_SOURCE = re.compile(r"\s*\b(Paper|Release): (.+)\.$")


@dataclass(frozen=True)
class SettingsFile:
    """What a file of settings says."""

    path: Path
    run: Mapping[str, str]
    """Of `RUN_KEYS`. Paths are relative to the working folder, as on the command line; a `~` is the home folder."""
    overrides: Mapping[str, Any]
    """By `section.field`."""

    def config(self, preset_name: str, overrides: Mapping[str, str]) -> Config:
        """Return a preset with the settings of the file, then those of the command line. Raises ConfigError."""
        if preset_name != self.run.get("preset"):
            preset(preset_name)  # a bad one is no mistake of the file
        try:
            config = with_overrides(preset(preset_name), self.overrides)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        return with_overrides(config, overrides)


def read_settings(path: str | Path) -> SettingsFile:
    """Read a TOML (`.toml`) or YAML (`.yaml`, `.yml`) file.

    Raises ConfigError naming the file and the key for anything but settings; an unknown key is answered with the
    nearest known one. MissingDependency without a reader of the format.
    """
    path = Path(path)
    readers = {".toml": _read_toml, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{path}: got a file named *{path.suffix}, expected .toml, .yaml or .yml")
    try:
        with open_input(path) as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from None
    if len(content) > _LARGEST:
        raise ConfigError(f"{path}: more than {_LARGEST} bytes, expected a file of settings")
    try:
        data = readers[path.suffix.lower()](content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: can't be read as {path.suffix.lower()[1:].upper()}: {quote(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {show(data)}, expected settings, such as 'preset' and 'model'")
    run: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    for key, value in _flat(path, data):
        if key in overrides or key in run:
            raise ConfigError(f"{path}: {key} is given twice")
        if key in RUN_KEYS:
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{path}: {key}: got {show(value)}, expected text")
            run[key] = os.path.expanduser(value)  # no shell has done it
        else:
            overrides[key] = value
    return SettingsFile(path, run, overrides)


def _flat(path: Path, data: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Return `section.field` and value of every setting; a hyphen in a key stands for an underscore."""
    sections = {f.name for f in dataclasses.fields(Config)}
    pairs: list[tuple[str, Any]] = []
    for given, value in data.items():
        key = str(given).replace("-", "_")
        if key in sections and isinstance(value, dict):
            pairs += [(f"{key}.{str(name).replace('-', '_')}", inner) for name, inner in value.items()]
        elif key in RUN_KEYS or "." in key:
            pairs.append((key, value))
        else:
            near = difflib.get_close_matches(key, [*RUN_KEYS, *sorted(sections)], 1, 0.75)
            nearest = near[0] if near else nearest_key(key)
            raise ConfigError(
                f"{path}: unknown key '{quote(given, 80)}'; "
                + (f"did you mean {nearest}? " if nearest else "")
                + f"expected {', '.join(RUN_KEYS)} or a section: {', '.join(sorted(sections))}"
            )
    return pairs


def _read_toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = import_package("tomli", "reading TOML")
    return tomllib.loads(text)


def _read_yaml(text: str) -> Any:
    """Parse YAML, refusing a key twice in one mapping, and aliases, which settings do not need."""
    yaml = import_package("yaml", "reading YAML", distribution="pyyaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            line = self.peek_event().start_mark.line + 1
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {line}: aliases are not read")
            if self.depth > _DEEPEST:
                raise ValueError(f"line {line}: nested deeper than {_DEEPEST} sections and lists")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = Counter(str(key.value) for key, _ in node.value)
            if len(keys) < len(node.value):
                twice = keys.most_common(1)[0][0]
                raise ValueError(f"line {node.start_mark.line + 1}: key {show(twice)} occurs twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Setting:
    """One setting, explained."""

    key: str
    kind: str
    """What values it takes."""
    default: Any
    """Of the paper's network, `unav100`."""
    text: str
    source: str
    """Where it comes from: the paper's section, equation or table, the released program, or this toolkit."""


@cache
def explained_settings() -> tuple[Setting, ...]:
    """Return every setting with its default and the docstring of its field."""
    settings = []
    defaults = Config()
    for section in dataclasses.fields(Config):
        values = getattr(defaults, section.name)
        texts, hints = _docstrings(type(values)), get_type_hints(type(values))
        for field in dataclasses.fields(values):
            text, source = _split_source(texts.get(field.name, ""))
            settings.append(
                Setting(
                    f"{section.name}.{field.name}", _kind(hints[field.name]), getattr(values, field.name), text, source
                )
            )
    return tuple(settings)


PRESET_TEXTS: Mapping[str, str] = {
    "unav100": "CCNet on I3D and VGGish features, the paper's network",
    "unav100_onepeace": "CCNet on ONE-PEACE features, the paper's stronger variant",
    "davel_unav100": "DAVEL, the baseline, on I3D and VGGish features",
    "davel_unav100_onepeace": "DAVEL on ONE-PEACE features",
    "demo": "a small CCNet for synthetic features, trained in minutes on two cores",
}


def changed_settings(name: str) -> dict[str, Any]:
    """Return what a preset has other than `unav100`, by `section.field`."""
    mine, plain = PRESETS[name].to_json(), PRESETS["unav100"].to_json()
    return {
        f"{section}.{key}": value
        for section, fields in mine.items()
        for key, value in fields.items()
        if value != plain[section][key]
    }


def setting_text(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"


def _docstrings(cls: type) -> dict[str, str]:
    """Return the strings that stand behind the fields of a class in its source."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if documented and isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            found[before.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return found


def _split_source(text: str) -> tuple[str, str]:
    match = _SOURCE.search(text)
    if match is None:
        return text, "this toolkit"
    where = {"Paper": "paper", "Release": "released program"}[match[1]]
    return text[: match.start()], f"{where}, {match[2]}"


def _kind(hint: Any) -> str:
    if get_args(hint) and get_origin(hint) is not tuple:
        return " | ".join(map(str, get_args(hint)))
    names = {bool: "on | off", int: "integer", float: "number", str: "text"}
    return names.get(hint, "text,text,...")
