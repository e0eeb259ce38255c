"""The parity check: does an engine compute what the eager network computes?

Compared are tensors at valid points, events after full post-processing, and mAP; besides, that nothing is NaN or
infinite and that what a video gets does not depend on its batch. Each comparison with a limit is a check with a name.
Needs numpy, no torch.

Shapes:  N videos   P points of all levels   C classes
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.parity.events import EventAgreement, MapAgreement, compare_map, detections, match_events, without_ties
from export.parity.inputs import ParityVideo
from export.parity.reference import Outputs, record
from export.parity.tolerances import Tolerance, tolerance
from runtime.backends.base import Backend
from runtime.backends.registry import runs_on_gpu
from runtime.batches import pack
from runtime.errors import ParityError
from runtime.spec import ModelSpec

MIXED_VIDEOS, MIXED_BATCH = 8, 4
"""Videos that are run again in batches of different lengths, and the size of those batches."""

TITLES = {
    "nonfinite": "values that are NaN or infinite",
    "max_logits": "logits, largest difference",
    "mean_logits": "logits, mean difference",
    "max_offsets": "offsets, largest difference",
    "mean_offsets": "offsets, mean difference",
    "batch_logits": "logits, alone or in a mixed batch",
    "batch_offsets": "offsets, alone or in a mixed batch",
    "events": "events found",
    "stress_events": "events found, stress inputs",
    "score_drift": "mean score drift of the events found",
    "map_difference": "mAP difference",
}
"""Checks by name, in words."""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with a limit."""

    name: str
    """One of `TITLES`."""
    value: float | None
    """None where it could not be computed; that fails."""
    limit: float | None
    """None where the value is reported and not judged."""
    at_least: bool = False
    """The value must reach the limit; otherwise it must not exceed it."""
    uncertainty: float = 0.0
    """How far the true value may well be on the limit's side of `value`: a check fails where the sample shows it."""
    detail: str = ""
    """Where the value comes from: the worst video, the first lost event."""

    @property
    def passed(self) -> bool:
        if self.value is None or not np.isfinite(self.value):
            return False
        if self.limit is None:
            return True
        if self.at_least:
            return self.value + self.uncertainty >= self.limit
        return self.value - self.uncertainty <= self.limit

    def __str__(self) -> str:
        value = "not computed" if self.value is None else f"{self.value:.3g}"
        limit = "no limit" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        limit += f", {'+' if self.at_least else '-'}{self.uncertainty:.2g}" if self.uncertainty else ""
        detail = f"  ({self.detail})" if self.detail else ""
        return f"{'ok  ' if self.passed else 'FAIL'} {TITLES[self.name]:<36} {value:>12}  {limit}{detail}"


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Verdict of the parity check, with everything that it rests on."""

    candidate: dict[str, Any]
    """`Backend.describe`."""
    reference: dict[str, Any]
    precision: str
    videos: dict[str, int]
    """How many stress inputs, and how many videos with events."""
    tolerance: dict[str, Any]
    checks: tuple[Check, ...]
    events: dict[str, Any]
    """Matched events, of the videos with events and of the stress inputs."""
    metric: dict[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def summary(self) -> dict[str, Any]:
        """Return the value of every check, for the manifest; None where it is not finite, which JSON can't hold."""
        values = {check.name: check.value for check in self.checks}
        return {name: value if value is not None and np.isfinite(value) else None for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        checks = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks]
        return {**dataclasses.asdict(self), "checks": _finite(checks), "passed": self.passed}

    def text(self) -> str:
        """Return the report for a person to read."""
        about = f"{self.candidate.get('backend')} {self.precision}"
        heading = f"{about}: {'passed' if self.passed else 'FAILED'} against {self.reference.get('backend')}"
        lines = [f"{heading} on {self.videos['stress']} stress inputs and {self.videos['events']} videos"]
        return "\n".join([*lines, *(f"  {check}" for check in self.checks)])

    def require(self) -> None:
        """Raise ParityError naming the failing checks unless all passed."""
        failing = [check for check in self.checks if not check.passed]
        if failing:
            told = "\n".join(f"  {check}" for check in failing)
            raise ParityError(
                f"{self.candidate.get('backend')} {self.precision} does not compute what the eager network computes; "
                f"{len(failing)} of {len(self.checks)} checks failed:\n{told}"
            )


