"""`ccnet bench` on stand-in engines: what is measured, what gets no speed, what the report holds."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_bundle

import ccnet.cli.bench
import runtime.profiling.bench
from ccnet.cli.main import main
from runtime.backends.base import check_inputs
from runtime.bundle import Bundle, Engine, FileRecord, Manifest, ModelFile
from runtime.errors import BackendUnavailable, EngineError
from runtime.profiling.bench import Candidate, Plan, bench, engine_candidates
from runtime.profiling.cold_start import measure_cold_start
from runtime.profiling.report import bench_text, text_table
from runtime.profiling.timing import Rules
from runtime.profiling.workload import sample_videos
from runtime.spec import ModelSpec

SPEC = ModelSpec(length=16, levels=2, visual_dim=6, audio_dim=3, labels=("a", "b"))
QUICK = Plan(rules=Rules(warmup_seconds=0, warmup_calls=1, seconds=0, calls=4), batches=(1, 2), cold_starts=1)


class FakeBackend:
    """An engine that answers with constants. It counts the videos of streams, and the different inputs of the rest."""

    name, precision = "fake", "fp32"

    def __init__(self, spec: ModelSpec = SPEC, max_batch: int = 2, seconds: float = 0.0) -> None:
        self.spec, self.max_batch, self.seconds = spec, max_batch, seconds
        self.batches: list[int] = []
        self.streamed = 0
        self.seen: set[bytes] = set()
        self.closed = False

    def infer(self, visual: Any, audio: Any, lengths: Any) -> tuple[Any, Any]:
        batch = len(check_inputs(visual, audio, lengths, self.spec, self.max_batch)[0])
        self.batches.append(batch)
        if threading.current_thread().name.startswith("ccnet-stream"):
            self.streamed += batch
        else:
            self.seen.add(visual.tobytes())
        time.sleep(self.seconds)
        shapes = self.spec.output_shapes(batch)
        return np.zeros(shapes["logits"], np.float32), np.ones(shapes["offsets"], np.float32)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name}

    def close(self) -> None:
        self.closed = True


def candidate(name: str, backend: FakeBackend, **changes: Any) -> Candidate:
    facts: dict[str, Any] = {"open": lambda: backend, "status": "verified", **changes}
    return Candidate(name=name, **facts)


def test_a_stream_is_counted_by_whole_batches_and_calls_get_other_inputs_each_time() -> None:
    backend = FakeBackend(max_batch=4)
    rules = replace(QUICK.rules, calls=600)
    (row,) = bench(SPEC, [candidate("a", backend)], replace(QUICK, rules=rules, batches=(4,)))["rows"]
    # videos of one batch come out together: counting them one by one would count the same moment four times
    assert 400 <= row["stream_videos_per_second"]["videos"] <= backend.streamed
    assert len(backend.seen) >= 8  # more than a cache of the processor holds of the real ones


def test_rows_for_every_batch_with_accuracy_beside_them() -> None:
    fast, slow = FakeBackend(seconds=0.001), FakeBackend(seconds=0.02)
    report = bench(
        SPEC, [candidate("slow", slow, status="reference"), candidate("fast", fast, accuracy={"matched": 1.0})], QUICK
    )
    assert [(r["candidate"], r["batch"]) for r in report["rows"]] == [
        ("slow", 1), ("fast", 1), ("slow", 2), ("fast", 2),
    ]  # fmt: skip
    first, second = report["rows"][:2]
    assert first["engine_ratio"]["median"] == 1.0
    assert second["engine_ratio"]["to"] == "slow"
    assert second["engine_ratio"]["median"] < 1
    assert first["engine_ms"]["n"] == first["end_to_end_ms"]["n"] == 4
    # End to end takes as long as the engine at least, and what is outside of it is not counted as engine.
    assert first["end_to_end_ms"]["min"] >= 20
    assert first["outside_engine_ms"]["p50"] < first["end_to_end_ms"]["p50"] - 19
    assert second["stream_videos_per_second"]["per_second"] > first["stream_videos_per_second"]["per_second"]
    assert {c["name"]: c["accuracy"] for c in report["candidates"]} == {"slow": {}, "fast": {"matched": 1.0}}
    assert slow.closed
    assert fast.closed
    json.dumps(report, allow_nan=False)
    assert "fast: verified; matched 1" in bench_text(report).splitlines()


def test_a_candidate_is_compared_with_its_peer_where_both_take_the_batch() -> None:
    first, peer, fast = FakeBackend(), FakeBackend(max_batch=1, seconds=0.02), FakeBackend(seconds=0.001)
    report = bench(SPEC, [candidate("first", first), candidate("peer", peer), candidate("x", fast, peer="peer")], QUICK)
    compared = {r["batch"]: r["peer_ratio"] for r in report["rows"] if "peer_ratio" in r}
    assert set(compared) == {1}
    assert compared[1]["to"] == "peer"
    assert compared[1]["median"] < 1


def test_batches_beyond_an_engine_are_left_out() -> None:
    small, large = FakeBackend(max_batch=1), FakeBackend(max_batch=4)
    report = bench(SPEC, [candidate("small", small), candidate("large", large)], QUICK)
    assert [(r["candidate"], r["batch"]) for r in report["rows"]] == [("small", 1), ("large", 1), ("large", 2)]
    assert set(small.batches) == {1}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("unverified", "its accuracy was never verified; run 'ccnet verify BUNDLE'"),
        ("failed", "it failed the parity check"),
    ],
)
def test_without_a_passed_parity_check_there_is_no_speed(status: str, reason: str) -> None:
    unverified = FakeBackend()
    report = bench(SPEC, [candidate("unverified", unverified, status=status), candidate("good", FakeBackend())], QUICK)
    assert {r["candidate"] for r in report["rows"]} == {"good"}
    assert unverified.batches == []
    assert [line for line in bench_text(report).splitlines() if "unverified" in line or "failed" in line] == [
        f"unverified: {status}; not measured: {reason}"
    ]


def test_peers_are_verified_before_they_are_measured() -> None:
    good, bad = FakeBackend(), FakeBackend()
    verdicts: dict[int, tuple[str, dict[str, Any]]] = {
        id(good): ("verified", {"max_logits": 1e-6}),
        id(bad): ("failed", {"max_logits": 0.5}),
    }

    def verify(backend: Any) -> tuple[str, dict[str, Any]]:
        return verdicts[id(backend)]

    report = bench(
        SPEC,
        [
            candidate("good", good, status="unverified", verify=verify),
            candidate("bad", bad, status="unverified", verify=verify),
        ],
        QUICK,
    )
    assert {r["candidate"] for r in report["rows"]} == {"good"}
    assert [c["status"] for c in report["candidates"]] == ["verified", "failed"]
    assert report["candidates"][1]["accuracy"] == {"max_logits": 0.5}
    assert bad.batches == []
    assert "bad: failed; not measured: it failed the parity check; max_logits 0.5" in bench_text(report).splitlines()


def test_what_does_not_open_here_is_listed_and_the_rest_goes_on() -> None:
    def absent() -> FakeBackend:
        raise BackendUnavailable("no such device")

    report = bench(SPEC, [candidate("gpu", FakeBackend(), open=absent), candidate("cpu", FakeBackend())], QUICK)
    assert report["candidates"][0]["not_measured"] == "no such device"
    assert {r["candidate"] for r in report["rows"]} == {"cpu"}


def test_the_number_of_videos_is_the_same_for_every_batch() -> None:
    plan = Plan(rules=Rules(calls=12, warmup_calls=4))
    assert [plan.rules_for(b).calls for b in (1, 2, 4, 32)] == [12, 6, 3, 3]
    assert [plan.rules_for(b).warmup_calls for b in (1, 2, 4, 32)] == [4, 2, 1, 1]


def test_an_error_in_the_stream_is_not_counted_as_a_result() -> None:
    class Broken(FakeBackend):
        def infer(self, visual: Any, audio: Any, lengths: Any) -> tuple[Any, Any]:
            logits, offsets = super().infer(visual, audio, lengths)
            return np.full_like(logits, np.nan), offsets

    with pytest.raises(EngineError):
        bench(SPEC, [candidate("broken", Broken())], QUICK)


def manifest_bundle(folder: Path, backends: tuple[str, ...]) -> Bundle:
    model_file = ModelFile(
        name="onnx-fp32", format="onnx", files=("m.onnx", "m.onnx.data"), precision="fp32", max_batch=4
    )
    engines = tuple(
        Engine(
            name=f"{b}-fp32",
            backend=b,
            precision="fp32",
            model_file="onnx-fp32",
            status="verified",
            accuracy={"matched": 1.0},
        )
        for b in backends
    )
    files = (FileRecord(name="m.onnx", size=5, sha256="aa"), FileRecord(name="m.onnx.data", size=7, sha256="bb"))
    manifest = Manifest(
        schema=1, spec=SPEC, model={}, checkpoint_sha256="c" * 64, versions={}, created="now",
        files=files, model_files=(model_file,), engines=engines,
    )  # fmt: skip
    return Bundle(folder, manifest)


def test_candidates_of_a_bundle(tmp_path: Path) -> None:
    bundle = manifest_bundle(tmp_path, ("onnxruntime", "openvino"))
    first, second = engine_candidates(bundle)
    assert (first.name, first.status, first.accuracy) == ("onnxruntime-fp32", "verified", {"matched": 1.0})
    assert first.files == {"m.onnx": "aa", "m.onnx.data": "bb"}
    assert first.weight_bytes == 12
    assert second.bundle == tmp_path
    assert [c.name for c in engine_candidates(bundle, ["openvino"])] == ["openvino-fp32"]

    failed = replace(bundle.manifest.engines[1], name="openvino-int8", precision="int8", status="failed")
    bundle = replace(bundle, manifest=replace(bundle.manifest, engines=(*bundle.manifest.engines, failed)))
    assert [(c.name, c.status) for c in engine_candidates(bundle, ["openvino"])] == [
        ("openvino-fp32", "verified"),
        ("openvino-int8", "failed"),
    ]


def test_cold_start_goes_into_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"import_s": 0.1, "load_s": 2.0, "first_result_s": 0.5, "total_s": 3.0, "peak_bytes": 130e6}
    monkeypatch.setattr(
        runtime.profiling.bench, "measure_cold_start", lambda bundle, engine, repeats: {"runs": [run] * repeats}
    )
    measured = candidate("x", FakeBackend(), bundle=Path("bundle"), weight_bytes=100_000_000)
    unverified = candidate("y", FakeBackend(), bundle=Path("bundle"), status="unverified")
    report = bench(SPEC, [measured, unverified], QUICK)
    assert [c["cold_start"] for c in report["candidates"]] == [{"runs": [run]}, None]
    assert "1.30" in bench_text(report)


def test_cold_start_of_what_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no bundle\.json|has no bundle"):
        measure_cold_start(tmp_path, "onnxruntime-fp32", repeats=1)


def test_sample_videos_differ_and_are_reproducible() -> None:
    first, second = sample_videos(SPEC, 2)
    assert first.visual.shape == (16, 6)
    assert first.audio.shape == (16, 3)
    assert first.visual.min() >= 0
    assert not np.array_equal(first.visual, second.visual)
    assert np.array_equal(first.visual, sample_videos(SPEC, 1)[0].visual)
    assert sample_videos(SPEC, 1, steps=5)[0].steps == 5


def test_text_table_alignment() -> None:
    assert text_table(("a", "bb"), [("xyz", "1")]) == "a    bb\nxyz   1"


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ccnet.plots import plot_bench

    report = bench(SPEC, [candidate("cpu", FakeBackend())], QUICK)
    plot_bench(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import runtime.profiling.bench, ccnet.cli.bench"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cold_start_that_fails_is_listed_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bundle: Path, engine: str, repeats: int) -> Any:
        raise EngineError("no such arithmetic here")

    monkeypatch.setattr(runtime.profiling.bench, "measure_cold_start", fail)
    unable = candidate("x", FakeBackend(), bundle=Path("bundle"))
    report = bench(SPEC, [unable, candidate("y", FakeBackend())], QUICK)
    assert [c["not_measured"] for c in report["candidates"]] == ["no such arithmetic here", None]
    assert {row["candidate"] for row in report["rows"]} == {"y"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "-1"], "expected seconds, 0 or more"),
        (["--seconds", "nan"], "expected seconds, 0 or more"),
        (["--calls", "0"], "expected an integer of 1 or more"),
        (["--backend", "typo"], "invalid choice"),
    ],
)
def test_what_is_out_of_range_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "bundle", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_report_alone_is_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = manifest_bundle(tmp_path, ())
    monkeypatch.setattr(ccnet.cli.bench, "read_bundle", lambda _: bundle)
    monkeypatch.setattr(ccnet.cli.bench, "engine_candidates", lambda *_: [candidate("x", FakeBackend())])
    report = tmp_path / "report.json"
    options = ["--seconds", "0", "--calls", "2", "--batches", "1", "--json", str(report)]
    assert main(["bench", str(tmp_path), *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == bench_text(json.loads(report.read_text())) + "\n"
    assert f"{report} written" in shown.err
    assert "batch 1: x" in shown.err


def test_an_option_without_effect_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bundle", "--no-compile"]) == 2
    assert "only with --checkpoint" in capsys.readouterr().err


def test_a_cold_start_does_not_import_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runtime", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    bundle = make_bundle(tmp_path / "bundle").folder
    monkeypatch.chdir(tmp_path)
    assert measure_cold_start(bundle, "onnxruntime-fp32", repeats=1)["runs"][0]["load_s"] > 0
