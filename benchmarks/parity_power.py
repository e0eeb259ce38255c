"""How often does the parity check refuse a right engine, and let a wrong one pass?

    python -m benchmarks.parity_power [--seeds 20] [--out FILE]

Twenty small networks with random weights, each as the fused network (which is right, in three precisions) and with one
mistake put in on purpose, at several strengths. Every mistake is computed in float32 and judged by the limits of each
precision, so that what a coarser limit lets pass can be told apart. Writes a page; ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import SMALL, labels, random_network
from benchmarks.results import markdown_table
from ccnet.cli.logs import reporting
from ccnet.config import with_overrides
from ccnet.network.layers import CrossAttention, MaskedConv1d
from ccnet.network.model import CCNet
from ccnet.torch_backend import TorchBackend
from export.fused.network import fused_network
from export.parity.compare import Check, ParityReport, compare
from export.parity.events import detections, judged_above
from export.parity.inputs import NUM_VIDEOS, ParityVideo, stress_inputs, synthetic_inputs
from export.parity.reference import Outputs, record
from export.parity.tolerances import TOLERANCES, tolerance, torch_dtype
from runtime.backends.base import BaseBackend, Float32, Int32
from runtime.backends.registry import Precision
from runtime.files import atomic_file
from runtime.spec import ModelSpec

log = logging.getLogger("benchmarks")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
CONFIG = with_overrides(SMALL, {"model.num_classes": "8"})
JUDGED: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
_ROUNDING = 2e-6
"""Between two orders of summation in float32, the outputs of these networks differ by less."""
_SHOWN: Precision = "fp16"
"""Whose checks are named in the table of misses."""
_MOVED = 0.1
"""Share of an event's length by which a person's boundaries are taken to differ from the network's."""

Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong with a network, put into a copy of it; `generator` chooses where."""

    name: str
    strength: str
    put: Callable[[CCNet, np.random.Generator], nn.Module]


def _transpose_head(model: CCNet, generator: np.random.Generator, *, share: float) -> nn.Module:
    """Move the square of one head in one projection of an attention towards its transpose."""
    attentions = [module for module in model.modules() if isinstance(module, CrossAttention)]
    attention = attentions[generator.integers(len(attentions))]
    layer = (attention.query, attention.key, attention.value, attention.proj)[generator.integers(4)]
    width = layer.in_features // attention.heads
    head = slice(width * (first := int(generator.integers(attention.heads))), width * (first + 1))
    square = layer.weight[head, head].clone()
    layer.weight[head, head] = square + share * (square.T - square)
    return model


def _drop_mask(model: CCNet, generator: np.random.Generator, *, kind: type[nn.Module]) -> nn.Module:
    """Let one module take every step for a valid one."""
    modules = [module for module in model.modules() if type(module) is kind]

    def all_valid(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*arguments[:-1], torch.ones_like(arguments[-1]))

    modules[generator.integers(len(modules))].register_forward_pre_hook(all_valid)
    return model


def _shift_level(model: CCNet, generator: np.random.Generator, *, level: int) -> nn.Module:
    """Move what one level of the pyramid puts out by one of its steps."""
    points = CONFIG.spec(labels(CONFIG)).grid.level_slices[level]

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            logits, offsets = (output.clone() for output in self.model(*inputs))
            for output in (logits, offsets):
                output[:, points] = output[:, points].roll(1, 1)
            return logits, offsets

    return Shifted()


def _round_tensor(model: CCNet, generator: np.random.Generator, *, bits: int) -> nn.Module:
    """Round one weight matrix to so many bits behind the point of its mantissa."""
    tensors = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    weight = tensors[generator.integers(len(tensors))]
    mantissa, exponent = torch.frexp(weight)
    weight.copy_(torch.ldexp(torch.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent))
    return model


MISTAKES = (
    *(
        Mistake("one head of an attention transposed", f"{share:.0%} of the way", partial(_transpose_head, share=share))
        for share in (1.0, 0.1, 0.01)
    ),
    Mistake("one mask dropped", "of an attention", partial(_drop_mask, kind=CrossAttention)),
    Mistake("one mask dropped", "of a convolution", partial(_drop_mask, kind=MaskedConv1d)),
    *(
        Mistake("one level shifted by one step", f"level {level + 1} of 4", partial(_shift_level, level=level))
        for level in (0, 1, 3)
    ),
    *(
        Mistake("one weight matrix rounded", f"to {bits} bits{name}", partial(_round_tensor, bits=bits))
        for bits, name in ((10, " (fp16)"), (7, " (bf16)"), (3, " (fp8)"))
    ),
)


class _Fused(TorchBackend):
    """A fused network, which takes an engine's inputs as they are."""

    def forward(self, model: nn.Module, visual: Tensor, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = model(visual, audio, lengths)
        return logits, offsets


class _Remembered:
    """A backend that is asked the same by every precision's check, and answers from memory."""

    def __init__(self, backend: BaseBackend) -> None:
        self._backend = backend
        self.name, self.precision = backend.name, backend.precision
        self.spec, self.max_batch = backend.spec, backend.max_batch
        self._known: dict[bytes, tuple[Float32, Float32]] = {}

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        key = hashlib.sha256(visual.tobytes() + audio.tobytes() + lengths.tobytes()).digest()
        if key not in self._known:
            self._known[key] = self._backend.infer(visual, audio, lengths)
        return self._known[key]

    def describe(self) -> dict[str, Any]:
        return self._backend.describe()

    def close(self) -> None:
        self._backend.close()


@dataclass(frozen=True)
class Verdict:
    """What the check said of one candidate."""

    kind: str
    """Of the candidate: a precision of the right network, or a mistake."""
    strength: str
    precision: str
    """Whose limits were used."""
    truth: str
    failing: tuple[str, ...]
    strict: tuple[str, ...]
    """Checks that would fail if no interval were allowed for and every mAP were judged."""
    effect: bool
    """Some output at a valid point differs by more than float32 rounding."""


def judge(seed: int) -> list[Verdict]:
    """Run the parity check on the right candidates and on all mistakes of one network."""
    spec = CONFIG.spec(labels(CONFIG))
    model = random_network(CONFIG, seed=seed)
    bare = stress_inputs(spec, seed) + synthetic_inputs(spec, count=NUM_VIDEOS, seed=seed)
    expected = record(TorchBackend(model, spec), bare)
    annotated = _annotate(bare, expected, spec, np.random.default_rng((seed, 1)))
    verdicts = []
    for precision in JUDGED:
        right = _Remembered(_Fused(fused_network(model, dtype=torch_dtype(precision)), spec))
        for truth, videos in (("annotations", annotated), ("reference events", bare)):
            report = compare(right, expected, videos, limits=tolerance(precision))
            verdicts.append(_verdict("right", "", precision, truth, report))
    for number, mistake in enumerate(MISTAKES):
        with torch.no_grad():
            wrong = mistake.put(copy.deepcopy(model), np.random.default_rng((seed, 2, number)))
        candidate = _Remembered(TorchBackend(wrong, spec))
        for precision in JUDGED:
            report = compare(candidate, expected, annotated, limits=tolerance(precision))
            verdicts.append(_verdict(mistake.name, mistake.strength, precision, "annotations", report))
    return verdicts


def _annotate(
    videos: Sequence[ParityVideo], outputs: Outputs, spec: ModelSpec, generator: np.random.Generator
) -> list[ParityVideo]:
    """Take the network's own best events, their ends moved, for a person's: a random network knows no others."""
    found = detections(outputs, videos, spec)
    least = judged_above([events for events, video in zip(found, videos, strict=True) if not video.stress])
    annotated = []
    for events, video in zip(found, videos, strict=True):
        if video.stress:
            annotated.append(video)
            continue
        chosen = (events.scores > least) & (np.arange(len(events)) < 8)
        segments = events.segments[chosen]
        moved = segments + _MOVED * np.ptp(segments, axis=1)[:, None] * generator.uniform(-1, 1, segments.shape)
        facts = {"segments": moved.clip(0, video.duration), "labels": events.labels[chosen], "annotated": True}
        annotated.append(dataclasses.replace(video, **facts))
    return annotated


def _verdict(kind: str, strength: str, precision: Precision, truth: str, report: ParityReport) -> Verdict:
    failing = tuple(check.name for check in report.checks if not check.passed)
    strict = tuple(check.name for check in report.checks if not _without_interval(check, precision).passed)
    values = report.summary()
    effect = any((values[name] or 0) > _ROUNDING for name in ("max_logits", "max_offsets"))
    return Verdict(kind, strength, precision, truth, failing, strict, effect)


def _without_interval(check: Check, precision: Precision) -> Check:
    limit = TOLERANCES[precision].average_map if check.limit is None else check.limit
    return dataclasses.replace(check, uncertainty=0.0, limit=limit)


def page(verdicts: Sequence[Verdict], seeds: int, seconds: float) -> str:
    """Write the page from the verdicts of all networks."""
    right = [verdict for verdict in verdicts if verdict.kind == "right"]
    alarms = [
        [
            f"{precision}, {truth}",
            f"{sum(bool(v.failing) for v in chosen)} of {len(chosen)}",
            f"{sum(bool(v.strict) for v in chosen)} of {len(chosen)}",
            _named(v.failing for v in chosen),
            _named(v.strict for v in chosen),
        ]
        for precision in JUDGED
        for truth in ("annotations", "reference events")
        if (chosen := [v for v in right if (v.precision, v.truth) == (precision, truth)])
    ]
    misses = []
    for mistake in MISTAKES:
        of_it = [v for v in verdicts if (v.kind, v.strength) == (mistake.name, mistake.strength) and v.effect]
        by_precision = {p: [v for v in of_it if v.precision == p] for p in JUDGED}
        misses.append(
            [
                f"{mistake.name}, {mistake.strength}",
                *(f"{sum(not v.failing for v in found)} of {len(found)}" for found in by_precision.values()),
                _named(v.failing for v in of_it if v.precision == _SHOWN),
            ]
        )
    return _TEXT.format(
        seeds=seeds,
        videos=NUM_VIDEOS,
        alarms=markdown_table(["right engine", "refused", "without intervals", "by", "by, without intervals"], alarms),
        misses=markdown_table(["mistake", *(f"missed at {p}" for p in JUDGED), f"seen at {_SHOWN} by"], misses),
        minutes=f"{seconds / 60:.0f}",
    )


def _named(checks: Any) -> str:
    """Name the checks that failed, with how often."""
    counts = Counter(name for failing in checks for name in failing)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(4)) or "-"


