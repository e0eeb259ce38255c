"""Damaged and hostile files: whatever a file holds, its reader ends with a result or a `CCNetError` of bounded text.

Every reader gets a few hundred mutations of a good file, the same ones in every run. `make soak` tries many more:
CCNET_FUZZ is their number for each reader, CCNET_FUZZ_SEED where to start. A failure names the seed that repeats it.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    SMALLEST as CONFIG,
)
from builders import (
    SMALLEST_LABELS as LABELS,
)
from builders import SPEC, OracleBackend, features_with, fill_draft, make_bundle, write_features
from fuzzing import RAW, Attack, mutated_bytes, mutated_json, mutated_npy, mutated_text

from ccnet.checkpoint import MANIFEST as CHECKPOINT
from ccnet.checkpoint import WEIGHTS, read_checkpoint, save_checkpoint
from ccnet.cli import inspect
from ccnet.config import parse_overrides, preset, with_overrides
from ccnet.network.model import CCNet
from ccnet.network.released import read_released
from ccnet.training.learner import Learner
from ccnet.training.state import STATE, TENSORS, Position, read_state, save_state
from export.bundle_writer import changed_bundle, new_bundle
from export.parity.inputs import synthetic_inputs
from export.parity.reference import Reference, load_reference, record, save_reference
from runtime.annotations import read_annotations
from runtime.bundle import MANIFEST, PARITY
from runtime.detections import read_events
from runtime.features import read_video
from runtime.files import sha256_file
from runtime.formats.events import Event, Video
from runtime.formats.registry import FORMATS, read_videos
from runtime.records import BadRecord, parse_json


def test_json_itself() -> None:
    for text in (*RAW[:5], *RAW[6:8], *RAW[9:12], *RAW[15:]):
        with pytest.raises(BadRecord):
            parse_json(text)


def test_bundle_manifest(attack: Attack, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    good = bundle.manifest.to_json()

    def read(path: Path) -> None:
        for as_json in (False, True):
            inspect.run(argparse.Namespace(bundle=path.parent, json=as_json), [])
        with changed_bundle(path.parent):
            pass

    attack(read, bundle.folder / MANIFEST, lambda rng: mutated_json(good, rng))


def test_parity_reports(attack: Attack, tmp_path: Path) -> None:
    with new_bundle(tmp_path / "b", spec=SPEC, model={}, checkpoint_sha256="0" * 64, versions={}) as draft:
        fill_draft(draft)
    good = json.loads((tmp_path / "b" / PARITY).read_text())
    manifest = (tmp_path / "b" / MANIFEST).read_bytes()

    def read(path: Path) -> None:
        (path.parent / MANIFEST).write_bytes(manifest)
        with changed_bundle(path.parent):
            pass

    attack(read, tmp_path / "b" / PARITY, lambda rng: mutated_json(good, rng))


def test_checkpoint(attack: Attack, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", CCNet(CONFIG.model), config=CONFIG, labels=LABELS, metrics={"epoch": 1})
    good = json.loads((tmp_path / "c" / CHECKPOINT).read_text())
    attack(
        lambda path: read_checkpoint(path.parent).load_model(),
        tmp_path / "c" / CHECKPOINT,
        lambda rng: mutated_json(good, rng),
        share=0.3,
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    learner = Learner(CONFIG, torch.device("cpu"))
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    row = {"epoch": 1, "step": 3, "learning_rate": 0.1, "loss": 0.5}
    position = Position(epoch=1, batch=2, best_map=0.5, best_epoch=1, epochs=(row,), steps=(row,))
    save_state(tmp_path / "last", learner, position, labels=LABELS, annotations_sha256="0", metrics={})
    return tmp_path / "last"


@pytest.fixture
def resume() -> Callable[[Path], None]:
    """Return what restores a learner; always the same one, as making one takes most of the time."""
    learner = Learner(CONFIG, torch.device("cpu"))

    def restore(folder: Path) -> None:
        with torch.random.fork_rng([]):
            read_state(folder).restore(learner)

    return restore


def test_training_state(attack: Attack, state: Path, resume: Callable[[Path], None]) -> None:
    good = json.loads((state / STATE).read_text())
    attack(lambda path: resume(path.parent), state / STATE, lambda rng: mutated_json(good, rng), share=0.2)


@pytest.mark.parametrize("name", [TENSORS, WEIGHTS])
def test_tensors_behind_their_hash(attack: Attack, state: Path, resume: Callable[[Path], None], name: str) -> None:
    good = (state / name).read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def mutate(rng: np.random.Generator) -> bytes:
        if rng.random() < 0.3:
            return mutated_bytes(good, rng)
        text = mutated_json(header, rng)
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    def read(path: Path) -> None:
        manifest = path.parent / (STATE if name == TENSORS else CHECKPOINT)
        content = json.loads(manifest.read_text())
        place = content if name == TENSORS else content["weights"]
        place |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
        manifest.write_text(json.dumps(content))
        resume(path.parent)

    attack(read, state / name, mutate, share=0.05)


def test_released_weights(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "released.pth.tar"
    torch.save({"epoch": 1, "state_dict_ema": {f"module.{i}": torch.zeros(3) for i in range(4)}}, path)
    good = path.read_bytes()
    attack(read_released, path, lambda rng: mutated_bytes(good, rng))


def test_overrides(attack: Attack, tmp_path: Path) -> None:
    config = preset("demo").to_json()
    keys = [f"{section}.{name}" for section, fields in config.items() for name in fields]

    def mutate(rng: np.random.Generator) -> bytes:
        key = keys[rng.integers(len(keys))]
        section, _, name = key.partition(".")
        text = json.dumps(config[section][name]).encode()
        value = RAW[rng.integers(len(RAW))].encode() if rng.random() < 0.5 else mutated_bytes(text, rng)
        return f"--{key}=".encode() + value

    def read(path: Path) -> None:
        argument = path.read_bytes().decode(errors="surrogateescape")
        with_overrides(preset("demo"), parse_overrides([argument]))

    attack(read, tmp_path / "argument", mutate)


def test_reference(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    videos = synthetic_inputs(SPEC, count=2)
    save_reference(path, Reference(SPEC, "0" * 64, videos, record(OracleBackend(), videos)))
    good = path.read_bytes()
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    header = json.loads(str(arrays["header"]))

    def mutate(rng: np.random.Generator) -> bytes:
        if rng.random() < 0.3:
            return mutated_bytes(good, rng)
        stream = io.BytesIO()
        changed = dict(arrays)
        name = list(arrays)[rng.integers(len(arrays))]
        action = rng.integers(6)
        if action == 0 or name == "header":
            text = mutated_json(header, rng).decode(errors="replace")
            changed["header"] = np.array(text[:200_000])
        elif action == 1:
            del changed[name]
        elif action == 2:
            changed[name] = arrays[name].astype(
                [np.float64, np.int8, np.uint64, "S8", "M8[s]", np.complex64][rng.integers(6)]
            )
        elif action == 3:
            changed[name] = arrays[name][1:] if rng.random() < 0.5 else arrays[name].reshape(-1)
        elif action == 4:
            values = arrays[name].copy()
            values.flat[rng.integers(values.size)] = (
                [-1, 0, 2**31 - 1][rng.integers(3)] if values.dtype.kind == "i" else np.nan
            )
            changed[name] = values
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, array in changed.items():
                data = io.BytesIO()
                np.save(data, array)
                content = data.getvalue()
                if action == 5 and key == name:
                    content = mutated_npy(content, rng)
                archive.writestr(f"{key}.npy", content)
        return stream.getvalue()

    attack(load_reference, path, mutate)


def test_features(attack: Attack, tmp_path: Path) -> None:
    write_features(tmp_path, "v", features_with(12))
    path = tmp_path / "v_seen.npy"
    good = path.read_bytes()
    attack(
        lambda path: read_video(path.parent, "v", SPEC.layout, SPEC.visual_dim, SPEC.audio_dim),
        path,
        lambda rng: mutated_npy(good, rng),
    )


def test_annotations(attack: Attack, tmp_path: Path) -> None:
    events = [{"segment": [0.5, 2], "label": LABELS[i], "label_id": i} for i in range(3)]
    good = {"database": {name: {"duration": 9.5, "subset": "test", "annotations": events} for name in ("v", "w")}}
    attack(read_annotations, tmp_path / "annotations.json", lambda rng: mutated_json(good, rng))


def test_events(attack: Attack, tmp_path: Path) -> None:
    events = [{"segment": [0.5, 2], "label": LABELS[i], "label_id": i, "score": 0.5} for i in range(3)]
    good = [{"video_id": name, "duration": 9.5, "events": events} for name in ("v", "w")]
    attack(
        read_events,
        tmp_path / "events.jsonl",
        lambda rng: b"\n".join(mutated_json(line, rng) for line in good),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_other_tools(attack: Attack, name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    if name == "parquet":
        pytest.importorskip("pyarrow")
    events = [Event(0.5 + i, 2.25 + i, LABELS[i % 3], 0.25 * i, i % 3) for i in range(4)]
    path = tmp_path / f"v{form.suffix}"
    form.write(path, [Video("v", events, 9.5, "test")])
    good = path.read_bytes()

    def mutate(rng: np.random.Generator) -> bytes:
        if form.suffix == ".json":
            return mutated_json(json.loads(good), rng)
        return mutated_bytes(good, rng) if name == "parquet" else mutated_text(good, rng)

    attack(lambda path: read_videos(path, form), path, mutate)


def test_annotations_of_activitynet(attack: Attack, tmp_path: Path) -> None:
    events = [{"segment": [0.5, 2], "label": label} for label in LABELS]
    good = {"database": {name: {"duration": 9.5, "subset": "training", "annotations": events} for name in ("v", "w")}}
    attack(read_annotations, tmp_path / "annotations.json", lambda rng: mutated_json(good, rng))


@pytest.mark.parametrize("name", ["dog_val.txt", "durations.csv"])
def test_annotations_of_thumos(attack: Attack, name: str, tmp_path: Path) -> None:
    good = {"dog_val.txt": b"v 0.5 2\nw  1 2.5\n", "durations.csv": b"video_id,duration\nv,9.5\nw,7\n"}
    for other, content in good.items():
        (tmp_path / other).write_bytes(content)
    attack(lambda path: read_annotations(path.parent), tmp_path / name, lambda rng: mutated_text(good[name], rng))
