"""An engine built again in its bundle: from the same graph, as a whole or not at all, and unverified afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from builders import engine, make_bundle

import export.rebuild
from export.tensorrt.build import EngineInfo
from runtime.bundle import MANIFEST, Bundle, ModelFile, read_bundle
from runtime.errors import BundleError, ExportError
from runtime.files import sha256_file

pytest.importorskip("onnx")

ENGINE = ModelFile(
    name="tensorrt-fp32",
    format="tensorrt",
    files=("tensorrt-fp32.engine",),
    precision="fp32",
    length=32,
    max_batch=4,
    gpu_name="another GPU",
    profile=(1, 2, 4),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    graph = make_bundle(tmp_path / "reference").folder / "model-t32.onnx"
    verified = engine("tensorrt", model_file=ENGINE.name, accuracy={"logits_max": 1e-6}, speed={"ms_per_video": 1.0})
    built = dataclasses.replace(ENGINE, onnx_sha256=sha256_file(graph))
    return make_bundle(folder, [verified, engine("onnxruntime")], engine_files=[built])


def fake_build(asked: dict[str, Any]) -> Any:
    def build_engine(onnx_path: Path, out_path: Path, **options: Any) -> EngineInfo:
        asked.update(options, onnx=sha256_file(onnx_path))
        out_path.unlink()  # a file of a draft is replaced, never written into
        out_path.write_bytes(b"built here")
        return EngineInfo(
            path=out_path,
            format=options["format"],
            precision=options["precision"],
            library="tensorrt",
            library_version="10.9",
            gpu_name="this GPU",
            compute_capabilities=("9.0",),
            profile=options["profile"],
            opset=17,
            onnx_sha256=sha256_file(onnx_path),
            build={},
        )

    return build_engine


def test_the_engine_is_replaced_and_its_engine_waits_for_proof(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(export.rebuild, "build_engine", fake_build(asked))
    assert export.rebuild.main([str(bundle.folder), ENGINE.name]) == 0
    assert asked["profile"] == (1, 2, 4)
    assert (asked["format"], asked["precision"]) == ("tensorrt", "fp32")
    after = read_bundle(bundle.folder)
    after.verify()
    assert after.model_file(ENGINE.name).gpu_name == "this GPU"
    assert asked["onnx"] == after.model_file(ENGINE.name).onnx_sha256
    gates = {r.backend: (r.status, r.accuracy, r.speed) for r in after.manifest.engines}
    assert gates["tensorrt"] == ("unverified", {}, {})
    assert gates["onnxruntime"][0] == "passed"


@pytest.mark.parametrize(
    ("made_for", "expected"),
    [((), ()), (("8.9",), ("8.9", "current")), (("8.9", "12.0"), ("8.9", "12.0", "current"))],
)
def test_an_rtx_engine_keeps_the_gpus_that_it_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_for: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    graph = make_bundle(tmp_path / "reference").folder / "model-t32.onnx"
    engine = dataclasses.replace(
        ENGINE, format="tensorrt-rtx", compute_capabilities=made_for, onnx_sha256=sha256_file(graph), gpu_name=None
    )
    bundle = make_bundle(tmp_path / "bundle", [engine("tensorrt-rtx", model_file=ENGINE.name)], engines=[engine])
    asked: dict[str, Any] = {}
    monkeypatch.setattr(export.rebuild, "build_engine", fake_build(asked))
    export.rebuild.rebuild(bundle.folder, ENGINE.name)
    assert asked["compute_capabilities"] == expected


def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(*_: Any, **__: Any) -> EngineInfo:
        raise ExportError("node 12: no implementation")

    monkeypatch.setattr(export.rebuild, "build_engine", failing)
    assert export.rebuild.main([str(bundle.folder), ENGINE.name]) == 2
    assert "node 12" in capsys.readouterr().err
    assert read_bundle(bundle.folder).manifest == bundle.manifest
    bundle.verify()
    assert [path.name for path in bundle.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_no_engine_or_lost_its_graph_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is an ONNX file"):
        export.rebuild.rebuild(bundle.folder, "onnx-fp32-t32")
    with pytest.raises(BundleError, match="no model file 'gone'"):
        export.rebuild.rebuild(bundle.folder, "gone")
    orphan = make_bundle(tmp_path / "orphan", [engine("onnxruntime")], engines=[ENGINE])
    with pytest.raises(BundleError, match="built from is not in the bundle"):
        export.rebuild.rebuild(orphan.folder, ENGINE.name)


def test_the_engine_is_built_as_it_was(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(export.rebuild, "build_engine", fake_build(asked))
    settings = {"workspace_bytes": 1 << 30, "optimization_level": 0, "hardware_compatible": True}
    content = json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
    for model_file in content["model_files"]:
        if model_file["name"] == ENGINE.name:
            model_file["build"] = {**settings, "seconds": 1.0}
    (bundle.folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    export.rebuild.rebuild(bundle.folder, ENGINE.name)
    assert {name: asked.get(name) for name in settings} == settings
    assert "seconds" not in asked
