"""What `tests/kills.py` kills: every command that writes, with what must be true at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import video_kills
from builders import (
    DAVEL_OPTIONS,
    SPEC,
    OracleBackend,
    copying_exporter,
    davel_parameters,
    engine,
    features_with,
    fill_draft,
    golden,
    make_bundle,
    random_network,
    write_features,
)

import ccnet.cli.chain
import ccnet.cli.demo
import ccnet.config
import export.graph.to_onnx
import export.parity.check
import export.rebuild
from ccnet.checkpoint import read_checkpoint, save_checkpoint
from ccnet.cli.main import main as ccnet_main
from ccnet.config import Config, ModelConfig, TrainConfig
from ccnet.synthetic.annotations import demo_annotations
from ccnet.synthetic.features import SynthesisSettings
from ccnet.synthetic.folder import synthesize_folder
from ccnet.training.loop import train
from ccnet.training.state import read_state
from export.bundle_writer import new_bundle
from export.parity.inputs import stress_inputs, synthetic_inputs
from export.parity.reference import Reference, load_reference, record, save_reference
from export.tensorrt.build import EngineInfo
from export.tensorrt.options import EngineOptions
from runtime.annotations import read_annotations
from runtime.bundle import ModelFile, read_bundle
from runtime.corpus.pools import ProcessPool, ThreadPool
from runtime.detections import read_events
from runtime.files import atomic_file, sha256_file
from runtime.profiling.timing import Rules
from runtime.spec import TimeBase

CONFIG = Config(
    model=ModelConfig(
        length=16,
        levels=2,
        visual_dim=4,
        audio_dim=3,
        dim=8,
        heads=2,
        self_layers=0,
        num_classes=2,
        head_dim=8,
        tdm_dim=4,
    ),
    train=TrainConfig(batch_size=4, epochs=2, warmup_epochs=0, workers=0, device="cpu"),
    time_base=TimeBase(fps=25.0, stride_frames=96.0, window_frames=96.0),
)


@dataclass(frozen=True)
class Case:
    """Something that writes, and what must be true at any moment."""

    name: str
    prepare: Callable[[Path], None]
    """Make the folder as it is before, with an earlier result in it."""
    act: Callable[[Path], object]
    check: Callable[[Path], object]
    """Raise where the result is neither the old nor the new one."""
    same: tuple[str, ...] = ()
    """Patterns of files that the next run must leave as a run that nobody killed does, to the byte."""
    late: bool = False
    """Whether it calls `begin` where the calls begin that count."""
    threads: bool = False
    """Whether the calls of its other threads count, too."""
    most: int | None = None
    """Kills of this case at most: it takes long."""


def begin() -> None:
    """Called where the calls begin at which a case can be killed; in a process that is not to be killed, nothing."""


def _command(*words: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        os.chdir(folder)
        status = ccnet_main([*words])
        if status:
            raise RuntimeError(f"exit status {status}")

    return act


def _prepare_bundle(folder: Path) -> None:
    make_bundle(folder / "bundle", [engine("onnxruntime", status="unverified")])
    videos = stress_inputs(SPEC)[:3] + synthetic_inputs(SPEC, count=4)
    save_reference(folder / "ref.npz", Reference(SPEC, "0" * 64, videos, record(OracleBackend(), videos)))


def _check_bundle(folder: Path) -> None:
    read_bundle(folder / "bundle").verify()


def _prepare_videos(folder: Path) -> None:
    make_bundle(folder / "bundle")
    (folder / "features").mkdir()
    database: dict[str, Any] = {}
    for i in range(4):
        write_features(folder / "features", f"v{i}", features_with(20, [(3, 8, i, 2.0)]))
        event = {"segment": [3.0, 8.0], "label": SPEC.labels[i], "label_id": i}
        database[f"v{i}"] = {"duration": 20.0, "subset": "test", "annotations": [event]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    _predict(folder)
    shutil.copy(folder / "events.jsonl", folder / "old.jsonl")


_predict = _command("predict", "bundle", "--features", "features", "--out", "events.jsonl", "--quiet")


def _check_events(folder: Path) -> None:
    if len(read_events(folder / "events.jsonl", SPEC.labels)) != 4:
        raise RuntimeError("videos are missing")


def _evaluate(folder: Path) -> None:
    _command("evaluate", "old.jsonl", "--annotations", "annotations.json", "--json", "scores.json")(folder)


def _prepare_scores(folder: Path) -> None:
    _prepare_videos(folder)
    _evaluate(folder)


def _prepare_only_videos(folder: Path) -> None:
    _prepare_videos(folder)
    (folder / "events.jsonl").unlink()


def _check_shards(folder: Path) -> None:
    for path in folder.glob("run/shards/[!.]*"):
        if len(read_events(path, SPEC.labels)) != 2:
            raise RuntimeError("videos are missing")


def _check_page(folder: Path) -> None:
    if not (folder / "page.html").read_text().rstrip().endswith("</html>"):
        raise RuntimeError("the page is not whole")


def _prepare_page(folder: Path) -> None:
    _prepare_videos(folder)
    _SHOW(folder)


def _prepare_comparison(folder: Path) -> None:
    _prepare_videos(folder)
    _COMPARE(folder)


def _prepare_repository(folder: Path) -> None:
    make_bundle(folder / "bundle")
    _TRITON(folder)


def _check_repository(folder: Path) -> None:
    from runtime.triton.check import Container, check_repository

    if problems := check_repository(folder / "repository", Container()):
        raise RuntimeError(f"Triton would refuse the repository: {problems}")


def _new_bundle(folder: Path) -> None:
    with new_bundle(folder / "bundle", spec=SPEC, model={}, checkpoint_sha256="0" * 64, versions={}) as draft:
        fill_draft(draft)


def _prepare_export(folder: Path) -> None:
    save_checkpoint(folder / "checkpoint", random_network(CONFIG.model), config=CONFIG, labels=("a", "b"))
    _EXPORT(folder)
    shutil.copy(folder / "bundle" / "model.onnx", folder / "graph.onnx")


def _export(folder: Path) -> None:
    """Export as the command does, but for the graph, which takes long to make and is there."""
    export.graph.to_onnx.export_onnx = copying_exporter(folder / "graph.onnx")  # type: ignore[assignment]
    export.parity.check.SPEED_RULES = Rules(seconds=0, calls=3)
    _EXPORT(folder)


def _prepare_released(folder: Path) -> None:
    torch.save(davel_parameters(golden("davel")), folder / "released.pt")
    _import_weights(folder)


def _check_checkpoint(folder: Path) -> None:
    read_checkpoint(folder / "checkpoint").load_model()


def _prepare_training(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(demo_annotations({"train": 6, "validation": 5}, 2, seed=1)))
    _synthesize(folder)
    one = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=1))
    train(one, folder / "annotations.json", folder / "features", folder / "old", quiet=True)


def _train(folder: Path) -> None:
    resume = (folder / "run" / "last").is_dir()
    train(CONFIG, folder / "annotations.json", folder / "features", folder / "run", resume=resume, quiet=True)


def _check_training(folder: Path) -> None:
    for name in ("best", "last"):
        if (folder / "run" / name).is_dir():
            read_checkpoint(folder / "run" / name).load_model()
    if (folder / "run" / "last").is_dir():
        done = read_state(folder / "run" / "last").position.epoch
        table = folder / "run" / "metrics.csv"
        if table.exists() and len(table.read_text().splitlines()) - 1 > done:
            raise RuntimeError("the table reports an epoch whose state is lost")


def _synthesize(folder: Path) -> None:
    annotations = read_annotations(folder / "annotations.json")
    videos = list(annotations.videos.values())
    synthesize_folder(annotations, videos, folder / "features", CONFIG, SynthesisSettings(), quiet=True)


def _check_features(folder: Path) -> None:
    for path in (folder / "features").glob("[!.]*.npy"):
        np.load(path, allow_pickle=False)


def _prepare_annotations(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(demo_annotations({"train": 4}, 2, seed=1)))


def _save_reference(folder: Path) -> None:
    videos = synthetic_inputs(SPEC, count=2)
    save_reference(folder / "ref.npz", Reference(SPEC, "0" * 64, videos, record(OracleBackend(), videos)))


def _from(pool: type[ThreadPool | ProcessPool], act: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what kills from the start of a pool's worker on: its calls are counted, not those that come before."""

    def acting(folder: Path) -> None:
        start = pool.start

        def starting(self: Any, worker: int) -> None:
            begin()
            start(self, worker)

        pool.start = starting  # type: ignore[method-assign, assignment]
        act(folder)

    return acting


