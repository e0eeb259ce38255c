"""Training batches from a feature folder: checked at the start, cropped at random, padded, with targets.

Everything random follows from (seed, epoch, index of the video), never from the state of a worker process. A run has
the same batches with any number of workers, and can be continued in the middle of an epoch.

Shapes:  B batch   T steps   n steps of one video   Cv, Ca feature widths   M events   P points   C classes
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ccnet.config import Config
from ccnet.network.model import released_inputs
from ccnet.training.targets import Targets, build_targets
from runtime.annotations import VideoAnnotation
from runtime.batches import pack
from runtime.coverage import Gaps, common_gaps, files_note, find_gaps, report_gaps, video_list
from runtime.errors import FeatureError
from runtime.features import VideoFeatures, feature_header, read_video
from runtime.spec import TimeBase

Floats = npt.NDArray[np.float32]
_CROP_TRIALS = 200
_NAMED_PROBLEMS = 5


class Batch(NamedTuple):
    """The videos of one training step."""

    visual: Tensor
    """[B, Cv, T] float32, zero after each video's end."""
    audio: Tensor
    """[B, Ca, T] float32."""
    mask: Tensor
    """[B, 1, T] bool, true where the video has content."""
    targets: Targets
    """Classes [B, P, C] and offsets [B, P, C, 2]."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device; from pinned memory this does not wait."""
        visual, audio, mask, *targets = (
            tensor.to(device, non_blocking=True) for tensor in (self.visual, self.audio, self.mask, *self.targets)
        )
        return Batch(visual, audio, mask, Targets(*targets))


class Sample(NamedTuple):
    """One video, cropped."""

    visual: Floats
    """[n, Cv], n <= T."""
    audio: Floats
    """[n, Ca]."""
    segments: Floats
    """[M, 2] start and end in grid steps, counted from the first step of the crop."""
    labels: npt.NDArray[np.int64]
    """[M]."""


def check_folder(folder: str | os.PathLike[str], videos: Sequence[VideoAnnotation], config: Config) -> None:
    """Check that every file of `videos` is there, whole and of the configured width. Only headers and sizes are read.

    What the features do not cover of the videos is logged. Raises FeatureError with the number of bad files, the first
    few of them and what is wrong with each; and where nearly all videos are not covered as they are annotated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatureError(f"{folder}: no such feature folder")
    if not videos:
        raise FeatureError(f"{folder}: got no videos, expected at least one")
    missing: list[str] = []
    damaged: list[str] = []
    gaps: dict[str, Gaps] = {}
    for video in videos:
        try:
            if found := _check_video(folder, video, config):
                gaps[video.video_id] = found
        except _MissingFile as error:  # noqa: PERF203
            missing.append(str(error))
        except FeatureError as error:
            damaged.append(str(error).removeprefix(f"{folder}{os.sep}"))
    if missing or damaged:
        parts = [_listed(kind, names) for kind, names in (("missing", missing), ("unusable", damaged)) if names]
        raise FeatureError(
            f"{folder}: of the files that {len(videos)} videos need, {'; '.join(parts)}. "
            + (
                "Is it the right folder, and do layout.visual and layout.audio end the files' names?"
                if len(missing) == len(videos)
                else "Add or replace them, or take their videos out of the annotation file"
            )
        )
    wrong = common_gaps(gaps, len(videos), config.time_base, cropped=False)
    if wrong:
        raise FeatureError(f"{folder}: {'; '.join(wrong)}. For example:\n{video_list(gaps, limit=_NAMED_PROBLEMS)}")
    report_gaps(gaps, len(videos), config.time_base, limit=_NAMED_PROBLEMS, cropped=False)


class _MissingFile(FeatureError):
    """The name of a file that is not there."""


def _check_video(folder: Path, video: VideoAnnotation, config: Config) -> Gaps | None:
    """Check the headers of a video's files, and return what they do not cover of it."""
    layout, model = config.layout, config.model
    lengths: list[int] = []
    for suffixes, expected in ((layout.visual, model.visual_dim), (layout.audio, model.audio_dim)):
        width = 0
        for suffix in suffixes:
            path = folder / f"{video.video_id}{suffix}.npy"
            if not path.exists():
                raise _MissingFile(path.name)
            (steps, channels), _ = feature_header(path)
            lengths.append(steps)
            width += channels
        if width != expected:
            files = " + ".join(f"{video.video_id}{suffix}.npy" for suffix in suffixes)
            raise FeatureError(f"{files} ({width} wide, expected {expected})")
    return find_gaps(
        min(lengths),
        files_note(video.video_id, layout, lengths),
        time_base=config.time_base,
        duration=video.duration,
        longest=model.length,
        hint="training crops at random places, validation keeps the first T",
    )


