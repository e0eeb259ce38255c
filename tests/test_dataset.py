"""Training loader: checks before it starts, crops, padding, and the same batches however they are loaded."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccnet.config import Config, ModelConfig, TrainConfig
from ccnet.training.dataset import (
    Batch,
    Collate,
    EpochBatches,
    Sample,
    TrainingVideos,
    check_folder,
    crop,
)
from ccnet.training.loader import TrainingLoader
from runtime.annotations import VideoAnnotation
from runtime.errors import FeatureError
from runtime.features import read_video
from runtime.spec import TimeBase

MODEL = ModelConfig(length=64, visual_dim=6, audio_dim=4, dim=8, heads=2, num_classes=3, head_dim=8, tdm_dim=4)


Folder = tuple[Path, list[VideoAnnotation]]


def configured(**train: Any) -> Config:
    return Config(model=MODEL, train=TrainConfig(**{"batch_size": 4, "workers": 0, **train}))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Ten videos of 8 to 90 steps (T is 64); a step's first channel says which step it is."""
    rng = np.random.default_rng(0)
    videos = []
    for i, steps in enumerate((8, 20, 33, 64, 65, 70, 90, 12, 40, 50)):
        seconds = TimeBase().covered_seconds(steps)
        for suffix, width in (("_rgb", 3), ("_flow", 3), ("_vggish", 4)):
            array = rng.random((steps, width), np.float32)
            array[:, 0] = np.arange(steps) + 1
            np.save(tmp_path / f"video{i}{suffix}.npy", array)
        start = rng.uniform(0, 0.5 * seconds, 2)
        segments = np.stack((start, start + rng.uniform(0.2, 0.5, 2) * seconds), 1)
        videos.append(VideoAnnotation(f"video{i}", seconds, "train", segments, rng.integers(0, 3, 2)))
    return tmp_path, videos


def equal(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip((*first[:3], *first.targets), (*second[:3], *second.targets), strict=True)
    )


def test_a_batch_is_padded_features_with_their_mask_and_targets(folder: Folder) -> None:
    batches = list(TrainingLoader(*folder, configured()).epoch(0))
    assert [len(batch.mask) for batch in batches] == [4, 4, 2]
    batch = batches[0]
    assert batch.visual.shape == (4, 6, 64)
    assert batch.audio.shape == (4, 4, 64)
    assert batch.mask.shape == (4, 1, 64)
    assert batch.mask.dtype == torch.bool
    assert batch.targets.classes.shape == (4, 126, 3)
    assert batch.targets.offsets.shape == (4, 126, 3, 2)
    for row in range(4):
        steps = int(batch.mask[row].sum())
        assert batch.mask[row, 0, :steps].all()  # a prefix
        assert (batch.visual[row, :, steps:] == 0).all()
        assert (batch.audio[row, :, steps:] == 0).all()
        # Consecutive steps, the same ones of rgb, flow and audio.
        first = batch.visual[row, 0, 0]
        expected = first + torch.arange(steps)
        for track in (batch.visual[row, 0], batch.visual[row, 3], batch.audio[row, 0]):
            assert torch.equal(track[:steps], expected)


def test_crops_are_nine_tenths_to_the_whole_and_at_most_t(folder: Folder) -> None:
    videos = TrainingVideos(*folder, configured())
    lengths = {index: {len(videos[epoch, index].visual) for epoch in range(30)} for index in (2, 6)}
    assert min(lengths[2]) >= 30
    assert max(lengths[2]) <= 33
    assert len(lengths[2]) >= 3
    assert lengths[6] == {64}  # 81 to 90 steps do not fit
    assert len({videos[epoch, 6].visual[0, 0] for epoch in range(10)}) > 3  # not always the same place


