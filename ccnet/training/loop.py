"""Training, from a folder of features to `best/` and `last/` checkpoints.

    result = train(preset("unav100"), "annotations.json", "features/", "run/")
    model = load_checkpoint(result.best)

The run folder holds `best/` (highest validation mAP), `last/` (newest, with the state to resume from), metrics.csv,
steps.csv and TensorBoard events. A run that was interrupted and resumed ends with exactly the weights of one that was
not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from ccnet.checkpoint import save_checkpoint
from ccnet.config import Config
from ccnet.training.dataset import Batch, check_folder
from ccnet.training.journal import LOSS_COLUMNS, Journal, Row
from ccnet.training.learner import Learner, choose_device, describe_device
from ccnet.training.loader import TrainingLoader, check_shared_memory
from ccnet.training.memory import check_memory
from ccnet.training.optimizer import learning_rate
from ccnet.training.pictures import ValidationPictures
from ccnet.training.state import Position, TrainingState, open_run, save_state
from ccnet.training.validation import evaluate_network
from runtime.annotations import Annotations, read_annotations
from runtime.errors import AnnotationError, CCNetError, CheckpointError, Interrupted, TrainingError
from runtime.evaluation import Evaluation
from runtime.files import sha256_file
from runtime.folders import FolderInUse, locked_folder
from runtime.progress import Progress
from runtime.signals import StopRequest

log = logging.getLogger(__name__)

_STEPS_PER_ROW = 20
"""Steps between two fetches of the losses, each of which waits for the device."""
SAVING_SHARE = 0.05
"""`last/` is written after an epoch unless that would take more than this share of the run's time."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The checkpoints of a finished run, and its scores."""

    best: Path
    """Checkpoint folder with the highest validation mAP."""
    last: Path
    """Checkpoint folder of the last epoch."""
    best_map: float
    """Validation mAP (Avg over tIoU 0.1:0.1:0.9) of `best`."""
    best_epoch: int
    epochs: tuple[Row, ...]
    """Rows of metrics.csv, one per epoch."""


def train(
    config: Config,
    annotations: str | Path,
    features: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    classes: Sequence[str] | None = None,
) -> TrainingResult:
    """Train on the subset `train`, validate on `validation`, write into the folder `out`.

    Ctrl-C, SIGTERM and SIGHUP save the state after the current step and raise Interrupted; `resume=True` continues
    from it, or after a kill from the last saved epoch. `quiet` leaves out the progress bar.
    `classes`: names in the order of their ids, where the annotation file does not have an event of each.

    Raises CheckpointError when `out` holds another run or has none to resume, AnnotationError and FeatureError for bad
    data, ConfigError for settings that do not fit the data, BackendUnavailable for an absent device, TrainingError
    when memory does not suffice or the loss is no longer finite.
    """
    out = Path(out)
    videos = read_annotations(annotations, classes)
    if videos.unnamed:
        ids = ", ".join(map(str, videos.unnamed[:5])) + (", ..." if len(videos.unnamed) > 5 else "")
        log.warning("%s: no event has label id %s; --classes gives such classes their names", annotations, ids)
    config.spec(videos.labels)  # raises where the number of classes differs, before anything is written
    for subset in ("train", "validation"):
        if not any(len(video.labels) for video in videos.subset(subset)):
            raise AnnotationError(f"{annotations}: the videos of subset '{subset}' have no events")
    check_folder(features, videos.subset("validation"), config)
    check_shared_memory(config)
    device = choose_device(config.train.device)
    check_memory(config, device)
    annotations_sha256 = sha256_file(annotations)
    with _only_run(out):
        state = open_run(out, config, annotations_sha256=annotations_sha256, resume=resume)
        if state is not None and state.labels != videos.labels:
            raise CheckpointError(f"{out}: the run was started with other class names (--classes); use those")
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _measured_convolutions(),
            StopRequest() as stop,
        ):
            run = _Run(config, videos, Path(features), out, device, state, annotations_sha256, quiet=quiet, stop=stop)
            try:
                return run.finish()
            finally:
                run.journal.close()


@contextlib.contextmanager
def _only_run(out: Path) -> Iterator[None]:
    try:
        with locked_folder(out):
            yield
    except FolderInUse as error:
        raise CheckpointError(f"{out}: {error} is training here; wait for it, or choose another folder") from None


