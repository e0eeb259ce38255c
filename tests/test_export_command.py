"""`ccnet export`, `verify` and `reference` on a network of two levels, from checkpoint to verified bundle."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import copying_exporter, edit_manifest

import export.engines
import export.graph.to_onnx
import export.parity.check
from ccnet.cli.main import main
from ccnet.config import Config, preset, with_overrides
from ccnet.network.model import CCNet
from export.graph.reference import ReferenceGraph
from export.parity.reference import load_reference
from export.parity.tolerances import TOLERANCES, Tolerance
from export.tensorrt.options import EngineOptions
from runtime.bundle import PARITY, Bundle, ModelFile, read_bundle
from runtime.errors import BackendUnavailable, ExportError
from runtime.localizer import Localizer
from runtime.profiling.timing import Rules
from runtime.profiling.workload import sample_videos

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TINY = {
    "model.length": "8",
    "model.levels": "2",
    "model.dim": "8",
    "model.heads": "2",
    "model.visual_dim": "12",
    "model.audio_dim": "6",
    "model.num_classes": "4",
    "model.head_dim": "8",
    "model.tdm_dim": "4",
    "model.self_layers": "0",
}


def tiny_config() -> Config:
    return with_overrides(preset("demo"), TINY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network whose scales are large enough that no part of it hides."""
    import torch

    from ccnet.checkpoint import save_checkpoint

    torch.manual_seed(0)
    config = tiny_config()
    model = CCNet(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(path, model, config=config, labels=("a", "b", "c", "d"))
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `ccnet export` with its defaults. Made once: the exporter takes its time."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    assert main(["export", str(checkpoint), "--out", str(out), "--max-batch", "4", "--videos", "6"]) == 0
    return out


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "ref.npz"
    assert main(["reference", str(checkpoint), "--out", str(path), "--videos", "6"]) == 0
    return path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def exporter(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that takes no time: whatever the precision, it hands out the graph of `exported`."""
    monkeypatch.setattr(export.graph.to_onnx, "export_onnx", copying_exporter(exported / "model.onnx"))
    monkeypatch.setattr(export.parity.check, "SPEED_RULES", Rules(seconds=0, calls=3))


def unverified(folder: Path) -> None:
    engines = read_bundle(folder).manifest.engines
    edit_manifest(folder, engines=tuple(dataclasses.replace(r, status="unverified", accuracy={}) for r in engines))


def statuses(bundle: Bundle) -> dict[str, str]:
    return {engine.name: engine.status for engine in bundle.manifest.engines}


def test_the_bundle_is_whole_verified_and_runs(exported: Path, checkpoint: Path) -> None:
    bundle = read_bundle(exported)
    bundle.verify()
    weights = json.loads((checkpoint / "checkpoint.json").read_text())["weights"]["sha256"]
    assert bundle.manifest.checkpoint_sha256 == weights
    assert bundle.manifest.model == tiny_config().model.to_json()
    (model_file,) = bundle.manifest.model_files
    assert (model_file.name, model_file.opset, model_file.max_batch) == ("onnx-fp32", 20, 4)
    engine, *others = bundle.manifest.engines
    assert (engine.name, engine.status) == ("onnxruntime-fp32", "verified")
    listed = {other.name: other.status for other in others}
    assert listed == {"onnxruntime-cuda-fp32": "unverified", "openvino-fp32": "unverified"}
    assert 0 < engine.accuracy["max_logits"] <= 1e-4
    report = json.loads((exported / PARITY).read_text())["engines"][engine.name]
    assert report["passed"]
    assert report["videos"]["events"] == 6
    graph = onnx.load(bundle.path(model_file))
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts["checkpoint_sha256"] == weights
    assert (facts["opset"], facts["graph"]) == ("20", "fused")
    with Localizer.load(exported) as localizer:
        localizer.batch([(v.visual, v.audio, None) for v in sample_videos(bundle.spec, 5)])


def test_the_next_commands_are_printed(
    exported: Path, checkpoint: Path, reference: Path, capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    unverified(bundle)
    assert main(["verify", str(bundle), "--reference", str(reference)]) == 0
    assert f"ccnet bench {bundle}" in capsys.readouterr().out


def strict(precision: str) -> Tolerance:
    return dataclasses.replace(TOLERANCES["fp32"], max_logits=0.0)


def test_a_miss_is_exit_status_3_and_no_bundle(
    exported: Path,
    checkpoint: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The network's graph with one bias off by a thousandth: what a wrong fold might do.
    model = onnx.load(exported / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "heads.class_bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
    wrong = tmp_path_factory.mktemp("wrong") / "model.onnx"
    onnx.save(model, wrong)
    monkeypatch.setattr(export.graph.to_onnx, "export_onnx", copying_exporter(wrong))
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "bundle"), "--videos", "2"]) == 3
    assert "logits, largest difference" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verify_verifies_what_was_not_run_and_flips_the_parity_check(bundle: Path, reference: Path) -> None:
    unverified(bundle)
    assert main(["verify", str(bundle), "--reference", str(reference)]) == 0
    found = read_bundle(bundle)
    found.verify()
    assert statuses(found) == {
        "onnxruntime-fp32": "verified",
        "openvino-fp32": "verified",
        "onnxruntime-cuda-fp32": "unverified",  # no GPU
    }
    assert main(["verify", str(bundle), "--reference", str(reference)]) == 0  # nothing left to verify here
    assert main(["verify", str(bundle), "--reference", str(reference), "--backend", "onnxruntime-cuda"]) == 2


def test_verify_marks_an_engine_that_fails(bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(bundle)
    monkeypatch.setattr(export.parity.check, "tolerance", strict)
    assert main(["verify", str(bundle), "--reference", str(reference)]) == 3
    found = read_bundle(bundle)
    assert {e.name: e.status for e in found.manifest.engines}["onnxruntime-fp32"] == "failed"
    with pytest.raises(BackendUnavailable):
        Localizer.load(bundle)


def test_verify_without_torch(bundle: Path, reference: Path) -> None:
    unverified(bundle)
    code = "import sys; sys.modules['torch'] = None; from ccnet.cli.main import main; "
    code += f"sys.exit(main(['verify', {str(bundle)!r}, '--reference', {str(reference)!r}]))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert statuses(read_bundle(bundle))["onnxruntime-fp32"] == "verified"


def test_verify_with_the_checkpoint(bundle: Path, checkpoint: Path) -> None:
    unverified(bundle)
    assert main(["verify", str(bundle), "--checkpoint", str(checkpoint), "--videos", "3"]) == 0


def test_a_reference_of_another_network_is_refused(
    bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(bundle, checkpoint_sha256="00" * 32)
    command = ["verify", str(bundle), "--reference", str(reference), "--backend", "onnxruntime"]
    assert main(command) == 2
    assert "made from checkpoint 0000" in capsys.readouterr().err


def test_an_engine_that_can_not_run_here_stays_unverified(
    bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from runtime.machine import gpus

    if gpus():
        pytest.skip("this machine has a GPU")
    manifest = read_bundle(bundle).manifest
    (bundle / "tensorrt-fp32.engine").write_bytes(b"plan")
    file = ModelFile(
        name="tensorrt-fp32",
        format="tensorrt",
        files=("tensorrt-fp32.engine",),
        precision="fp32",
        max_batch=4,
        library="tensorrt",
        library_version="8.6.0",
        gpu_name="Some GPU",
        compute_capabilities=("9.0",),
        profile=(1, 1, 4),
    )
    engine = dataclasses.replace(
        manifest.engines[0], name="tensorrt-fp32", backend="tensorrt", model_file="tensorrt-fp32", status="unverified"
    )
    from export.bundle_writer import changed_bundle

    with changed_bundle(bundle) as draft:
        draft.add_model_file(file)
        draft.set_engine(engine)
    assert main(["verify", str(bundle), "--reference", str(reference)]) == 2
    assert "could not be run here" in capsys.readouterr().err
    assert statuses(read_bundle(bundle))["tensorrt-fp32"] == "unverified"


def test_the_reference_file_holds_stress_and_synthetic_videos(reference: Path) -> None:
    found = load_reference(reference)
    assert sum(video.stress for video in found.videos) > 10
    assert sum(not video.stress for video in found.videos) == 6
    assert found.spec == tiny_config().spec(("a", "b", "c", "d"))


def test_polygraphy_is_asked_and_its_answer_judged(
    bundle: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("polygraphy")
    folder = tmp_path / "polygraphy"
    command = ["verify", str(bundle), "--reference", str(reference), "--polygraphy", str(folder)]
    assert main(command) == 0
    assert "--load-inputs" in capsys.readouterr().out
    start = "import sys, polygraphy; from polygraphy.tools import main; sys.exit(main())"
    tool = [sys.executable, "-c", start, "run", str(bundle / "model.onnx"), "--onnxrt"]
    tool += ["--load-inputs", str(folder / "inputs.json"), "--save-outputs", str(folder / "results.json")]
    tool += ["--load-outputs", str(folder / "expected.json"), "--atol", "1e-4", "--rtol", "1e-4"]
    done = subprocess.run(tool, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert main(command) == 0
    assert "passed" in capsys.readouterr().out
    (folder / "results.json").write_text("{}")
    assert main(command) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "precision"),
        (["--precision", "auto", "fp16"], "auto alone"),
        (["--opt-batch", "9", "--max-batch", "8"], "opt-batch"),
        (["--graph", "reference", "--precision", "fp16"], "reference graph"),
        (["--features", "nowhere"], "nowhere"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_bad_requests_say_what_is_wrong_before_any_work(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "bundle"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network of one level, without C2F and F2C."""
    from ccnet.checkpoint import save_checkpoint

    config = with_overrides(tiny_config(), {"model.levels": "1"})
    path = tmp_path_factory.mktemp("checkpoint") / "ablated"
    save_checkpoint(path, CCNet(config.model).eval(), config=config, labels=("a", "b", "c", "d"))
    return path


def test_an_ablated_network_becomes_the_reference_graph_with_a_warning(
    ablated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exporter(module: object, *arguments: object, metadata: dict[str, str], **options: object) -> None:
        assert isinstance(module, ReferenceGraph)
        raise ExportError(f"the {metadata['graph']} graph would be written here")

    monkeypatch.setattr(export.graph.to_onnx, "export_onnx", exporter)
    assert main(["export", str(ablated), "--out", str(tmp_path / "bundle"), "--videos", "2"]) == 2
    printed = capsys.readouterr().err
    assert "warning: model.levels = 1: writing the reference graph" in printed
    assert "the reference graph would be written here" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graph", "fused"], "model.levels = 1: the fused network has no such form; use --graph reference"),
        (["--precision", "fp16"], "the reference graph has fp32 only"),
    ],
)
def test_an_ablated_network_has_no_fused_graph_and_fp32_alone(
    ablated: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(ablated), "--out", str(tmp_path / "bundle"), "--videos", "1", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["export", str(checkpoint), "--out", str(tmp_path)]) == 2
    assert "no bundle" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.usefixtures("exporter")
def test_auto_keeps_the_engines_that_pass(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "--out", str(out), "--precision", "auto", "--videos", "6"]) == 0
    manifest = read_bundle(out).manifest
    verified = [engine for engine in manifest.engines if engine.status == "verified"]
    assert manifest.engines[: len(verified)] == tuple(verified)  # a tiny network's bf16 may fail
    speeds = [engine.speed["ms_per_video"] for engine in verified]
    assert speeds == sorted(speeds)
    assert all(engine.speed["machine"] for engine in verified)
    assert {"onnxruntime-fp32", "openvino-fp32"} <= {engine.name for engine in verified}
    assert "onnxruntime-cuda-fp32" not in {engine.name for engine in manifest.engines}  # can't run here


