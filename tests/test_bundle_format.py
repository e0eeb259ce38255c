"""The documented format of `bundle.json`: the JSON Schema in docs/ states what the strict reader takes.

The schema is derived from the dataclasses here and compared with the file; after a change of the manifest write it
again with `python tests/test_bundle_format.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from builders import make_bundle

from runtime.bundle import MANIFEST, SCHEMA, Manifest

PATH = Path(__file__).resolve().parents[1] / "docs" / "bundle.schema.json"
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema of an annotated type, as `runtime.schema.convert` reads it."""
    if dataclasses.is_dataclass(hint):
        fields = dataclasses.fields(hint)
        hints = get_type_hints(hint)
        required = [
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        properties = {f.name: schema_of(hints[f.name]) for f in fields}
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    args = get_args(hint)
    if type(None) in args:
        return {"anyOf": [schema_of(next(a for a in args if a is not type(None))), {"type": "null"}]}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": schema_of(args[0])}
    if get_origin(hint) is Literal:
        return {"enum": list(args)}
    if get_origin(hint) is dict:
        return {"type": "object", **({} if args[1] is Any else {"additionalProperties": schema_of(args[1])})}
    return {"type": PLAIN[hint]}


def manifest_schema() -> dict[str, Any]:
    schema = schema_of(Manifest)
    schema["properties"]["schema"] = {"const": SCHEMA}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bundle.json of a CCNet bundle",
        "description": "Described in docs/bundle.md.",
        **schema,
    }


def test_the_documented_schema_is_that_of_the_reader() -> None:
    assert json.loads(PATH.read_text(encoding="utf-8")) == manifest_schema()


def test_a_manifest_fits_the_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    make_bundle(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / MANIFEST).read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(json.loads(PATH.read_text(encoding="utf-8")))
    assert list(validator.iter_errors(manifest)) == []
    for key in manifest:
        assert list(validator.iter_errors({k: v for k, v in manifest.items() if k != key}))
    assert list(validator.iter_errors({**manifest, "extra": 1}))


if __name__ == "__main__":
    PATH.write_text(json.dumps(manifest_schema(), indent=2) + "\n", encoding="utf-8")
