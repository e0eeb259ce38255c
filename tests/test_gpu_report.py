"""The report of a day on a GPU, as far as a CPU goes: stages, their isolation, the time budget, the page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import simulated_library
from tensorrt_simulation import ENGINE_FILE, ENGINE_SPEC, Simulation, install, write_engine

from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import running as gpu_running
from benchmarks.gpu import stages as gpu_stages
from benchmarks.gpu.page import measurements, page
from benchmarks.gpu.report import Stage
from benchmarks.gpu.settings import Absent
from benchmarks.networks import Networks
from ccnet.cli.main import make_parser
from export.parity.inputs import stress_inputs, synthetic_inputs
from export.parity.reference import Reference, record, save_reference
from export.tensorrt.options import EngineOptions
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.bundle import read_bundle
from runtime.errors import EngineError, EngineMismatch, ExportError

SETTINGS: dict[str, Any] = {"device": "cpu", "batches": [1, 2], "seconds": 0.0}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run on the CPU over the stand-in network, one precision, no GPU tests but one that skips."""
    builders.make_bundle(tmp_path / "bundle")
    videos = [*stress_inputs(builders.SPEC), *synthetic_inputs(builders.SPEC)]
    with builders.OracleBackend() as oracle:
        save_reference(tmp_path / "reference.npz", Reference(builders.SPEC, "0" * 64, videos, record(oracle, videos)))
    (tmp_path / "test_nothing.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pytest.skip('no GPU')\n"
    )
    options = {
        "--bundle": tmp_path / "bundle",
        "--reference": tmp_path / "reference.npz",
        "--out": tmp_path / "out",
        "--work": tmp_path / "work",
        "--device": "cpu",
        "--formats": "tensorrt-rtx",
        "--precisions": "fp32",
        "--seconds": 0,
        "--tests": tmp_path / "test_nothing.py",
    }
    return [str(part) for pair in options.items() for part in pair] + ["--batches", "1", "2"]


def report_of(arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    status = gpu_report.main(arguments)
    out = Path(arguments[arguments.index("--out") + 1])
    return status, json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_dry_run_names_every_stage_and_does_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*arguments, "--dry-run", "--torch-python", sys.executable, "--checkpoint", str(tmp_path)]
    assert gpu_report.main(more) == 0
    printed = capsys.readouterr().out
    for stage in (
        "machine",
        "copy",
        "matmuls",
        "tensorrt-rtx fp32 latency build",
        "tests",
        "torch eager fp32",
        "onnxruntime fp32",
    ):
        assert f"{stage} " in printed
    assert not (tmp_path / "out").exists()
    assert (gpu_report.ROOT / "tests" / "test_gpu.py").is_file()  # where stages run and the GPU tests are looked for