_TEXT = """# What the parity check sees, and what it does not

`ccnet export` and `ccnet verify` compare every engine with the eager network: tensors, events after post-processing,
and mAP. A check that compares a share or an mAP states a 95% interval, and fails only where the whole interval lies
beyond the limit: a limit is never finer than what the sample can resolve.

- **Events found**: Wilson's interval of the share, from the number of events. Of 70 events one may be lost where 0.99
  are asked for; of fp32 all are expected, so that any loss counts.
- **mAP difference**: the jackknife over {videos} groups of videos, and never less than what one event of the rarest
  class is worth. It is judged where a person annotated the videos (`--features` with `--annotations`). On synthetic
  videos, and on the network's own events where it knows no others, it is reported without a limit. The report says how
  many events each class has (`parity.json`, `metric.class_events`).
- Tensors are compared as they are. Their limits hold for every value or for the mean of millions, and need no interval.

The tables come from `python -m benchmarks.parity_power`: {seeds} networks of random weights (T = 64, 4 levels, 8
classes, 0.1 M parameters), the stress inputs and {videos} synthetic videos each. Annotations are the network's own best
events with their ends moved by up to a tenth of their length. Rates of {seeds} have an error of up to 11 points.

## False alarms

The fused network is right by construction; fp16 and bf16 round its weights and arithmetic.

{alarms}

Without intervals an mAP difference of one or two events would refuse half of the good fp16 engines. In bfloat16 some of
these networks lose more than 1% of their events for good: that is what the limit asks, and no accident of the sample.

## Misses

One mistake in a copy of the network, computed in float32, judged by the limits of three precisions. Real fp16 and bf16
engines round besides, which adds to the difference. A mistake that a coarser limit lets pass is as small as that
precision's rounding. Where a mistake changes no output at all (the mask of a convolution whose result is masked again),
the network is not counted.

{misses}

Rounding one matrix to the type of the limits is no mistake there: an fp16 engine rounds all of them. What one wrong
head of these small networks changes is mostly as little. So a new engine is best verified in fp32 first, where all but
such small mistakes show, and then in the precision that it is for. Made in {minutes} minutes on one core.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="False alarms and misses of the parity check.")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="how many networks (default: 20)")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/parity.md)")
    arguments = parser.parse_args(argv)
    begin = time.perf_counter()
    verdicts: list[Verdict] = []
    with reporting():
        for seed in range(arguments.seeds):
            verdicts += judge(seed)
            log.info("%d of %d networks, %.0f s", seed + 1, arguments.seeds, time.perf_counter() - begin)
    with atomic_file(arguments.out, "w") as stream:
        stream.write(page(verdicts, arguments.seeds, time.perf_counter() - begin))


if __name__ == "__main__":
    main()
