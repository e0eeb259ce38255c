"""Damaged and hostile requests, uploads, lists, settings, and folders that runs keep: as in tests/test_fuzz.py."""

from __future__ import annotations

import io
import json
import zipfile
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, OracleBackend, engine, features_with, make_bundle, onnx_model_file, write_features
from fuzzing import Attack, Limits, mutated_bytes, mutated_json, mutated_npy, mutated_text

from ccnet.cli.convert import read_durations
from ccnet.cli.main import main
from ccnet.settings import read_settings
from runtime.annotations import read_class_list
from runtime.corpus.claims import FileClaims
from runtime.corpus.plan import pinned_engine, read_plan
from runtime.corpus.run import Run
from runtime.corpus.sources import read_manifest
from runtime.corpus.store import LocalStore
from runtime.detections import read_events
from runtime.files import sha256_file, write_json
from runtime.localizer import Localizer
from runtime.onnx_file import external_files
from runtime.video.extractor import MANIFEST as EXTRACTOR
from runtime.video.extractor import ExtractorManifest, ExtractorSpec, read_extractor


@pytest.mark.parametrize("model", ["localizer", "network"])
def test_requests(attack: Attack, model: str, tmp_path: Path) -> None:
    from runtime.serving.models import event_outputs, localizer_model, localizer_source, network_job, network_model
    from runtime.serving.protocol import infer_response, parse_infer

    visual, audio = features_with(12)
    inputs: list[dict[str, Any]] = [
        {"name": "visual", "datatype": "FP32", "shape": [12, 6], "data": visual.tolist()},
        {"name": "audio", "datatype": "FP32", "shape": [12, 3], "parameters": {"binary_data_size": audio.nbytes}},
    ]
    if model == "localizer":
        inputs.append({"name": "duration", "datatype": "FP64", "shape": [1], "data": [9.5]})
        outputs = [{"name": "scores", "parameters": {"binary_data": True}}]
    else:
        outputs = [{"name": "logits"}]
    good = {"id": "v", "inputs": inputs, "outputs": outputs}
    localizer = Localizer([OracleBackend()], SPEC)

    def mutate(rng: np.random.Generator) -> bytes:
        head = mutated_json(good, rng)
        stated = len(head) if rng.random() < 0.9 else int(rng.integers(2**31))
        return f"{stated}\n".encode() + head + audio.tobytes()

    def read(path: Path) -> None:
        stated, _, content = path.read_bytes().partition(b"\n")
        request = parse_infer(content, stated.decode())
        if model == "localizer":
            localizer_model(SPEC).check(request)
            found = localizer(*localizer_source(request))
            infer_response(model, "1", request, event_outputs(found))
        else:
            network_model(SPEC, 4).check(request)
            network_job(request, SPEC, 4, 4)

    attack(read, tmp_path / "request", mutate)


