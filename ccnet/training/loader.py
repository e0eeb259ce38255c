"""Training batches that processes of their own make while the training process computes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from ccnet.config import Config, TrainConfig
from ccnet.training.dataset import Batch, Collate, EpochBatches, Sample, TrainingVideos
from runtime.annotations import VideoAnnotation
from runtime.errors import CCNetError, TrainingError
from runtime.schema import quote
from runtime.signals import STOP_SIGNALS
from runtime.spec import point_grid

_POLL_SECONDS = 2
_STUCK_SECONDS = 600
_NO_WORKERS = "is there enough memory, and shared memory (/dev/shm)? train.workers 0 loads without further processes"


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
    if train.workers == 0 or not sys.platform.startswith("linux"):
        return
    if not os.access(folder, os.W_OK):
        raise TrainingError(
            f"{folder}: can't be written to, and loading processes hand their batches over there; use train.workers 0"
        )
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
