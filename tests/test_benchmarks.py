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

from benchmarks import growth, latency, roofline, throughput  # noqa: E402
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
    """Networks whose every form is the toy."""
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


def test_latency_of_the_forms(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # a compiler run takes longer than all other tests
    data, named = measured(latency.run(Setting(networks, tmp_path, RULES)))
    assert {row["name"] for row in data["rows"]} >= {"eager fp32", "torch.compile fp32"}
    assert all(row["passed"] for row in data["rows"])
    engines = [row for row in data["rows"] if row["name"].startswith("deployment ")]
    for row in engines:
        library = row["name"].removeprefix("deployment ").rpartition("-")[0]
        assert set(row["times_as_fast_as"]) == {"eager fp32", f"straightforward {library}-fp32"}
        assert row["engine_ms"]["n"] == 2
        assert named[f"{row['name']} p50"] == row["engine_ms"]["p50"]
    assert set(data["graphs"]) == {"reference", "fused", "int8"}


def test_an_engine_that_computes_something_else_gets_no_speed(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    infer = OnnxRuntimeBackend.infer
    monkeypatch.setattr(OnnxRuntimeBackend, "infer", lambda *a: tuple(0.5 + out for out in infer(*a)))
    data, named = measured(latency.run(Setting(networks, tmp_path, RULES)))
    wrong = [row for row in data["rows"] if "onnxruntime" in row["name"]]
    assert wrong
    assert all(not row["passed"] and row["engine_ms"] is None for row in wrong)
    assert not any("onnxruntime" in name for name in named)
    assert "no speed" in (tmp_path / "latency.md").read_text()


def test_growth(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "CANDIDATES", (20, 50))
    monkeypatch.setattr(growth, "LENGTHS", (0.5, 1.0, 2.0))
    data, named = measured(growth.run(Setting(networks, tmp_path, RULES)))
    assert set(data["timings_ms"]["stages"]) == {"read", "pack", "engine", "decode", "suppress"}
    assert "post-processing of 50 candidates p50" in named
    assert "16 steps, whole p50" in named
    assert "32 steps, windows p50" in named
    assert f"batch 2, {data['engine']} p50" in named


def test_throughput(networks: Networks, tmp_path: Path) -> None:
    _, named = measured(throughput.run(Setting(networks, tmp_path, RULES)))
    assert set(named) == {"one after the other", "stream"}
    assert all(rate > 0 for rate in named.values())


def test_roofline_shares_and_page(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MATRIX", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 16)
    path = roofline.run(Setting(networks, tmp_path, RULES))
    named = {m["name"]: m["value"] for m in json.loads(path.read_text())["measurements"]}
    # The toy is one product: 16 steps x 32 features x 15 outputs.
    assert named["operations per video"] == pytest.approx(2 * 16 * 32 * 15 / 1e9)
    assert named["peak product fp32"] > 0
    shares = [name.rpartition("-")[2] for name in named if name.startswith("share reached by")]
    assert shares
    assert {f"peak product {precision}" for precision in shares} <= set(named)  # each against its own arithmetic
    assert "NVIDIA H200, fp16 | 32" in path.with_suffix(".md").read_text()


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