def compare(
    candidate: Backend,
    reference: Backend | Outputs,
    videos: Sequence[ParityVideo],
    *,
    limits: Tolerance | None = None,
    batches: Sequence[int] | None = None,
) -> ParityReport:
    """Run the candidate on every video, alone and in mixed batches, and compare.

    `batches`: sizes of the mixed batches, those above `max_batch` left out. By default a small one, and on a GPU the
    largest too: there a batch size may have kernels of its own.

    `reference` is a backend, run here, or what one put out for the same videos. `limits`: by default those of the
    candidate's precision. Raises what the backends raise, ParityError when the reference is of other inputs.
    """
    started = time.perf_counter()
    limits = limits or tolerance(candidate.precision)
    spec = candidate.spec
    expected = reference if isinstance(reference, Outputs) else record(reference, videos)
    if expected.logits.shape[0] != len(videos) or expected.logits.shape[1:] != spec.output_shapes(1)["logits"][1:]:
        raise ParityError(
            f"the reference holds logits {expected.logits.shape}, expected {len(videos)} videos of {spec}"
        )
    found = record(candidate, videos)
    valid = _valid_points(videos, spec)
    checks = [_finite_check(found)]
    finite = checks[0].passed
    checks += _tensor_checks(found, expected, valid, videos, limits)
    checks += _batch_checks(candidate, found, videos, valid, limits, _batch_sizes(candidate, batches))
    events: dict[str, EventAgreement] = {}
    metric: MapAgreement | None = None
    if finite:
        events, metric = _compare_events(found, expected, videos, spec, limits)
    checks += _event_checks(events, metric, limits)
    stress = sum(video.stress for video in videos)
    return ParityReport(
        candidate=candidate.describe(),
        reference=expected.source,
        precision=candidate.precision,
        videos={"stress": stress, "events": len(videos) - stress},
        tolerance=limits.to_json(),
        checks=tuple(checks),
        events={kind: {**dataclasses.asdict(found), "share": found.share} for kind, found in events.items()},
        metric={} if metric is None else _metric_facts(metric, spec),
        seconds=round(time.perf_counter() - started, 2),
    )


def _valid_points(videos: Sequence[ParityVideo], spec: ModelSpec) -> Bools:
    """Return [N, P], true for points that lie on content."""
    return spec.grid.valid_points([video.features.steps for video in videos])


def _finite_check(found: Outputs) -> Check:
    """Count NaN and infinity, at padded points too: an engine that makes one there will make it elsewhere."""
    bad = int(np.count_nonzero(~np.isfinite(found.logits)) + np.count_nonzero(~np.isfinite(found.offsets)))
    return Check(name="nonfinite", value=bad, limit=0)


def _differences(found: Outputs, expected: Outputs, valid: Bools) -> dict[str, npt.NDArray[np.floating[Any]]]:
    """Return for each tensor the differences at every point; invalid points count as equal."""
    with np.errstate(invalid="ignore"):
        logits = np.abs(found.logits - expected.logits)
        offsets = np.abs(found.offsets - expected.offsets) / np.maximum(1.0, np.abs(expected.offsets))
    return {
        "logits": np.where(valid[:, :, None], logits, 0.0),
        "offsets": np.where(valid[:, :, None, None], offsets, 0.0),
    }


def _tensor_checks(
    found: Outputs, expected: Outputs, valid: Bools, videos: Sequence[ParityVideo], limits: Tolerance
) -> list[Check]:
    checks = []
    for name, difference in _differences(found, expected, valid).items():
        per_video = difference.reshape(len(videos), -1).max(1)
        worst = int(np.argmax(per_video))
        entries = np.count_nonzero(valid) * difference[0, 0].size
        for kind, value, detail in (
            ("max", float(per_video[worst]), videos[worst].name),
            ("mean", float(difference.sum(dtype=np.float64) / entries), ""),
        ):
            limit = getattr(limits, f"{kind}_{name}")
            checks.append(Check(name=f"{kind}_{name}", value=value, limit=limit, detail=detail))
    return checks


def _batch_sizes(candidate: Backend, batches: Sequence[int] | None) -> list[int]:
    """Return the sizes of the mixed batches, the small one first."""
    largest = candidate.max_batch
    wanted = [min(MIXED_BATCH, largest), *(batches or ([largest] if runs_on_gpu(candidate.name) else []))]
    return [size for size in dict.fromkeys(wanted) if 2 <= size <= largest]


