"""The demo's chain of commands, with a network too small and too little trained to reach the goal."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("matplotlib")
pytest.importorskip("av")
pytest.importorskip("PIL")

from ccnet.cli import demo, demo_video
from ccnet.cli.chain import WITHOUT_TORCH
from ccnet.cli.main import main
from ccnet.config import PRESETS, Config
from ccnet.synthetic.videos import Appearance, Scene, draw_scenes, scene_annotations, write_scene
from runtime.annotations import read_annotations
from runtime.bundle import read_bundle
from runtime.detections import read_events
from runtime.features import find_videos
from runtime.files import write_json
from runtime.spec import FeatureLayout
from runtime.video.container import ReadOptions, ReadReport
from runtime.video.extractor import Extractor
from runtime.video.frames import read_frames
from runtime.video.sound import read_sound


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Config:
    config = PRESETS["demo"]
    model = dataclasses.replace(config.model, length=64, levels=2, dim=8, heads=2, head_dim=8, tdm_dim=4, self_layers=0)
    train = dataclasses.replace(config.train, epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    config = dataclasses.replace(config, model=model, train=train)
    monkeypatch.setitem(PRESETS, "demo", config)
    monkeypatch.setattr(demo, "VIDEOS", {"train": 8, "validation": 4, "test": 12})
    return config


@pytest.mark.slow
def test_a_network_that_misses_the_goal_fails_the_demo_after_all_its_steps(
    small: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    printed = capfd.readouterr().out
    assert "NOT REACHED" in printed
    assert "tIoU" in printed  # the paper's table
    annotations = read_annotations(tmp_path / "demo" / "annotations.json")
    spec = read_bundle(tmp_path / "demo" / "bundle").spec
    assert spec.length == 64
    events = read_events(tmp_path / "demo" / "events.jsonl", spec.labels)
    assert set(events) == {video.video_id for video in annotations.subset("test")}
    assert (tmp_path / "demo" / "timeline.png").stat().st_size > 5000


@pytest.mark.slow
def test_from_video_files_to_events(
    small: Config,
    extractor: Extractor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The chain of `ccnet demo --video` from mp4 files with sound on, with an extractor that is there already."""
    videos = {"train": 4, "validation": 1, "test": 2}
    monkeypatch.setattr(demo_video, "VIDEOS", videos)
    monkeypatch.setattr(
        demo_video, "SETTINGS", {**demo_video.SETTINGS, "train.epochs": 1, "train.warmup_epochs": 0, "model.levels": 2}
    )
    out = tmp_path / "demo"
    shutil.copytree(extractor.folder, out / "extractor")
    (out / "annotations.json").write_text("{}")  # without it, the folder would be somebody else's
    assert main(["demo", "--video", "--out", str(out)]) == 1
    printed = capfd.readouterr()
    assert "NOT REACHED" in printed.out
    assert printed.err.count("PyTorch can't be imported here") == 3  # extract, predict, evaluate
    scenes = draw_scenes(videos)
    assert {path.stem for path in out.glob("videos/*/*.mp4")} == set(scenes)
    learned = [name for name in scenes if not name.startswith("test")]
    assert find_videos(out / "features", FeatureLayout()) == sorted(learned)
    for name in learned:  # a step is there for every whole window
        steps = (round(scenes[name].duration * 25) - 25) // 8 + 1
        assert len(np.load(out / "features" / f"{name}_flow.npy")) == steps
    events = read_events(out / "events.jsonl", read_bundle(out / "bundle").spec.labels)
    assert set(events) == set(scenes) - set(learned)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_step_that_fails_ends_the_demo(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DIFFICULTY", 7)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "ccnet synthesize ended with exit status 2" in capsys.readouterr().err


def test_predicting_happens_where_torch_cannot_be_imported() -> None:
    command = ["train", "--preset", "demo", "--annotations", "a", "--features", "f", "--out", "o"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(Path(demo.__file__).parents[2]), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs the package 'torch'" in done.stderr


def test_videos_of_the_demo_show_and_sound_what_their_annotations_say(tmp_path: Path) -> None:
    scenes = draw_scenes({"train": 20}, seed=0)
    kinds = [(part.seen, part.heard) for scene in scenes.values() for part in scene.appearances]
    assert set(kinds) == {(True, True), (True, False), (False, True)}
    write_json(tmp_path / "annotations.json", scene_annotations(scenes))
    videos = read_annotations(tmp_path / "annotations.json").subset("train")
    assert sum(len(video.labels) for video in videos) == kinds.count((True, True))

    scene = Scene(
        0,
        8.0,
        (
            Appearance(0, 1.0, 3.0, seen=True, heard=True),
            Appearance(1, 4.0, 5.0, seen=True, heard=False),
            Appearance(2, 6.0, 7.0, seen=False, heard=True),
        ),
    )
    assert [event.label for event in scene.events] == [0]
    write_scene(tmp_path / "a.mp4", scene)
    report = ReadReport()
    frames = list(read_frames(str(tmp_path / "a.mp4"), 128, Fraction(25), ReadOptions(threads=1), report))
    sound = np.concatenate(list(read_sound(str(tmp_path / "a.mp4"), ReadOptions(), report)))
    assert len(frames) == 200
    colourful = np.array([np.ptp(frame.astype(int), axis=2).max() > 100 for frame in frames])
    assert colourful.tolist() == [25 <= index < 75 or 100 <= index < 125 for index in range(200)]
    loud = np.array([np.abs(sound[round((k + 0.25) * 16000) : round((k + 0.75) * 16000)]).max() for k in range(8)])
    assert ((loud > 0.2 * loud.max()) == [False, True, True, False, False, False, True, False]).all()
