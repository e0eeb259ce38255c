"""A look at annotations and features before training: what would stop it, what would spoil it, how classes are spread.

Shapes:  n steps of one video   M events of one video
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.annotations import SUBSETS, Annotations, VideoAnnotation
from runtime.coverage import Gaps, common_gaps, files_note, find_gaps
from runtime.errors import FeatureError
from runtime.features import feature_header, read_video
from runtime.files import open_regular
from runtime.progress import Progress
from runtime.spec import FeatureLayout, ModelSpec, TimeBase

FEW_EVENTS = 5
"""Training events below which a class is hardly learned, and worth a note."""

Severity = Literal["problem", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that holds for some videos or classes."""

    severity: Severity
    """A problem stops training or makes its result meaningless; a note is for a person to judge."""
    kind: str
    """Stable name, for programs."""
    text: str
    """What it is, and what to do."""
    cases: Mapping[str, str] = field(default_factory=dict)
    """Video id, file or class -> what there is to say about it; may be empty text."""


@dataclass(frozen=True)
class ClassCount:
    """Events and videos of one class in each subset."""

    label: str
    events: Mapping[str, int]
    videos: Mapping[str, int]
    seconds: float
    """Median duration of its training events; 0 without any."""


@dataclass(frozen=True)
class DataReport:
    """The result of a data check."""

    videos: Mapping[str, int]
    """Videos of each subset."""
    findings: tuple[Finding, ...]
    """Problems first."""
    classes: tuple[ClassCount, ...]
    """In the order of label ids."""
    values_read: bool
    """Whether more than the headers of the files were looked at."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "problem")

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "videos": dict(self.videos),
            "values_read": self.values_read,
            "findings": [{**vars(finding), "cases": dict(finding.cases)} for finding in self.findings],
            "classes": [
                {**vars(count), "events": dict(count.events), "videos": dict(count.videos)} for count in self.classes
            ],
        }


def check_data(
    annotations: Annotations, folder: str | Path, spec: ModelSpec, *, quick: bool = False, quiet: bool = True
) -> DataReport:
    """Check the features of all videos against their annotations and a network's inputs.

    `spec` gives widths, file names, time base and T; its labels do not matter. `quick` looks at headers alone: neither
    at values nor for identical files. Raises FeatureError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatureError(f"{folder}: no such feature folder")
    videos = list(annotations.videos.values())
    seen = _Seen()
    with Progress("check-data", total=len(videos), quiet=quiet) as progress:
        for video in videos:
            _look_at(video, folder, spec, seen, quick=quick)
            progress.advance()
    classes = count_classes(annotations)
    findings = [
        *_file_findings(seen),
        *_gap_findings(seen.gaps, len(seen.steps), spec.time_base),
        *_event_findings(videos, seen.steps, spec),
        *_class_findings(annotations, classes),
        *_copies(seen.digests),
    ]
    findings.sort(key=lambda finding: finding.severity != "problem")
    counts = Counter(video.subset for video in videos)
    return DataReport({name: counts[name] for name in SUBSETS if counts[name]}, tuple(findings), classes, not quick)


