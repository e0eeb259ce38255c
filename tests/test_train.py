"""Training: it learns, it resumes exactly, it refuses what would ruin a run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ccnet.training.loop
import ccnet.training.validation
from ccnet import load_checkpoint
from ccnet.checkpoint import load_tensors, read_checkpoint, save_tensors
from ccnet.config import Config, LossConfig, ModelConfig, TrainConfig
from ccnet.network.model import CCNet
from ccnet.synthetic.annotations import demo_annotations
from ccnet.synthetic.features import SynthesisSettings
from ccnet.synthetic.folder import synthesize_folder
from ccnet.training.dataset import TrainingVideos
from ccnet.training.journal import EPOCH_COLUMNS, LOSS_COLUMNS, STEP_COLUMNS
from ccnet.training.learner import Learner, choose_device
from ccnet.training.loader import check_shared_memory
from ccnet.training.loop import TrainingResult, train
from ccnet.training.optimizer import AveragedWeights, learning_rate, make_optimizer
from ccnet.training.state import save_state
from runtime.annotations import read_annotations
from runtime.batches import Batch
from runtime.errors import (
    AnnotationError,
    BackendUnavailable,
    CCNetError,
    CheckpointError,
    ConfigError,
    FeatureError,
    Interrupted,
    TrainingError,
)
from runtime.files import sha256_file
from runtime.spec import TimeBase

CONFIG = Config(
    model=ModelConfig(
        length=16,
        levels=2,
        visual_dim=12,
        audio_dim=8,
        dim=8,
        heads=2,
        self_layers=0,
        num_classes=2,
        head_dim=8,
        tdm_dim=4,
        drop_path=0.3,  # so that a random generator that is not restored shows
    ),
    train=TrainConfig(batch_size=4, epochs=2, warmup_epochs=1, learning_rate=5e-3, ema=0.8, workers=0, device="cpu"),
    loss=LossConfig(normalizer=12.0),  # about the positive points of a batch of so short videos
    time_base=TimeBase(fps=25.0, stride_frames=96.0, window_frames=96.0),
)
STEPS_PER_EPOCH, EPOCHS = 3, 3


def changed(config: Config = CONFIG, **fields: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


class Data:
    """A synthetic set of 11 training and 5 validation videos: the last batch of an epoch is smaller."""

    def __init__(self, folder: Path) -> None:
        self.annotations = folder / "annotations.json"
        self.features = folder / "features"
        self.annotations.write_text(json.dumps(demo_annotations({"train": 11, "validation": 5}, 2, seed=1)))
        annotations = read_annotations(self.annotations)
        settings = SynthesisSettings.of_difficulty(0.0)
        synthesize_folder(annotations, list(annotations.videos.values()), self.features, CONFIG, settings, quiet=True)

    def train(self, out: Path, config: Config = CONFIG, *, resume: bool = False) -> TrainingResult:
        return train(config, self.annotations, self.features, out, resume=resume, quiet=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def straight(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    data.train(out)
    return out


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def without_clocks(path: Path) -> list[dict[str, str]]:
    clocks = ("samples_per_second", "loading_share")
    return [{name: value for name, value in row.items() if name not in clocks} for row in table(path)]


def assert_same_run(out: Path, straight: Path) -> None:
    """Assert that weights, optimiser, random state and tables are identical, bit by bit."""
    for name in ("last/model.safetensors", "last/training.safetensors", "best/model.safetensors"):
        ours, theirs = load_tensors(out / name), load_tensors(straight / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert different == [], name
    for name in ("metrics.csv", "steps.csv"):
        assert without_clocks(out / name) == without_clocks(straight / name)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal during the `step`-th training step (counted from 1) of the process."""
    original, done = Learner.step, 0

    def stepping(self: Learner, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(Learner, "step", stepping)


# --- it learns ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_tables_and_curves(straight: Path) -> None:
    epochs, steps = table(straight / "metrics.csv"), table(straight / "steps.csv")
    assert tuple(epochs[0]) == EPOCH_COLUMNS
    assert tuple(steps[0]) == STEP_COLUMNS
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    assert [row["step"] for row in epochs] == ["3", "6", "9"]
    assert all(math.isfinite(float(row[name])) for row in epochs for name in EPOCH_COLUMNS)
    assert any("tfevents" in name for name in os.listdir(straight / "tensorboard"))
    best = read_checkpoint(straight / "best")
    assert best.metrics["validation_map"] == pytest.approx(max(float(row["validation_map"]) for row in epochs))
    assert best.config == CONFIG
    assert isinstance(load_checkpoint(straight / "last"), CCNet)


def test_timelines_of_three_videos_go_to_tensorboard(
    data: Data, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each validation where there is time for them; the run is the same as without."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("ccnet.training.pictures.SHARE", math.inf)
    data.train(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 3
    for tag in tags:
        assert tag.startswith("validation/")
        assert [image.step for image in events.Images(tag)] == [3, 6, 9]
        assert all(image.width > 500 for image in events.Images(tag))


def test_pictures_that_fail_do_not_cost_the_run(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ccnet.training.pictures.SHARE", math.inf)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data.train(tmp_path / "run", changed(epochs=1, warmup_epochs=0))
    assert caplog.text.count("no timelines in TensorBoard from now on") == 1


def test_the_loss_falls_on_clean_features(data: Data, tmp_path: Path) -> None:
    data.train(tmp_path / "run", changed(epochs=5, learning_rate=2e-2))
    losses = [float(row["loss"]) for row in table(tmp_path / "run" / "metrics.csv")]
    assert losses[-1] < 0.5 * losses[0]  # from 3.7 to 1.0 when this was written


def test_the_saved_weights_are_the_averaged_ones(straight: Path) -> None:
    averaged = load_tensors(straight / "last" / "model.safetensors")
    state = load_tensors(straight / "last" / "training.safetensors")
    assert all(f"model/{name}" in state for name in averaged)
    assert any(not torch.equal(tensor, state[f"model/{name}"]) for name, tensor in averaged.items())


def test_the_callers_random_numbers_and_signals_are_left_alone(data: Data, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    data.train(tmp_path / "run", changed(epochs=1, warmup_epochs=0))
    assert torch.equal(torch.rand(3), expected)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_bfloat16_on_a_cpu(data: Data, tmp_path: Path) -> None:
    result = data.train(tmp_path / "run", changed(epochs=1, precision="bf16"))
    assert math.isfinite(result.epochs[-1]["loss"] or math.nan)
    assert {tensor.dtype for tensor in load_tensors(result.last / "model.safetensors").values()} == {torch.float32}


def test_validation_only_every_few_epochs_and_at_the_end(data: Data, tmp_path: Path) -> None:
    result = data.train(tmp_path / "run", changed(validate_every=2))
    validated = [row["epoch"] for row in result.epochs if row["validation_map"] is not None]
    assert validated == [2, 3]
    written = [bool(row["validation_map"]) for row in table(tmp_path / "run" / "metrics.csv")]
    assert written == [False, True, True]


# --- it resumes exactly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "number", "workers"),
    [
        ([1], signal.SIGINT, 0),  # the very first step
        ([5], signal.SIGTERM, 1),  # in the middle of an epoch
        ([6], signal.SIGINT, 0),  # the last step of an epoch, before its validation
        ([4, 3, 1], signal.SIGINT, 0),  # three times
    ],
)
def test_stopped_and_resumed_equals_not_stopped(
    data: Any, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: Any, number: Any, workers: int
) -> None:
    out, config = tmp_path / "run", changed(workers=workers)
    for position, step in enumerate(stops):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, number)
            with pytest.raises(Interrupted, match=f"stopped by {number.name} .* add --resume") as stopped:
                data.train(out, config, resume=position > 0)
            assert stopped.value.exit_code == 128 + number
    assert len(table(out / "metrics.csv")) == (sum(stops) - 1) // STEPS_PER_EPOCH
    data.train(out, config, resume=True)
    assert_same_run(out, straight)


def test_stopped_during_validation(data: Data, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batch.read

    def reading(*arguments: Any, **rest: Any) -> Any:
        if next(videos) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **rest)

    videos = itertools.count()
    monkeypatch.setattr(ccnet.training.validation, "BATCH", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "read", reading)
        with pytest.raises(Interrupted):
            data.train(tmp_path / "run")
    assert table(tmp_path / "run" / "metrics.csv") == []
    data.train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", straight)


def test_killed_after_an_epoch(data: Data, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next epoch had begun and was written to the tables and to `best/`, but not to the state: it is repeated."""

    class Killed(BaseException):
        pass

    original = save_state

    def saving(folder: Any, learner: Any, position: Any, **rest: Any) -> None:
        if position.epoch == 2:
            raise Killed
        original(folder, learner, position, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(ccnet.training.loop, "SAVING_SHARE", math.inf)  # save after every epoch, however slow the disk
        patch.setattr(ccnet.training.loop, "save_state", saving)
        with pytest.raises(Killed):
            data.train(tmp_path / "run")
    data.train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", straight)


def test_a_finished_run_can_be_resumed_and_has_nothing_to_do(
    data: Data, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "step", lambda *arguments: pytest.fail("it trained on"))
    result = data.train(straight, resume=True)
    assert len(result.epochs) == EPOCHS
    assert result.best_map == read_checkpoint(result.best).metrics["validation_map"]


def test_a_full_disk_leaves_the_last_state(
    data: Data, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            data.train(out)

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            data.train(out, resume=True)
    assert sorted(os.listdir(out)) == [".lock", "best", "last", "metrics.csv", "steps.csv", "tensorboard"]
    data.train(out, resume=True)
    assert_same_run(out, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes(data: Data, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, a scheduler or a closed terminal: the command leaves with 128 + n and a state, without a traceback."""
    out = tmp_path / "run"
    settings = {
        **{f"model.{name}": getattr(CONFIG.model, name) for name in ("length", "levels", "visual_dim", "audio_dim")},
        **{f"model.{name}": getattr(CONFIG.model, name) for name in ("dim", "heads", "num_classes", "tdm_dim")},
        "time_base.stride_frames": 96.0,
        "time_base.window_frames": 96.0,
        "train.batch_size": 2,
        "train.epochs": 1000,
    }
    command = [sys.executable, "-m", "ccnet", "train", "--preset", "demo", "--annotations", str(data.annotations)]
    command += ["--features", str(data.features), "--out", str(out)]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    # Where the tests run under nohup, a child would ignore SIGHUP from the start.
    before = signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(number, before)
    try:
        deadline = time.monotonic() + 120
        while not (out / "last").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "\r" not in errors  # no bar into a log
    assert f"stopped by {number.name}" in errors
    assert read_checkpoint(out / "last").metrics["step"] > 0


def test_a_worker_that_dies_is_named_and_the_state_is_saved(
    data: Data, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = Learner.step, 0

    def stepping(self: Learner, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == 4:  # the first step of the second epoch
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
        return original(self, *arguments)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stepping)
        patch.setattr(TrainingVideos, "__getitem__", _slowly(TrainingVideos.__getitem__))
        with pytest.raises(TrainingError, match=r"loading process ended.*train\.workers 0"):
            data.train(out, changed(workers=1))
    assert read_checkpoint(out / "last").metrics["step"] >= 3
    data.train(out, resume=True)
    assert_same_run(out, straight)


def _slowly(read: Any) -> Any:
    def reading(*arguments: Any) -> Any:
        time.sleep(0.05)
        return read(*arguments)

    return reading


def test_little_shared_memory_is_named_at_the_start(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match=r"shared memory.*train\.workers 0"):
        data.train(tmp_path / "run", changed(workers=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux alone")
def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"can't be written to.*train\.workers 0"):
        check_shared_memory(changed(workers=1), str(tmp_path / "absent"))
    check_shared_memory(changed(workers=0), str(tmp_path / "absent"))


def test_a_bad_validation_video_does_not_cost_the_epoch(data: Data, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(data.features, features)
    (video, *_) = read_annotations(data.annotations).subset("validation")
    path = next(features.glob(f"{video.video_id}_*.npy"))
    array = np.load(path)
    array[0, 0] = np.nan
    np.save(path, array)
    with pytest.raises(CCNetError, match=path.name):
        train(CONFIG, data.annotations, features, tmp_path / "run", quiet=True)
    assert read_checkpoint(tmp_path / "run" / "last").metrics["step"] == STEPS_PER_EPOCH


# --- it refuses --------------------------------------------------------------------------------------------------


HOLD = """
import sys, time
from runtime.folders import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_not_in_the_way(data: Data, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"run: process {process.pid} on .* is training here"):
            train(changed(epochs=1, warmup_epochs=0), data.annotations, data.features, out, quiet=True)
    finally:
        process.kill()
        process.communicate()
    assert (out / ".lock").exists()
    train(changed(epochs=1, warmup_epochs=0), data.annotations, data.features, out, quiet=True)


def test_nothing_to_resume(data: Data, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume, it has no last/training\.json"):
        data.train(tmp_path / "run", resume=True)


def test_a_folder_with_a_run_is_not_trained_into(data: Data, straight: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a run already \(3 epochs done\); add --resume"):
        data.train(straight)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_another_configuration(data: Data, straight: Path, resume: bool) -> None:
    other = changed(learning_rate=1.0, seed=5)
    with pytest.raises(CheckpointError) as caught:
        data.train(straight, other, resume=resume)
    assert "train.learning_rate is 0.005 there, 1.0 was asked for" in str(caught.value)
    assert "train.seed is 0 there, 5 was asked for" in str(caught.value)
    assert "train.epochs" not in str(caught.value)


def test_a_run_of_other_annotations(data: Data, straight: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text(data.annotations.read_text() + "\n")
    with pytest.raises(CheckpointError, match="another annotation file"):
        train(CONFIG, tmp_path / "annotations.json", data.features, straight, resume=True, quiet=True)


@pytest.mark.parametrize("name", ["training.json", "training.safetensors", "model.safetensors", "checkpoint.json"])
def test_a_damaged_state(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    interrupt_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        data.train(tmp_path / "run")
    path = tmp_path / "run" / "last" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        data.train(tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["optimizer/exp_avg/", "optimizer/", "random/cpu"])
def test_a_state_with_tensors_that_do_not_fit(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupt_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        data.train(tmp_path / "run")
    path = tmp_path / "run" / "last" / "training.safetensors"
    tensors = load_tensors(path)
    key = next(key for key in tensors if key.startswith(name))
    tensors[key.replace("exp_avg", "other") if name == "optimizer/" else key] = torch.zeros(7)
    save_tensors(path, tensors)
    manifest = path.with_name("training.json")
    content = json.loads(manifest.read_text()) | {"size": path.stat().st_size, "sha256": sha256_file(path)}
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"training\.safetensors: tensor '(optimizer|random)/"):
        data.train(tmp_path / "run", resume=True)


def test_a_state_of_another_schema(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        data.train(tmp_path / "run")
    path = tmp_path / "run" / "last" / "training.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2', 1))
    with pytest.raises(CheckpointError, match=r"training\.json\.schema: got 2, expected 1; .* start the run again"):
        data.train(tmp_path / "run", resume=True)


def test_something_else_in_the_place_of_a_checkpoint(data: Data, tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "photo.jpg").write_bytes(b"dear to somebody")
    with pytest.raises(CheckpointError, match="not replaced"):
        data.train(tmp_path / "run")
    assert (tmp_path / "run" / "best" / "photo.jpg").exists()


def test_data_that_do_not_fit(data: Data, tmp_path: Path) -> None:
    wrong = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=3))
    with pytest.raises(ConfigError, match=r"labels: got 2, expected model\.num_classes = 3"):
        data.train(tmp_path / "run", wrong)
    with pytest.raises(FeatureError):
        train(CONFIG, data.annotations, tmp_path, tmp_path / "run", quiet=True)
    with pytest.raises(AnnotationError):
        train(CONFIG, tmp_path / "none.json", data.features, tmp_path / "run", quiet=True)
    only_training = json.loads(data.annotations.read_text())
    for video in only_training["database"].values():
        video["subset"] = "train"
    (tmp_path / "train.json").write_text(json.dumps(only_training))
    with pytest.raises(AnnotationError, match="validation"):
        train(CONFIG, tmp_path / "train.json", data.features, tmp_path / "run", quiet=True)
    without_events = json.loads(data.annotations.read_text())
    for video in without_events["database"].values():
        video["annotations"] = [] if video["subset"] == "validation" else video["annotations"]
    (tmp_path / "quiet.json").write_text(json.dumps(without_events))
    with pytest.raises(AnnotationError, match="the videos of subset 'validation' have no events"):
        train(CONFIG, tmp_path / "quiet.json", data.features, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "step", lambda self, *arguments: torch.full((len(LOSS_COLUMNS),), math.nan))
    with pytest.raises(TrainingError, match=r"the loss is nan between steps 0 and 3; lower train\.learning_rate"):
        data.train(tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()


def test_devices_that_are_not_there(data: Data, tmp_path: Path) -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(BackendUnavailable, match=f"'{absent}' was asked for"):
        data.train(tmp_path / "run", changed(device=absent))
    for nonsense in ("gpu", "meta"):
        with pytest.raises(ConfigError, match="expected auto, cpu, cuda"):
            choose_device(nonsense)
    with pytest.raises(ConfigError, match="fp16"):
        data.train(tmp_path / "run", changed(precision="fp16"))


# --- its parts ---------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = TrainConfig(learning_rate=1e-3, min_learning_rate=1e-5, warmup_epochs=2, epochs=4)
    rates = [learning_rate(step, steps_per_epoch=5, config=config) for step in range(31)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[20] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[30] == pytest.approx(1e-5)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    without_warmup = TrainConfig(learning_rate=1e-3, warmup_epochs=0)
    assert learning_rate(0, steps_per_epoch=5, config=without_warmup) == 1e-3


def test_only_convolution_and_linear_weights_decay() -> None:
    model = CCNet(CONFIG.model)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            decays = isinstance(module, nn.Conv1d | nn.Linear) and kind == "weight"
            assert decay[id(parameter)] == (0.1 if decays else 0.0), f"{name}.{kind}"


def test_averaged_weights() -> None:
    model = nn.Linear(3, 2)
    average = AveragedWeights(model, 0.75)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 4.0
    average.update(model)
    torch.testing.assert_close(average.model.weight, first + 1.0)
    assert torch.equal(model.weight, first + 4.0)
    assert not average.model.weight.requires_grad
