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
from runtime.video.extractor import Extractor, is_extractor, read_extractor


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a bundle or extractor holds and check its files",
        description="Show the networks, the engines with the verdict of their parity check, and how the folder was "
        "made. Compare every file with its hash. Exit status 2 when a file is missing or altered.",
    )
    parser.add_argument("bundle", help="bundle or extractor folder")
    parser.add_argument("--json", action="store_true", help="print the manifest, and what is wrong with files, as JSON")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Return 0. Raises BundleError, after everything was printed, when a file is missing or altered."""
    bundle: Bundle | Extractor
    bundle = read_extractor(arguments.bundle) if is_extractor(arguments.bundle) else read_bundle(arguments.bundle)
    problems = _problems(bundle)
    if arguments.json:
        print_text(json.dumps({"manifest": bundle.manifest.to_json(), "problems": problems}, indent=2))
    else:
        print_text("\n".join(_text(bundle, problems)))
    if problems:
        raise BundleError(f"{bundle.folder}: {len(problems)} file(s) are not what the manifest says")
    return 0


def _problems(bundle: Bundle | Extractor) -> dict[str, str]:
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


def _head(bundle: Bundle | Extractor) -> list[str]:
    """Say what the folder is of, one fact a line."""
    versions = f"by          {', '.join(f'{name} {version}' for name, version in bundle.manifest.versions.items())}"
    made = f"made {bundle.manifest.created}"
    if isinstance(bundle, Extractor):
        sizes = bundle.spec
        names = (*sizes.layout.visual, *sizes.layout.audio)
        widths = zip(names, (sizes.rgb_dim, sizes.flow_dim, sizes.audio_dim), strict=True)
        return [
            f"extractor   {bundle.folder}, {made}",
            versions,
            *(f"weights     {name} {digest[:16]}" for name, digest in bundle.manifest.weights.items()),
            f"features    {', '.join(f'{name} {width}' for name, width in widths)}",
            f"frames      shorter side {sizes.side}, crop {sizes.crop}, flow of {sizes.iterations} iterations",
        ]
    spec, base = bundle.spec, bundle.spec.time_base
    visual, audio = " + ".join(spec.layout.visual), " + ".join(spec.layout.audio)
    return [
        f"bundle      {bundle.folder}, {made}",
        versions,
        f"checkpoint  {bundle.manifest.checkpoint_sha256[:16]}",
        f"network     T = {spec.length} steps, {spec.levels} levels, {spec.num_classes} classes",
        f"features    visual {spec.visual_dim} ({visual}), audio {spec.audio_dim} ({audio})",
        f"time        one step every {base.step_seconds:g} s; T covers {base.covered_seconds(spec.length):.1f} s",
    ]


def _text(bundle: Bundle | Extractor, problems: dict[str, str]) -> list[str]:
    manifest = bundle.manifest
    return [
        *_head(bundle),
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