_ENGINE = ModelFile(
    name="tensorrt-rtx-fp32",
    format="tensorrt-rtx",
    files=("tensorrt-rtx-fp32.engine",),
    precision="fp32",
    max_batch=4,
    library_version="1.0",
    profile=(1, 2, 4),
    options=EngineOptions(format="tensorrt-rtx", precision="fp32", profile=(1, 2, 4)).to_json(),
)


def _prepare_engine(folder: Path) -> None:
    graph = make_bundle(folder / "plain").folder / "model.onnx"
    built = dataclasses.replace(_ENGINE, onnx_sha256=sha256_file(graph))
    verified = engine("tensorrt-rtx", model_file=built.name)
    make_bundle(folder / "bundle", [verified, engine("onnxruntime")], engine_files=[built])
    shutil.rmtree(folder / "plain")


def _rebuild(folder: Path) -> None:
    """Rebuild as the command does, but for the engine library, which takes long or is not there."""

    def build_engine(onnx_path: Path, out_path: Path, options: EngineOptions) -> EngineInfo:
        with atomic_file(out_path) as stream:
            stream.write(b"another engine")
        return EngineInfo(
            path=out_path,
            options=options,
            library="tensorrt_rtx",
            library_version="2.0",
            gpu_name=None,
            compute_capabilities=(),
            profile=options.profile,
            opset=17,
            onnx_sha256=sha256_file(onnx_path),
            build={},
        )

    export.rebuild.build_engine = build_engine  # type: ignore[attr-defined, assignment]
    _command("rebuild", "bundle", "tensorrt-rtx-fp32")(folder)


