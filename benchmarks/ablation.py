"""What is each part of the network worth on synthetic features? In the form of the paper's Tables 2 and 3.

    python -m benchmarks.ablation [--seeds 0 1 2] [--out DIR] [--work DIR]

Every variant is trained for the same steps, on the same batches, from the same seeds; the averaged weights of the last
step are scored on the test subset, without choosing among epochs. A finished run is kept in the work folder, so that
the benchmark can be run in pieces. `model.cmi off` leaves each modality's Block attending to itself (the same number
of parameters), `model.tcg off` leaves the gates out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.networks import SMALL
from benchmarks.results import RESULTS, Measurement, markdown_table, write_result
from ccnet.cli.logs import reporting
from ccnet.config import LossConfig, TrainConfig, with_overrides
from ccnet.synthetic.features import SynthesisSettings
from runtime.files import write_json
from runtime.machine import machine_facts

log = logging.getLogger("benchmarks")

WORK = Path(__file__).resolve().parents[1] / "build" / "ablation"
TIOU = (0.5, 0.6, 0.7, 0.8, 0.9)

CONFIG = dataclasses.replace(
    SMALL,
    train=TrainConfig(
        epochs=15,
        warmup_epochs=1,
        learning_rate=5e-3,
        ema=0.95,
        workers=0,
        device="cpu",
        validate_every=1000,  # only after the last epoch
    ),
    loss=LossConfig(normalizer=100.0),
)
"""Videos of 10 to 60 s in steps of 0.96 s."""
SYNTHESIS = SynthesisSettings(seed=1, signal=10.0, distractors=2.0, distractor_strength=1.75, tails=0.5)
"""Of what one modality shows, two thirds is no event, and it shows more strongly than the events do: the sum of both
modalities does not tell them apart."""
VIDEOS = {"train": 240, "validation": 16, "test": 160}


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    overrides: Mapping[str, str]


VARIANTS = (
    Variant("CCNet, all parts", {}),
    Variant("without CMI", {"model.cmi": "off"}),
    Variant("without TCG", {"model.tcg": "off"}),
    Variant("without CMI and TCG", {"model.cmi": "off", "model.tcg": "off"}),
    Variant("without C2F", {"model.c2f": "off"}),
    Variant("without F2C", {"model.f2c": "off"}),
    Variant("without C2F and F2C", {"model.c2f": "off", "model.f2c": "off"}),
)


@dataclass(frozen=True)
class Job:
    variant: Variant
    seed: int
    work: Path

    @property
    def result(self) -> Path:
        return self.work / "runs" / f"{self.variant.name.replace(' ', '-').replace(',', '')}-{self.seed}.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the page from all that is there."""
    parser = argparse.ArgumentParser(description="Synthetic ablation in the form of the paper's Tables 2 and 3.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--rows", type=int, nargs="+", help="only these rows of the table, counted from 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of data and finished runs (build/ablation)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time; default: all cores")
    options = parser.parse_args(argv)
    machine = machine_facts()
    work = options.work / _identity()
    synthesize(work)
    variants = [VARIANTS[row] for row in options.rows] if options.rows else list(VARIANTS)
    jobs = [Job(variant, seed, work) for seed in options.seeds for variant in variants]
    missing = [job for job in jobs if not job.result.is_file()]
    context = multiprocessing.get_context("spawn")
    with reporting(), ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        log.info("%d runs, %d of them to be done, %d at a time", len(jobs), len(missing), options.processes)
        for line in pool.map(run, missing):
            log.info("%s", line)
    print(report(work, options.seeds, options.out, machine))


def synthesize(work: Path) -> None:
    """Write the annotation file and its features, once."""
    from ccnet.synthetic.annotations import demo_annotations
    from ccnet.synthetic.folder import synthesize_folder
    from runtime.annotations import read_annotations

    path = work / "annotations.json"
    if not path.is_file():
        write_json(path, demo_annotations(VIDEOS, CONFIG.model.num_classes, seed=SYNTHESIS.seed))
    annotations = read_annotations(path)
    synthesize_folder(annotations, list(annotations.videos.values()), work / "features", CONFIG, SYNTHESIS, quiet=True)


