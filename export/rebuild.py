"""Builds an engine of a bundle again for this machine: `python -m export.rebuild BUNDLE ARTIFACT`.

The runtime runs this in a process of its own for `on_mismatch="rebuild"`. It needs the engine library, but no torch
and no checkpoint, and so can't verify the new engine: its engines are `not-run` until `ccnet verify` has run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from export.bundle_writer import changed_bundle
from export.tensorrt.build import build_engine
from export.tensorrt.options import CURRENT, EngineOptions
from runtime.bundle import MANIFEST, Bundle, ModelFile, read_bundle
from runtime.errors import BundleError, CCNetError, ConfigError, ExportError
from runtime.schema import section_from_json


def rebuild(folder: str | Path, name: str) -> ModelFile:
    """Replace the engine `name` of the bundle by one built here from the same ONNX file, and return its entry.

    The bundle changes as a whole or not at all. Raises BundleError when there is no such engine or its ONNX file is
    not in the bundle, and what `build_engine` raises.
    """
    bundle = read_bundle(folder)
    old = bundle.model_file(name)
    if old.format == "onnx":
        raise BundleError(f"{bundle.folder}: '{name}' is an ONNX file; only engines are built")
    source = _source(bundle, old)
    bundle.verify(source)
    options = _options(bundle, old)
    with changed_bundle(folder) as draft:
        info = build_engine(draft.folder / source.files[0], draft.folder / old.files[0], options)
        built = info.model_file(name=name)
        draft.add_model_file(built)
        for engine in (*bundle.manifest.engines, *bundle.manifest.rejected):
            if engine.model_file == name:
                draft.set_engine(dataclasses.replace(engine, status="unverified", accuracy={}, speed={}))
    return built


def _options(bundle: Bundle, engine: ModelFile) -> EngineOptions:
    """Read the options that the engine was built with; for RTX add this GPU, as other machines may share the bundle."""
    try:
        where = f"{bundle.folder / MANIFEST}: options of '{engine.name}'"
        options = section_from_json(EngineOptions, engine.options, where=where)
    except (ConfigError, ExportError) as error:
        raise BundleError(f"{error}; export the bundle again") from error
    if not options.compute_capabilities:  # a portable RTX engine stays portable
        return options
    return dataclasses.replace(options, compute_capabilities=(*options.compute_capabilities, CURRENT))


def _source(bundle: Bundle, engine: ModelFile) -> ModelFile:
    """The ONNX file that an engine was built from, recognised by its hash."""
    digests = {record.name: record.sha256 for record in bundle.manifest.files}
    for model_file in bundle.manifest.model_files:
        if model_file.format == "onnx" and digests.get(model_file.files[0]) == engine.onnx_sha256:
            return model_file
    raise BundleError(f"{bundle.folder}: the ONNX file that '{engine.name}' was built from is not in the bundle")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.rebuild", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("model_file", help="name of the engine, as 'ccnet inspect' shows it")
    arguments = parser.parse_args(argv)
    try:
        built = rebuild(arguments.bundle, arguments.model_file)
    except CCNetError as error:
        print(f"rebuild: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{built.name}: built with {built.library} {built.library_version}; verify it with 'ccnet verify'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
