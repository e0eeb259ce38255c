"""`ccnet demo`: run the whole job on synthetic features, with the commands a user types, in minutes on two cores.

Exit status: 0 when the trained network reaches the goal on the test subset and the untrained one is far from it, 1 when
it does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ccnet.cli.chain import Chain
from ccnet.cli.options import (
    output_folder,
    quoted_path,
)
from ccnet.config import PRESETS, Config

GOAL = 0.60
"""Test mAP (Avg over tIoU 0.1:0.1:0.9) that the trained network has to reach."""
UNTRAINED_LIMIT = 0.05
"""The untrained network has to stay below this; otherwise the goal would show nothing."""
PRESET = "demo"
DIFFICULTY = 0.25
VIDEOS = {"train": 480, "validation": 40, "test": 80}
SEED = 0
_CANDIDATES = 16
"""Videos that the picture is chosen from."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="synthesize, train, export, predict, evaluate, bench and draw, on a small set",
        description="Synthesizes a small set of videos with realistic durations and overlaps, trains a small network, "
        "exports it, predicts and evaluates in a process without PyTorch, measures its speed and draws one video. "
        f"Exit status 1 when the test mAP stays below {GOAL}.",
    )
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR", help="folder for everything (default: demo, or demo-video)"
    )
    parser.add_argument(
        "--video",
        action="store_true",
        help="begin with video files: writes a few with sound, extracts their features with small networks of seeded "
        "weights, trains, exports, predicts on other videos and evaluates",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.video:
        from ccnet.cli.demo_video import VideoDemo

        return VideoDemo(Path(arguments.out or "demo-video")).run()
    return _Demo(Path(arguments.out or "demo"), PRESETS[PRESET]).run()


class _Demo(Chain):
    """The steps, in the order in which they run. All files are in one folder."""

    def __init__(self, out: Path, config: Config) -> None:
        super().__init__(out)
        self.config = config
        self.annotations = out / "annotations.json"
        self.features = out / "features"
        self.training = out / "training"
        self.bundle = out / "bundle"
        self.events = out / "events.jsonl"
        self.scores = out / "evaluation.json"
        self.picture = out / "timeline.png"

    def run(self) -> int:
        self._synthesize()
        untrained = self._score_untrained()
        self._train()
        videos = ("--features", self.features, "--annotations", self.annotations)
        self.command("export", self.training / "best", "--out", self.bundle, *videos)
        test = ("--annotations", self.annotations, "--subset", "test")
        self.command("predict", self.bundle, "--features", self.features, *test, "--out", self.events, torch=False)
        self.command("evaluate", self.events, *test, "--json", self.scores, torch=False)
        self.command("bench", self.bundle, "--batches", 1, 4, "--seconds", 0.5, "--calls", 5, torch=False)
        self._draw()

        trained = float(json.loads(self.scores.read_text(encoding="utf-8"))["average_map"])
        reached = trained >= GOAL and untrained < UNTRAINED_LIMIT
        print(
            f"test mAP (Avg.): untrained {untrained:.3f} (expected below {UNTRAINED_LIMIT}), trained {trained:.3f} "
            f"(expected {GOAL:.2f} or more): {'reached' if reached else 'NOT REACHED'}"
        )
        print(f"picture: {self.picture}\nbundle:  {self.bundle}")
        print(f"next:    ccnet inspect {quoted_path(self.bundle)}")
        return 0 if reached else 1

    def _synthesize(self) -> None:
        from ccnet.synthetic.annotations import demo_annotations
        from runtime.files import write_json

        counts = ", ".join(f"{count} {subset}" for subset, count in VIDEOS.items())
        self.log(f"{counts} videos with the durations and overlaps of UnAV-100: {self.annotations}")
        write_json(self.annotations, demo_annotations(VIDEOS, self.config.model.num_classes, seed=SEED))
        where = ("--annotations", self.annotations, "--out", self.features)
        self.command("synthesize", "--preset", PRESET, *where, "--difficulty", DIFFICULTY, "--seed", SEED)

    def _score_untrained(self) -> float:
        """Return the test mAP of the network before any training."""
        import torch

        from ccnet.network.model import CCNet
        from ccnet.training.validation import evaluate_network
        from runtime.annotations import read_annotations

        annotations = read_annotations(self.annotations)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.train.seed)
            model = CCNet(self.config.model)
        spec = self.config.spec(annotations.labels)
        average = evaluate_network(model, spec, annotations, self.features, "test").average_map
        self.log(f"the untrained network has a test mAP (Avg.) of {average:.3f}")
        return average

    def _train(self) -> None:
        where = ("--annotations", self.annotations, "--features", self.features, "--out", self.training)
        resume = ("--resume",) if (self.training / "last").is_dir() else ()
        self.command("train", "--preset", PRESET, *where, *resume)

    def _draw(self) -> None:
        """Draw the test video whose gates move most, among those with the most classes."""
        from ccnet.checkpoint import read_checkpoint
        from ccnet.plots import Shown, draw_timeline, read_gates
        from ccnet.synthetic.features import FeatureSynthesizer, SynthesisSettings
        from runtime.annotations import read_annotations
        from runtime.detections import read_events
        from runtime.features import FeatureFiles

        annotations = read_annotations(self.annotations)
        checkpoint = read_checkpoint(self.training / "best")
        spec, model = checkpoint.spec, checkpoint.load_model()
        videos = sorted(annotations.subset("test"), key=lambda video: -len(set(video.labels.tolist())))[:_CANDIDATES]
        gates = {
            video.video_id: read_gates(model, spec, FeatureFiles(self.features, video.video_id).read(spec))
            for video in videos
        }
        video = max(videos, key=lambda video: gates[video.video_id].audio.std() + gates[video.video_id].visual.std())
        synthesizer = FeatureSynthesizer(
            num_classes=spec.num_classes,
            visual_dim=spec.visual_dim,
            audio_dim=spec.audio_dim,
            time_base=spec.time_base,
            settings=SynthesisSettings.of_difficulty(DIFFICULTY, SEED),
        )
        draw_timeline(
            self.picture,
            truth=video,
            predictions=read_events(self.events, spec.labels)[video.video_id],
            gates=gates[video.video_id],
            shown=Shown(spec.time_base.fps, *synthesizer.presence(video)),
        )