@contextlib.contextmanager
def _measured_convolutions() -> Iterator[None]:
    """Let cuDNN measure its kernels on the first batch and keep the fastest: all batches have the same shapes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Run:
    """A run in this process: from `state`, or from the start, to the end."""

    def __init__(
        self,
        config: Config,
        annotations: Annotations,
        features: Path,
        out: Path,
        device: torch.device,
        state: TrainingState | None,
        annotations_sha256: str,
        *,
        quiet: bool,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.annotations = annotations
        self.features = features
        self.out = out
        self.device = device
        self.annotations_sha256 = annotations_sha256
        self.quiet = quiet
        self.stop = stop
        on_gpu = device.type == "cuda"
        self.loader = TrainingLoader(features, annotations.subset("train"), config, pin_memory=on_gpu)
        self.learner = Learner(config, device)
        self.position = Position()
        if state is not None:
            state.restore(self.learner)
            self.position = state.position
        spec = config.spec(annotations.labels)
        self.pictures = ValidationPictures(spec, annotations.subset("validation"), features)
        self.journal = Journal(out, self.position.epochs, self.position.steps)
        self.window = torch.tensor(self.position.window_sums, dtype=torch.float32, device=device)
        self._window_samples = 0
        self._window_started = time.perf_counter()
        self._saved_at = time.perf_counter()
        self._saving_seconds = 0.0

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, warm-up included."""
        return self.config.train.warmup_epochs + self.config.train.epochs

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run, over all resumes."""
        return self.position.epoch * len(self.loader) + self.position.batch

    def finish(self) -> TrainingResult:
        """Train the epochs that are left."""
        self._introduce()
        if self.steps_done:
            self.journal.write()  # a kill may have come between the state and its tables
        while self.position.epoch < self.total_epochs:
            self._train_epoch()
            self._end_epoch(self._validate())
        best_map = self.position.best_map
        assert best_map is not None  # the last epoch is always validated
        return TrainingResult(
            best=self.out / "best",
            last=self.out / "last",
            best_map=best_map,
            best_epoch=self.position.best_epoch,
            epochs=tuple(self.journal.epochs),
        )

    def _train_epoch(self) -> None:
        position = self.position
        text = f"epoch {position.epoch + 1}/{self.total_epochs}"
        self._window_started = time.perf_counter()
        with Progress(text, total=len(self.loader), initial=position.batch, unit="step", quiet=self.quiet) as progress:
            for batch in self._timed(self._batches()):
                self.window += self.learner.step(batch.to(self.device), self._rate(self.steps_done))
                self._window_samples += len(batch.mask)
                position.batch += 1
                position.window_steps += 1
                if position.window_steps == _STEPS_PER_ROW:
                    progress.show(**self._close_window())
                progress.advance()
                self._stop_if_asked()
            fetching = time.perf_counter()
            self._close_window()
            position.epoch_seconds += time.perf_counter() - fetching

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches that are left of the epoch; the state is saved before an error of loading leaves."""
        position = self.position
        try:
            yield from self.loader.epoch(position.epoch, position.batch, while_waiting=self._stop_if_asked)
        except Interrupted:
            raise
        except CCNetError:
            self._save_before_error()
            raise

    def _stop_if_asked(self) -> None:
        if self.stop.requested:
            self._save_and_stop()

    def _save_before_error(self) -> None:
        if self.steps_done and all(map(math.isfinite, self.window.tolist())):
            self._save_last()
            self.journal.write()

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; count the epoch's seconds, and those among them spent waiting for data."""
        asked = time.perf_counter()
        for batch in batches:
            self.position.epoch_loading_seconds += time.perf_counter() - asked
            yield batch
            now = time.perf_counter()
            self.position.epoch_seconds += now - asked
            asked = now

    def _close_window(self) -> dict[str, float]:
        """Fetch the losses since the last row, which waits for the device, and start a new row."""
        position = self.position
        if position.window_steps == 0:
            return {}
        sums: list[float] = self.window.tolist()
        self.window.zero_()
        means = dict(zip(LOSS_COLUMNS, (value / position.window_steps for value in sums), strict=True))
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"the loss is {means['loss']} between steps {self.steps_done - position.window_steps} and "
                f"{self.steps_done}; lower train.learning_rate, or use train.precision fp32 or bf16. "
                f"{self.out / 'last'} holds the state before that, if an epoch was finished"
            )
        now = time.perf_counter()
        rate = self._rate(self.steps_done - 1)
        speed = self._window_samples / (now - self._window_started)
        row: Row = {"step": self.steps_done, "epoch": position.epoch + 1, "learning_rate": rate, **means}
        self.journal.add_steps({**row, "samples_per_second": speed})
        position.epoch_sums = tuple(a + b for a, b in zip(position.epoch_sums, sums, strict=True))
        position.window_steps, self._window_samples, self._window_started = 0, 0, now
        return {"loss": means["loss"], "rate": rate, "videos/s": speed}

    def _validate(self) -> Evaluation | None:
        """Evaluate the averaged weights, every `validate_every` epochs and after the last one."""
        epoch = self.position.epoch + 1
        if epoch % self.config.train.validate_every and epoch < self.total_epochs:
            return None
        try:
            evaluation = evaluate_network(
                self.learner.average.model,
                self.config.spec(self.annotations.labels),
                self.annotations,
                self.features,
                "validation",
                device=self.device,
                precision=self.config.train.precision,
                quiet=self.quiet,
                stop=self.stop,
            )
            if self.pictures.due:
                for video_id, image in self.pictures.draw(self.learner.average.model, self.device):
                    self.journal.add_picture(f"validation/{video_id}", image, self.steps_done)
        except Interrupted:
            self._save_and_stop()
        except CCNetError:
            self._save_before_error()
            raise
        return evaluation

    def _end_epoch(self, evaluation: Evaluation | None) -> None:
        position = self.position
        steps, samples = len(self.loader), len(self.loader.videos)
        row: Row = {
            "epoch": position.epoch + 1,
            "step": self.steps_done,
            "learning_rate": self._rate(self.steps_done - 1),
            **{name: value / steps for name, value in zip(LOSS_COLUMNS, position.epoch_sums, strict=True)},
            "samples_per_second": samples / position.epoch_seconds,
            "loading_share": position.epoch_loading_seconds / position.epoch_seconds,
            "validation_map": evaluation.average_map if evaluation else None,
            "validation_map_50": evaluation.map_at[0.5] if evaluation else None,
        }
        self.journal.add_epoch(row)
        position.epoch, position.batch = position.epoch + 1, 0
        position.epoch_sums = (0.0,) * len(LOSS_COLUMNS)
        position.epoch_seconds = position.epoch_loading_seconds = 0.0
        if evaluation and (position.best_map is None or evaluation.average_map > position.best_map):
            position.best_map, position.best_epoch = evaluation.average_map, position.epoch
            self._save_best()
        # Saving a network of the paper's size takes seconds: not after every short epoch, but always after the last.
        due = (time.perf_counter() - self._saved_at) * SAVING_SHARE >= self._saving_seconds
        if due or position.epoch == self.total_epochs:
            self._save_last()
        self.journal.write()
        self._report(row)

    def _save_best(self) -> None:
        metrics = {"epoch": self.position.epoch, "validation_map": self.position.best_map}
        average, labels = self.learner.average.model, self.annotations.labels
        save_checkpoint(self.out / "best", average, config=self.config, labels=labels, metrics=metrics)

    def _save_last(self) -> None:
        started = time.perf_counter()
        self.position.epochs, self.position.steps = tuple(self.journal.epochs), tuple(self.journal.steps)
        self.position.window_sums = tuple(self.window.tolist())
        metrics = {"epoch": self.position.epoch, "step": self.steps_done}
        save_state(
            self.out / "last",
            self.learner,
            self.position,
            labels=self.annotations.labels,
            annotations_sha256=self.annotations_sha256,
            metrics=metrics,
        )
        self._saved_at = time.perf_counter()
        self._saving_seconds = self._saved_at - started

    def _save_and_stop(self) -> NoReturn:
        self._save_last()
        self.journal.write()
        number = self.stop.signal_number
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} in epoch {self.position.epoch + 1} after step "
            f"{self.steps_done}; the state is in {self.out / 'last'}, add --resume to continue",
            number,
        )

    def _rate(self, step: int) -> float:
        return learning_rate(step, steps_per_epoch=len(self.loader), config=self.config.train)

    def _introduce(self) -> None:
        model, settings = self.config.model, self.config.train
        parameters = sum(p.numel() for p in self.learner.model.parameters())
        log.info(f"device: {describe_device(self.device)} (train.device: {settings.device})")
        log.info(
            f"network: {parameters / 1e6:.1f} M parameters, {settings.precision}, T = {model.length}, "
            f"{model.num_classes} classes; {len(self.loader.videos)} training videos, {len(self.loader)} steps an "
            f"epoch, {settings.warmup_epochs} + {settings.epochs} epochs (train.warmup_epochs + train.epochs)"
        )
        if self.steps_done:
            rest = "nothing left to do" if self.position.epoch == self.total_epochs else "continuing"
            log.info(f"{self.out}: {self.position.epoch} of {self.total_epochs} epochs done, {rest}")

    def _report(self, row: Row) -> None:
        score = row["validation_map"]
        validation = "" if score is None else f"  validation mAP {score:.4f}"
        star = "  (best)" if self.position.best_epoch == row["epoch"] else ""
        log.info(
            f"epoch {row['epoch']}/{self.total_epochs}  loss {row['loss']:.4f} (class "
            f"{row['classification_loss']:.4f}, offset {row['offset_loss']:.4f}){validation}{star}  "
            f"{row['samples_per_second']:.1f} videos/s, "
            f"{100 * (row['loading_share'] or 0):.0f}% of the time waiting for data"
        )
