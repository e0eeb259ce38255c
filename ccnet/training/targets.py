"""Targets: the class and the offsets that every point of the pyramid should have, from the events of a video.

Points, ranges and the rule for overlaps are those of the baseline, DAVEL (Geng et al., CVPR 2023), which CCNet keeps.

Shapes:  B batch   M events (padded)   P points of all levels   C classes   L pyramid levels
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.spec import PointGrid


class Targets(NamedTuple):
    """What the loss compares the network's outputs with; shaped like them."""

    classes: Tensor
    """[B, P, C] float32, 1 where the point belongs to an event of the class (multi-hot), else 0."""
    offsets: Tensor
    """[B, P, C, 2] float32: distances to start and end in units of the level's stride; 0 where `classes` is 0."""


def regression_ranges(levels: int) -> tuple[tuple[float, float], ...]:
    """Return the distances in grid steps that each level regresses: (0, 4), (4, 8), (8, 16), ..., (.., inf)."""
    edges = [0.0, *(float(4 * 2**level) for level in range(levels - 1)), math.inf]
    return tuple(itertools.pairwise(edges))


def build_targets(segments: Tensor, labels: Tensor, grid: PointGrid, num_classes: int) -> Targets:
    """Build the targets of a batch of videos.

    A point belongs to an event when it lies strictly inside it and the larger of its distances to start and end
    lies in the range of the point's level (both ends included, so that an event exactly on an edge is not lost).
    Where a point belongs to two events of one class, the shorter one gives the offsets; of equally short ones, the
    first.

    Args:
        segments: [B, M, 2] start and end in grid steps, float.
        labels: [B, M] int64 class of each event; -1 marks padding.
        grid: the point grid of the network.
        num_classes: C.
    """
    batch, events = labels.shape
    points = torch.tensor(grid.positions, device=segments.device)  # [P]
    strides = torch.tensor(grid.point_strides, device=segments.device)
    ranges = torch.tensor(regression_ranges(len(grid.lengths)), device=segments.device)
    ranges = ranges.repeat_interleave(torch.tensor(grid.lengths, device=segments.device), dim=0)  # [P, 2]

    # Events from short to long, so that the shorter one is the one of lower rank.
    segments = segments.float()
    order = (segments[..., 1] - segments[..., 0]).argsort(dim=1, stable=True)
    segments = segments.gather(1, order[..., None].expand(-1, -1, 2))
    labels = labels.gather(1, order)

    distances = torch.stack((points - segments[..., :1], segments[..., 1:] - points), dim=-1)  # [B, M, P, 2]
    farther = distances.amax(-1)
    belongs = (distances.amin(-1) > 0) & (farther >= ranges[:, 0]) & (farther <= ranges[:, 1])
    belongs &= (labels >= 0)[..., None]

    ranks = torch.arange(events, device=labels.device)[None, :, None].where(belongs, events)  # [B, M, P]
    winner = torch.full((batch, num_classes, points.numel()), events, device=labels.device)
    winner.scatter_reduce_(1, labels.clamp(min=0)[..., None].expand_as(ranks), ranks, "amin")
    winner = winner.transpose(1, 2)  # [B, P, C]; `events` where no event of the class qualifies

    positive = winner < events
    padded = torch.nn.functional.pad(segments, (0, 0, 0, 1))  # one more row, for "no event"
    chosen = padded.gather(1, winner.reshape(batch, -1, 1).expand(-1, -1, 2)).view(*winner.shape, 2)
    position = points[:, None]
    offsets = torch.stack((position - chosen[..., 0], chosen[..., 1] - position), dim=-1) / strides[:, None, None]
    return Targets(positive.float(), offsets * positive[..., None])