def test_a_day_without_a_gpu(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    status, report, text = report_of(arguments)
    stages = report["stages"]
    outcomes = {name: stage["status"] for name, stage in stages.items()}
    assert status == 1
    assert outcomes["machine"] == outcomes["copy"] == outcomes["tensorrt-rtx fp32 latency build"] == "done"
    assert (tmp_path / "work" / "tensorrt-rtx-fp32-latency.engine").is_file()
    assert outcomes["tests"] == "skipped"
    assert outcomes["tensorrt-rtx fp32 latency parity check"] == "failed"
    missing = "needs 'tensorrt-rtx fp32 latency parity check'"
    assert stages["tensorrt-rtx fp32 latency speed"] == {"status": "skipped", "error": missing}
    assert "BackendUnavailable" in stages["tensorrt-rtx fp32 latency parity check"]["error"]
    assert report["machine"]["libraries"]["tensorrt-rtx"].startswith("1.")
    assert report["commit"] != ""
    assert "| tensorrt-rtx fp32 latency parity check | failed |" in text
    assert stages["onnxruntime fp32"]["result"]["status"]["passed"]
    assert {m["name"].split(" / ")[1] for m in report["measurements"]} == {"onnxruntime fp32"}
    assert "batch 2, onnxruntime fp32" in text


@pytest.mark.slow  # a dozen processes
def test_a_short_day_on_a_gpu(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of TensorRT 8.6, simulated, one of which takes too long; the GPU tests are other files' matter."""
    shutil.rmtree(tmp_path / "bundle")
    builders.make_bundle(tmp_path / "bundle", spec=ENGINE_SPEC)
    videos = [*stress_inputs(ENGINE_SPEC)[:4], *synthetic_inputs(ENGINE_SPEC, count=4)]
    with monkeypatch.context() as patched:
        install(patched, Simulation())
        path = write_engine(tmp_path / "engines" / "e.engine")
        with TensorRTBackend.open(path, ENGINE_FILE, ENGINE_SPEC) as backend:
            outputs = record(backend, videos)
    save_reference(tmp_path / "reference.npz", Reference(ENGINE_SPEC, "0" * 64, videos, outputs))
    monkeypatch.setenv("PYTHONPATH", str(simulated_library.shim(tmp_path / "shim")), prepend=os.pathsep)
    stages = gpu_report.plan(gpu_report.parse([*arguments, "--formats", "tensorrt", "--batches", "1", "8", "32"]))
    engines = [stage for stage in stages if stage.name.startswith("tensorrt")]
    slow = "tensorrt fp32 throughput build"
    engines = [dataclasses.replace(stage, limit_seconds=4) if stage.name == slow else stage for stage in engines]
    monkeypatch.setattr(gpu_report, "plan", lambda options: engines)
    status, report, text = report_of([*arguments, "--device", "cuda", "--batches", "1", "8", "32", "--minutes", "9"])
    outcomes = {name.partition("fp32 ")[2]: stage for name, stage in report["stages"].items()}
    assert {name: (o["status"], o.get("error")) for name, o in outcomes.items()} == {
        f"{kind} {what}": ("done", "took longer than 4 s" if (kind, what) == ("throughput", "build") else None)
        for kind in ("latency", "throughput")
        for what in ("build", "parity check", "speed", "copies", "contexts", "layers")
    }
    assert status == 0
    assert outcomes["throughput build"]["result"]["profile"] == [1, 8, 8]  # what was built before the time was over
    rows = {
        kind: [row["batch"] for row in outcomes[f"{kind} speed"]["result"]["rows"]]
        for kind in ("latency", "throughput")
    }
    assert rows == {"latency": [1], "throughput": [8]}
    assert "| tensorrt fp32 throughput | " in text


def test_no_time_left(arguments: list[str]) -> None:
    status, report, _ = report_of([*arguments, "--minutes", "0"])
    assert status == 0
    assert {stage["status"] for stage in report["stages"].values()} == {"skipped"}
    assert "0 minutes were used up" in report["stages"]["machine"]["error"]


@pytest.mark.parametrize(
    ("missing", "text"),
    [(["--out", "o"], "give --bundle"), (["--out", "o", "--bundle", "b"], "needs --reference")],
)
def test_what_must_be_given(missing: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_report.parse(missing)
    assert text in capsys.readouterr().err


def run_one(arguments: list[str], stage: Stage, limit: float = 60) -> dict[str, Any]:
    options = gpu_report.parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    return gpu_report.run_stage(stage, options, {"device": "cpu", "bundle": "b", "reference": "r"}, limit)


def test_a_crash_is_recorded_with_its_output(arguments: list[str]) -> None:
    outcome = run_one(arguments, Stage("odd", "tensorrt", "no_such_stage", 60))
    assert (outcome["status"], outcome["error"]) == ("failed", "ended with 1")
    assert "no_such_stage" in outcome["output"]


def test_a_stage_that_takes_too_long_is_ended(arguments: list[str]) -> None:
    outcome = run_one(arguments, Stage("copy", "tensorrt", "copy", 60), limit=0.05)
    assert outcome["status"] == "failed"
    assert "took longer" in outcome["error"]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ("pass", "done", "1 passed, 0 failed, 0 skipped"),
        ("assert False, 'it is broken'", "failed", "pytest ended with 1: 0 passed, 1 failed, 0 skipped"),
        ("pytest.skip('no GPU')", "skipped", "0 passed, 0 failed, 1 skipped"),
    ],
)
def test_outcome_of_the_tests(arguments: list[str], tmp_path: Path, body: str, status: str, text: str) -> None:
    (tmp_path / "test_nothing.py").write_text(f"import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    outcome = run_one(arguments, Stage("tests", "pytest", "pytest", 60))
    assert outcome["status"] == status
    assert text in (outcome.get("error") or outcome["result"]["summary"])
    assert "it is broken" in outcome.get("output", "") or status != "failed"


def test_what_tests_said_before_they_took_too_long_is_kept(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import time\nimport pytest\n\n@pytest.mark.gpu\ndef test_quick():\n    pass\n\n"
        "@pytest.mark.gpu\ndef test_slow():\n    time.sleep(60)\n"
    )
    outcome = run_one(arguments, Stage("tests", "pytest", "pytest", 60), limit=10)
    assert (outcome["status"], outcome["error"]) == ("failed", "took longer than 10 s")
    assert "test_quick PASSED" in outcome["output"]


def test_clocks_are_sampled_while_a_stage_runs(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    lines = "345, 70.0, 30, 0x0\\n1980, 600.0, [N/A], 0x4\\n"
    tool.write_text(f"#!/bin/sh\nprintf '{lines}'\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    gpu = run_one(arguments, Stage("odd", "tensorrt", "no_such_stage", 60))["gpu"]
    assert gpu == {
        "sm_mhz": {"min": 345, "mean": 1162.5, "max": 1980},
        "unsteady": True,
        "power_w": {"min": 70, "mean": 335, "max": 600},
        "samples": 2,
        "clock_reasons": ["0x0", "0x4"],
    }


def test_what_a_library_lacks_is_no_failure(tmp_path: Path) -> None:
    def lacks(settings: Any) -> dict[str, Any]:
        raise ExportError("tensorrt 8.6.0 does not support bfloat16; use fp16")

    def foreign(settings: Any) -> dict[str, Any]:
        raise EngineMismatch("TensorRT-RTX 1.7.1 can't run this engine on H200")

    def breaks(settings: Any) -> dict[str, Any]:
        raise ExportError("tensorrt 8.6.0 built no engine")

    def imports(settings: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'orjson'")

    (tmp_path / "settings.json").write_text("{}")
    for stage, status in ((lacks, "absent"), (foreign, "absent"), (breaks, "failed"), (imports, "failed")):
        files = [str(tmp_path / "settings.json"), str(tmp_path / "result.json")]
        assert gpu_stages.main([stage.__name__, *files], {stage.__name__: stage}) == 1
        assert json.loads((tmp_path / "result.json").read_text())["status"] == status


def test_an_old_result_is_not_taken_for_a_new_one(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "odd.result.json").write_text('{"status": "done", "result": {}}')
    assert run_one(arguments, Stage("odd", "tensorrt", "no_such_stage", 60))["status"] == "failed"


def test_a_failed_parity_check_fails_its_stage(arguments: list[str], tmp_path: Path) -> None:
    interpreter = tmp_path / "python"  # the last argument that it gets is where the result goes
    answer = '{"status": "done", "result": {"passed": false}}'
    interpreter.write_text(f"""#!/bin/sh\nfor last; do :; done\necho '{answer}' > "$last"\n""")
    interpreter.chmod(0o755)
    outcome = run_one([*arguments, "--torch-python", str(interpreter)], Stage("x parity check", "torch", "status", 60))
    assert (outcome["status"], outcome["error"]) == ("failed", "the parity check failed")
    assert outcome["result"] == {"passed": False}


def test_a_backend_is_timed_only_if_its_parity_check_passed() -> None:
    settings = SETTINGS | {"batches": [1, 2, 4]}
    found = gpu_stages.time_backend(builders.OracleBackend(max_batch=2), settings, verified=True)
    assert [row["batch"] for row in found["rows"]] == [1, 2]  # 4 is above what the backend takes
    for row in found["rows"]:
        assert row["end_to_end_ms"]["p50"] >= row["engine_ms"]["min"]
        assert row["stream_videos_per_second"]["per_second"] > 0
        assert "device_ms" not in row
    assert gpu_stages.time_backend(builders.OracleBackend(), settings, verified=False)["rows"] == []


def test_batch_sizes_that_were_done_outlive_their_stage(arguments: list[str], tmp_path: Path) -> None:
    class Slow(builders.OracleBackend):
        def infer(self, visual: Any, audio: Any, lengths: Any) -> Any:
            if len(visual) > 1:
                raise EngineError("out of memory")
            return super().infer(visual, audio, lengths)

    partial = tmp_path / "partial.json"
    with pytest.raises(EngineError, match="out of memory"):
        gpu_stages.time_backend(Slow(), SETTINGS | {"partial": str(partial)}, verified=True, facts={"status": "x"})
    kept = json.loads(partial.read_text())
    assert [row["batch"] for row in kept["rows"]] == [1]
    assert kept["status"] == "x"

    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\ncp {partial} {tmp_path}/work/odd.partial.json\nexec sleep 60\n")
    interpreter.chmod(0o755)
    outcome = run_one([*arguments, "--torch-python", str(interpreter)], Stage("odd", "torch", "peer", 60), limit=1)
    assert (outcome["status"], outcome["error"]) == ("failed", "took longer than 1 s")
    assert outcome["result"] == kept


def test_an_interrupt_keeps_what_the_running_stage_had(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is lent for a while ends the report with SIGTERM; here the stage sends it, and leaves a child."""
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f"""#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\n"""
        f"""echo '{{"rows": []}}' > {tmp_path}/work/odd.partial.json\nkill -TERM $PPID\nexec sleep 60\n"""
    )
    interpreter.chmod(0o755)
    stages = [Stage(name, "torch", "peer", 60) for name in ("odd", "next")]
    monkeypatch.setattr(gpu_report, "plan", lambda options: stages)
    status, report, text = report_of([*arguments, "--torch-python", str(interpreter)])
    assert status == 130
    assert report["stages"].keys() == {"odd"}
    assert report["stages"]["odd"]["error"] == "the report was interrupted"
    assert report["stages"]["odd"]["result"] == {"rows": []}
    assert "the report was interrupted" in text
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10  # a moment passes until the system has taken it away
    while (stat := Path(f"/proc/{child}/stat")).exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_stage_leaves_behind_keeps_nobody_waiting(arguments: list[str], tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nsleep 20 &\nexec sleep 20\n")
    interpreter.chmod(0o755)
    begin = time.monotonic()
    run_one([*arguments, "--torch-python", str(interpreter)], Stage("odd", "torch", "peer", 60), limit=0.2)
    assert time.monotonic() - begin < 10


def test_long_stages_are_shorter_where_time_is_short() -> None:
    tests, check = Stage("tests", "pytest", "pytest", 420), Stage("x", "tensorrt", "status", 90)
    assert [round(tests.limit(minutes)) for minutes in (60, 25, 12, 5)] == [420, 420, 202, 120]
    assert check.limit(5) == 90


@pytest.mark.parametrize("how", ["takes too long", "fails"])
def test_an_engine_that_was_built_first_outlives_a_better_one(arguments: list[str], tmp_path: Path, how: str) -> None:
    interpreter = tmp_path / "python"
    end = "exec sleep 60" if how == "takes too long" else "exit 1"
    partial = f"{tmp_path}/work/x-build.partial.json"
    interpreter.write_text(f"""#!/bin/sh\necho '{{"profile": [1, 8, 8]}}' > {partial}\n{end}\n""")
    interpreter.chmod(0o755)
    stage = Stage("x build", "torch", "build", 60)
    outcome = run_one([*arguments, "--torch-python", str(interpreter)], stage, limit=1)
    assert (outcome["status"], outcome["result"]["profile"]) == ("done", [1, 8, 8])
    assert outcome["error"] == ("took longer than 1 s" if how == "takes too long" else "ended with 1")


def test_a_verified_backend_that_can_not_be_measured_is_an_error() -> None:
    class Broken(builders.OracleBackend):
        def describe(self) -> dict[str, Any]:
            raise EngineError("the device is gone")

    with pytest.raises(EngineError, match="not measured: the device is gone"):
        gpu_stages.time_backend(Broken(), SETTINGS, verified=True)


def test_speed_and_layers_of_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sim = Simulation()
    install(monkeypatch, sim)
    bundle = builders.make_bundle(tmp_path / "bundle", spec=ENGINE_SPEC)
    model_file = dataclasses.replace(ENGINE_FILE, files=("tensorrt-fp16-throughput.engine",))
    path = write_engine(tmp_path / "work" / "tensorrt-fp16-throughput.engine")
    path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(model_file)))
    settings = SETTINGS | {
        "bundle": str(bundle.folder),
        "work": str(path.parent),
        "format": "tensorrt",
        "precision": "fp16",
        "kind": "throughput",
        "device": "cuda",
    }
    judged: list[Any] = []

    def judge(*_: Any, batches: Any) -> Any:
        judged.append(batches)
        return SimpleNamespace(to_json=dict)

    with monkeypatch.context() as patched:
        patched.setattr(gpu_stages, "compare", judge)
        patched.setattr(gpu_stages, "load_reference", lambda path: SimpleNamespace(outputs=None, videos=None))
        gpu_stages.status(settings | {"batches": [1, 2, 4, 64], "reference": "r"})
    assert judged == [[1, 2, 4]]  # each that is timed
    speed = gpu_stages.speed(settings)
    assert [row["batch"] for row in speed["rows"]] == [1, 2]
    assert speed["describe"]["cuda_graphs"] == {1: "replayed", 2: "replayed"}
    for row in speed["rows"]:
        assert row["graph"] == "replayed"
        assert row["device_ms"]["p50"] == row["device_ms_without_graph"]["p50"] == pytest.approx(0.5)
        assert row["stream_videos_per_second"]["per_second"] > 0
    copies = gpu_running.copies(settings | {"batches": [2]})
    assert [row["candidate"] for row in copies["ways"]] == ["stream", "graph", "steps"]
    assert copies["fastest"]["2"].keys() == {"latency", "throughput"}
    contexts = gpu_running.contexts(settings | {"seconds": 0.01})
    assert contexts["videos_per_second"].keys() == {"1", "2"}
    assert all(rate > 0 for rates in contexts["videos_per_second"].values() for rate in rates.values())
    assert contexts["under_load_ms"].keys() == {"normal", "high priority"}
    assert gpu_stages.layers(settings | {"batches": [1, 64]}).keys() == {"1"}  # this engine takes up to 4
    assert gpu_stages.layers(settings | {"batches": [64]}).keys() == {"4"}
    layers = gpu_stages.layers(settings)
    assert layers["1"] == {"total_ms": 2.5, "layers": 2, "slowest": [("slow", 2.0), ("quick", 0.5)]}
    assert sim.held == {}


def test_machine_and_copy_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = Simulation()
    install(monkeypatch, sim)
    monkeypatch.setattr(gpu_stages, "COPY_BYTES", 4096)
    facts = gpu_stages.machine(SETTINGS | {"device": "cuda"})
    assert facts["cuda"]["name"] == "Simulated GPU"
    assert facts["libraries"]["tensorrt"] == "10.9.0"
    found = gpu_stages.copy(SETTINGS | {"device": "cuda"})
    assert found["bytes_per_second"] == pytest.approx(2 * 4096 / 0.5e-3)
    assert sim.held == {}


def summary(p50: float) -> dict[str, float]:
    return {"p50": p50, "p99": 2 * p50}


RATE = {"stream_videos_per_second": {"per_second": 800.0}}
ROW = {"batch": 1, "engine_ms": summary(1.5), "device_ms": summary(1.0), "graph": "replayed", **RATE}
DONE: dict[str, Any] = {
    "copy": {"status": "done", "result": {"bytes": 1 << 30, "bytes_per_second": 3.9e12}},
    "matmuls": {"status": "done", "result": {"side": 8192, "operations_per_second": {"fp16": 7.9e14}}},
    "tensorrt fp16 build": {"status": "done", "seconds": 60.0, "gpu": {
        "sm_mhz": {"min": 345.0, "mean": 1800.0, "max": 1980.0}, "unsteady": True}, "result": {"engine": {
        "seconds": 58.0, "engine_bytes": 500 << 20, "delivered_precisions": {"fp16": 300}}, "profile": [1, 8, 8],
        "not_built": "no engine for batch 64"}},
    "tensorrt fp16 parity check": {"status": "done", "result": {"passed": True}},
    "tensorrt fp16 speed": {"status": "done", "result": {
        "rows": [ROW], "describe": {"scratch_bytes": 80 << 20}}},
    "tensorrt fp16 copies": {"status": "done", "result": {"fastest": {"1": {"latency": "graph", "throughput": "steps"}},
        "ways": [{"candidate": way, "batch": 1, "engine_ms": summary(ms), **RATE}
                 for way, ms in (("stream", 1.5), ("graph", 1.4), ("steps", 1.6))]}},
    "tensorrt fp16 contexts": {"status": "done", "result": {"videos_per_second": {"1": {"1": 700.0, "2": 900.0,
        "3": 950.0}}, "under_load_ms": {"normal": summary(3.0), "high priority": summary(1.5)}}},
    "tensorrt fp16 layers": {"status": "done", "result": {
        "1": {"total_ms": 1.0, "layers": 2, "slowest": [["conv", 0.75], ["norm", 0.25]]}}},
    "tensorrt fp32 speed": {"status": "done", "result": {"rows": [ROW | {"device_ms": summary(0.9)}]}},
    "tensorrt bf16 build": {"status": "failed", "error": "ExportError: tensorrt 8.6.0 does not support | bfloat16"},
    "torch eager fp32": {"status": "done", "result": {"status": {"passed": False}, "rows": [ROW]}},
}  # fmt: skip


def test_page() -> None:
    text = page({"commit": "abc"}, DONE)
    assert "| tensorrt fp16 | 58 s | [1, 8, 8] | 500 MiB | 80 MiB | {'fp16': 300} | verified |" in text
    assert "| batch 1, tensorrt fp16 | 1.000 / 2.000 |  | 1.500 / 3.000 |  | 800 | replayed |" in text
    assert "| batch 1, tensorrt fp16 | 1.500 / 800 | 1.400 / 800 | 1.600 / 800 | graph | steps |" in text
    assert "| batch 1, tensorrt fp16 | 700 | 900 | 950 |" in text
    assert "high priority, beside its largest batches: 1.500 / 3.000 ms" in text
    assert "3900 GB/s" in text
    assert "| tensorrt fp16 build | done | 60.0 | 345 to 1980, unsteady | no engine for batch 64 |" in text
    assert "- batch 1, tensorrt fp16 is no faster than with fp32 (0.900 ms)" in text
    assert "fp16 matmul of 8192 x 8192: 790.0 TFLOP/s" in text
    assert "| conv | 0.7500 | 75.0% |" in text
    assert "does not support / bfloat16" in text
    assert "batch 1, torch eager" not in text  # its parity check failed: no speed without proof


def test_measurements() -> None:
    assert {m.name: m.value for m in measurements(DONE)} == {
        "batch 1 / tensorrt fp16 / device p50": 1.0,
        "batch 1 / tensorrt fp16 / engine p50": 1.5,
        "batch 1 / tensorrt fp16 / throughput": 800.0,
        "batch 1 / tensorrt fp32 / device p50": 0.9,
        "batch 1 / tensorrt fp32 / engine p50": 1.5,
        "batch 1 / tensorrt fp32 / throughput": 800.0,
    }


@pytest.mark.slow  # tens of seconds of eager PyTorch and torch imports
def test_the_torch_side(
    tiny_networks: Networks, tiny_graph: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import torch_stages as gpu_torch

    matmuls = gpu_torch.matmuls(SETTINGS)
    assert set(matmuls["operations_per_second"]) == {"fp16", "bf16", "tf32", "fp32"}
    assert all(rate > 0 for rate in matmuls["operations_per_second"].values())
    monkeypatch.setattr("export.graph.to_onnx.export_onnx", builders.copying_exporter(tiny_graph("fused")))
    bundle, reference = tmp_path / "bundle", tmp_path / "reference.npz"
    settings = SETTINGS | {
        "checkpoint": str(tiny_networks.checkpoint),
        "bundle": str(bundle),
        "reference": str(reference),
        "batches": [1, 4],
    }
    gpu_torch.export(settings | {"precisions": ["fp16", "tf32", "fp32"], "opset": 17})
    graphs = {a.precision: a.opset for a in read_bundle(bundle).manifest.model_files}
    assert graphs == {"fp16": 17, "fp32": 17}
    for form in ("eager", "fused"):
        found = gpu_torch.peer(settings | {"form": form, "precision": "fp32"})
        assert found["status"]["passed"], found["status"]
        assert [row["batch"] for row in found["rows"]] == [1, 4]
        assert all(row["device_ms"]["p50"] > 0 for row in found["rows"])
    found = gpu_stages.onnxruntime(settings | {"precision": "fp32", "cuda_graph": False})
    assert found["status"]["passed"], found["status"]
    with pytest.raises(Absent, match="no bf16 graph"):
        gpu_stages.onnxruntime(settings | {"precision": "bf16", "cuda_graph": False})


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_each_kind_of_engine_is_tuned_for_its_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    asked: list[EngineOptions] = []
    library = SimpleNamespace(__version__="10.9.0", TilingOptimizationLevel=None)

    def build(graph: Path, out: Path, options: EngineOptions, *, gpu: bool) -> Any:
        asked.append(options)
        raise ExportError("far enough")

    bundle = builders.make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(gpu_stages, "build_here", build)
    monkeypatch.setattr(gpu_stages, "load_library", lambda format: library)
    options = gpu_report.parse(["--bundle", "b", "--reference", "r", "--out", "o", "--formats", "tensorrt"])
    stage = next(s for s in gpu_report.plan(options) if s.name == f"tensorrt fp32 {kind} build")
    with pytest.raises(ExportError, match="far enough"):
        gpu_stages.build(SETTINGS | {"bundle": str(bundle.folder), "work": str(tmp_path)} | stage.settings)
    expected = {"latency": ((1, 1, 1), 5, "moderate"), "throughput": ((1, 32, 64), None, "none")}[kind]
    assert (asked[0].profile, asked[0].optimization_level, asked[0].tiling) == expected
    assert asked[0].timing_cache == tmp_path / "timings.cache"  # of all precisions and kinds


@pytest.mark.parametrize("wide", ["is built", "fails"])
def test_tensorrt_8_builds_for_small_batches_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wide: str) -> None:
    asked: list[tuple[int, ...]] = []

    def build(graph: Path, out: Path, options: EngineOptions, *, gpu: bool) -> Any:
        asked.append(options.profile)
        if len(asked) > 1 and wide == "fails":
            raise ExportError("built no engine")
        model_file = dataclasses.replace(ENGINE_FILE, profile=options.profile, max_batch=options.profile[2])
        facts = {"build": {"seconds": 1.0}, "profile": options.profile, "opset": 17, "onnx_sha256": "0"}
        return SimpleNamespace(**facts, model_file=lambda name: model_file)

    library = SimpleNamespace(__version__="8.6.0")
    monkeypatch.setattr(gpu_stages, "build_here", build)
    monkeypatch.setattr(gpu_stages, "load_library", lambda format: library)
    settings = SETTINGS | {"bundle": str(builders.make_bundle(tmp_path / "bundle").folder), "work": str(tmp_path)}
    settings |= {"partial": str(tmp_path / "partial.json"), "batches": [2, 16, 64], "format": "tensorrt"}
    found = gpu_stages.build(settings | {"precision": "fp32", "kind": "throughput"})
    assert asked == [(1, 8, 8), (1, 32, 64)]
    assert found["profile"] == ((1, 32, 64) if wide == "is built" else (1, 8, 8))
    assert found.get("not_built") == (None if wide == "is built" else "built no engine")
    described = json.loads((tmp_path / "tensorrt-fp32-throughput.json").read_text())
    assert described["max_batch"] == found["profile"][2]
    assert json.loads((tmp_path / "partial.json").read_text())["profile"] == list(found["profile"])


GUIDE = (gpu_report.ROOT / "benchmarks" / "GPU.md").read_text(encoding="utf-8")


def commands(begin: str) -> list[list[str]]:
    """Return the arguments of each command of the guide that begins so."""
    joined = GUIDE.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(begin), comments=True) for line in joined if line.startswith(begin)]


def test_the_commands_of_the_guide_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    reports = commands("python -m benchmarks.gpu.report ")
    assert len(reports) == 5
    for arguments in reports:
        assert gpu_report.plan(gpu_report.parse(arguments))
        assert gpu_report.main([*arguments, "--dry-run"]) == 0
    parser, _ = make_parser()
    for arguments in (tools := commands("ccnet ")):
        parser.parse_args(arguments)
    assert {arguments[0] for arguments in tools} == {"export", "reference"}
    (stage,) = re.findall(r"`python -m benchmarks.gpu.stages (\w+) (\S+) result.json`", GUIDE)
    assert stage[0] in gpu_stages.STAGES
    assert "tensorrt-fp16-latency-speed.settings.json" in stage[1]


def test_the_order_of_the_day() -> None:
    given = ["--checkpoint", "c", "--torch-python", "python", "--out", "o", "--precisions", "fp32", "fp16"]
    stages = gpu_report.plan(gpu_report.parse(given))
    names = [stage.name for stage in stages]
    assert names[:5] == ["machine", "copy", "tests", "matmuls", "export"]
    assert gpu_report.PRECISIONS[0] == "fp16"
    built = [name for name in names if name.endswith("build")]
    assert built[:2] == ["tensorrt fp32 latency build", "tensorrt fp32 throughput build"]
    (compiled,) = (stage for stage in stages if stage.settings.get("form") == "compiled")
    assert (compiled.settings["batches"], compiled.limit_seconds) == ([1, 64], 600)  # it takes minutes for each
    assert all("optimization_level" in stage.settings for stage in stages if " latency " in stage.name)


def test_graphs_are_written_as_the_guide_says(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    (command,) = (line.partition(" &&")[0] for line in GUIDE.splitlines() if "tests/builders.py graphs" in line)
    command = command.replace("python ", f"{sys.executable} ").replace(" graphs", f" {tmp_path / 'new' / 'graphs'}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, shell=True, check=True, cwd=gpu_report.ROOT, env=environment)
    assert {path.stem for path in (tmp_path / "new" / "graphs").glob("*.onnx")} >= {"fp32", "fp16"}
