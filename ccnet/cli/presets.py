"""`ccnet presets`: what can be trained, and every setting with its default and where it comes from."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from ccnet.cli.options import add_json_argument, print_result
from ccnet.config import PRESETS, preset
from ccnet.settings import PRESET_TEXTS, changed_settings, explained_settings, setting_text


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "presets",
        help="list the presets, and explain every setting",
        description="Without a name: the presets, and every setting with its default. With one: its value of each.",
    )
    parser.add_argument("name", nargs="?", metavar="PRESET", help="show the values of this preset")
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    name = arguments.name or "unav100"
    values = preset(name).to_json()
    record = {
        "presets": {known: {"text": PRESET_TEXTS[known], "changes": changed_settings(known)} for known in PRESETS},
        "settings": [
            {**vars(setting), "default": _value(values, setting.key), "preset": name}
            for setting in explained_settings()
        ],
    }
    lines = list(_presets()) if arguments.name is None else [f"{name}: {PRESET_TEXTS[name]}"]
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    lines += ["", f"settings, with the values of {name}; change one as --section.field value, or in a file (--config)"]
    for setting in explained_settings():
        changed = "  (changed)" if setting.key in changed_settings(name) else ""
        lines.append(f"\n{setting.key} = {setting_text(_value(values, setting.key))}{changed}   [{setting.kind}]")
        lines += textwrap.wrap(
            f"{setting.text} ({setting.source})", width, initial_indent="    ", subsequent_indent="    "
        )
    print_result(arguments, record, "\n".join(lines))
    return 0


def _presets() -> Iterator[str]:
    width = max(map(len, PRESETS)) + 2
    for name in PRESETS:
        yield f"{name:<{width}}{PRESET_TEXTS[name]}"
        changes = ", ".join(f"{key} {setting_text(value)}" for key, value in changed_settings(name).items())
        if changes:
            indent = " " * (width + 2)
            yield from textwrap.wrap(f"differs: {changes}", 110, initial_indent=indent, subsequent_indent=indent)


def _value(values: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return values[section][name]