def test_events_move_with_the_crop_and_fall_away_when_less_than_half_remains() -> None:
    time_base = TimeBase()  # a step sees 1.5 steps to either side
    events = np.array([[2.0, 8.0], [28.0, 33.0], [10.0, 90.0], [15.0, 20.0]], np.float32)
    features = np.arange(100, dtype=np.float32)[:, None]
    seen = set()
    for seed in range(200):
        sample = Sample(features, features, events, np.arange(4))
        cut = crop(sample, 30, keep=0.5, time_base=time_base, rng=np.random.default_rng(seed))
        first = int(cut.visual[0, 0])
        seen.add(first)
        assert cut.visual[:, 0].tolist() == list(range(first, first + 30))
        low, high = first - 1.5, first + 29 + 1.5
        expected = [
            [label, max(start, low) - first, min(end, high) - first]
            for label, (start, end) in enumerate(events.tolist())
            if min(end, high) - max(start, low) >= 0.5 * (end - start)
        ]
        assert len(expected) > 0  # places without an event are avoided
        np.testing.assert_allclose(np.column_stack((cut.labels, cut.segments)), expected)
    assert min(seen) == 0
    assert max(seen) <= 32  # from 33 on, no event is at least half inside
    assert len(seen) > 20


def test_a_video_without_events_can_be_cropped_and_collated() -> None:
    features = np.ones((50, 6), np.float32)
    none = Sample(features, features[:, :4], np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    cut = crop(none, 40, keep=0.5, time_base=TimeBase(), rng=np.random.default_rng(0))
    batch = Collate(configured())([cut, cut])
    assert batch.targets.classes.sum() == 0
    assert int(batch.mask.sum()) == 80


def test_an_epoch_visits_every_video_once_in_its_own_order() -> None:
    batches = EpochBatches(10, 4, seed=3)
    orders = []
    for epoch in (0, 1):
        batches.epoch = epoch
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert sorted(i for _, i in keys) == list(range(10))
        orders.append([i for _, i in keys])
    assert orders[0] != orders[1]
    assert [i for batch in EpochBatches(10, 4, seed=3) for _, i in batch] == orders[0]
    assert [i for batch in EpochBatches(10, 4, seed=4) for _, i in batch] != orders[0]


def test_batches_do_not_depend_on_workers_and_continue_inside_an_epoch(folder: Folder) -> None:
    alone = TrainingLoader(*folder, configured())
    helped = TrainingLoader(*folder, configured(workers=2))
    for epoch in (1, 0):
        expected = list(alone.epoch(epoch))
        got = list(helped.epoch(epoch))
        assert len(got) == len(expected)
        assert all(equal(a, b) for a, b in zip(got, expected, strict=True))
        rest = list(helped.epoch(epoch, first_batch=2))
        assert len(rest) == 1
        assert equal(rest[0], expected[2])
    other = next(iter(alone.epoch(1)))
    assert not equal(other, next(iter(alone.epoch(0))))
    assert not equal(other, next(iter(TrainingLoader(*folder, configured(seed=1)).epoch(1))))


def test_loading_leaves_the_global_random_state_alone(folder: Folder) -> None:
    before = torch.get_rng_state()
    list(TrainingLoader(*folder, configured(workers=1)).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_missing_files_are_counted_and_named_before_training(folder: Folder) -> None:
    path, videos = folder
    for i in range(7):
        (path / f"video{i}_flow.npy").unlink()
    with pytest.raises(FeatureError, match=r"10 videos need, 7 missing: video0_flow.npy, .*video4_flow.npy, \.\.\."):
        TrainingLoader(path, videos, configured())


def test_damaged_files_are_found_before_training(folder: Folder) -> None:
    path, videos = folder
    truncated = path / "video1_rgb.npy"
    truncated.write_bytes(truncated.read_bytes()[:-10])
    np.save(path / "video2_vggish.npy", np.array([{"a": 1}]), allow_pickle=True)
    (path / "video3_rgb.npy").write_bytes(b"")
    np.save(path / "video5_rgb.npy", np.zeros((20, 4), np.float32))
    np.save(path / "video7_flow.npy", np.zeros((20, 3), np.int64))
    with pytest.raises(FeatureError, match="5 unusable") as caught:
        check_folder(path, videos, configured())
    for name in ("video1_rgb", "video2_vggish", "video3_rgb", r"video5_rgb", "video7_flow"):
        assert name in str(caught.value)
    assert "7 wide, expected 6" in str(caught.value)


def write_npz(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, x=np.ones((4, 3), np.float32))


def cut_header(path: Path) -> None:
    np.save(path, np.ones((4, 3), np.float32))
    path.write_bytes(path.read_bytes()[:40])


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (write_npz, "not a .npy file"),
        (cut_header, "not a .npy file, or one cut inside its header"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(200)), "not a .npy file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
        (lambda path: np.save(path, np.zeros((0, 3), np.float32)), "there is no content"),
        (lambda path: np.save(path, np.zeros((20, 3), np.longdouble)), "got dtype float128"),
        (replace_by_pipe, "not a regular file"),
    ],
)
def test_the_check_refuses_what_reading_refuses(folder: Folder, spoil: Callable[[Path], Any], reason: str) -> None:
    path, videos = folder
    bad = path / "video1_rgb.npy"
    spoil(bad)
    with pytest.raises(FeatureError, match=f"1 unusable: {bad.name}: .*{reason}"):
        check_folder(path, videos, configured())
    with pytest.raises(FeatureError, match=f"{bad.name}: .*{reason}"):
        read_video(path, "video1", configured().layout, 6, 4)


