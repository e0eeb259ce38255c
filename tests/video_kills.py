"""What `tests/kills.py` kills of commands that read videos. The networks are averages; all that is written is real."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from builders import LABELS, make_bundle
from video_files import simple_extractor, write_video

from ccnet.cli.main import main
from runtime.detections import read_events
from runtime.files import sha256_file
from runtime.spec import ModelSpec
from runtime.video.features import FeatureExtractor

VIDEOS = ("a", "b")


def prepare_extraction(folder: Path) -> None:
    """Write videos, and features of other ones of the same names."""
    (folder / "videos").mkdir()
    for seed in (1, 2):
        for name in VIDEOS:
            write_video(folder / "videos" / f"{name}.mp4", count=33, sound=1.4, size=(64, 64), seed=seed)
        if seed == 1:
            extract(folder)


def extract(folder: Path) -> None:
    _run(folder, "extract", "videos", "--extractor", "E", "--out", "features", "--quiet")


def check_features(folder: Path) -> None:
    """Raise where a feature file is not whole, or a record is of other files than those that are there."""
    for path in folder.rglob("[!.]*.npy"):
        if len(np.load(path, allow_pickle=False)) != 2:
            raise RuntimeError(f"{path}: not two steps")
    for path in folder.glob("*features/[!.]*.json"):
        for name, digest in json.loads(path.read_text())["files"].items():
            if sha256_file(path.with_name(name)) != digest:
                raise RuntimeError(f"{path}: {name} is another file")


def prepare_prediction(folder: Path) -> None:
    """Write a bundle, videos, and events of other videos of the same names."""
    make_bundle(folder / "bundle", spec=ModelSpec(length=32, levels=4, visual_dim=10, audio_dim=5, labels=LABELS))
    (folder / "videos").mkdir()
    for seed in (1, 2):
        for name in VIDEOS:
            write_video(folder / "videos" / f"{name}.mp4", count=33, sound=1.4, size=(64, 64), seed=seed)
        if seed == 1:
            predict(folder)


def predict(folder: Path) -> None:
    _run(folder, "predict", "bundle", "--videos", "videos", "--extractor", "E", "--out", "events.jsonl", "--quiet")


def check_prediction(folder: Path) -> None:
    """Raise where features or events are not whole."""
    check_features(folder)
    if set(read_events(folder / "events.jsonl", LABELS)) != {*VIDEOS}:
        raise RuntimeError("videos are missing")


def _run(folder: Path, *words: str) -> None:
    os.chdir(folder)

    def load(*_: object, options: Any = None, **__: object) -> FeatureExtractor:
        return simple_extractor(options)

    FeatureExtractor.load = load  # type: ignore[method-assign, assignment]
    if status := main([*words]):
        raise RuntimeError(f"exit status {status}")
