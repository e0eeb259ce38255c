"""Small annotation sets with the durations, event lengths and overlaps of UnAV-100, drawn from its statistics.

The tables below were measured on the published annotations (10,790 videos, 30,059 events). Sets drawn from them serve
the demo and the tests where the published file is not at hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_DURATIONS = (10.0, 26.9, 38.0, 43.9, 49.0, 54.0, 60.0)
"""Video duration in seconds at each quantile."""

_EVENT_GROUPS = (
    # share of videos, events (from, to), relative event length at each quantile, probability of 1, 2, .. classes
    (0.41, (1, 1), (0.02, 0.51, 0.84, 0.99, 1.0, 1.0, 1.0), (1.0,)),
    (0.20, (2, 2), (0.01, 0.06, 0.16, 0.41, 0.81, 1.0, 1.0), (0.46, 0.54)),
    (0.13, (3, 3), (0.01, 0.04, 0.08, 0.21, 0.45, 0.82, 1.0), (0.34, 0.49, 0.17)),
    (0.18, (4, 6), (0.01, 0.02, 0.05, 0.10, 0.24, 0.49, 1.0), (0.23, 0.43, 0.26, 0.08)),
    (0.08, (7, 23), (0.01, 0.02, 0.03, 0.06, 0.12, 0.24, 1.0), (0.07, 0.28, 0.29, 0.36)),
)
_SHORTEST_EVENT = 0.2
_PLACEMENT_TRIALS = 20


def draw_duration(rng: np.random.Generator) -> float:
    """Draw the duration of a video, in seconds."""
    return round(float(np.interp(rng.random(), _QUANTILES, _DURATIONS)), 2)


def draw_event_length(rng: np.random.Generator, duration: float, events: int) -> float:
    """Draw the length in seconds of one event, in a video of `duration` seconds that holds `events` events."""
    group = next(group for group in _EVENT_GROUPS if events <= group[1][1] or group is _EVENT_GROUPS[-1])
    share = float(np.interp(rng.random(), _QUANTILES, group[2]))
    return min(duration, max(_SHORTEST_EVENT, share * duration))


def draw_events(rng: np.random.Generator, duration: float, num_classes: int) -> list[tuple[float, float, int]]:
    """Draw the events of one video as (start s, end s, class): at least one; those of one class do not overlap."""
    shares = np.array([group[0] for group in _EVENT_GROUPS])
    _, (fewest, most), _, class_shares = _EVENT_GROUPS[rng.choice(len(shares), p=shares / shares.sum())]
    count = fewest + min(int(rng.exponential(3.0)), most - fewest)
    distinct = min(num_classes, 1 + int(rng.choice(len(class_shares), p=class_shares)))
    classes = rng.choice(num_classes, distinct, replace=False)

    events: list[tuple[float, float, int]] = []
    for number in range(count):
        label = int(classes[number % distinct])
        for _ in range(_PLACEMENT_TRIALS):
            length = draw_event_length(rng, duration, count)
            start = round(float(rng.uniform(0, duration - length)), 3)
            end = round(min(duration, start + length), 3)
            if all(label != other or end <= begin or start >= finish for begin, finish, other in events):
                events.append((start, end, label))
                break
    return sorted(events)


def demo_annotations(videos: dict[str, int], num_classes: int, *, seed: int = 0) -> dict[str, Any]:
    """Return a set in the JSON layout of the published annotation file.

    Args:
        videos: number of videos per subset, e.g. `{"train": 200, "validation": 40, "test": 60}`.
        num_classes: classes are called `class 00`, `class 01`, ...; every one of them occurs in each subset that has
            at least twice as many videos as there are classes, with overwhelming probability.
        seed: the same seed gives the same set.
    """
    rng = np.random.default_rng(seed)
    names = [f"class {label:02d}" for label in range(num_classes)]
    database: dict[str, Any] = {}
    for subset, count in videos.items():
        for number in range(count):
            duration = draw_duration(rng)
            database[f"{subset}_{number:05d}"] = {
                "duration": duration,
                "subset": subset,
                "annotations": [
                    {"segment": [start, end], "label": names[label], "label_id": label}
                    for start, end, label in draw_events(rng, duration, num_classes)
                ],
            }
    return {"version": "synthetic", "database": database}
