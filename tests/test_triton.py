"""A Triton repository: its text against Triton's own schema, post-processing, what the check finds, a real server."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import SPEC, OracleBackend, edit_manifest, engine, features_with, make_bundle, oracle, tensorrt_model_file
from triton_server import running

from ccnet.cli.main import main
from runtime.batches import pack
from runtime.bundle import read_bundle
from runtime.errors import BackendUnavailable, BundleError, ConfigError, RequestError
from runtime.localizer import Localizer
from runtime.triton.check import Container, check_repository, onnx_versions
from runtime.triton.model import PostProcessing, read_spec
from runtime.triton.repository import RepositoryOptions, write_repository

pytest.importorskip("onnx")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def repository(bundle: Path) -> Path:
    write_repository(read_bundle(bundle), bundle.parent / "models", RepositoryOptions())
    return bundle.parent / "models"


def parsed(path: Path) -> Any:
    """Return a configuration read with Triton's schema."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(path.read_text(), schema.ModelConfig())


def test_the_text_is_what_triton_reads(repository: Path) -> None:
    network = parsed(repository / "ccnet_network" / "config.pbtxt")
    assert (network.name, network.backend, network.max_batch_size) == ("ccnet_network", "onnxruntime", 4)
    assert network.default_model_filename == "model.onnx"
    assert {t.name: list(t.dims) for t in network.input} == {"visual": [32, 6], "audio": [32, 3], "lengths": [1]}
    [lengths] = [t for t in network.input if t.name == "lengths"]
    assert lengths.HasField("reshape")
    assert list(lengths.reshape.shape) == []  # the graph takes [batch]
    assert {t.name: list(t.dims) for t in network.output} == {"logits": [60, 4], "offsets": [60, 4, 2]}
    assert network.dynamic_batching.max_queue_delay_microseconds == 2000
    assert [(warm.batch_size, sorted(warm.inputs)) for warm in network.model_warmup] == [
        (1, ["audio", "lengths", "visual"]),
        (4, ["audio", "lengths", "visual"]),
    ]
    assert network.version_policy.latest.num_versions == 1
    events = parsed(repository / "ccnet_events" / "config.pbtxt")
    assert (events.backend, events.instance_group[0].count) == ("python", 1)
    ensemble = parsed(repository / "ccnet" / "config.pbtxt")
    assert ensemble.platform == "ensemble"
    assert [t.name for t in ensemble.input] == ["visual", "audio", "lengths", "duration"]
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == ["ccnet_network", "ccnet_events"]
    assert (repository / "ccnet" / "1").is_dir()
    assert read_spec(repository / "ccnet_events" / "1") == SPEC


def test_post_processing_gives_padded_events() -> None:
    videos = [features_with(30, [(3, 8, 1, 3.0), (10, 20, 2, 2.0)]), features_with(12)]
    visual, audio, lengths = pack(videos, SPEC)
    logits, offsets = oracle(visual, audio, lengths)
    tensors = {
        "logits": logits,
        "offsets": offsets,
        "lengths": lengths[:, None],
        "duration": np.array([[30.0], [12.0]]),
    }
    run = PostProcessing(SPEC, 4)
    found = run(tensors)
    assert found["count"].tolist() == [[2], [0]]
    assert found["segments"].shape == (2, 100, 2)
    np.testing.assert_allclose(found["segments"][0, :2], [[3.5, 8.5], [10.5, 20.5]])
    assert found["labels"][0, :3].tolist() == [1, 2, -1]
    for change, message in (
        ({"lengths": np.array([[0], [12]], np.int32)}, "lengths: got"),
        ({"duration": np.array([[30.0], [-1.0]])}, "video 1 of the request: duration"),
        ({"logits": np.where(np.arange(60)[:, None] == 4, np.float32(np.nan), logits)}, "video 0 of the request"),
    ):
        with pytest.raises(RequestError, match=message):
            run({**tensors, **change})


