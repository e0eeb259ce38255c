"""Training batches from a feature folder: checked at the start, cropped at random, padded, with targets.

Everything random follows from (seed, epoch, index of the video), never from the state of a worker process. A run has
the same batches with any number of workers, and can be continued in the middle of an epoch.

Shapes:  B batch   T steps   n steps of one video   Cv, Ca feature widths   M events   P points   C classes
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ccnet.config import Config, TrainConfig
from ccnet.network.model import released_inputs
from ccnet.training.targets import Targets, build_targets
from runtime.annotations import VideoAnnotation
from runtime.batches import pack
from runtime.coverage import Gaps, common_gaps, files_note, find_gaps, report_gaps, video_list
from runtime.errors import CCNetError, FeatureError, TrainingError
from runtime.features import VideoFeatures, feature_header, read_video
from runtime.schema import quote
from runtime.signals import STOP_SIGNALS
from runtime.spec import TimeBase, point_grid

Floats = npt.NDArray[np.float32]
_CROP_TRIALS = 200
_NAMED_PROBLEMS = 5
_POLL_SECONDS = 2
_STUCK_SECONDS = 600
_NO_WORKERS = "is there enough memory, and shared memory (/dev/shm)? train.workers 0 loads without further processes"


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
            "Add or replace them, or take their videos out of the annotation file"
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


class TrainingLoader:
    """Batches of an epoch, made in other processes while the training process computes.

    loader = TrainingLoader(folder, annotations.subset("train"), config)
    for batch in loader.epoch(3):            # or loader.epoch(3, first_batch=17) to continue inside it
        ...
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        videos: Sequence[VideoAnnotation],
        config: Config,
        *,
        pin_memory: bool = False,
    ) -> None:
        """Check the folder first. Raises FeatureError when files are missing or damaged."""
        train: TrainConfig = config.train
        self.videos = TrainingVideos(folder, videos, config)
        self._batches = EpochBatches(len(self.videos), train.batch_size, train.seed)
        collate = Collate(config)
        self._loader: DataLoader[Any] = DataLoader(
            _Guarded(self.videos),
            batch_sampler=cast(Any, self._batches),
            collate_fn=_GuardedCollate(collate),
            num_workers=train.workers,
            persistent_workers=train.workers > 0,
            pin_memory=pin_memory,
            timeout=_POLL_SECONDS if train.workers else 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            # Its own generator: starting an epoch must not move the global one, which a resumed run restores.
            generator=torch.Generator().manual_seed(train.seed),
        )
        # Also at the exit of the interpreter, before multiprocessing sends its workers the SIGTERM that they ignore.
        weakref.finalize(self, _end_workers, self._loader)

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._batches)

    def epoch(
        self, epoch: int, first_batch: int = 0, *, while_waiting: Callable[[], None] = lambda: None
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, from `first_batch` on; call `while_waiting` every few seconds without one.

        Raises FeatureError when a video can't be used, TrainingError when the loading processes are dead or stuck.
        """
        self._batches.epoch, self._batches.first_batch = epoch, first_batch
        with _own_child_signals():
            batches = iter(self._loader)
        waited = 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # of torch: there is no class for either case
                if "timed out" not in str(error):
                    raise TrainingError(f"a data loading process ended: {quote(error)}; {_NO_WORKERS}") from error
                waited += _POLL_SECONDS
                if waited >= _STUCK_SECONDS:
                    raise TrainingError(f"no batch for {waited} seconds; {_NO_WORKERS}") from error
                while_waiting()
                continue
            waited = 0
            if isinstance(batch, CCNetError):
                raise batch
            yield batch


def _end_workers(loader: Any) -> None:
    """End the loading processes of a `DataLoader`, if need be by force: a traceback may keep its iterator alive."""
    iterator = getattr(loader, "_iterator", None)
    for worker in getattr(iterator, "_workers", ()):
        worker.kill()


@contextlib.contextmanager
def _own_child_signals() -> Iterator[None]:
    """Undo torch's handler of SIGCHLD, which raises in the middle of a step; waiting for a batch sees a dead worker."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def check_shared_memory(config: Config, folder: str = "/dev/shm") -> None:
    """Raise TrainingError where the batches under way between processes would not fit the shared memory."""
    model, train = config.model, config.train
    if train.workers == 0 or not os.path.isdir(folder):
        return
    features = model.length * (model.visual_dim + model.audio_dim)
    targets = point_grid(model.length, model.levels).num_points * model.num_classes * 3
    needed = 4 * train.batch_size * (features + targets) * (2 * train.workers + 1)  # two ahead, and one in use
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"{folder}: {free / 1e6:.1f} MB of shared memory are free, batches from {train.workers} loading "
            f"process(es) need {needed / 1e6:.1f} MB; give the container more (docker run --shm-size 1g), or use "
            "train.workers 0"
        )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore what reaches every process of a terminal or a job: the training process decides when to stop.

    A worker ends by itself when the training process is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Guarded(Dataset[Any]):
    """Returns a user's mistake as a value: raised in a worker, it would arrive wrapped in a traceback."""

    def __init__(self, videos: TrainingVideos) -> None:
        self.videos = videos

    def __getitem__(self, key: tuple[int, int]) -> Sample | CCNetError:
        try:
            return self.videos[key]
        except CCNetError as error:
            return error


class _GuardedCollate:
    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Sample | CCNetError]) -> Batch | CCNetError:
        for sample in samples:
            if isinstance(sample, CCNetError):
                return sample
        return self.collate(cast("Sequence[Sample]", samples))
