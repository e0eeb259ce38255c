"""ModelSpec: what a deployed network consumes and produces, and how its grid maps to seconds.

The one contract between training, export and runtime: tensor names, shapes, the point grid, the time base,
the feature layout, labels and post-processing defaults are defined here and nowhere else.

Shapes:  B batch   T steps (`length`)   Cv, Ca visual / audio feature width   P points of all levels
         C classes   L pyramid levels
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from runtime.schema import require, section_from_json

VISUAL, AUDIO, LENGTHS = "visual", "audio", "lengths"
LOGITS, OFFSETS = "logits", "offsets"
INPUT_TYPES: Mapping[str, type[np.generic]] = {VISUAL: np.float32, AUDIO: np.float32, LENGTHS: np.int32}
INPUT_NAMES = tuple(INPUT_TYPES)
OUTPUT_NAMES = (LOGITS, OFFSETS)

LONGEST, WIDEST = 1 << 20, 1 << 16
"""Largest T and feature width: what is allocated follows from a file, and must not follow from a damaged one."""

Floats = npt.NDArray[np.floating[Any]]
Method = Literal["soft", "hard", "none"]


@dataclass(frozen=True, kw_only=True)
class TimeBase:
    """How grid steps relate to seconds (defaults: UnAV-100's I3D features; ONE-PEACE uses 16 / 4 / 16)."""

    fps: float = 25.0
    """Frames per second of the video the features were computed from. Paper: implementation details."""
    stride_frames: float = 8.0
    """Frames between neighbouring steps. Paper: implementation details."""
    window_frames: float = 24.0
    """Frames that one step sees. Paper: implementation details."""

    def __post_init__(self) -> None:
        for name in ("fps", "stride_frames", "window_frames"):
            value = getattr(self, name)
            require(1e-6 <= value <= 1e6, f"time_base.{name}", value, "a number above 0 (0.000001 to 1000000)")

    @property
    def step_seconds(self) -> float:
        """Seconds between neighbouring grid steps."""
        return self.stride_frames / self.fps

    def to_grid(self, seconds: Any) -> Any:
        """Convert seconds to a grid coordinate: `(s * fps - window / 2) / stride`."""
        return (seconds * self.fps - 0.5 * self.window_frames) / self.stride_frames

    def to_seconds(self, grid: Any) -> Any:
        """Convert a grid coordinate to seconds: `(grid * stride + window / 2) / fps` (not clamped)."""
        return (grid * self.stride_frames + 0.5 * self.window_frames) / self.fps

    def covered_seconds(self, steps: int) -> float:
        """Return the seconds from the start of the first step's window to the end of the last one's."""
        return ((steps - 1) * self.stride_frames + self.window_frames) / self.fps


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """Names of one video's files in a feature folder: `<video id><suffix>.npy`, each `[T_video, C]`.

    The files of one modality are concatenated along the channels, in this order.
    """

    visual: tuple[str, ...] = ("_rgb", "_flow")
    """Endings of a video's visual files. Release: feature files."""
    audio: tuple[str, ...] = ("_vggish",)
    """Endings of a video's audio files. Release: feature files."""

    def __post_init__(self) -> None:
        for name in ("visual", "audio"):
            suffixes = getattr(self, name)
            good = len(suffixes) > 0 and all(s and not set(s) & set("/\\") for s in suffixes)
            require(good, f"layout.{name}", suffixes, "one or more file name suffixes without separators")


@dataclass(frozen=True, kw_only=True)
class PostProcessing:
    """Decoding and suppression settings of the released configuration. Thresholds live here, never in the network."""

    pre_nms_score: float = 0.001
    """Candidates at or below this score are dropped while decoding. Release: configuration."""
    pre_nms_top_k: int = 2000
    """Best (point, class) pairs kept per pyramid level. Release: configuration."""
    min_length: float = 0.05
    """Segments not longer than this many grid steps are dropped while decoding. Release: configuration."""
    method: Method = "soft"
    """Gaussian Soft-NMS, hard NMS, or none. Paper: inference."""
    sigma: float = 0.4
    """Soft-NMS decay: other scores are multiplied by exp(-iou^2 / sigma). Release: configuration."""
    iou_threshold: float = 0.7
    """Hard NMS drops a segment whose IoU with a kept one is at least this."""
    min_score: float = 0.001
    """Segments whose (decayed) score falls below this are dropped. Release: configuration."""
    max_segments: int = 100
    """Events kept per video, over all classes. Release: configuration."""
    multiclass: bool = True
    """Suppress every class on its own; False: all classes compete (class-agnostic). Release: configuration."""
    voting_threshold: float = 0.75
    """Class-agnostic only: boundary voting over segments with at least this IoU; 0 turns voting off. Release:
    configuration."""

    def __post_init__(self) -> None:
        require(0 <= self.pre_nms_score < 1, "post.pre_nms_score", self.pre_nms_score, "a number in [0, 1)")
        require(self.pre_nms_top_k >= 1, "post.pre_nms_top_k", self.pre_nms_top_k, "an integer >= 1")
        require(self.min_length >= 0, "post.min_length", self.min_length, "a number >= 0")
        require(self.method in get_args(Method), "post.method", self.method, f"one of {get_args(Method)}")
        require(self.sigma > 0, "post.sigma", self.sigma, "a number above 0")
        require(0 <= self.iou_threshold <= 1, "post.iou_threshold", self.iou_threshold, "in [0, 1]")
        require(0 <= self.min_score < 1, "post.min_score", self.min_score, "a number in [0, 1)")
        require(self.max_segments >= 1, "post.max_segments", self.max_segments, "an integer >= 1")
        require(0 <= self.voting_threshold <= 1, "post.voting_threshold", self.voting_threshold, "in [0, 1]")


Shape = tuple[int | str, ...]
"""Extents; a text names a free one, `rows`, or a multiple of it, `8*rows`."""


@dataclass(frozen=True)
class GraphTensors:
    """Names and shapes of a graph's inputs and outputs, float32 unless `types` says otherwise."""

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    types: Mapping[str, type[np.generic]] = field(default_factory=dict)

    def sized(self, **sizes: int) -> GraphTensors:
        """Return the tensors with some of the free extents fixed."""

        def fixed(extent: int | str) -> int | str:
            factor, _, name = str(extent).rpartition("*")
            return int(factor or 1) * sizes[name] if name in sizes else extent

        inputs, outputs = (
            {name: tuple(fixed(extent) for extent in shape) for name, shape in shapes.items()}
            for shapes in (self.inputs, self.outputs)
        )
        return dataclasses.replace(self, inputs=inputs, outputs=outputs)

    def input_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs, free but for the batch axis, as `ModelSpec.input_shapes` does."""
        return cast("dict[str, tuple[int, ...]]", dict(self.sized(batch=batch).inputs))

    def output_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the outputs."""
        return cast("dict[str, tuple[int, ...]]", dict(self.sized(batch=batch).outputs))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The contract of one exported network.

    Inputs:  visual [B, T, Cv] float32, audio [B, T, Ca] float32, lengths [B] int32 (valid steps of a video, 1 to T;
    the features behind them are zeros).
    Outputs: logits [B, P, C] float32, offsets [B, P, C, 2] float32 (distances to start and end in units of the
    level's stride, >= 0). Points run level by level, level 1 (the finest) first.
    """

    length: int
    """T: steps the network takes. Shorter videos are padded with zeros, longer ones cropped or windowed."""
    levels: int
    visual_dim: int
    audio_dim: int
    labels: tuple[str, ...]
    """Class names; the index is the label id."""
    time_base: TimeBase = field(default_factory=TimeBase)
    layout: FeatureLayout = field(default_factory=FeatureLayout)
    post: PostProcessing = field(default_factory=PostProcessing)

    def __post_init__(self) -> None:
        check_length(self.length, self.levels)
        for name in ("visual_dim", "audio_dim"):
            require(1 <= getattr(self, name) <= WIDEST, f"spec.{name}", getattr(self, name), f"1 to {WIDEST}")
        good = len(self.labels) >= 1 and len(set(self.labels)) == len(self.labels)
        require(good, "spec.labels", self.labels, "one or more distinct class names")

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def grid(self) -> PointGrid:
        return point_grid(self.length, self.levels)

    def input_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            VISUAL: (batch, self.length, self.visual_dim),
            AUDIO: (batch, self.length, self.audio_dim),
            LENGTHS: (batch,),
        }

    def output_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        points = self.grid.num_points
        return {LOGITS: (batch, points, self.num_classes), OFFSETS: (batch, points, self.num_classes, 2)}

    @property
    def tensors(self) -> GraphTensors:
        """The same shapes with the batch axis free."""

        def free(shapes: dict[str, tuple[int, ...]]) -> dict[str, Shape]:
            return {name: ("batch", *shape[1:]) for name, shape in shapes.items()}

        return GraphTensors(free(self.input_shapes(1)), free(self.output_shapes(1)), INPUT_TYPES)

    def to_json(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_json(cls, data: Any) -> ModelSpec:
        """Read what `to_json` wrote. Raises ConfigError for unknown, missing or mistyped keys."""
        return section_from_json(cls, data, where="spec")


@dataclass(frozen=True)
class PointGrid:
    """Points of all pyramid levels, laid out level by level.

    Level l (0-based) has `T / 2**l` points at grid positions 0, s, 2s, ... with stride s = 2**l and no half-stride
    offset, as in the released program.
    """

    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    positions: npt.NDArray[np.float32]
    """[P] grid position of each point, in steps."""
    point_strides: npt.NDArray[np.float32]
    """[P] stride of each point's level, in steps."""

    @property
    def num_points(self) -> int:
        return len(self.positions)

    @property
    def level_slices(self) -> tuple[slice, ...]:
        ends = np.cumsum(self.lengths).tolist()
        return tuple(slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True))

    def valid_points(self, lengths: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which points [..., P] lie on a valid step of videos of `lengths` [...] steps."""
        valid: npt.NDArray[np.bool_] = self.positions < np.asarray(lengths)[..., None]
        return valid


@functools.lru_cache(maxsize=64)
def point_grid(length: int, levels: int) -> PointGrid:
    """Return the point grid of a pyramid over `length` steps. Raises ConfigError when `length` does not divide."""
    check_length(length, levels)
    strides = tuple(2**level for level in range(levels))
    lengths = tuple(length // s for s in strides)
    positions = np.concatenate([np.arange(n, dtype=np.float32) * s for n, s in zip(lengths, strides, strict=True)])
    point_strides = np.repeat(np.asarray(strides, np.float32), lengths)
    positions.flags.writeable = point_strides.flags.writeable = False
    return PointGrid(lengths, strides, positions, point_strides)


def check_length(length: int, levels: int) -> None:
    """Raise ConfigError unless `length` is a positive multiple of the coarsest level's stride."""
    require(isinstance(levels, int) and 1 <= levels <= 12, "levels", levels, "an integer from 1 to 12")
    coarsest = 2 ** (levels - 1)
    good = isinstance(length, int) and coarsest <= length <= LONGEST and length % coarsest == 0
    expected = f"a multiple of {coarsest} (the stride of level {levels}), at most {LONGEST}"
    require(good, "length", length, expected)