def test_a_folder_that_is_not_there(tmp_path: Path, folder: Folder) -> None:
    with pytest.raises(FeatureError, match="no such feature folder"):
        check_folder(tmp_path / "absent", folder[1], configured())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_turns_bad_when_read_is_named_without_a_traceback(folder: Folder, workers: int) -> None:
    path, videos = folder
    array = np.load(path / "video8_vggish.npy")
    array[3, 1] = np.nan
    np.save(path / "video8_vggish.npy", array)
    loader = TrainingLoader(path, videos, configured(workers=workers))
    with pytest.raises(FeatureError, match="video8_vggish.npy") as caught:
        list(loader.epoch(0))
    assert "Traceback" not in str(caught.value)


def test_events_beyond_the_features_do_not_break_a_batch(folder: Folder) -> None:
    """Features may end before the annotated duration does; the event is clipped where the video is cropped."""
    path, videos = folder
    late = dataclasses.replace(videos[3], segments=np.array([[0.5, 60.0]]), labels=np.array([1]))
    batch = next(iter(TrainingLoader(path, [late], configured(crop_max=1.0)).epoch(0)))
    assert batch.targets.offsets.isfinite().all()


def test_a_kept_error_does_not_keep_the_process(folder: Folder) -> None:
    """Workers ignore SIGTERM, which is what multiprocessing sends them when the interpreter ends."""
    path, videos = folder
    np.save(path / "video8_vggish.npy", np.full_like(np.load(path / "video8_vggish.npy"), np.nan))
    code = f"""
import sys
import numpy as np
from ccnet.config import Config, ModelConfig, TrainConfig
from ccnet.training.loader import TrainingLoader
from runtime.annotations import VideoAnnotation

model = ModelConfig(length=64, visual_dim=6, audio_dim=4, dim=8, heads=2, num_classes=3, head_dim=8, tdm_dim=4)
seconds = { {video.video_id: video.duration for video in videos}!r}
videos = [VideoAnnotation(i, s, "train", np.array([[0.5, 2.0]]), np.array([1])) for i, s in seconds.items()]
loader = TrainingLoader(sys.argv[1], videos, Config(model=model, train=TrainConfig(batch_size=4, workers=1)))
list(loader.epoch(0))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "video8_vggish.npy" in done.stderr
