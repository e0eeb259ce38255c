"""What programs and scripts outside this repository rely on. A change here needs a line in the changelog."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import ccnet
import runtime
from ccnet.cli.main import COMMANDS, main
from ccnet.config import Config, preset
from runtime.average_precision import average_precision
from runtime.localizer import Localizer
from runtime.suppression import suppress

ENGINE_OPTIONS = {
    *("--backend", "--batch", "--long-videos", "--on-mismatch", "--precision", "--threads", "--window-overlap"),
    "--workers",
}
PARITY_OPTIONS = {"--annotations", "--device", "--features", "--videos"}
BUILD_OPTIONS = {
    *("--compute-capability", "--hardware-compatible", "--optimization-level", "--tiling", "--timing-cache"),
    *("--version-compatible", "--workspace-mib"),
}
READ_OPTIONS = {"--decode-threads", "--max-duration", "--missing-audio", "--remote", "--timestamps"}
OPTIONS: dict[str, set[str]] = {
    "demo": {"--out", "--video"},
    "synthesize": {
        *("--annotations", "--difficulty", "--dtype", "--json", "--limit", "--out", "--preset", "--seed"),
        *("--subset", "--workers"),
    },
    "presets": {"--json"},
    "check-data": {
        "--annotations",
        "--classes",
        "--config",
        "--features",
        "--json",
        "--per-class",
        "--preset",
        "--quick",
        "--quiet",
    },
    "train": {
        *("--annotations", "--classes", "--config", "--features", "--json", "--out", "--preset", "--quiet", "--resume"),
    },
    "import-weights": {"--annotations", "--json", "--out", "--preset"},
    "import-extractor": {
        *("--flow-iterations", "--i3d-flow", "--i3d-rgb", "--json", "--out", "--raft", "--vggish"),
        *("--format", "--precision", *BUILD_OPTIONS),
    },
    "extract": {
        *("--backend", "--check", "--extractor", "--json", "--on-error", "--out", "--precision", "--quiet"),
        *("--threads", *READ_OPTIONS),
    },
    "export": {
        *("--copies", "--format", "--graph", "--high-priority", "--json", "--max-batch", "--opset", "--opt-batch"),
        *("--out", "--precision", *BUILD_OPTIONS, *PARITY_OPTIONS),
    },
    "rebuild": {"--json"},
    "verify": {"--backend", "--checkpoint", "--json", "--polygraphy", "--precision", "--reference", *PARITY_OPTIONS},
    "reference": {"--json", "--out", *PARITY_OPTIONS},
    "predict": {
        *("--extractor", "--videos", *READ_OPTIONS),
        *("--annotations", "--features", "--format", "--json", "--on", "--on-error", "--out", "--processes", "--quiet"),
        *("--shard", "--shard-size", "--subset", *ENGINE_OPTIONS),
    },
    "evaluate": {
        "--annotations",
        "--classes",
        "--features",
        "--json",
        "--per-class",
        "--quiet",
        "--subset",
        *ENGINE_OPTIONS,
    },
    "convert": {
        *("--annotations", "--durations", "--from", "--json", "--min-score", "--out", "--score", "--subset", "--to"),
    },
    "compare": {"--annotations", "--draws", "--features", "--json", "--quiet", "--seed", "--subset", *ENGINE_OPTIONS},
    "serve": {
        *("--contexts", "--host", "--max-body", "--max-connections", "--max-wait", "--port", "--queue", "--quiet"),
        *("--timeout", "--tls-cert", "--tls-key", "--token-file", *ENGINE_OPTIONS),
        *("--extractions", "--extractor", "--max-video", "--video-timeout", *(READ_OPTIONS - {"--remote"})),
    },
    "triton": {
        *("--backends", "--check", "--device", "--format", "--instances", "--json", "--name", "--onnxruntime", "--out"),
        *("--precision", "--queue-delay", "--tensorrt"),
    },
    "show": {
        *("--annotations", "--features", "--json", "--media", "--names", "--out", "--quiet", "--subset", "--title"),
        *("--video", "--videos"),
        *ENGINE_OPTIONS,
    },
    "inspect": {"--json"},
    "bench": {
        *("--backend", "--batches", "--calls", "--checkpoint", "--json", "--no-compile", "--plot", "--seconds"),
    },
    "doctor": {"--json"},
}

SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (Localizer.__init__, "(self, backends, spec, *, post=None, long_videos='crop', window_overlap=0.5)"),
    (
        Localizer.load,
        "(folder, backend='auto', *, precision=None, on_mismatch='error', threads=None, post=None, long_videos='crop',"
        " window_overlap=0.5)",
    ),
    (Localizer.__call__, "(self, visual, audio, duration=None)"),
    (Localizer.batch, "(self, videos)"),
    (Localizer.stream, "(self, videos, *, batch_size=None, workers=None)"),
    (Localizer.describe, "(self)"),
    (Localizer.close, "(self)"),
    (runtime.FeatureFiles, "(folder, video_id)"),
    (
        suppress,
        "(segments, scores, labels, *, method='soft', sigma=0.4, iou_threshold=0.7, min_score=0.001, max_segments=100,"
        " multiclass=True, voting_threshold=0.75)",
    ),
    (
        average_precision,
        "(pred_video, pred_segments, pred_scores, pred_labels, gt_video, gt_segments, gt_labels, num_classes,"
        " tiou_thresholds)",
    ),
    (preset, "(name)"),
    (Config.spec, "(self, labels)"),
    (ccnet.load_checkpoint, "(folder, device='cpu')"),
    (ccnet.load_bundle, "(folder, backend='auto', **options)"),
    (ccnet.train, "(config, annotations, features, out, *, resume=False, quiet=False, classes=None)"),
    (ccnet.save_checkpoint, "(folder, model, *, config, labels, metrics=None)"),
]


def test_exported_names() -> None:
    assert runtime.__all__ == ["CCNetError", "Detections", "FeatureFiles", "Localizer", "ModelSpec"]
    assert ccnet.__all__ == [
        *("CCNet", "Config", "Localizer", "ModelConfig", "load_bundle", "load_checkpoint", "preset"),
        *("save_checkpoint", "train"),
    ]
    for package in (runtime, ccnet):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
        with pytest.raises(AttributeError, match="no attribute 'Locator'"):
            package.Locator  # noqa: B018
    assert ccnet.Localizer is runtime.Localizer


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures(function: Callable[..., Any], expected: str) -> None:
    """Names, defaults and kinds of the parameters."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == expected


def printed_help(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.findall(r"^    ([a-z-]+)", printed_help(capsys), re.MULTILINE) == list(OPTIONS)
    assert [name.replace("_", "-") for name in COMMANDS] == list(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", printed_help(capsys, command), re.MULTILINE)
    assert {*options} == OPTIONS[command] | {"--help"}


def test_names_without_pytorch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ccnet import Config, Localizer, load_bundle, load_checkpoint, preset, save_checkpoint, train\n"
        "from runtime import CCNetError, Detections, FeatureFiles, Localizer, ModelSpec\n"
        "preset('demo').spec(tuple('abcde'))\n"
        "try:\n"
        "    train('demo', 'annotations', 'features', 'out')\n"
        "except CCNetError as error:\n"
        "    assert \"pip install 'ccnet[train]'\" in str(error), error\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_that_reports_does_so_as_json() -> None:
    """`demo` runs other commands, and `serve` has no result."""
    assert {name for name, options in OPTIONS.items() if "--json" not in options} == {"demo", "serve"}
