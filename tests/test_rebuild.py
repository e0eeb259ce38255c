"""An engine built again in its bundle: from the same graph, as a whole or not at all, and unverified afterwards."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import edit_manifest, engine, make_bundle

import export.rebuild
from ccnet.cli.main import main
from export.rebuild import engines_to_rebuild, rebuild
from export.tensorrt.build import EngineInfo
from export.tensorrt.options import EngineOptions
from runtime.backends.tensorrt import cuda
from runtime.bundle import Bundle, Engine, ModelFile, read_bundle
from runtime.errors import BackendUnavailable, BundleError, ExportError
from runtime.files import sha256_file

pytest.importorskip("onnx")

OPTIONS = EngineOptions(
    format="tensorrt-rtx", precision="fp32", profile=(1, 2, 4), compute_capabilities=("8.9",), workspace_bytes=1 << 30
)
ENGINE = ModelFile(
    name="tensorrt-rtx-fp32",
    format="tensorrt-rtx",
    files=("tensorrt-rtx-fp32.engine",),
    precision="fp32",
    max_batch=4,
    library_version="1.6.0",
    compute_capabilities=("8.9",),
    profile=(1, 2, 4),
    options=OPTIONS.to_json(),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle with a verified engine whose file is not really an engine."""
    graph = make_bundle(tmp_path / "reference").folder / "model.onnx"
    verified = engine("tensorrt-rtx", model_file=ENGINE.name, accuracy={"logits_max": 1e-6}, speed={"ms_per_video": 1})
    built = dataclasses.replace(ENGINE, onnx_sha256=sha256_file(graph))
    return make_bundle(tmp_path / "bundle", [verified, engine("onnxruntime")], engine_files=[built])


def verified(bundle: Bundle) -> Engine:
    return next(e for e in bundle.manifest.engines if e.backend == "tensorrt-rtx")


def with_engine_file(bundle: Bundle, **changes: Any) -> None:
    """Change the manifest entry of the engine's file."""
    files = [
        dataclasses.replace(file, **changes) if file.name == ENGINE.name else file
        for file in bundle.manifest.model_files
    ]
    edit_manifest(bundle.folder, model_files=tuple(files))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EngineOptions]:
    """Options of each build, which ends there."""
    seen: list[EngineOptions] = []

    def build_engine(onnx_path: Path, out_path: Path, options: EngineOptions) -> EngineInfo:
        seen.append(options)
        raise ExportError("node 12: no implementation")

    monkeypatch.setattr(export.rebuild, "build_engine", build_engine)
    return seen


def test_the_engine_is_replaced_by_a_real_one_and_waits_for_its_parity_check(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    with_engine_file(
        bundle, options={**ENGINE.options, "compute_capabilities": []}
    )  # a portable engine builds without a GPU
    assert main(["rebuild", str(bundle.folder)]) == 0  # it is of another version
    assert f"built with tensorrt_rtx {rtx.__version__}, unverified" in capsys.readouterr().err
    after = read_bundle(bundle.folder)
    after.verify()
    rebuilt = after.model_file(ENGINE.name)
    assert after.path(rebuilt).read_bytes()[:4] == b"vtrt"
    assert (rebuilt.library_version, rebuilt.compute_capabilities) == (rtx.__version__, ())
    assert rebuilt.onnx_sha256 == sha256_file(after.folder / "model.onnx")
    assert rebuilt.options == {**OPTIONS.to_json(), "compute_capabilities": []}
    engines = {e.backend: (e.status, e.accuracy, e.speed) for e in after.manifest.engines}
    assert engines["tensorrt-rtx"] == ("unverified", {}, {})
    assert engines["onnxruntime"][0] == "verified"


@pytest.mark.parametrize(
    ("made_for", "expected"),
    [((), ()), (("8.9",), ("8.9", "current")), (("8.9", "12.0"), ("8.9", "12.0", "current"))],
)
def test_an_engine_is_built_as_it_was_and_for_this_gpu_too(
    bundle: Bundle, asked: list[EngineOptions], made_for: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    with_engine_file(bundle, options={**ENGINE.options, "compute_capabilities": made_for})
    with pytest.raises(ExportError):
        rebuild(bundle.folder, verified(bundle))
    assert asked == [dataclasses.replace(OPTIONS, compute_capabilities=expected)]


def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    bundle: Bundle, asked: list[EngineOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rebuild", str(bundle.folder), ENGINE.name]) == 2
    assert "node 12" in capsys.readouterr().err
    assert read_bundle(bundle.folder).manifest == bundle.manifest
    bundle.verify()
    assert [path.name for path in bundle.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_which_engines_are_rebuilt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    of_another_version = [ENGINE.name]
    assert [e.name for e in engines_to_rebuild(bundle)] == of_another_version
    assert [e.name for e in engines_to_rebuild(bundle, [ENGINE.name, ENGINE.name])] == of_another_version
    for name in ("onnxruntime-fp32", "gone"):
        with pytest.raises(BundleError, match=f"got {name}, expected TensorRT engines of it: tensorrt-rtx-fp32"):
            engines_to_rebuild(bundle, [name])
    with_engine_file(bundle, library_version=str(rtx.__version__))
    monkeypatch.setattr(cuda, "probe", lambda index: cuda.Device(index, "this GPU", "8.9", 1 << 34, "13.0"))
    assert engines_to_rebuild(read_bundle(bundle.folder)) == []
    assert main(["rebuild", str(bundle.folder)]) == 0
    monkeypatch.setattr(cuda, "probe", lambda index: cuda.Device(index, "this GPU", "12.0", 1 << 34, "13.0"))
    assert [e.name for e in engines_to_rebuild(read_bundle(bundle.folder))] == [ENGINE.name]


def test_engines_that_can_not_be_compared_with_this_machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailable, match=r"(?s)can't compare its engines.*pip install 'ccnet\[rtx\]'"):
        engines_to_rebuild(bundle)


def test_an_engine_without_its_graph_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, [engine("tensorrt-rtx", model_file=ENGINE.name)], engine_files=[ENGINE])
    with pytest.raises(BundleError, match="built from is not in the bundle"):
        rebuild(bundle.folder, verified(bundle))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_aux_streams": 0}, r"bundle.json: options of 'tensorrt-rtx-fp32': unknown key\(s\) max_aux_streams"),
        ({"profile": [1, 2]}, r"profile: got \(1, 2\), expected batch sizes"),
        ({"workspace_bytes": "1G"}, "workspace_bytes: got '1G', expected int"),
    ],
)
def test_options_that_this_version_does_not_know_are_refused(
    bundle: Bundle, asked: list[EngineOptions], changes: dict[str, Any], text: str
) -> None:
    with_engine_file(bundle, options={**ENGINE.options, **changes})
    with pytest.raises(BundleError, match=rf"{text}.*; export the bundle again"):
        rebuild(bundle.folder, verified(bundle))
    assert asked == []
