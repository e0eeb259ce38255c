"""`ccnet synthesize`: published layout, whole files, resumable, the same with any number of workers."""

from __future__ import annotations

import errno
import hashlib
import json
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

from ccnet.cli.main import main
from ccnet.config import Config, ModelConfig
from ccnet.synthetic.annotations import demo_annotations
from ccnet.synthetic.features import SynthesisSettings
from ccnet.synthetic.folder import synthesize_folder
from runtime.annotations import Annotations, read_annotations
from runtime.errors import CCNetError, ConfigError, FeatureError
from runtime.features import read_video
from runtime.spec import FeatureLayout

CONFIG = Config(model=ModelConfig(length=224, visual_dim=12, audio_dim=5, num_classes=4))


@pytest.fixture(scope="module", name="annotations")
def annotations_of_sixteen_videos(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    path = tmp_path_factory.mktemp("annotations") / "annotations.json"
    path.write_text(json.dumps(demo_annotations({"train": 12, "test": 4}, 4, seed=1)))
    return read_annotations(path)


def synthesize(annotations: Annotations, folder: Path, videos: Any = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"config": CONFIG, "settings": SynthesisSettings(), "quiet": True}
    return synthesize_folder(annotations, videos or list(annotations.videos.values()), folder, **(defaults | options))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.npy"))}


def test_files_are_in_the_published_layout(annotations: Annotations, tmp_path: Path) -> None:
    result = synthesize(annotations, tmp_path)
    assert result.written == 16
    for video in annotations.videos.values():
        shapes = {
            suffix: np.load(tmp_path / f"{video.video_id}{suffix}.npy").shape for suffix in ("_rgb", "_flow", "_vggish")
        }
        steps = 1 + int((video.duration * 25 - 24) // 8)
        assert shapes == {"_rgb": (steps, 6), "_flow": (steps, 6), "_vggish": (steps, 5)}
        visual, audio = read_video(tmp_path, video.video_id, CONFIG.layout, 12, 5)
        assert visual.shape == (steps, 12)
        assert audio.shape == (steps, 5)
    assert result.size == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))


def test_workers_order_and_selection_do_not_matter(annotations: Annotations, tmp_path: Path) -> None:
    videos = list(annotations.videos.values())
    synthesize(annotations, tmp_path / "alone")
    synthesize(annotations, tmp_path / "helped", videos[::-1], workers=2)
    synthesize(annotations, tmp_path / "part", videos[3:5])
    whole = contents(tmp_path / "alone")
    assert contents(tmp_path / "helped") == whole
    part = contents(tmp_path / "part")
    assert len(part) == 6
    assert part.items() <= whole.items()


