"""The chain of `ccnet demo --video`: from pixels and sound to events, with an extractor of seeded weights.

Exit status: 0 when the network reaches the goal on the test videos, 1 when it does not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ccnet.cli.chain import Chain

GOAL = 0.30
"""Test mAP (Avg over tIoU 0.1:0.1:0.9) that the network has to reach."""
VIDEOS = {"train": 24, "validation": 4, "test": 8}
SEED = 0
CROP, ITERATIONS = 64, 1
"""Sizes of the extractor; the published ones are 224 and 20."""
SETTINGS = {
    "model.length": 40,
    "model.levels": 4,
    "time_base.stride_frames": 8,
    "time_base.window_frames": 24,
    "train.batch_size": 8,
    "train.epochs": 60,
    "train.warmup_epochs": 2,
    "train.validate_every": 10,
    "train.ema": 0.97,
}
"""What differs from the preset `demo`: the time base of the published features, and few, short videos."""
_CALIBRATION_WINDOWS = 16


class VideoDemo(Chain):
    """The steps, in the order in which they run. All files are in one folder."""

    def run(self) -> int:
        """Run every step and print the mAP. Return the exit status."""
        videos, extractor, features = (self.out / name for name in ("videos", "extractor", "features"))
        annotations, training, bundle = (self.out / name for name in ("annotations.json", "training", "bundle"))
        events, scores = self.out / "events.jsonl", self.out / "evaluation.json"
        self._write_videos(annotations, videos)
        widths = self._make_extractor(extractor)
        engine = ("--extractor", extractor)
        learned = [videos / subset for subset in VIDEOS if subset != "test"]
        self.command("extract", *learned, *engine, "--out", features, torch=False)
        settings = [word for name, value in (widths | SETTINGS).items() for word in (f"--{name}", value)]
        resume = ("--resume",) if (training / "last").is_dir() else ()
        data = ("--features", features, "--annotations", annotations)
        self.command("train", "--preset", "demo", *data, "--out", training, *settings, *resume)
        self.command("export", training / "best", "--out", bundle)
        new = ("--videos", videos / "test", *engine, "--out", events)
        self.command("predict", bundle, *new, torch=False)
        test = ("--annotations", annotations, "--subset", "test")
        self.command("evaluate", events, *test, "--json", scores, torch=False)
        reached = float(json.loads(scores.read_text(encoding="utf-8"))["average_map"])
        verdict = "reached" if reached >= GOAL else "NOT REACHED"
        print(f"test mAP (Avg.) from video files: {reached:.3f} (expected {GOAL:.2f} or more): {verdict}")
        print(f"videos:  {videos}\nevents:  {events}")
        return 0 if reached >= GOAL else 1

    def _write_videos(self, annotations: Path, videos: Path) -> None:
        from ccnet.synthetic.videos import draw_scenes, scene_annotations, write_scene
        from runtime.files import write_json

        self.log(f"{sum(VIDEOS.values())} videos of shapes and tones, not all of which come together: {videos}")
        scenes = draw_scenes(VIDEOS, seed=SEED)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(annotations, scene_annotations(scenes))
        for name, scene in scenes.items():
            path = videos / name.partition("_")[0] / f"{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():  # one that is there is whole, and its features stay valid
                write_scene(path, scene)

    def _make_extractor(self, folder: Path) -> dict[str, int]:
        """Make the extractor, unless it is there. Return the settings that follow from its widths."""
        from ccnet.synthetic.videos import SIDE
        from runtime.video.extractor import MANIFEST, read_extractor

        if not (folder / MANIFEST).exists():
            from export.extractors.bundle import make_extractor
            from export.extractors.seeded import calibrate, seeded_networks, weight_hashes

            self.log(f"an extractor of seeded weights, a sixteenth as wide as the published one: {folder}")
            networks = seeded_networks(SEED)
            spec = networks.spec(side=SIDE, crop=CROP, iterations=ITERATIONS)
            calibrate(networks, spec, calibration_windows(spec.window + 1))
            make_extractor(networks, spec, weight_hashes(networks), folder)
        spec = read_extractor(folder).spec
        return {
            "model.visual_dim": spec.rgb_dim + spec.flow_dim,
            "model.audio_dim": spec.audio_dim,
            "model.num_classes": 4,
        }


def calibration_windows(frames: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return windows [16, frames, 128, 128, 3] of videos that are in no subset."""
    from ccnet.synthetic.videos import draw_frames, draw_scenes

    scenes = draw_scenes({"calibration": _CALIBRATION_WINDOWS}, seed=SEED + 1)
    starts = np.random.default_rng(SEED).integers(0, 150, len(scenes))
    return np.stack(
        [draw_frames(scene)[start : start + frames] for scene, start in zip(scenes.values(), starts, strict=True)]
    )
