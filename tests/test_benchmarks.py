"""The CPU benchmarks on a tiny network: they run, compare equal things, and write results that can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from torch import Tensor, nn  # noqa: E402

from benchmarks import growth, latency, postprocessing, roofline  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.arguments import Setting  # noqa: E402
from benchmarks.compare import compare  # noqa: E402
from benchmarks.networks import BRANCH_SCALE, Networks, benchmark_config, random_network  # noqa: E402
from export.graph.reference import ReferenceGraph  # noqa: E402
from runtime.errors import ConfigError  # noqa: E402
from runtime.profiling.timing import Rules  # noqa: E402
from runtime.spec import ModelSpec  # noqa: E402

RULES = Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=2)


class Toy(nn.Module):
    """The network's forward contract in a few operations, so that an export takes a second."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = spec.visual_dim + spec.audio_dim
        self.levels, self.classes = spec.levels, spec.num_classes
        self.weight = nn.Parameter(torch.randn(width, 3 * spec.num_classes, generator=generator) / width**0.5)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = (torch.cat([visual, audio], dim=1) * mask).transpose(1, 2) @ self.weight
        points = torch.cat([x[:, :: 2**level] for level in range(self.levels)], dim=1)
        offsets = torch.relu(points[..., self.classes :]) + 1
        return points[..., : self.classes], offsets.unflatten(2, (-1, 2))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    """Networks of which every graph is the toy."""
    made = Networks(tmp_path_factory.mktemp("work"), benchmark_config("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Networks, "eager", lambda self: Toy(self.spec))
        patch.setattr(Networks, "module", lambda self, form: ReferenceGraph(Toy(self.spec)))
        yield made


def measured(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    data = json.loads(path.read_text())
    assert len(compare(data, data)) == len(data["measurements"])
    assert path.with_suffix(".md").read_text().startswith("# ")
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    return data, {m["name"]: m["value"] for m in data["measurements"]}


def test_no_parameter_of_the_network_hides_a_branch() -> None:
    model = random_network(benchmark_config("tiny"))
    scales = [p for name, p in model.named_parameters() if name.endswith("_scale.scale")]
    assert scales
    assert all(float(p.detach().std()) > 0.1 * BRANCH_SCALE for p in scales)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unav100"):
        benchmark_config("huge")


def test_latency(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # a compiler run takes longer than all other tests
    monkeypatch.setattr(latency, "BATCHES", (1, 2))
    data, named = measured(latency.run(Setting(networks, tmp_path, RULES)))
    assert [c["name"] for c in data["candidates"]][:2] == ["eager fp32", "torch.compile fp32"]
    assert all(c["status"] == "verified" for c in data["candidates"][1:] if not c["not_measured"])
    fused = [row for row in data["rows"] if row["candidate"].startswith("fused ")]
    assert fused
    for row in fused:
        assert named[f"batch {row['batch']} / {row['candidate']} / engine p50"] == row["engine_ms"]["p50"]
        assert named[f"batch {row['batch']} / {row['candidate']} / throughput"] > 0
        if row["batch"] == 1:
            library = row["candidate"].removeprefix("fused ").rpartition("-")[0]
            assert row["engine_ratio"]["to"] == "eager fp32"
            assert row["peer_ratio"]["to"] == f"reference {library}-fp32"
    assert {row["candidate"] for row in data["rows"] if row["batch"] == 2} == {row["candidate"] for row in fused}
    assert set(data["graphs"]) == {"reference", "fused", "int8"}


def test_an_engine_that_computes_something_else_gets_no_speed(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    pytest.importorskip("onnxruntime")
    infer = OnnxRuntimeBackend.infer
    monkeypatch.setattr(OnnxRuntimeBackend, "infer", lambda *a: tuple(0.5 + out for out in infer(*a)))
    data, named = measured(latency.run(Setting(networks, tmp_path, RULES, compiled=False)))
    wrong = [c for c in data["candidates"] if "onnxruntime" in c["name"]]
    assert [c["status"] for c in wrong] == ["failed", "failed"]
    assert not any("onnxruntime" in name for name in named)
    assert "- fused onnxruntime-fp32: it failed the parity check" in (tmp_path / "latency.md").read_text()


def test_the_engines_of_a_graph_are_those_of_the_registry(networks: Networks) -> None:
    assert set(networks.engines("fused")) == {"openvino-bf16", "openvino-fp32", "onnxruntime-fp32"}
    assert set(networks.engines("int8")) == {"openvino-int8"}
    assert set(networks.engines("fp16")) == {"onnxruntime-fp16"}


def test_growth(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "CANDIDATES", (20, 50))
    monkeypatch.setattr(growth, "LENGTHS", (0.5, 1.0, 2.0))
    _, named = measured(growth.run(Setting(networks, tmp_path, RULES)))
    assert set(named) == {
        *(f"{n} steps, {way} p50" for n, way in ((8, "whole"), (16, "whole"), (32, "cropped"), (32, "windows"))),
        *(f"post-processing of {n} candidates p50" for n in (20, 50)),
    }


def test_roofline_shares_and_page(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MATRIX", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 16)
    path = roofline.run(Setting(networks, tmp_path, RULES))
    named = {m["name"]: m["value"] for m in json.loads(path.read_text())["measurements"]}
    # The toy is one matmul: 16 steps x 32 features x 15 outputs.
    assert named["operations per video"] == pytest.approx(2 * 16 * 32 * 15 / 1e9)
    assert named["peak matmul fp32"] > 0
    shares = [name.rpartition("-")[2] for name in named if name.startswith("share reached by")]
    assert shares
    assert {f"peak matmul {precision}" for precision in shares} <= set(named)  # each against its own arithmetic
    assert "NVIDIA H200, fp16 | 32" in path.with_suffix(".md").read_text()


def test_suppression_and_metric_beside_plain_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocessing, "SIZES", (50,))
    monkeypatch.setattr(postprocessing, "TEST_VIDEOS", 5)
    monkeypatch.setattr(postprocessing, "TEST_EVENTS", 20)
    monkeypatch.setattr(postprocessing, "FIRST_CALLS", 1)
    path = postprocessing.run(tmp_path, calls=2)
    named = {m["name"]: m["value"] for m in json.loads(path.read_text())["measurements"]}
    assert {"suppression, 50 candidates / p50", "metric, 500 predictions, in rounds / p50"} <= set(named)
    assert named["first suppress call / p50"] > 0


def test_what_differs_from_plain_numpy_is_not_timed() -> None:
    with pytest.raises(AssertionError):
        postprocessing.against_peer(lambda: ([1.0],), lambda: ([1.1],), RULES)


def test_one_command_runs_each_in_its_own_process_and_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def run_process(command: list[str], check: bool) -> Any:
        started.append(command[2:])
        return type("Done", (), {"returncode": int(command[2] == "benchmarks.growth")})

    monkeypatch.setattr("benchmarks.__main__.subprocess.run", run_process)
    shared = ["--preset", "tiny", "--out", str(tmp_path), "--seconds", "0"]
    assert main(["latency", "postprocessing", *shared]) == 0
    assert started == [["benchmarks.latency", *shared], ["benchmarks.postprocessing", "--out", str(tmp_path)]]
    assert main(["growth", "latency", *shared]) == 1
    assert started[-1][0] == "benchmarks.latency"  # one that fails does not stop the next
    assert "failed: growth" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["no-such-benchmark"])
