"""Damaged and hostile files: whatever a file holds, its reader ends with a result or a `CCNetError` of bounded text.

Every reader gets a few hundred mutations of a good file, the same ones in every run. `make soak` tries many more:
CCNET_FUZZ is their number for each reader, CCNET_FUZZ_SEED where to start. A failure names the seed that repeats it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
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
from fuzzing import RAW, mutated_bytes, mutated_json, mutated_npy

from ccnet.checkpoint import MANIFEST as CHECKPOINT
from ccnet.checkpoint import WEIGHTS, read_checkpoint, save_checkpoint
from ccnet.cli.main import main
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
from runtime.corpus.plan import pinned_engine, read_plan
from runtime.corpus.run import Run
from runtime.corpus.sources import read_manifest
from runtime.corpus.store import LocalStore
from runtime.detections import read_events
from runtime.features import read_video
from runtime.files import sha256_file
from runtime.formats.events import Event, Video
from runtime.formats.registry import FORMATS, read_videos
from runtime.localizer import Localizer
from runtime.records import BadRecord, parse_json

Attack = Callable[..., None]


@pytest.fixture
def attack(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Attack:
    """Read mutations; the numbers go to the table at the end of the session, and a fault fails the test."""
    reader = request.node.name.removeprefix("test_")

    def run(read: Callable[[Path], object], path: Path, mutate: fuzzing.Mutate, *, share: float = 1.0) -> None:
        row, found = fuzzing.attack(reader, read, path, mutate, round(fuzzing.COUNT * share))
        record_property("fuzz", row.to_json())
        assert not found, "\n".join(f"{kind}: {example}" for kind, example in found.items())

    return run


def test_json_itself() -> None:
    for text in (*RAW[:5], *RAW[6:8], *RAW[9:12], *RAW[15:]):
        with pytest.raises(BadRecord):
            parse_json(text)


def test_bundle_manifest(attack: Attack, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    good = bundle.manifest.to_json()

    def read(path: Path) -> None:
        for arguments in ([], ["--json"]):
            if main(["inspect", str(path.parent), *arguments]) == 0:
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
    row = {"epoch": 1, "step": 3, "learning_rate": 0.1, "loss": 0.5}
    position = Position(epoch=1, batch=2, best_map=0.5, best_epoch=1, epochs=(row,), steps=(row,))
    save_state(tmp_path / "last", learner, position, labels=LABELS, annotations_sha256="0", metrics={})
    return tmp_path / "last"


def _resume(folder: Path) -> None:
    with torch.random.fork_rng([]):
        read_state(folder).restore(Learner(CONFIG, torch.device("cpu")))


def test_training_state(attack: Attack, state: Path) -> None:
    good = json.loads((state / STATE).read_text())
    attack(lambda path: _resume(path.parent), state / STATE, lambda rng: mutated_json(good, rng), share=0.2)


@pytest.mark.parametrize("name", [TENSORS, WEIGHTS])
def test_tensors_behind_their_hash(attack: Attack, state: Path, name: str) -> None:
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
        _resume(path.parent)

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
    structured = form.suffix == ".json"

    def mutate(rng: np.random.Generator) -> bytes:
        return mutated_json(json.loads(good), rng) if structured else mutated_bytes(good, rng)

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
    attack(lambda path: read_annotations(path.parent), tmp_path / name, lambda rng: mutated_bytes(good[name], rng))


def test_requests_with_tensors(attack: Attack, tmp_path: Path) -> None:
    from runtime.serving.models import localizer_model, localizer_source
    from runtime.serving.protocol import parse_infer

    visual, audio = features_with(12)
    inputs = [
        {"name": "visual", "datatype": "FP32", "shape": [12, 6], "data": visual.tolist()},
        {"name": "audio", "datatype": "FP32", "shape": [12, 3], "parameters": {"binary_data_size": audio.nbytes}},
        {"name": "duration", "datatype": "FP64", "shape": [1], "data": [9.5]},
    ]
    good = {"id": "v", "inputs": inputs, "outputs": [{"name": "scores", "parameters": {"binary_data": True}}]}

    def read(path: Path) -> Any:
        content = path.read_bytes()
        request = parse_infer(content, str(len(content) - audio.nbytes))
        localizer_model(SPEC).check(request)
        return Localizer([OracleBackend()], SPEC)(*localizer_source(request))

    attack(read, tmp_path / "request", lambda rng: mutated_json(good, rng) + audio.tobytes())


def test_uploads(attack: Attack, tmp_path: Path) -> None:
    from runtime.serving.uploads import features_of_files, parse_form, unpack_npz

    stream = io.BytesIO()
    np.savez_compressed(stream, visual=features_with(12).visual, audio=features_with(12).audio)
    archive = stream.getvalue()
    attack(
        lambda path: features_of_files(unpack_npz(path.read_bytes(), 100_000), SPEC, "v"),
        tmp_path / "v.npz",
        lambda rng: mutated_bytes(archive, rng),
    )
    pytest.importorskip("python_multipart")
    part = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="visual.npy"\r\n\r\n'
    form = part + archive + b"\r\n" + part.replace(b"visual", b"audio") + b"x\r\n--edge--\r\n"
    attack(
        lambda path: features_of_files(parse_form(path.read_bytes(), b"edge").files, SPEC, "v"),
        tmp_path / "form",
        lambda rng: mutated_bytes(form, rng),
    )


def test_manifest_of_videos(attack: Attack, tmp_path: Path) -> None:
    good = [{"video_id": name, "features": "part", "duration": 9.5} for name in ("v", "w")]
    attack(
        lambda path: read_manifest(str(path)),
        tmp_path / "videos.jsonl",
        lambda rng: b"\n".join(mutated_json(line, rng) for line in good),
    )


@pytest.mark.parametrize("name", ["plan.json", "videos.jsonl", "engine.json", "done/000000.json"])
def test_the_folder_of_a_run(attack: Attack, name: str, tmp_path: Path) -> None:
    write_features(tmp_path, "v", features_with(12, [(2, 8, 1, 3.0)]))
    bundle, out = make_bundle(tmp_path / "bundle"), tmp_path / "run"
    assert main(["predict", str(bundle.folder), "--features", str(tmp_path), "--out", str(out), "--quiet"]) == 0
    good = json.loads((out / name).read_bytes())

    def read(path: Path) -> None:
        store = LocalStore(out)
        plan = read_plan(store)
        assert plan is not None
        run = Run(store, plan)
        pinned_engine(store)
        if plan.shards:
            plan.entries(store, 0)
        run.summary()
        if run.complete:
            run.finish(str(tmp_path))

    attack(read, out / name, lambda rng: mutated_json(good, rng))
