"""`ccnet inspect`: show what a bundle holds and what was verified about it, and check that its files are whole."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ccnet.cli.options import print_text
from runtime.backends.registry import runs_on_gpu
from runtime.bundle import Bundle, read_bundle
from runtime.errors import BundleError
from runtime.machine import measured_here


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("inspect", help="show what a bundle holds and check its files")
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print the manifest, and what is wrong with files, as JSON")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Return 0. Raises BundleError, after everything was printed, when a file is missing or altered."""
    bundle = read_bundle(arguments.bundle)
    problems = _problems(bundle)
    if arguments.json:
        print_text(json.dumps({"manifest": bundle.manifest.to_json(), "problems": problems}, indent=2))
    else:
        print_text("\n".join(_text(bundle, problems)))
    if problems:
        raise BundleError(f"{bundle.folder}: {len(problems)} file(s) are not what the manifest says")
    return 0


def _problems(bundle: Bundle) -> dict[str, str]:
    """Return what is wrong with each bad file, by name."""
    problems = {}
    for record in bundle.manifest.files:
        try:
            bundle.verify_file(record.name)
        except BundleError as error:  # noqa: PERF203  a bundle has a few files
            problems[record.name] = str(error)
    listed = {record.name for record in bundle.manifest.files}
    for model_file in bundle.manifest.model_files:
        for name in model_file.files:
            if name not in listed:
                problems[name] = f"model file '{model_file.name}' names it, but the manifest has no record of it"
    return problems


def _text(bundle: Bundle, problems: dict[str, str]) -> list[str]:
    manifest, spec, base = bundle.manifest, bundle.spec, bundle.spec.time_base
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    visual, audio = " + ".join(spec.layout.visual), " + ".join(spec.layout.audio)
    return [
        f"bundle      {bundle.folder}, made {manifest.created}",
        f"by          {versions}",
        f"checkpoint  {manifest.checkpoint_sha256[:16]}",
        f"network     T = {spec.length} steps, {spec.levels} levels, {spec.num_classes} classes",
        f"features    visual {spec.visual_dim} ({visual}), audio {spec.audio_dim} ({audio})",
        f"time        one step every {base.step_seconds:g} s; T covers {base.covered_seconds(spec.length):.1f} s",
        "",
        *_table(
            ("file", "bytes", "sha256", "state"),
            [(f.name, f"{f.size:,}", f.sha256[:16], "BAD" if f.name in problems else "ok") for f in manifest.files],
        ),
        *(f"  {name}: {problem}" for name, problem in problems.items()),
        "",
        *_table(
            ("model file", "format", "precision", "max batch", "built for", "facts"),
            [
                (a.name, a.format, a.precision, str(a.max_batch), _built_for(a), _facts(a.build))
                for a in manifest.model_files
            ],
        ),
        "",
        *_table(
            ("engine", "backend", "precision", "status", "ms per video", "accuracy"),
            [
                (
                    r.name,
                    r.backend,
                    r.precision,
                    r.status,
                    _speed(r.speed, r.backend),
                    _facts(r.accuracy),
                )
                for r in manifest.engines
            ],
        ),
        *(
            [
                "",
                "unverified: built, never compared with the eager network; 'ccnet verify BUNDLE' does it",
            ]
            if any(r.status == "unverified" for r in manifest.engines)
            else []
        ),
    ]


def _built_for(model_file: Any) -> str:
    if model_file.format == "onnx":
        return f"opset {model_file.opset}"
    where = model_file.gpu_name or ", ".join(model_file.compute_capabilities) or "any GPU"
    return f"{model_file.library} {model_file.library_version}, {where}"


def _speed(speed: dict[str, Any], backend: str) -> str:
    if "ms_per_video" not in speed:
        return "-"
    here = measured_here(speed, gpu=runs_on_gpu(backend))
    return f"{speed['ms_per_video']:.2f}{'' if here else ' (elsewhere)'}"


def _facts(facts: dict[str, Any]) -> str:
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items() if _is_scalar(v)]
    return ", ".join(shown) or "-"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
