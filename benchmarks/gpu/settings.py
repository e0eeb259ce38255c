"""What the stages of `benchmarks.gpu.report` are given, and the files that they leave for each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle, ModelFile, read_bundle
from runtime.errors import CCNetError, ExportError
from runtime.files import write_json
from runtime.profiling.bench import Plan
from runtime.profiling.timing import Rules
from runtime.schema import section_from_json
from runtime.spec import ModelSpec

Settings = dict[str, Any]
"""`bundle`, `reference`, `work` (folders and files), `batches`, `seconds` (per measurement), `device` (cuda or cpu),
and for engines `format`, `precision`, `kind` (latency or throughput), `optimization_level` (of the former). A stage
that measures one thing after the other leaves each in the file `partial`."""


class Absent(CCNetError):
    """The bundle does not hold what the stage is about."""


def bench_plan(settings: Settings, max_batch: int) -> Plan:
    """Return what to measure of an engine that takes batches of up to `max_batch`."""
    seconds = settings["seconds"]
    rules = Rules(warmup_seconds=min(0.3, seconds), seconds=seconds)
    return Plan(rules=rules, batches=tuple(batches_of(settings, max_batch)))


def batches_of(settings: Settings, max_batch: int) -> list[int]:
    """Return the batch sizes to look at that an engine takes; it may be built for fewer videos than asked for."""
    return [batch for batch in settings["batches"] if batch <= max_batch] or [max_batch]


def keep(settings: Settings, found: dict[str, Any]) -> None:
    """Leave what a stage has so far, should it not come to its end."""
    if partial := settings.get("partial"):
        write_json(partial, found)


def graph_of(settings: Settings) -> tuple[Bundle, ModelFile]:
    """Return the bundle and its graph of the stage's precision. Raises Absent where it has none."""
    bundle = read_bundle(settings["bundle"])
    wanted = "fp32" if settings["precision"] == "tf32" else settings["precision"]
    for model_file in bundle.manifest.model_files:
        if model_file.format == "onnx" and model_file.precision == wanted:
            return bundle, model_file
    raise Absent(f"{bundle.folder}: has no {wanted} graph; export it with --precision {wanted}")


def engine_path(settings: Settings) -> Path:
    """Return where the stage's engine is, or is to be."""
    return Path(settings["work"]) / f"{settings['format']}-{settings['precision']}-{settings['kind']}.engine"


def engine_of(settings: Settings) -> tuple[Path, ModelFile, ModelSpec]:
    """Return the built engine, its manifest entry and its spec. Raises ExportError where it was not built."""
    path = engine_path(settings)
    if not path.is_file():
        raise ExportError(f"{path}: was not built")
    model_file = section_from_json(ModelFile, json.loads(path.with_suffix(".json").read_text()), where=path.name)
    return path, model_file, read_bundle(settings["bundle"]).spec