def _batch_checks(
    candidate: Backend,
    alone: Outputs,
    videos: Sequence[ParityVideo],
    valid: Bools,
    limits: Tolerance,
    sizes: Sequence[int],
) -> list[Check]:
    """Check that a video gets the same in a batch of mixed lengths as alone; engines of batch 1 pass.

    The chosen videos fill whole batches of every size, again and again where there are too few.
    """
    if not sizes or len(videos) < 2:
        return []
    chosen = _mixed(videos)
    worst = dict.fromkeys(("logits", "offsets"), (0.0, sizes[0]))
    for size in sizes:
        repeated = np.resize(chosen, -(-len(chosen) // size) * size)
        for rows in repeated.reshape(-1, size):
            logits, offsets = candidate.infer(*pack([videos[i].features for i in rows], candidate.spec))
            together = Outputs(logits, offsets, {})
            apart = Outputs(alone.logits[rows], alone.offsets[rows], {})
            for name, difference in _differences(together, apart, valid[rows]).items():
                worst[name] = max(worst[name], (float(np.nan_to_num(difference, nan=np.inf).max()), size))
    return [
        Check(name=f"batch_{name}", value=value, limit=getattr(limits, f"max_{name}"), detail=f"in batches of {size}")
        for name, (value, size) in worst.items()
    ]


def _mixed(videos: Sequence[ParityVideo]) -> list[int]:
    """Return indices of videos of all lengths, long and short ones next to each other."""
    order = np.argsort([video.features.steps for video in videos], kind="stable")
    spread = order[np.unique(np.linspace(0, len(order) - 1, min(MIXED_VIDEOS, len(order))).round().astype(int))]
    half = (len(spread) + 1) // 2
    pairs = [spread[:half], spread[half:][::-1]]
    return [int(pairs[i % 2][i // 2]) for i in range(len(spread))]


def _compare_events(
    found: Outputs, expected: Outputs, videos: Sequence[ParityVideo], spec: ModelSpec, limits: Tolerance
) -> tuple[dict[str, EventAgreement], MapAgreement | None]:
    theirs = detections(expected, videos, spec)
    decided = without_ties(expected, videos, spec, limits.undecided, limits.tiou)
    ours = detections(found, videos, spec, keep=2)
    events, metric = {}, None
    for kind, stress in (("videos", False), ("stress inputs", True)):
        rows = [i for i, video in enumerate(videos) if video.stress == stress]
        if not rows:
            continue
        wanted, chosen = [theirs[i] for i in rows], [videos[i] for i in rows]
        events[kind] = match_events([ours[i] for i in rows], [decided[i] for i in rows], chosen, limits.tiou)
        if not stress:
            kept = detections(Outputs(found.logits[rows], found.offsets[rows], {}), chosen, spec)
            metric = compare_map(kept, wanted, chosen, spec.num_classes)
    return events, metric


def _event_checks(events: dict[str, EventAgreement], metric: MapAgreement | None, limits: Tolerance) -> list[Check]:
    checks = []
    for name, kind, least in (
        ("events", "videos", limits.matched),
        ("stress_events", "stress inputs", limits.matched_stress),
    ):
        found = events.get(kind)
        detail = f"no {kind} among the inputs"
        if found is not None:
            detail = f"{found.matched} of {found.events} above score {found.threshold:.3g}"
        if found is not None and found.lost:
            detail += f"; first lost: {found.lost[0]}"
        value, uncertainty = (None, 0.0) if found is None else (found.share, found.uncertainty)
        checks.append(Check(name=name, value=value, limit=least, at_least=True, uncertainty=uncertainty, detail=detail))
    drift = None if "videos" not in events else events["videos"].mean_score_drift
    checks.append(Check(name="score_drift", value=drift, limit=limits.score_drift))
    if metric is None:
        return [*checks, Check(name="map_difference", value=None, limit=limits.average_map)]
    counts = sorted(metric.class_events.values())
    return [
        *checks,
        Check(
            name="map_difference",
            value=metric.difference,
            limit=limits.average_map if metric.ground_truth == "annotations" else None,
            uncertainty=metric.uncertainty,
            detail=f"{metric.candidate:.4f} for {metric.reference:.4f} on {metric.ground_truth}: {metric.events} events"
            f" of {len(counts)} classes, {counts[0] if counts else 0} to {counts[-1] if counts else 0} of each",
        ),
    ]


def _metric_facts(metric: MapAgreement, spec: ModelSpec) -> dict[str, Any]:
    events = {spec.labels[label]: count for label, count in metric.class_events.items()}
    return {**dataclasses.asdict(metric), "class_events": events, "difference": metric.difference}


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