def test_uploads(attack: Attack, tmp_path: Path) -> None:
    pytest.importorskip("python_multipart")
    from runtime.serving.uploads import features_of_files, parse_form, unpack_npz

    arrays = dict(zip(("visual", "audio"), features_with(12), strict=True))
    archive = _archive(arrays, {})
    part = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="%s.npy"\r\n\r\n%s\r\n'
    good = {name: _npy(array) for name, array in arrays.items()}
    form = b"".join(part % (name.encode(), content) for name, content in good.items()) + b"--edge--\r\n"
    features_of_files(unpack_npz(archive, 100_000), SPEC, "v")
    features_of_files(parse_form(form, b"edge").files, SPEC, "v")

    def mutate(rng: np.random.Generator) -> bytes:
        if rng.random() < 0.5:
            return mutated_bytes(archive, rng)
        name = ("visual", "audio")[rng.integers(2)]
        return _archive(arrays, {name: mutated_npy(good[name], rng)})

    attack(
        lambda path: features_of_files(unpack_npz(path.read_bytes(), 100_000), SPEC, "v"),
        tmp_path / "v.npz",
        mutate,
        name="uploads[npz]",
    )
    attack(
        lambda path: features_of_files(parse_form(path.read_bytes(), b"edge").files, SPEC, "v"),
        tmp_path / "form",
        lambda rng: mutated_bytes(form, rng) if rng.random() < 0.5 else mutated_text(form, rng),
        name="uploads[form]",
    )


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _archive(arrays: dict[str, Any], instead: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", instead.get(name) or _npy(array))
    return stream.getvalue()


def test_manifest_of_videos(attack: Attack, tmp_path: Path) -> None:
    good = [{"video_id": name, "features": "part", "duration": 9.5} for name in ("v", "w")]
    attack(
        lambda path: read_manifest(str(path)),
        tmp_path / "videos.jsonl",
        lambda rng: b"\n".join(mutated_json(line, rng) for line in good),
    )


@pytest.mark.parametrize(
    "name", ["plan.json", "videos.jsonl", "engine.json", "done/000000.json", "shards/000000.jsonl"]
)
def test_the_folder_of_a_run(attack: Attack, name: str, tmp_path: Path) -> None:
    write_features(tmp_path, "v", features_with(12, [(2, 8, 1, 3.0)]))
    bundle, out = make_bundle(tmp_path / "bundle"), tmp_path / "run"
    assert main(["predict", str(bundle.folder), "--features", str(tmp_path), "--out", str(out), "--quiet"]) == 0
    lines = [json.loads(line) for line in (out / name).read_bytes().splitlines()] if name.endswith(".jsonl") else None
    good = lines or [json.loads((out / name).read_bytes())]

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
        if not run.left:
            run.join(str(tmp_path / "joined.jsonl"))
        if name.startswith("shards"):
            read_events(path, SPEC.labels)

    attack(read, out / name, lambda rng: b"\n".join(mutated_json(line, rng) for line in good))


def test_claims(attack: Attack, tmp_path: Path) -> None:
    first = FileClaims(tmp_path)
    assert first.acquire(0) == 0
    good = json.loads((tmp_path / "000000").read_bytes())
    second = FileClaims(tmp_path)

    def read(path: Path) -> None:
        second.acquire(0)
        second.attempts()
        second.release(0)

    attack(read, tmp_path / "000000", lambda rng: mutated_json(good, rng))
    for claims in (first, second):
        claims.close()


def test_class_lists(attack: Attack, tmp_path: Path) -> None:
    attack(read_class_list, tmp_path / "l.json", lambda rng: mutated_json(list(LABELS), rng), name="class_list[json]")
    text = "\n".join(LABELS).encode()
    attack(read_class_list, tmp_path / "l.txt", lambda rng: mutated_text(text, rng), name="class_list[txt]")


def test_durations(attack: Attack, tmp_path: Path) -> None:
    good = b"video_id,duration\nv,9.5\nw,7\n"
    attack(lambda path: read_durations(str(path)), tmp_path / "d.csv", lambda rng: mutated_text(good, rng))


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_settings(attack: Attack, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("tomllib" if suffix == ".toml" else "yaml")
    good = {
        ".toml": b'preset = "demo"\nout = "o"\n[model]\nlength = 64\nheads = 4\n[loss]\nnormalizer = 1.5\n',
        ".yaml": b"preset: demo\nout: o\nmodel:\n  length: 64\n  heads: 4\nlayout:\n  visual: [_a, _b]\n",
    }[suffix]

    def read(path: Path) -> None:
        read_settings(path).config("demo", {})

    attack(read, tmp_path / f"s{suffix}", lambda rng: mutated_text(good, rng))


def test_extractor_manifest(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    manifest = ExtractorManifest(
        schema=1,
        versions={},
        created="2000-01-01T00:00:00+00:00",
        files=(),
        model_files=(onnx_model_file(),),
        engines=(engine("onnxruntime"),),
        spec=ExtractorSpec(),
        weights={"raft": "0" * 64},
    )
    good = manifest.to_json()

    def read(path: Path) -> None:
        extractor = read_extractor(path.parent)
        extractor.engines("flow")
        extractor.identity()

    attack(read, tmp_path / EXTRACTOR, lambda rng: mutated_json(good, rng))


def test_records_of_extraction(attack: Attack, tmp_path: Path) -> None:
    from runtime.video.container import ReadOptions
    from runtime.video.files import VideoPath, is_done, recorded_duration

    manifest = ExtractorManifest(
        schema=1, versions={}, created="", files=(), model_files=(), engines=(), spec=ExtractorSpec(), weights={}
    )
    write_json(tmp_path / EXTRACTOR, manifest.to_json())
    extractor, options = read_extractor(tmp_path), ReadOptions()
    video = VideoPath("v", str(tmp_path / "v.mp4"))
    Path(video.path).write_bytes(b"x")
    facts = (tmp_path / "v.mp4").stat()
    names = [f"v{suffix}.npy" for suffix in (*extractor.spec.layout.visual, *extractor.spec.layout.audio)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    good = {
        "schema": 1,
        "video": {"id": "v", "path": video.path, "size": facts.st_size, "modified": facts.st_mtime_ns},
        "files": {name: sha256_file(tmp_path / name) for name in names},
        "duration": 9.5,
        "extractor": json.loads(json.dumps(extractor.identity())),
        "options": {"missing_audio": options.missing_audio, "timestamps": options.timestamps},
        "precisions": {"flow": "fp32"},
    }
    write_json(tmp_path / "v.json", good)
    assert is_done(video, tmp_path, extractor, options, {"flow": "fp32"})

    def read(path: Path) -> None:
        if is_done(video, tmp_path, extractor, options, {"flow": "fp32"}):
            assert recorded_duration(tmp_path, "v") > 0

    attack(read, tmp_path / "v.json", lambda rng: mutated_json(good, rng))


def test_graphs(attack: Attack, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    good = (tmp_path / "b" / "model.onnx").read_bytes()
    attack(external_files, tmp_path / "g.onnx", lambda rng: mutated_bytes(good, rng))


def test_model_repositories(attack: Attack, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from runtime.triton.check import Container, check_repository

    make_bundle(tmp_path / "bundle")
    repository = tmp_path / "repository"
    assert main(["triton", str(tmp_path / "bundle"), "--out", str(repository), "--device", "cpu"]) == 0
    for path in sorted(repository.glob("*/config.pbtxt")):
        good = path.read_bytes()
        attack(
            lambda path: check_repository(repository, Container(onnxruntime=(1, 20), tensorrt=(10, 9))),
            path,
            partial(mutated_text, good),
            share=0.3,
            name=f"model_repository[{path.parent.name}]",
        )
        path.write_bytes(good)


def test_lists_of_videos(attack: Attack, tmp_path: Path) -> None:
    from runtime.video.files import find_video_files

    good = b"# videos\nv.mp4\n../w.mp4\n/x/y.mkv\n"
    attack(lambda path: find_video_files([path]), tmp_path / "l.txt", lambda rng: mutated_text(good, rng))


def mutated_mp4(content: bytes, rng: np.random.Generator) -> bytes:
    """Put other numbers into the index of an MP4 file, or damage its bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    damaged = bytearray(content)
    begin = content.index(b"moov")
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(begin, len(content) - 4))
        number = (0, 1, 255, 2**15, 2**31 - 1, 2**32 - 1, int(rng.integers(2**32)))[rng.integers(7)]
        damaged[at : at + 4] = number.to_bytes(4, "big")
    return bytes(damaged)


def test_videos(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    from video_files import write_video

    from runtime.video import frames
    from runtime.video.container import ReadOptions, ReadReport
    from runtime.video.sound import read_sound

    monkeypatch.setattr(frames, "LARGEST_PICTURE", 1 << 16)  # as a file of this size may have
    options = ReadOptions(threads=1, longest_seconds=20.0, missing_audio="silence")
    good = write_video(tmp_path / "good.mp4", size=(32, 48), count=6, sound=0.2).read_bytes()

    def read(path: Path) -> None:
        for _ in frames.read_frames(str(path), 32, Fraction(25), options, ReadReport()):
            pass
        for _ in read_sound(str(path), options, ReadReport()):
            pass

    # FFmpeg's own: some of its decoders take what a legal picture takes, whatever is in the file
    limits = Limits(seconds=5.0, base_bytes=1 << 30)
    attack(read, tmp_path / "v.mp4", lambda rng: mutated_mp4(good, rng), share=0.1, limits=limits)