def test_an_interrupted_folder_is_continued(
    annotations: Annotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(annotations, tmp_path / "whole")
    videos = list(annotations.videos.values())
    synthesize(annotations, tmp_path / "part", videos[:7])
    damaged = tmp_path / "part" / f"{videos[2].video_id}_flow.npy"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    (tmp_path / "part" / f"{videos[4].video_id}_vggish.npy").unlink()
    result = synthesize(annotations, tmp_path / "part")
    assert (result.written, result.kept) == (9 + 2, 5)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_no_partial_file(
    annotations: Annotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = np.save
    calls: list[None] = []

    def full(stream: Any, array: Any, **options: Any) -> None:
        calls.append(None)
        if len(calls) == 8:
            stream.write(b"half")
            raise OSError(28, "No space left on device")
        saved(stream, array, **options)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        synthesize(annotations, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 7
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(np, "save", saved)
    assert synthesize(annotations, tmp_path).kept == 2


def test_too_little_room_is_said_before_the_first_file(
    annotations: Annotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FeatureError, match="--dtype float16"):
        synthesize(annotations, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_a_folder_of_other_settings_is_not_mixed_into(annotations: Annotations, tmp_path: Path) -> None:
    synthesize(annotations, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FeatureError, match=r"other settings \(settings\)"):
        synthesize(annotations, tmp_path, settings=SynthesisSettings(seed=5))
    with pytest.raises(FeatureError, match=r"other settings \(dtype\)"):
        synthesize(annotations, tmp_path, dtype="float16")
    assert contents(tmp_path) == before


def test_a_folder_of_real_features_is_left_alone(annotations: Annotations, tmp_path: Path) -> None:
    np.save(tmp_path / "real_rgb.npy", np.zeros((3, 6), np.float32))
    with pytest.raises(FeatureError, match=r"no synthetic\.json, so they are not replaced"):
        synthesize(annotations, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["real_rgb.npy"]


def test_half_precision_files_hold_the_same_values(annotations: Annotations, tmp_path: Path) -> None:
    videos = annotations.subset("test")
    synthesize(annotations, tmp_path / "single", videos)
    synthesize(annotations, tmp_path / "half", videos, dtype="float16")
    for path in (tmp_path / "single").glob("*.npy"):
        half = np.load(tmp_path / "half" / path.name)
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, np.load(path).astype(np.float16))


def test_widths_that_do_not_split_over_the_files(annotations: Annotations, tmp_path: Path) -> None:
    odd = Config(model=ModelConfig(visual_dim=13, audio_dim=5, num_classes=4))
    with pytest.raises(ConfigError, match=r"model\.visual_dim: got 13"):
        synthesize(annotations, tmp_path, config=odd)
    single = Config(model=odd.model, layout=FeatureLayout(visual=("_v",), audio=("_a",)))
    assert synthesize(annotations, tmp_path, config=single).written == 16


def test_the_command(annotations: Annotations, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "synthesize",
        "--annotations",
        str(annotations.path),
        "--out",
        str(tmp_path),
        "--subset",
        "test",
        "train",
    ]
    settings = ["--model.num_classes", "4", "--model.visual_dim", "8", "--model.audio_dim=4"]
    assert main([*command, "--limit", "6", "--workers", "1", *settings]) == 0
    assert "6 videos written" in capsys.readouterr().out
    assert len(list(tmp_path.glob("test_*.npy"))) == 12
    assert len(list(tmp_path.glob("train_*.npy"))) == 6
    for wrong, message in (
        (["--difficulty", "2", *settings], "difficulty: got 2.0"),
        ([], "model.num_classes: got 100"),
        (["--model.width", "3", *settings], "unknown configuration key 'model.width'"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--limit", "0", *settings])
    assert "argument --limit: got '0', expected an integer of 1 or more" in capsys.readouterr().err


def test_the_former_name_of_the_command(
    annotations: Annotations, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--annotations", str(annotations.path), "--out", str(tmp_path), "--limit", "1", "--workers", "1"]
    assert (
        main(["plant", *command, "--model.num_classes", "4", "--model.visual_dim", "8", "--model.audio_dim", "4"]) == 0
    )
    printed = capsys.readouterr()
    assert "1 videos written" in printed.out
    assert "warning: 'ccnet plant' is now 'ccnet synthesize'" in printed.err


def test_the_published_annotations_fit_the_preset(annotations_file: Path, tmp_path: Path) -> None:
    """A few videos at full width; the class count and the label ids of the real file fit the preset."""
    annotations = read_annotations(annotations_file)
    result = synthesize_folder(
        annotations, annotations.subset("test")[:3], tmp_path, Config(), SynthesisSettings(), quiet=True
    )
    assert result.written == 3
    video = annotations.subset("test")[0]
    visual, audio = read_video(tmp_path, video.video_id, Config().layout, 2048, 128)
    assert visual.shape[1] == 2048
    assert audio.shape[1] == 128


def test_processes_without_shared_memory(
    annotations: Annotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("ccnet.synthetic.folder.ProcessPoolExecutor", refuse)
    videos = list(annotations.videos.values())[:2]
    with pytest.raises(CCNetError, match=r"Read-only file system: /dev/shm\); use --workers 1"):
        synthesize(annotations, tmp_path / "two", videos, workers=2)
    synthesize(annotations, tmp_path / "one", videos, workers=1)
    assert list((tmp_path / "one").glob("*.npy"))


def test_sigterm_to_all_processes_ends_quietly_and_is_continued(tmp_path: Path) -> None:
    """A scheduler's signal reaches the workers too: exit status 143, no traceback, no file that is not whole."""
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(demo_annotations({"train": 2000}, 5, seed=0)))
    command = [sys.executable, "-m", "ccnet", "synthesize", "--annotations", str(annotations), "--preset", "demo"]
    command += ["--out", str(tmp_path / "features"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("features/*.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert "the same command continues" in errors
    assert list((tmp_path / "features").glob(".*")) == []
    assert 0 < len(list(tmp_path.glob("features/*.npy"))) < 3 * 2000