def test_what_is_refused(bundle: Path, tmp_path: Path) -> None:
    opened = read_bundle(bundle)
    for options, message in (
        ({"format": "tensorrt"}, "no tensorrt file in fp32; it has: onnx fp32"),
        ({"precision": "fp16"}, "no onnx file in fp16"),
    ):
        with pytest.raises(BackendUnavailable, match=message):
            write_repository(opened, tmp_path / "models", RepositoryOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a letter"):
        RepositoryOptions(name="../x")
    with pytest.raises(ConfigError, match="Triton has no other"):
        RepositoryOptions(format="tensorrt-rtx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(BundleError, match=r"holds 'precious\.txt'"):
        write_repository(opened, tmp_path / "mine", RepositoryOptions())
    edit_manifest(bundle, engines=(engine("onnxruntime", status="failed"),))
    with pytest.raises(BackendUnavailable, match="failed the parity check is not served"):
        write_repository(read_bundle(bundle), tmp_path / "models", RepositoryOptions())
    (bundle / "model.onnx").write_bytes(b"changed")
    edit_manifest(bundle, engines=(engine("onnxruntime"),))
    with pytest.raises(BundleError):
        write_repository(read_bundle(bundle), tmp_path / "models", RepositoryOptions())
    assert not (tmp_path / "models").exists()


def edited(repository: Path, model: str, before: str, after: str) -> list[str]:
    """Return what the check says when a part of a configuration is another one."""
    path = repository / model / "config.pbtxt"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    try:
        return check_repository(repository, Container())
    finally:
        path.write_text(text)


def test_the_check_finds_what_triton_would_say_at_load(repository: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    assert check_repository(repository, Container()) == []
    logits = 'input_map { key: "logits" value: "logits" }'
    for model, before, after, message in (
        ("ccnet", logits, "", "input 'logits' of ccnet_events is not connected"),
        ("ccnet", logits, 'input_map { key: "logits" value: "x" }', "tensor 'x' is taken by ccnet_events"),
        ("ccnet", logits, 'input_map { key: "scores" value: "logits" }', "it has no input 'scores'"),
        ("ccnet", 'output_map { key: "count" value: "count" }', "", "output 'count' is made by no step"),
        ("ccnet", 'model_name: "ccnet_events"', 'model_name: "absent"', "there is no such model"),
        ("ccnet", "max_batch_size: 4", "max_batch_size: 9", "takes batches of 9, ccnet_network of 4 at most"),
        ("ccnet", "data_type: TYPE_FP64 dims: [ 1 ]", "data_type: TYPE_FP32 dims: [ 1 ]", "another data type"),
        ("ccnet_events", "dims: [ 60, 4 ]", "dims: [ 61, 4 ]", r"tensor logits for ccnet_events is [61, 4], where"),
        ("ccnet_events", 'backend: "python"', 'backend: "pyton"', "backend 'pyton' is not in the container"),
        ("ccnet_events", 'name: "ccnet_events"', 'name: "other"', "its configuration is named 'other'"),
        ("ccnet_network", "model.onnx", "model.plan", "1/model.plan: no such file"),
        ("ccnet_network", "max_batch_size", "max_batchsize", "config.pbtxt:"),
        ("ccnet_network", "data_type: TYPE_FP32", "data_type: 99999999999", "config.pbtxt: Value out of range"),
        ("ccnet_network", "model.onnx", "x" * 5000, "no such file"),
    ):
        problems = edited(repository, model, before, after)
        assert any(message in problem for problem in problems), (message, problems)
    with pytest.raises(ConfigError, match="no such model repository"):
        check_repository(repository / "absent", Container())
    with pytest.raises(ConfigError, match="holds no model"):
        check_repository(repository / "ccnet", Container())


def test_graphs_that_the_container_does_not_read(repository: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    onnx = pytest.importorskip("onnx")
    path = repository / "ccnet_network" / "1" / "model.onnx"
    assert onnx_versions(io.BytesIO(path.read_bytes())) == (9, 17)
    assert check_repository(repository, Container(onnxruntime=(1, 20, 1))) == []
    model = onnx.load(path)
    model.ir_version, model.opset_import[0].version = 11, 23
    onnx.save(model, path)
    problems = check_repository(repository, Container(onnxruntime=(1, 20, 1)))
    assert len(problems) == 2
    assert "operator set 23, ONNX Runtime 1.20.1 reads 21 at most" in problems[0]
    assert "IR version 11, ONNX Runtime 1.20.1 reads 10 at most" in problems[1]
    path.write_bytes(b"\x07 not an onnx file")
    assert "not an ONNX file" in check_repository(repository, Container(onnxruntime=(1, 20, 1)))[0]


def test_plans_of_another_tensorrt(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    built = dataclasses.replace(
        tensorrt_model_file(), library="tensorrt", library_version="10.9.0.34", compute_capabilities=("8.9",)
    )
    make_bundle(
        tmp_path / "gpu",
        [engine("tensorrt", "fp16", model_file=built.name)],
        engine_files=[built],
    )
    options = RepositoryOptions(format="tensorrt", precision="fp16")
    write_repository(read_bundle(tmp_path / "gpu"), tmp_path / "models", options)
    network = parsed(tmp_path / "models" / "ccnet_network" / "config.pbtxt")
    assert (network.backend, network.default_model_filename) == ("tensorrt", "model.plan")
    assert check_repository(tmp_path / "models", Container(tensorrt=(10, 9))) == []
    [problem] = check_repository(tmp_path / "models", Container(tensorrt=(10, 8, 0)))
    assert "built by TensorRT 10.9.0.34, the container has 10.8.0" in problem


def test_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tritonclient.grpc")
    out = str(bundle.parent / "served")
    assert main(["triton", str(bundle), "--out", out, "--name", "events", "--check", "--onnxruntime", "1.20.1"]) == 0
    text = capsys.readouterr().out
    assert "events_network, events_events, events, from onnx-fp32 (verified)" in text
    assert "nothing found that Triton refuses" in text
    (bundle.parent / "served" / "events_network" / "1" / "model.onnx").unlink()
    assert main(["triton", "--out", out, "--check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["events_network: 1/model.onnx: no such file"]
    for arguments, message in (
        (["--out", out], "BUNDLE is missing"),
        ([str(bundle), "--out", out, "--tensorrt", "10"], "--tensorrt: said of the container, for --check"),
        ([str(bundle), "--out", out, "--backends", "python"], "--backends: said of the container, for --check"),
        (["--out", out, "--check", "--device", "cpu"], "--device: only where a repository is written"),
        (["--out", out, "--check", "--tensorrt", "ten"], "version: got 'ten'"),
    ):
        assert main(["triton", *arguments]) == 2
        assert message in capsys.readouterr().err


STAND_IN = """
import numpy as np
import triton_python_backend_utils as triton
from builders import oracle


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            logits, offsets = oracle(given["visual"], given["audio"], given["lengths"].reshape(-1))
            pairs = {"logits": logits, "offsets": offsets}.items()
            tensors = [triton.Tensor(name, np.ascontiguousarray(array, np.float32)) for name, array in pairs]
            responses.append(triton.InferenceResponse(tensors))
        return responses
"""
"""The network for a server without its backend: the same tensors, computed in Python."""


def test_a_real_server_answers_with_the_events_of_the_localizer(bundle: Path, tmp_path: Path) -> None:
    """The generated post-processing and ensemble, warm-up and batches, in the server that NVIDIA publishes."""
    client = pytest.importorskip("tritonclient.http")
    models = tmp_path / "models"
    write_repository(read_bundle(bundle), models, RepositoryOptions(kind="KIND_CPU", queue_delay_us=20_000))
    network = models / "ccnet_network"
    text = (network / "config.pbtxt").read_text()
    text = text.replace('backend: "onnxruntime"', 'backend: "python"').replace("model.onnx", "model.py")
    (network / "config.pbtxt").write_text(text.replace("reshape { shape: [  ] }", ""))
    (network / "1" / "model.onnx").unlink()
    (network / "1" / "model.py").write_text(STAND_IN)
    for path in models.glob("*/1/model.py"):  # in a container the package is installed
        path.write_text(f"import sys\n\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n{path.read_text()}")

    videos = [features_with(30, [(3, 8, 1, 3.0), (10, 20, 2, 2.0)]), features_with(12, [(1, 4, 0, 1.0)])]
    visual, audio, lengths = pack(videos, SPEC)
    durations = np.array([[30.0], [12.0]])

    def request(rows: slice, lengths: Any = lengths) -> list[Any]:
        arrays = (visual[rows], audio[rows], lengths[rows, None], durations[rows])
        inputs = []
        for name, kind, array in zip(
            ("visual", "audio", "lengths", "duration"), ("FP32", "FP32", "INT32", "FP64"), arrays, strict=True
        ):
            inputs.append(client.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
        return inputs

    with (
        OracleBackend() as backend,
        Localizer([backend], SPEC) as localizer,
        running(models, tmp_path) as address,
        client.InferenceServerClient(address, concurrency=8) as server,
    ):
        expected = localizer.batch([(*v, float(d)) for v, d in zip(videos, durations[:, 0], strict=True)])
        assert server.is_model_ready("ccnet")
        both = server.infer("ccnet", request(slice(0, 2)))
        pending = [server.async_infer("ccnet", request(slice(i % 2, i % 2 + 1))) for i in range(8)]
        alone = [one.get_result() for one in pending]
        for result, rows in ((both, [0, 1]), *((one, [i % 2]) for i, one in enumerate(alone))):
            for row, video in enumerate(rows):
                count = int(result.as_numpy("count")[row, 0])
                assert count == len(expected[video])
                np.testing.assert_array_equal(result.as_numpy("segments")[row, :count], expected[video].segments)
                np.testing.assert_array_equal(result.as_numpy("scores")[row, :count], expected[video].scores)
                np.testing.assert_array_equal(result.as_numpy("labels")[row, :count], expected[video].labels)
        with pytest.raises(Exception, match="lengths: got"):
            server.infer("ccnet", request(slice(0, 1), np.array([0, 0], np.int32)))
        assert server.infer("ccnet", request(slice(0, 1))).as_numpy("count")[0, 0] == 2  # and the server lives on
