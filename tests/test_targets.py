"""Targets: against a plain loop over the rule's words, and its edges one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ccnet.training.targets import build_targets, regression_ranges
from runtime.spec import point_grid


def by_the_words(segments: Any, labels: Any, grid: Any, num_classes: int) -> Any:
    """Assign targets by the released program's rule, point by point."""
    ranges = [(0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, math.inf)]
    classes = np.zeros((grid.num_points, num_classes), np.float32)
    offsets = np.zeros((grid.num_points, num_classes, 2), np.float32)
    shortest = np.full((grid.num_points, num_classes), np.inf)
    for level, points in enumerate(grid.level_slices):
        for p in range(points.start, points.stop):
            x, stride = float(grid.positions[p]), grid.strides[level]
            for (start, end), label in zip(segments, labels, strict=True):
                farther = max(x - start, end - x)
                if start < x < end and ranges[level][0] <= farther <= ranges[level][1]:
                    classes[p, label] = 1
                    if end - start < shortest[p, label]:
                        shortest[p, label] = end - start
                        offsets[p, label] = (x - start) / stride, (end - x) / stride
    return classes, offsets


def padded(videos: Any) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(len(labels) for _, labels in videos)
    segments = torch.zeros(len(videos), most, 2)
    labels = torch.full((len(videos), most), -1)
    for row, (s, c) in enumerate(videos):
        segments[row, : len(c)], labels[row, : len(c)] = torch.as_tensor(s).view(-1, 2), torch.as_tensor(c)
    return segments, labels


def test_ranges_follow_from_the_number_of_levels() -> None:
    assert regression_ranges(6) == ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, math.inf))
    assert regression_ranges(2) == ((0, 4), (4, math.inf))
    assert regression_ranges(1) == ((0, math.inf),)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_rule_read_point_by_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = point_grid(224, 6)
    videos = []
    for count in (0, 1, 9, 23):
        start = rng.uniform(-1.5, 200, count)
        # Half of the lengths are whole numbers of steps from whole starts: distances that fall on a range's edge.
        start = np.where(rng.random(count) < 0.5, start.round(), start)
        length = np.where(rng.random(count) < 0.5, rng.choice([1, 4, 8, 16, 64], count), rng.uniform(0.5, 220, count))
        videos.append((np.stack((start, start + length), 1).astype(np.float32), rng.integers(0, 5, count)))
    targets = build_targets(*padded(videos), grid, 5)
    assert targets.classes.shape == (4, 441, 5)
    assert targets.offsets.shape == (4, 441, 5, 2)
    for row, (segments, labels) in enumerate(videos):
        classes, offsets = by_the_words(segments, labels, grid, 5)
        np.testing.assert_array_equal(targets.classes[row].numpy(), classes)
        # float32 against float64 arithmetic on coordinates up to 224.
        np.testing.assert_allclose(targets.offsets[row].numpy(), offsets, rtol=1e-5, atol=2e-5)


def test_a_point_on_the_boundary_is_outside() -> None:
    targets = build_targets(*padded([([[3.0, 6.0]], [0])]), point_grid(32, 6), 1)
    assert targets.classes[0, :32, 0].nonzero().flatten().tolist() == [4, 5]


def test_classes_share_a_point_and_the_shorter_event_of_one_class_wins() -> None:
    events = [[0.5, 3.5], [1.0, 3.0], [0.0, 4.0]], [1, 1, 0]
    targets = build_targets(*padded([events]), point_grid(32, 6), 2)
    assert targets.classes[0, 2].tolist() == [1, 1]
    assert targets.offsets[0, 2].tolist() == [[2, 2], [1, 1]]
    # Outside the shorter one the longer one speaks.
    assert targets.offsets[0, 1, 1].tolist() == [0.5, 2.5]


def test_offsets_are_in_units_of_the_level() -> None:
    targets = build_targets(*padded([([[0.5, 23.5]], [0])]), point_grid(32, 6), 1)
    third = point_grid(32, 6).level_slices[2]  # stride 4, range 8 to 16
    assert targets.classes[0, third, 0].nonzero().flatten().tolist() == [2, 3, 4]  # grid positions 8, 12, 16
    assert targets.offsets[0, third][2, 0].tolist() == [(8 - 0.5) / 4, (23.5 - 8) / 4]


def test_decoding_the_targets_gives_the_events_back() -> None:
    grid = point_grid(224, 6)
    rng = np.random.default_rng(5)
    start = rng.uniform(0, 100, 8)
    segments = np.stack((start, start + rng.uniform(2, 120, 8)), 1)
    targets = build_targets(*padded([(segments, range(8))]), grid, 8)
    for label, (begin, end) in enumerate(segments):
        mine = targets.classes[0, :, label].bool().numpy()
        assert mine.any()
        offsets = targets.offsets[0, mine, label].numpy() * grid.point_strides[mine, None]
        np.testing.assert_allclose(grid.positions[mine] - offsets[:, 0], begin, atol=1e-4)
        np.testing.assert_allclose(grid.positions[mine] + offsets[:, 1], end, atol=1e-4)


def test_what_a_video_gets_does_not_depend_on_its_batch() -> None:
    grid = point_grid(64, 6)
    one = ([[2.0, 9.0], [1.0, 40.0]], [2, 0])
    other = ([[5.0, 6.5]] * 5, [1] * 5)
    alone, together = build_targets(*padded([one]), grid, 3), build_targets(*padded([other, one]), grid, 3)
    assert torch.equal(alone.classes[0], together.classes[1])
    assert torch.equal(alone.offsets[0], together.offsets[1])
