"""What the cases of an error have in common: how long the events are, what overlaps them, where they lie.

Shapes:  N events   V videos
"""

from __future__ import annotations

import numpy as np

from ccnet.report.tables import Flags, Floats, Integers, Truth
from runtime.evaluation import BUCKETS

EDGE_SECONDS = 1.0
"""An event this close to the start or the end of its video touches it."""

_LIMITS = (*(up_to for _, up_to in BUCKETS), np.inf)
TRAITS: dict[str, tuple[str, ...]] = {
    "duration": (*(f"({above:g}, {up_to:g}] s" for above, up_to in BUCKETS), f"above {BUCKETS[-1][1]:g} s"),
    "overlap": ("nothing", "its own class", "another class", "both"),
    "position": ("inside", "touches the start", "touches the end", "whole video"),
}
"""Name of each trait -> what it can be. Overlap: with annotated events, other than itself."""


def traits_of(video: Integers, segments: Floats, labels: Integers, truth: Truth, own: Integers) -> dict[str, Integers]:
    """Return what each of N events is, by trait: an index into `TRAITS[name]`.

    `own` [N]: the number of the annotated event that it is itself, which does not count as overlap; -1 for none.
    """
    lengths = segments[:, 1] - segments[:, 0]
    duration = np.searchsorted(_LIMITS, lengths, side="left")
    start = segments[:, 0] <= EDGE_SECONDS
    end = segments[:, 1] >= truth.durations[video] - EDGE_SECONDS
    alike, other = _overlaps(video, segments, labels, truth, own)
    return {"duration": duration, "overlap": alike + 2 * other, "position": start + 2 * end}


def _overlaps(video: Integers, segments: Floats, labels: Integers, truth: Truth, own: Integers) -> tuple[Flags, Flags]:
    """Return whether an annotated event of the same class, and one of another, overlaps each event [N]."""
    alike, other = np.zeros(len(labels), np.bool_), np.zeros(len(labels), np.bool_)
    begin = np.searchsorted(truth.video, np.arange(len(truth.durations) + 1))
    for number in range(len(labels)):
        here = np.arange(begin[video[number]], begin[video[number] + 1])
        here = here[here != own[number]]
        start, end = segments[number]
        here = here[(truth.segments[here, 0] < end) & (truth.segments[here, 1] > start)]
        same = truth.labels[here] == labels[number]
        alike[number], other[number] = same.any(), (~same).any()
    return alike, other


def counts(traits: dict[str, Integers], chosen: Flags) -> dict[str, list[int]]:
    """Return how many of the chosen events are what, by trait."""
    return {name: np.bincount(traits[name][chosen], minlength=len(values)).tolist() for name, values in TRAITS.items()}