def _prepare_demo(folder: Path) -> None:
    _demo(folder)
    shutil.copy(folder / "demo" / "bundle" / "model.onnx", folder / "graph.onnx")


def _demo(folder: Path) -> None:
    """Run the demonstration with a network that takes seconds, and its graph exported beforehand."""
    small = dataclasses.replace(CONFIG.train, batch_size=8)
    presets: Any = ccnet.config.PRESETS
    demo = presets["demo"]
    model = dataclasses.replace(demo.model, dim=8, heads=2, head_dim=8, tdm_dim=4, self_layers=0)
    presets["demo"] = dataclasses.replace(demo, model=model, train=small)
    ccnet.cli.demo.VIDEOS.update(train=8, validation=4, test=4)
    export.parity.check.SPEED_RULES = Rules(seconds=0, calls=3)
    if (folder / "graph.onnx").exists():
        export.graph.to_onnx.export_onnx = copying_exporter(folder / "graph.onnx")  # type: ignore[assignment]
    os.chdir(folder)
    if ccnet_main(["demo", "--out", "demo"]) not in (0, 1):  # 1: so small a network learns nothing
        raise RuntimeError("the demonstration failed")


def _check_demo(folder: Path) -> None:
    demo = folder / "demo"
    json.loads((demo / "annotations.json").read_text())
    read_bundle(demo / "bundle").verify()
    if len(read_events(demo / "events.jsonl")) != 4:
        raise RuntimeError("videos are missing")


