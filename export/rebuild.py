"""Engines of a bundle or extractor built again for this machine, from its own ONNX files.

Needs the engine library, but neither torch nor a checkpoint, and so can't verify what it built.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.bundle_writer import changed_folder
from export.tensorrt.build import build_engine
from export.tensorrt.options import CURRENT, EngineOptions
from runtime.backends.tensorrt.engine import check_engine
from runtime.bundle import Contents, Engine, ModelFile, ModelFolder, read_bundle
from runtime.errors import BackendUnavailable, BundleError, ConfigError, EngineMismatch, ExportError
from runtime.schema import section_from_json
from runtime.video.extractor import is_extractor, read_extractor

log = logging.getLogger(__name__)


def read_folder(folder: str | Path) -> ModelFolder[Any]:
    """Read a bundle or an extractor. Raises BundleError for anything else."""
    return read_extractor(folder) if is_extractor(folder) else read_bundle(folder)


def engines_to_rebuild(bundle: ModelFolder[Any], names: Sequence[str] = ()) -> list[Engine]:
    """Return the named engines; without names, those that were built for another GPU or library version.

    Raises BundleError for a name that is not a TensorRT engine of the bundle, BackendUnavailable when whether its
    engines fit can't be found out here, for example without a GPU.
    """
    known = {e.name: e for e in bundle.manifest.engines if bundle.model_file(e.model_file).format != "onnx"}
    if unknown := [name for name in names if name not in known]:
        raise BundleError(
            f"{bundle.folder}: got {', '.join(unknown)}, expected TensorRT engines of it: "
            f"{', '.join(known) or 'it has none'}"
        )
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    mismatched: list[Engine] = []
    unknown_here: list[str] = []
    for engine in known.values():
        try:
            check_engine(bundle.model_file(engine.model_file))
        except EngineMismatch as error:  # noqa: PERF203 - a few engines
            log.info("%s", error)
            mismatched.append(engine)
        except BackendUnavailable as error:
            unknown_here.append(f"{engine.name}: {error}")
    if unknown_here and not mismatched:
        reasons = "".join(f"\n  {line}" for line in unknown_here)
        raise BackendUnavailable(f"{bundle.folder}: can't compare its engines with this machine:{reasons}")
    for line in unknown_here:
        log.warning("left as it is: %s", line)
    return mismatched


def rebuild(folder: str | Path, engine: Engine) -> ModelFile:
    """Replace the file of an engine by one built here from the same ONNX file, and return its manifest entry.

    The engine's status becomes `unverified`. The bundle changes as a whole or not at all. Raises BundleError when the
    ONNX file is not in the bundle any more, or the options that the engine was built with can't be read; and what
    `build_engine` raises.
    """
    bundle = read_folder(folder)
    old = bundle.model_file(engine.model_file)
    source = _source(bundle, old)
    options = _options(bundle, old)
    bundle.verify(source)
    log.info("building %s", engine.name)
    with changed_folder(folder, read_folder) as draft:
        info = build_engine(draft.folder / source.files[0], draft.folder / old.files[0], options)
        built = info.model_file(name=old.name)
        draft.add_model_file(built)
        for other in bundle.manifest.engines:
            if other.model_file == old.name:
                draft.set_engine(dataclasses.replace(other, status="unverified", accuracy={}, speed={}))
    return built


def _source(bundle: ModelFolder[Any], engine_file: ModelFile) -> ModelFile:
    """Return the ONNX file that an engine was built from, recognised by its hash."""
    manifest: Contents = bundle.manifest
    digests = {record.name: record.sha256 for record in manifest.files}
    for model_file in manifest.model_files:
        if model_file.format == "onnx" and digests.get(model_file.files[0]) == engine_file.onnx_sha256:
            return model_file
    raise BundleError(f"{bundle.folder}: the ONNX file that '{engine_file.name}' was built from is not in the bundle")


def _options(bundle: ModelFolder[Any], engine_file: ModelFile) -> EngineOptions:
    """Read the options that an engine was built with; for RTX add this GPU, as other machines may share the bundle."""
    try:
        where = f"{bundle.folder / bundle.manifest.FILE}: options of '{engine_file.name}'"
        options = section_from_json(EngineOptions, engine_file.options, where=where)
    except (ConfigError, ExportError) as error:
        raise BundleError(f"{error}; export the bundle again") from error
    if not options.compute_capabilities:  # a portable RTX engine stays portable
        return options
    return dataclasses.replace(options, compute_capabilities=(*options.compute_capabilities, CURRENT))