@dataclass
class _Seen:
    """What the files of all videos are like."""

    steps: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, Gaps] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Hash of the content -> file names."""


def _look_at(video: VideoAnnotation, folder: Path, spec: ModelSpec, seen: _Seen, *, quick: bool) -> None:
    paths = feature_paths(folder, video.video_id, spec.layout)
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        seen.missing[video.video_id] = ", ".join(absent)
        return
    try:
        shapes = [feature_header(path)[0] for path in paths]
        _check_widths(video.video_id, shapes, spec)
        if not quick:
            read_video(folder, video.video_id, spec.layout, spec.visual_dim, spec.audio_dim)
            for path in paths:
                seen.digests[_digest(path)].append(path.name)
    except FeatureError as error:
        seen.bad[video.video_id] = str(error).removeprefix(f"{folder}{os.sep}")
        return
    lengths = [steps for steps, _ in shapes]
    seen.steps[video.video_id] = min(lengths)
    gaps = find_gaps(
        min(lengths),
        files_note(video.video_id, spec.layout, lengths),
        time_base=spec.time_base,
        duration=video.duration,
        longest=spec.length,
        hint="training crops at random places, validation keeps the first T",
    )
    if gaps is not None:
        seen.gaps[video.video_id] = gaps


def feature_paths(folder: str | Path, video_id: str, layout: FeatureLayout) -> list[Path]:
    """Return the files of one video: visual, then audio."""
    return [Path(folder) / f"{video_id}{suffix}.npy" for suffix in (*layout.visual, *layout.audio)]


def _check_widths(video_id: str, shapes: Sequence[tuple[int, int]], spec: ModelSpec) -> None:
    visual = len(spec.layout.visual)
    for name, own, expected in (
        ("visual", shapes[:visual], spec.visual_dim),
        ("audio", shapes[visual:], spec.audio_dim),
    ):
        width = sum(channels for _, channels in own)
        if width != expected:
            raise FeatureError(f"{video_id}: {name} features are {width} wide, expected {expected} (model.{name}_dim)")


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _file_findings(seen: _Seen) -> Iterable[Finding]:
    if seen.missing:
        yield Finding(
            "problem",
            "missing files",
            "files are missing; add them, or take the videos out of the annotation file",
            seen.missing,
        )
    if seen.bad:
        yield Finding("problem", "bad files", "files can't be used; extract or copy them again", seen.bad)


def _gap_findings(gaps: Mapping[str, Gaps], videos: int, time_base: TimeBase) -> Iterable[Finding]:
    for fact in common_gaps(gaps, videos, time_base, cropped=False):
        yield Finding("problem", "time base", fact)
    texts = {
        "lengths": "files of one video differ in length; what not all have is not used",
        "duration": "the features do not cover the annotated duration",
        "cropped": "videos are longer than the network's T",
    }
    for name, text in texts.items():
        cases = {video_id: fact for video_id, found in gaps.items() if (fact := getattr(found, name))}
        if cases:
            yield Finding("note", name, text, cases)


def _event_findings(videos: Sequence[VideoAnnotation], steps: Mapping[str, int], spec: ModelSpec) -> Iterable[Finding]:
    """Say which events no step sees, and which lie between two steps, so that no point ever learns them."""
    behind: dict[str, str] = {}
    between: dict[str, str] = {}
    for video in videos:
        if video.video_id not in steps:
            continue
        grid = spec.time_base.to_grid(video.segments)
        outside = video.segments[:, 0] >= spec.time_base.covered_seconds(steps[video.video_id])
        # A point belongs to an event when it is strictly inside.
        last = min(steps[video.video_id], spec.length) - 1
        first = np.maximum(np.floor(grid[:, 0]) + 1, 0)
        without = (first >= grid[:, 1]) | (first > last)
        if outside.any():
            behind[video.video_id] = _events(video, outside)
        if (without & ~outside).any():
            between[video.video_id] = _events(video, without & ~outside)
    if behind:
        yield Finding("note", "events outside", "events begin after the features end, and are never seen", behind)
    if between:
        yield Finding(
            "note",
            "events between steps",
            f"no step's centre, one every {spec.time_base.step_seconds:.3g} s up to the end of the features or T, lies "
            "inside these events, so that they are never learned",
            between,
        )


def _events(video: VideoAnnotation, which: Any) -> str:
    shown = [f"{start:.2f} - {end:.2f} s" for start, end in video.segments[which][:3].tolist()]
    rest = int(which.sum()) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def count_classes(annotations: Annotations) -> tuple[ClassCount, ...]:
    """Return how often each class occurs in each subset."""
    classes = len(annotations.labels)
    events = {name: np.zeros(classes, np.int64) for name in SUBSETS}
    videos = {name: np.zeros(classes, np.int64) for name in SUBSETS}
    durations: list[list[float]] = [[] for _ in range(classes)]
    for video in annotations.videos.values():
        events[video.subset] += np.bincount(video.labels, minlength=classes)
        videos[video.subset][np.unique(video.labels)] += 1
        if video.subset == "train":
            for label, length in zip(video.labels.tolist(), np.ptp(video.segments, axis=1).tolist(), strict=True):
                durations[label].append(length)
    return tuple(
        ClassCount(
            label,
            {name: int(events[name][i]) for name in SUBSETS},
            {name: int(videos[name][i]) for name in SUBSETS},
            float(np.median(durations[i])) if durations[i] else 0.0,
        )
        for i, label in enumerate(annotations.labels)
    )


def _class_findings(annotations: Annotations, classes: Sequence[ClassCount]) -> Iterable[Finding]:
    present = {video.subset for video in annotations.videos.values()}
    for name in ("train", "validation"):
        if name not in present:
            yield Finding("problem", "subset", f"there is no video of subset '{name}', which training needs")
        elif not any(count.events[name] for count in classes):
            yield Finding("problem", "subset", f"the videos of subset '{name}' have no events")
    if "train" in present:
        none = {count.label: "" for count in classes if count.events["train"] == 0}
        few = {
            count.label: f"{count.events['train']} event(s)"
            for count in classes
            if 0 < count.events["train"] < FEW_EVENTS
        }
        if none:
            yield Finding(
                "note", "classes without examples", "classes have no training event: they are never found", none
            )
        if few:
            yield Finding("note", "rare classes", f"classes have fewer than {FEW_EVENTS} training events", few)
    for name in ("validation", "test"):
        unseen = {count.label: "" for count in classes if name in present and count.events[name] == 0}
        if unseen:
            yield Finding(
                "note", f"classes not in {name}", f"classes have no {name} event: their AP is not known", unseen
            )


def _copies(digests: Mapping[str, list[str]]) -> Iterable[Finding]:
    cases = {
        names[0]: f"the same as {', '.join(names[1:4])}" + (", ..." if len(names) > 4 else "")
        for names in digests.values()
        if len(names) > 1
    }
    if cases:
        yield Finding("note", "identical files", "files of different videos or modalities have the same content", cases)