def _listed(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _NAMED_PROBLEMS else ""
    return f"{len(names)} {kind}: {', '.join(names[:_NAMED_PROBLEMS])}{more}"


def crop(sample: Sample, steps: int, *, keep: float, time_base: TimeBase, rng: np.random.Generator) -> Sample:
    """Cut a video to `steps` consecutive steps at a random place.

    Events are clipped to what the kept steps see (each step sees `window_frames` around its own position), and dropped
    when less than the share `keep` of their length remains. A place where an event remains is preferred.
    """
    length = len(sample.visual)
    half_window = 0.5 * time_base.window_frames / time_base.stride_frames
    for _ in range(_CROP_TRIALS):
        first = int(rng.integers(0, length - steps + 1))
        clipped = sample.segments.clip(first - half_window, first + steps - 1 + half_window)
        kept = clipped[:, 1] - clipped[:, 0] >= keep * (sample.segments[:, 1] - sample.segments[:, 0])
        if kept.any() or not len(kept):
            break
    window = slice(first, first + steps)
    return Sample(sample.visual[window], sample.audio[window], clipped[kept] - first, sample.labels[kept])


class TrainingVideos(Dataset[Any]):
    """Videos of one subset; the item `(epoch, index)` is cropped by (seed, epoch, index)."""

    def __init__(self, folder: str | os.PathLike[str], videos: Sequence[VideoAnnotation], config: Config) -> None:
        """Check the whole folder first; see `check_folder`."""
        check_folder(folder, videos, config)
        self.folder = Path(folder)
        self.videos = list(videos)
        self.config = config

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Read and crop a video. Raises FeatureError for values that are bad (NaN) or a file that changed."""
        epoch, index = key
        video, model, train = self.videos[index], self.config.model, self.config.train
        visual, audio = read_video(self.folder, video.video_id, self.config.layout, model.visual_dim, model.audio_dim)
        segments = self.config.time_base.to_grid(video.segments).astype(np.float32)
        sample = Sample(visual, audio, segments.reshape(-1, 2), video.labels)

        rng = np.random.default_rng((train.seed, epoch, index))
        length = len(visual)
        steps = max(1, round(length * rng.uniform(train.crop_min, train.crop_max)))
        steps = min(steps, model.length)
        if steps == length:
            return sample
        return crop(sample, steps, keep=train.crop_keep, time_base=self.config.time_base, rng=rng)


class Collate:
    """Makes a `Batch` of samples, padded to T, with targets. Runs in the loading process."""

    def __init__(self, config: Config) -> None:
        # Class names do not matter to a batch.
        self._spec = config.spec(tuple(map(str, range(config.model.num_classes))))

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        arrays = pack([VideoFeatures(sample.visual, sample.audio) for sample in samples], self._spec)
        visual, audio, mask = released_inputs(*(torch.from_numpy(array) for array in arrays))
        most = max(len(sample.labels) for sample in samples)
        segments = torch.zeros(len(samples), most, 2)
        labels = torch.full((len(samples), most), -1)
        for row, sample in enumerate(samples):
            events = len(sample.labels)
            segments[row, :events] = torch.from_numpy(sample.segments)
            labels[row, :events] = torch.from_numpy(sample.labels)
        return Batch(visual, audio, mask, build_targets(segments, labels, self._spec.grid, self._spec.num_classes))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, index)`: every video once per epoch, in an order that follows from (seed, epoch).

    `epoch` and `first_batch` are set before an epoch is iterated; the last batch may be smaller.
    """

    def __init__(self, videos: int, batch_size: int, seed: int) -> None:
        self.videos, self.batch_size, self.seed = videos, batch_size, seed
        self.epoch, self.first_batch = 0, 0

    def __len__(self) -> int:
        return -(-self.videos // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.videos).tolist()
        for batch in range(self.first_batch, len(self)):
            yield [(self.epoch, i) for i in order[batch * self.batch_size : (batch + 1) * self.batch_size]]