_EXPORT = _command("export", "checkpoint", "--out", "bundle", "--videos", "2", "--max-batch", "2")
_import_weights = _command(
    "import-weights", "released.pt", "--preset", "davel_unav100", "--out", "checkpoint", *DAVEL_OPTIONS
)
_VERIFY = _command("verify", "bundle", "--reference", "ref.npz", "--backend", "onnxruntime")
_SHARDS = _command("predict", "bundle", "--features", "features", "--out", "run", "--shard-size", "2", "--quiet")
_PROCESSES = _command(
    *("predict", "bundle", "--features", "features", "--out", "run", "--shard-size", "2", "--quiet"),
    *("--processes", "2", "--threads", "1"),
)
_SHOW = _command("show", "old.jsonl", "--annotations", "annotations.json", "--out", "page.html", "--quiet")
_COMPARE = _command(
    *("compare", "old.jsonl", "events.jsonl", "--annotations", "annotations.json"),
    *("--json", "comparison.json", "--draws", "10", "--quiet"),
)
_TRITON = _command("triton", "bundle", "--out", "repository", "--device", "cpu")
_CONVERT = _command("convert", "old.jsonl", "--out", "events.csv")
CASES = (
    Case("verify", _prepare_bundle, _VERIFY, _check_bundle, ("bundle/model.onnx",)),
    Case("export", _prepare_export, _export, _check_bundle, ("bundle/model.onnx",)),
    Case("rebuild", _prepare_engine, _rebuild, _check_bundle, ("bundle/model.onnx", "bundle/*.engine")),
    Case("demo", _prepare_demo, _demo, _check_demo, ("demo/annotations.json", "demo/features/*"), most=8),
    Case("export (its writer)", _new_bundle, _new_bundle, _check_bundle, ("bundle/*.onnx",)),
    Case("import-weights", _prepare_released, _import_weights, _check_checkpoint, ("checkpoint/*.safetensors",)),
    Case("train", _prepare_training, _train, _check_training, ("run/*/*.safetensors",)),
    Case("synthesize", _prepare_annotations, _synthesize, _check_features, ("features/*",)),
    Case("predict", _prepare_videos, _predict, _check_events, ("*.jsonl*",)),
    Case("predict (shards)", _prepare_only_videos, _SHARDS, _check_shards, ("run/shards/*", "run/*.json*")),
    Case(
        "predict (its thread)",
        _prepare_only_videos,
        _from(ThreadPool, _SHARDS),
        _check_shards,
        ("run/shards/*", "run/*.json*"),
        late=True,
        threads=True,
    ),
    Case(
        "predict (processes)",
        _prepare_only_videos,
        _from(ProcessPool, _PROCESSES),
        _check_shards,
        ("run/shards/*", "run/*.json*"),
        late=True,  # workers alone are killed by tests/corpus_kills.py: strace would kill every one that follows, too
    ),
    Case(
        "extract",
        video_kills.prepare_extraction,
        video_kills.extract,
        video_kills.check_features,
        ("features/*.npy",),
    ),
    Case(
        "predict --videos",
        video_kills.prepare_prediction,
        video_kills.predict,
        video_kills.check_prediction,
        ("events.jsonl", "events.jsonl.features/*.npy"),
    ),
    Case(
        "evaluate --json",
        _prepare_scores,
        _evaluate,
        lambda f: json.loads((f / "scores.json").read_text()),
        ("scores.json",),
    ),
    Case("reference", _save_reference, _save_reference, lambda f: load_reference(f / "ref.npz"), ("ref.npz",)),
    Case("convert", _prepare_videos, _CONVERT, _check_events, ("events.csv",)),
    Case("show", _prepare_page, _SHOW, _check_page),
    Case(
        "compare --json",
        _prepare_comparison,
        _COMPARE,
        lambda f: json.loads((f / "comparison.json").read_text()),
        ("comparison.json",),
    ),
    Case(
        "triton",
        _prepare_repository,
        _TRITON,
        _check_repository,
        ("repository/**/*",),
    ),
)
