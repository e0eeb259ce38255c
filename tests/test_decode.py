"""Decoding: the released program's detections, and the rules one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import golden

from runtime.decode import decode
from runtime.errors import EngineError
from runtime.spec import PostProcessing, point_grid

GRID = point_grid(64, 6)
POST = PostProcessing()


def outputs(seed: int = 0, centre: float = -3.0, classes: int = 7) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(centre, 2, (GRID.num_points, classes)).astype(np.float32)
    return logits, generator.gamma(2, 1, (GRID.num_points, classes, 2)).astype(np.float32)


def plain(logits: Any, offsets: Any, valid_steps: int, post: PostProcessing) -> list[tuple[Any, ...]]:
    """Apply the rules, one candidate at a time."""
    rows = []
    for level, stride in zip(GRID.level_slices, GRID.strides, strict=True):
        found = []
        for step, point in enumerate(range(level.start, level.stop)):
            for label in range(logits.shape[1]):
                score = 1 / (1 + np.exp(-np.float64(logits[point, label])))
                if step * stride < valid_steps and score > post.pre_nms_score:
                    left, right = offsets[point, label].astype(float) * stride
                    found.append((step * stride - left, step * stride + right, score, label))
        found = sorted(found, key=lambda row: -row[2])[: post.pre_nms_top_k]
        rows += [row for row in found if row[1] - row[0] > post.min_length]
    return rows


@pytest.mark.parametrize("valid_steps", [0, 1, 17, 41, 63, 64])
@pytest.mark.parametrize("post", [POST, PostProcessing(pre_nms_top_k=20, pre_nms_score=0.05, min_length=2.0)])
def test_equals_a_plain_implementation(valid_steps: int, post: PostProcessing) -> None:
    logits, offsets = outputs()
    segments, scores, labels = decode(logits, offsets, valid_steps, GRID, post)
    expected = plain(logits, offsets, valid_steps, post)
    assert [a.dtype for a in (segments, scores, labels)] == [np.float32, np.float32, np.int64]
    assert len(scores) == len(expected)
    if expected:
        table = np.array(expected)
        np.testing.assert_array_equal(labels, table[:, 3])
        np.testing.assert_allclose(scores, table[:, 2], rtol=1e-6)  # one float32 exponential
        np.testing.assert_allclose(segments, table[:, :2], rtol=0, atol=1e-4)  # float32 at up to 600 steps


def test_finds_the_candidates_of_the_released_program() -> None:
    data = golden("network")
    for logits, offsets, valid in zip(data["cls_logits"], data["offsets"], data["point_mask"], strict=True):
        steps = int(valid[:64].sum())
        scores = decode(logits, offsets, steps, GRID, POST)[1]
        assert len(scores) <= int((logits[valid] > -6.9067).sum())
        assert scores.max() == pytest.approx(1 / (1 + np.exp(-logits[valid].max())), rel=1e-6)


def test_ties_go_to_the_earlier_point_then_to_the_lower_label() -> None:
    logits, offsets = outputs(classes=3)
    logits[:] = 1.0
    logits[5, 2] = 2.0
    _, scores, labels = decode(logits, offsets, 64, GRID, PostProcessing(pre_nms_top_k=4))
    np.testing.assert_array_equal(labels[:4], [2, 0, 1, 2])
    assert scores[0] > scores[1] == scores[3]


def test_zeros_of_both_signs_tie() -> None:
    logits, offsets = outputs(classes=2)
    logits[:] = 0.0
    logits[0, 0] = -0.0
    labels = decode(logits, offsets, 64, GRID, PostProcessing(pre_nms_top_k=3))[2]
    np.testing.assert_array_equal(labels[:3], [0, 1, 0])


def test_extreme_logits_are_silent() -> None:
    logits, offsets = outputs(classes=2)
    logits[:, 0], logits[:, 1] = -3e4, 3e4
    with np.errstate(all="raise", under="ignore"):
        _, scores, labels = decode(logits, offsets, 64, GRID, PostProcessing(pre_nms_score=0.0))
    assert set(scores[labels == 1].tolist()) == {1.0}
    assert scores[labels == 0].max(initial=0) < 1e-30


def test_half_precision_outputs_and_strided_views() -> None:
    logits, offsets = outputs()
    wide = np.zeros((GRID.num_points, 14), np.float16)
    wide[:, ::2] = logits
    got = decode(wide[:, ::2], offsets.astype(np.float16), 64, GRID, POST)
    expected = decode(wide[:, ::2].astype(np.float32), offsets.astype(np.float16).astype(np.float32), 64, GRID, POST)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_padded_points_may_hold_anything() -> None:
    logits, offsets = outputs()
    expected = decode(logits, offsets, 17, GRID, POST)
    padded = ~GRID.valid_points(17)
    logits[padded], offsets[padded] = np.nan, np.inf
    for a, b in zip(decode(logits, offsets, 17, GRID, POST), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_engine_outputs() -> None:
    logits, offsets = outputs()
    with pytest.raises(EngineError, match=r"logits: got shape \[125, 7\], expected \[126, C\] for a grid of 64 steps"):
        decode(logits[1:], offsets, 64, GRID, POST)
    with pytest.raises(EngineError, match=r"offsets: got shape \[126, 7\], expected \[126, 7, 2\]"):
        decode(logits, offsets[..., 0], 64, GRID, POST)
    with pytest.raises(Exception, match="valid_steps: got 65, expected an integer from 0 to 64"):
        decode(logits, offsets, 65, GRID, POST)
    for value in (np.nan, np.inf, -np.inf):
        bad = logits.copy()
        bad[70, 3] = value
        with pytest.raises(EngineError, match="logits: not finite at point 70"):
            decode(bad, offsets, 64, GRID, POST)
    logits[71, 2], offsets[71, 2, 1] = 5.0, np.nan
    with pytest.raises(EngineError, match="offsets: not finite at point 71"):
        decode(logits, offsets, 64, GRID, POST)
