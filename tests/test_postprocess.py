"""From engine outputs to seconds: the released program's detections, crops and clamping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import golden

from runtime.errors import ConfigError
from runtime.postprocess import detect
from runtime.spec import ModelSpec, PostProcessing, TimeBase

SPEC = ModelSpec(length=64, levels=6, visual_dim=48, audio_dim=16, labels=tuple("abcdefg"))


@pytest.mark.parametrize("video", range(3))
def test_equals_the_released_program(video: int) -> None:
    data = golden("network")
    got = detect(
        data["cls_logits"][video],
        data["offsets"][video],
        valid_steps=int(data["lengths"][video]),
        duration=float(data["durations"][video]),
        spec=SPEC,
    )
    expected = {name: data[f"detections/{video}/{name}"] for name in ("segments", "scores", "labels")}
    np.testing.assert_array_equal(got.labels, expected["labels"])
    # Measured: 1e-6 s (the released program goes to seconds in float32) and 3e-8.
    np.testing.assert_allclose(got.segments, expected["segments"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(got.scores, expected["scores"], rtol=0, atol=2e-7)
    assert got.label_names == SPEC.labels
    assert [a.dtype for a in (got.segments, got.scores, got.labels)] == [np.float64, np.float32, np.int64]


def one_event(point: int, left: float, right: float) -> tuple[Any, Any]:
    """Return engine outputs with a single candidate, of label 2, at a point of the finest level."""
    logits = np.full((126, 7), -20, np.float32)
    offsets = np.zeros((126, 7, 2), np.float32)
    logits[point, 2], offsets[point, 2] = 3.0, (left, right)
    return logits, offsets


def test_steps_become_seconds() -> None:
    got = detect(*one_event(10, 2.5, 4.0), valid_steps=64, duration=60.0, spec=SPEC)
    # grid 7.5 .. 14 -> (grid * 8 + 12) / 25
    np.testing.assert_allclose(got.segments, [[2.88, 4.96]], rtol=1e-12)
    np.testing.assert_array_equal(got.labels, [2])
    np.testing.assert_allclose(got.scores, [1 / (1 + np.exp(-3))], rtol=1e-6)


def test_first_step_and_time_base() -> None:
    spec = ModelSpec(
        length=64,
        levels=6,
        visual_dim=48,
        audio_dim=16,
        labels=SPEC.labels,
        time_base=TimeBase(fps=16, stride_frames=4, window_frames=16),
    )
    got = detect(*one_event(10, 2, 4), valid_steps=64, duration=600.0, spec=spec, first_step=100)
    np.testing.assert_allclose(got.segments, [[(108 * 4 + 8) / 16, (114 * 4 + 8) / 16]], rtol=1e-12)


def test_events_are_clamped_to_the_video() -> None:
    got = detect(*one_event(10, 60, 60), valid_steps=64, duration=12.5, spec=SPEC)
    np.testing.assert_array_equal(got.segments, [[0.0, 12.5]])
    beyond = detect(*one_event(50, 1, 1), valid_steps=64, duration=12.5, spec=SPEC)
    assert beyond.segments.shape == (0, 2)
    assert len(beyond) == 0


def test_nothing_found() -> None:
    logits, offsets = one_event(10, 1, 1)
    got = detect(logits, offsets, valid_steps=5, duration=3.0, spec=SPEC)
    assert len(got) == 0
    assert got.to_json() == []


def test_settings_replace_those_of_the_model() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(-2, 2, (126, 7)).astype(np.float32)
    offsets = generator.gamma(2, 1, (126, 7, 2)).astype(np.float32)
    arguments: dict[str, Any] = {"valid_steps": 64, "duration": 30.0, "spec": SPEC}
    assert len(detect(logits, offsets, **arguments)) == 100
    assert len(detect(logits, offsets, post=PostProcessing(max_segments=5), **arguments)) == 5
    hard = detect(logits, offsets, post=PostProcessing(method="hard", iou_threshold=0.2), **arguments)
    assert not np.array_equal(hard.scores, detect(logits, offsets, **arguments).scores)


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_duration(duration: float) -> None:
    with pytest.raises(ConfigError, match="duration: got .*, expected seconds above 0"):
        detect(*one_event(10, 1, 1), valid_steps=64, duration=duration, spec=SPEC)
