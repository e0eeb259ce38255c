"""`ccnet demo`: run the whole job on synthetic features, with the commands a user types, in minutes on two cores.

Exit status: 0 when the trained network reaches the goal on the test subset and the untrained one is far from it, 1 when
it does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ccnet.config import PRESETS, Config
from runtime.errors import CCNetError

log = logging.getLogger(__name__)

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

# A process in which `import torch` fails, as on a machine that has the lean runtime only.
WITHOUT_TORCH = """import sys
sys.path[0] = sys.argv.pop(1)  # in place of the current folder
sys.modules['torch'] = None
from ccnet.cli.main import main
sys.exit(main(sys.argv[1:]))"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="synthesize, train, export, predict, evaluate, bench and draw, on a small set",
        description="Synthesizes a small set of videos with realistic durations and overlaps, trains a small network, "
        "exports it, predicts and evaluates in a process without PyTorch, measures its speed and draws one video. "
        f"Exit status 1 when the test mAP stays below {GOAL}.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything (default: %(default)s)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    out = Path(arguments.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "annotations.json").exists():
        raise CCNetError(f"{out}: holds other files; give --out a new folder")
    demo = _Demo(out, PRESETS[PRESET])
    return demo.run()


class _Demo:
    """The steps, in the order in which they run. All files are in one folder."""

    def __init__(self, out: Path, config: Config) -> None:
        self.out, self.config = out, config
        self.annotations = out / "annotations.json"
        self.features = out / "features"
        self.training = out / "training"
        self.bundle = out / "bundle"
        self.events = out / "events.jsonl"
        self.scores = out / "evaluation.json"
        self.picture = out / "timeline.png"
        self._begun = time.perf_counter()

    def run(self) -> int:
        self._synthesize()
        untrained = self._score_untrained()
        self._train()
        videos = ("--features", self.features, "--annotations", self.annotations)
        self._command("export", self.training / "best", "--out", self.bundle, *videos)
        test = ("--annotations", self.annotations, "--subset", "test")
        self._command("predict", self.bundle, "--features", self.features, *test, "--out", self.events, torch=False)
        self._command("evaluate", self.events, *test, "--json", self.scores, torch=False)
        self._command("bench", self.bundle, "--batches", 1, 4, "--seconds", 0.5, "--calls", 5, torch=False)
        self._draw()

        trained = float(json.loads(self.scores.read_text(encoding="utf-8"))["average_map"])
        reached = trained >= GOAL and untrained < UNTRAINED_LIMIT
        print(
            f"test mAP (Avg.): untrained {untrained:.3f} (expected below {UNTRAINED_LIMIT}), trained {trained:.3f} "
            f"(expected {GOAL:.2f} or more): {'reached' if reached else 'NOT REACHED'}"
        )
        print(f"picture: {self.picture}\nbundle:  {self.bundle}")
        print(f"next:    ccnet inspect {shlex.quote(str(self.bundle))}")
        return 0 if reached else 1

    def _synthesize(self) -> None:
        from ccnet.synthetic.annotations import demo_annotations
        from runtime.files import write_json

        counts = ", ".join(f"{count} {subset}" for subset, count in VIDEOS.items())
        self._log(f"{counts} videos with the durations and overlaps of UnAV-100: {self.annotations}")
        write_json(self.annotations, demo_annotations(VIDEOS, self.config.model.num_classes, seed=SEED))
        where = ("--annotations", self.annotations, "--out", self.features)
        self._command("synthesize", "--preset", PRESET, *where, "--difficulty", DIFFICULTY, "--seed", SEED)

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
        self._log(f"the untrained network has a test mAP (Avg.) of {average:.3f}")
        return average

    def _train(self) -> None:
        where = ("--annotations", self.annotations, "--features", self.features, "--out", self.training)
        resume = ("--resume",) if (self.training / "last").is_dir() else ()
        self._command("train", "--preset", PRESET, *where, *resume)

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

    def _command(self, *words: object, torch: bool = True) -> None:
        """Run `ccnet ...`; `torch=False`: in a process of its own in which PyTorch can't be imported.

        Raises CCNetError when it fails; the command has reported why.
        """
        from ccnet.cli.main import main

        argv = [str(word) for word in words]
        self._log(f"ccnet {' '.join(argv)}" + ("" if torch else "      (PyTorch can't be imported here)"))
        if torch:
            status = main(argv)
        else:
            ours = str(Path(__file__).resolve().parents[2])
            process = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, ours, *argv], env=os.environ, check=False)
            status = process.returncode
        if status:
            raise CCNetError(f"ccnet {argv[0]} ended with exit status {status}, expected 0")

    def _log(self, line: str) -> None:
        sys.stdout.flush()  # in a file that both streams go to, the order stays
        log.info("\n[%5.1f s] %s", time.perf_counter() - self._begun, line)