@pytest.mark.slow  # an export
def test_half_precision_and_opset_17(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = ["export", str(checkpoint), "--out", str(out), "--precision", "fp16"]
    assert main([*command, "--opset", "17", "--videos", "6"]) == 0
    bundle = read_bundle(out)
    assert {m.name: m.opset for m in bundle.manifest.model_files} == {"onnx-fp16": 17}
    assert statuses(bundle) == {"onnxruntime-fp16": "verified", "onnxruntime-cuda-fp16": "unverified"}
    with Localizer.load(out, "onnxruntime", precision="fp16") as localizer:
        assert localizer.backends[0].precision == "fp16"


def test_options_that_can_not_apply_are_refused(
    checkpoint: Path, bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    annotated = ["export", str(checkpoint), "--out", str(tmp_path / "b"), "--annotations", "a.json"]
    level = ["export", str(checkpoint), "--out", str(tmp_path / "b"), "--optimization-level", "3"]
    lowest = ["export", str(checkpoint), "--out", str(tmp_path / "b"), "--optimization-level", "0"]
    tuned = ["export", str(checkpoint), "--out", str(tmp_path / "b"), "--opt-batch", "4"]
    beyond = ["export", str(checkpoint), "--out", str(tmp_path / "b"), "--optimization-level", "9"]
    videos = ["verify", str(bundle), "--backend", "onnxruntime", "--reference", str(reference), "--videos", "3"]
    for command, message in (
        (annotated, "annotations: got a.json without a feature folder"),
        (level, "optimization_level: for engines only"),
        (lowest, "optimization_level: for engines only"),
        (tuned, "opt-batch: for engines only"),
        (beyond, "optimization_level: got 9, expected 0 to 5"),
        ([*videos[:-2], "--polygraphy", str(tmp_path)], "--backend: --polygraphy asks a tool of its own"),
        (videos, "--videos: a reference file already holds its videos"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("exporter")
def test_auto_goes_on_without_an_engine_that_can_not_be_built(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_engine(onnx_path: Path, out_path: Path, options: EngineOptions) -> None:
        raise ExportError(f"no kernels for {options.precision}")

    monkeypatch.setattr(export.engines, "build_engine", build_engine)
    out = tmp_path / "bundle"
    command = ["export", str(checkpoint), "--out", str(out), "--videos", "3", "--format", "onnx", "tensorrt"]
    assert main([*command, "--precision", "auto"]) == 0
    engines = read_bundle(out).manifest.engines
    assert "onnxruntime-fp32" in {engine.name for engine in engines}
    assert "tensorrt" not in {engine.backend for engine in engines}
    printed = capsys.readouterr().out
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        assert f"tensorrt-{precision}: not run here: no kernels for {precision}" in printed


def test_a_link_to_a_bundle_stays_a_link(bundle: Path, reference: Path) -> None:
    link = bundle.with_name("current")
    link.symlink_to(bundle, target_is_directory=True)
    unverified(bundle)
    assert main(["verify", str(link), "--reference", str(reference)]) == 0
    assert link.is_symlink()
    assert statuses(read_bundle(bundle))["onnxruntime-fp32"] == "verified"


def test_verify_from_inside_the_bundle(bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(bundle)
    monkeypatch.chdir(bundle)
    assert main(["verify", ".", "--reference", str(reference)]) == 0
    assert statuses(read_bundle(bundle))["onnxruntime-fp32"] == "verified"
