"""The contract: point grid, time base, and strict JSON round trips."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from runtime.errors import ConfigError
from runtime.spec import ModelSpec, PostProcessing, TimeBase, point_grid


def spec(**changes: object) -> ModelSpec:
    values: dict[str, object] = {"length": 64, "levels": 6, "visual_dim": 48, "audio_dim": 16, "labels": ("a", "b")}
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def test_point_grid_of_the_paper() -> None:
    grid = point_grid(224, 6)
    assert grid.lengths == (224, 112, 56, 28, 14, 7)
    assert grid.num_points == 441
    assert grid.positions[:3].tolist() == [0, 1, 2]
    assert grid.positions[grid.level_slices[5]].tolist() == [0, 32, 64, 96, 128, 160, 192]
    assert set(grid.point_strides[grid.level_slices[2]].tolist()) == {4.0}


def test_point_grid_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        point_grid(64, 6).positions[0] = 1


@pytest.mark.parametrize("valid", [1, 2, 3, 31, 32, 33, 63, 64])
def test_valid_points_are_those_inside_the_valid_steps(valid: int) -> None:
    grid = point_grid(64, 6)
    mask = np.arange(64) < valid
    expected = np.concatenate([mask[::stride] for stride in grid.strides])  # as the released program strides its mask
    np.testing.assert_array_equal(grid.valid_points(valid), expected)
    np.testing.assert_array_equal(grid.valid_points([64, valid])[1], expected)


def test_time_base_round_trip_and_known_values() -> None:
    base = TimeBase()
    assert base.to_seconds(0) == pytest.approx(0.48)  # the first step sees frames 0..23, centred at 12 / 25 s
    assert base.to_grid(0.48) == pytest.approx(0.0)
    assert base.step_seconds == pytest.approx(0.32)
    assert base.covered_seconds(1) == pytest.approx(0.96)
    seconds = np.linspace(0, 60, 7)
    np.testing.assert_allclose(base.to_seconds(base.to_grid(seconds)), seconds, atol=1e-12)


@pytest.mark.parametrize("length", [0, -32, 100, 16])
def test_length_must_fit_the_pyramid(length: int) -> None:
    with pytest.raises(ConfigError, match=r"length: got .*, expected a multiple of 32"):
        spec(length=length)


def test_json_round_trip() -> None:
    original = spec(post=PostProcessing(method="hard", sigma=0.9), time_base=TimeBase(fps=16, stride_frames=4))
    assert ModelSpec.from_json(original.to_json()) == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key.* extra"),
        ({"length": "224"}, "spec.length: got '224', expected int"),
        ({"length": True}, "spec.length: got True, expected int"),
        ({"labels": "ab"}, "spec.labels: got 'ab', expected a list"),
        ({"labels": ["a", "a"]}, "distinct class names"),
        ({"post": {"method": "fast"}}, r"spec.post.method: got 'fast', expected one of 'soft'"),
        ({"post": {"sigma": float("nan")}}, "spec.post.sigma: got nan, expected a finite number"),
        ({"time_base": {"fps": 0}}, "time_base.fps: got 0.0, expected a number above 0"),
        ({"layout": {"visual": ["../x"]}}, "layout.visual"),
    ],
)
def test_json_errors_name_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_json(spec().to_json() | change)


def test_json_missing_key() -> None:
    data = spec().to_json()
    del data["labels"]
    with pytest.raises(ConfigError, match="missing key.* labels"):
        ModelSpec.from_json(data)


def test_shapes_follow_the_length() -> None:
    shorter = dataclasses.replace(spec(), length=32)
    assert shorter.input_shapes(3) == {"visual": (3, 32, 48), "audio": (3, 32, 16), "lengths": (3,)}
    assert shorter.output_shapes(3) == {"logits": (3, 63, 2), "offsets": (3, 63, 2, 2)}