def run(job: Job) -> str:
    """Train one variant with one seed on one core, and keep its scores. Returns a line for the log."""
    import torch

    from ccnet.checkpoint import read_checkpoint
    from ccnet.training.loop import train
    from ccnet.training.validation import evaluate_network
    from runtime.annotations import read_annotations

    torch.set_num_threads(1)
    config = with_overrides(CONFIG, {**job.variant.overrides, "train.seed": str(job.seed)})
    annotations, features = job.work / "annotations.json", job.work / "features"
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        result = train(config, annotations, features, out, quiet=True)
        checkpoint = read_checkpoint(result.last)
        network = checkpoint.load_model()
        evaluation = evaluate_network(
            network, checkpoint.spec, read_annotations(annotations), features, "test", quiet=True
        )
    scores: dict[str, Any] = {
        "map": [evaluation.map_at[threshold] for threshold in TIOU],
        "average": evaluation.average_map,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "last_loss": result.epochs[-1]["loss"],
        "steps": result.epochs[-1]["step"],
        "cpu_seconds": time.process_time() - begun,
    }
    write_json(job.result, scores)
    return f"{job.variant.name}, seed {job.seed}: mAP Avg {100 * evaluation.average_map:.1f}"


def report(work: Path, seeds: Sequence[int], out: Path, machine: Mapping[str, Any]) -> str:
    """Write `ablation.json` and `ablation.md` from the finished runs of these seeds; returns the page."""
    finished = {
        variant.name: scores
        for variant in VARIANTS
        if len(scores := [json.loads(p.read_text()) for s in seeds if (p := Job(variant, s, work).result).is_file()])
        == len(seeds)
    }
    full = finished.get(VARIANTS[0].name)
    rows, measurements = [], []
    for name, scores in finished.items():
        averages = [100 * score["average"] for score in scores]
        means = [100 * statistics.mean(score["map"][i] for score in scores) for i in range(len(TIOU))]
        change = "" if full is None or name == VARIANTS[0].name else _change(scores, full)
        row = [name, *(f"{mean:.1f}" for mean in means), f"{statistics.mean(averages):.1f}"]
        row += [" / ".join(f"{average:.1f}" for average in averages), change]
        rows.append(row)
        measurements.append(
            Measurement(name=f"{name} / mAP Avg", value=statistics.mean(averages), unit="%", better="higher")
        )
    header = ["", *(str(threshold) for threshold in TIOU), "Avg.", "Avg. of each seed", "change, mean (from, to)"]
    page = "\n\n".join(
        ["# Ablation on synthetic features", _description(finished, seeds), markdown_table(header, rows)]
    )
    details = {"settings": {**_settings(), "seeds": list(seeds)}, "runs": finished}
    write_result(out, "ablation", measurements=measurements, page=page, machine=machine, **details)
    return page


def _change(scores: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]) -> str:
    """Return the difference to the full network, seed by seed."""
    changes = [100 * (score["average"] - other["average"]) for score, other in zip(scores, full, strict=True)]
    return f"{statistics.mean(changes):+.1f} ({min(changes):+.1f}, {max(changes):+.1f})"


def _description(finished: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> str:
    model, train, settings = CONFIG.model, CONFIG.train, SYNTHESIS
    steps = next(iter(finished.values()))[0]["steps"] if finished else 0
    return (
        f"mAP (%) on {VIDEOS['test']} synthetic test videos after {steps} steps of batch {train.batch_size} on "
        f"{VIDEOS['train']} training videos, mean of the seeds {', '.join(map(str, seeds))}. A small network (T = "
        f"{model.length}, D = {model.dim}, {model.levels} levels, {model.num_classes} classes); every row has the same "
        f"steps, batches and seeds. Synthetic: signature {settings.signal} noise deviations, {settings.distractors} "
        f"seen-only and as many heard-only distractors per event, {settings.distractor_strength} times as strong as "
        f"an event, {100 * settings.tails:.0f}% of event boundaries drawn out in one modality. Without CMI each "
        "modality's block attends to itself (as many parameters); without TCG there are no gates. Both modalities "
        "still meet in MTGC and the heads. These numbers say nothing about UnAV-100."
    )


def _settings() -> dict[str, Any]:
    return {"config": CONFIG.to_json(), "synthesizing": dataclasses.asdict(SYNTHESIS), "videos": VIDEOS}


def _identity() -> str:
    """Return the name of the folder in which runs of these settings are kept."""
    return hashlib.sha256(json.dumps(_settings(), sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
