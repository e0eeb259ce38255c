"""`ccnet predict`: every good video gets its events, every bad one is named, and no partial file looks whole."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, OracleBackend, engine, features_with, make_bundle, write_features

from ccnet.cli.main import main
from runtime.backends.base import Float32, Int32
from runtime.batches import Batch
from runtime.detections import read_events
from runtime.errors import EngineError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle").folder


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """v0 .. v5: video i has one event [2, 8] of class i % 4 and i + 12 steps."""
    folder = tmp_path / "features"
    folder.mkdir()
    for i in range(6):
        write_features(folder, f"v{i}", features_with(12 + i, [(2, 8, i % 4, 3.0)]))
    return folder


def kept(out: Path) -> list[str]:
    """Return the ids of the videos that an unfinished run has."""
    shards = sorted(Path(f"{out}.partial").glob("shards/*.jsonl"))
    return [row["video_id"] for shard in shards for row in lines(shard)]


def predict(bundle: Path, features: Path, out: Path, *options: str) -> int:
    return main(["predict", str(bundle), "--features", str(features), "--out", str(out), *options])


def features_of_many(folder: Path, count: int) -> None:
    for i in range(count):
        write_features(folder, f"w{i:03d}", features_with(12, [(2, 8, i % 4, 3.0)]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_videos_of_a_folder(bundle: Path, features: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "events.jsonl"
    assert predict(bundle, features, out, "--batch", "2") == 0
    rows = lines(out)
    assert [row["video_id"] for row in rows] == [f"v{i}" for i in range(6)]
    assert [row["duration"] for row in rows] == [12.0 + i for i in range(6)]
    for i, row in enumerate(rows):
        (event,) = row["events"]
        assert event["segment"] == [2.5, 8.5]
        assert (event["label"], event["label_id"]) == (LABELS[i % 4], i % 4)
        assert event["score"] == pytest.approx(1 / (1 + np.exp(-3)), rel=1e-5)
    assert set(read_events(out)) == {f"v{i}" for i in range(6)}
    assert "6 videos, 6 events, by onnxruntime-fp32 (parity check: verified)" in capsys.readouterr().out


def annotate(path: Path, videos: dict[str, tuple[float, str]]) -> Path:
    database = {
        video_id: {
            "duration": duration,
            "subset": subset,
            "annotations": [{"segment": [0.0, 1.0 + i], "label": LABELS[i], "label_id": i} for i in range(4)],
        }
        for video_id, (duration, subset) in videos.items()
    }
    path.write_text(json.dumps({"version": "1", "database": database}))
    return path


def test_ids_and_durations_from_annotations(bundle: Path, features: Path, tmp_path: Path) -> None:
    annotations = annotate(tmp_path / "a.json", {"v4": (7.5, "test"), "v1": (13.0, "train"), "v2": (14.0, "test")})
    out = tmp_path / "events.jsonl"
    assert predict(bundle, features, out, "--annotations", str(annotations), "--subset", "test") == 0
    rows = lines(out)
    assert [(row["video_id"], row["duration"]) for row in rows] == [("v4", 7.5), ("v2", 14.0)]
    assert rows[0]["events"][0]["segment"] == [2.5, 7.5]
    assert predict(bundle, features, out, "--annotations", str(annotations)) == 0
    assert len(lines(out)) == 3
    assert predict(bundle, features, out, "--subset", "test") == 2


def spoil(features: Path) -> None:
    (features / "v1_heard.npy").unlink()
    np.save(features / "v3_seen.npy", np.full((9, 6), np.nan, np.float32))


def test_bad_videos_are_reported_at_the_end_and_the_good_ones_are_kept(
    bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    spoil(features)
    out = tmp_path / "events.jsonl"
    assert predict(bundle, features, out) == 1
    assert [row["video_id"] for row in lines(out)] == ["v0", "v2", "v4", "v5"]
    report = capsys.readouterr().err
    assert "warning: 2 of 6 videos failed:" in report
    assert "v1_heard.npy: no such feature file" in report
    assert "v3_seen.npy: nan at step 0, channel 0" in report


def test_stopping_at_a_bad_video_keeps_the_good_ones_for_the_next_run(
    bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    spoil(features)
    out = tmp_path / "events.jsonl"
    assert predict(bundle, features, out, "--on-error", "stop", "--shard-size", "1") == 1
    assert not out.exists()
    assert kept(out) == ["v0"]
    report = capsys.readouterr().err
    assert "stopped at video v1 (--on-error stop)" in report
    assert f"the events of 1 of 6 videos are in {out}.partial; run the same command again to go on" in report
    for i in (1, 3):
        write_features(features, f"v{i}", features_with(12 + i, [(2, 8, i % 4, 3.0)]))
    assert predict(bundle, features, out, "--on-error", "stop", "--shard-size", "1") == 0
    assert [row["video_id"] for row in lines(out)] == [f"v{i}" for i in range(6)]
    assert not Path(f"{out}.partial").exists()


def test_features_with_a_note_are_used_and_reported(bundle: Path, features: Path, tmp_path: Path, capsys: Any) -> None:
    np.save(features / "v2_heard.npy", np.zeros((40, 3), np.float32))
    assert predict(bundle, features, tmp_path / "events.jsonl") == 0
    report = capsys.readouterr().err
    assert "warning: 1 of 6 videos are not covered as a whole:" in report
    assert "v2_heard.npy has 40" in report


def test_long_videos(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    write_features(folder, "long", features_with(100, [(3, 8, 1, 3.0), (70, 90, 2, 2.0)]))
    out = tmp_path / "events.jsonl"
    assert predict(bundle, folder, out) == 0
    assert [event["segment"] for event in lines(out)[0]["events"]] == [[3.5, 8.5]]
    assert predict(bundle, folder, out, "--long-videos", "windows") == 0
    assert [event["segment"] for event in lines(out)[0]["events"]] == [[3.5, 8.5], [70.5, 90.5]]


def test_parquet(bundle: Path, features: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "events.parquet"
    assert predict(bundle, features, out) == 0
    assert parquet.read_table(out).num_rows == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tensorrt"], "has no engine for tensorrt"),
        (["--batch", "99"], "batch_size: got 99, expected 1 to 4"),
        (["--long-videos", "windows", "--window-overlap", "1"], "window_overlap"),
        (["--window-overlap", "0.2"], "--window-overlap: only with --long-videos windows"),
        (["--missing-audio", "silence", "--remote"], "--missing-audio --remote: only with --videos"),
        (["--extractor", "e"], "--extractor: only with --videos"),
    ],
)
def test_what_can_not_be_done_is_said_before_anything_is_written(
    options: list[str], message: str, bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    assert predict(bundle, features, tmp_path / "out" / "events.jsonl", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_without_features(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    assert predict(bundle, tmp_path, tmp_path / "events.jsonl") == 2
    assert "no feature files; expected <video id>_seen.npy" in capsys.readouterr().err


def test_an_engine_failure_keeps_the_good_ones_and_is_raised(
    bundle: Path, features: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        if 15 in lengths:  # v3
            raise EngineError("the device fell off the bus")
        return OracleBackend(self.spec).infer(visual, audio, lengths)

    monkeypatch.setattr("runtime.backends.onnxruntime.OnnxRuntimeBackend.infer", failing)
    out = tmp_path / "events.jsonl"
    assert predict(bundle, features, out, "--shard-size", "1") == 2
    assert not out.exists()
    assert kept(out) == ["v0", "v1", "v2"]
    assert "fell off the bus" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_the_good_ones(
    number: signal.Signals,
    status: int,
    bundle: Path,
    features: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def interrupting(self: Any, count: int = 1) -> None:
        seen.append(count)
        if sum(seen) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("ccnet.cli.predict.Progress.advance", interrupting)
    out = tmp_path / "events.jsonl"
    features_of_many(features, 200)
    assert predict(bundle, features, out, "--shard-size", "1") == status
    assert not out.exists()
    ids = kept(out)
    assert ids == sorted(path.name[: -len("_seen.npy")] for path in features.glob("*_seen.npy"))[: len(ids)]
    assert 1 <= len(ids) < 200
    assert "ccnet predict: interrupted" in capsys.readouterr().err


def test_an_interrupt_before_the_first_video_leaves_nothing(
    bundle: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Batch.read

    def reading(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # until it is noticed; six videos are done in a moment
        return original(*arguments, **options)

    monkeypatch.setattr(Batch, "read", reading)
    assert predict(bundle, features, tmp_path / "events.jsonl") == 143
    assert not list(tmp_path.glob("events*"))


def test_an_existing_result_survives_a_run_that_fails(
    bundle: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "events.jsonl"
    assert predict(bundle, features, out) == 0
    before = out.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert predict(bundle, features, out) == 2
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "events.jsonl", "features"]


@pytest.mark.filterwarnings("always:engine")
def test_an_unverified_bundle_is_warned_about_in_one_line(tmp_path: Path, features: Path, capsys: Any) -> None:
    folder = make_bundle(tmp_path / "unverified", [engine("onnxruntime", status="unverified")]).folder
    assert predict(folder, features, tmp_path / "events.jsonl") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: engine 'onnxruntime-fp32' was never verified")


def test_a_pipe_gets_every_line(bundle: Path, features: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert predict(bundle, features, pipe) == 0
            found = reader.communicate(timeout=30)[0]
        finally:
            reader.kill()  # else it waits for a writer for ever where there was none
    assert [json.loads(line)["video_id"] for line in found.splitlines()] == [f"v{i}" for i in range(6)]
    assert not pipe.is_file()


def test_standard_output_has_the_lines_alone(bundle: Path, features: Path, capfd: Any) -> None:
    assert main(["predict", str(bundle), "--features", str(features), "--out", "-"]) == 0
    captured = capfd.readouterr()
    assert [json.loads(line)["video_id"] for line in captured.out.splitlines()] == [f"v{i}" for i in range(6)]
    assert "6 videos, 6 events" in captured.err


def test_a_link_stays_and_its_target_is_written(bundle: Path, features: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there" / "events.jsonl")
    assert predict(bundle, features, tmp_path / "link.jsonl") == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(lines(tmp_path / "there" / "events.jsonl")) == 6


@pytest.mark.parametrize("out", ["file/x.jsonl", "file/", "file/new/"])
def test_a_place_for_no_output_is_refused_before_the_work(
    bundle: Path, features: Path, tmp_path: Path, out: str, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(bundle), "--features", str(features), "--out", f"{tmp_path}/{out}"])
    assert caught.value.code == 2
    assert "folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["e.jsonl", "E.PARQUET", "e.json", "-e.jsonl", "my dir/é 'x' $HOME.jsonl", "e.JSONL", "events", "a\nb.jsonl"],
)
def test_the_command_that_is_printed_works(
    bundle: Path, features: Path, tmp_path: Path, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("PARQUET"):
        pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    events = [{"segment": [2.0, 8.0], "label": LABELS[0], "label_id": 0}]
    database = {f"v{i}": {"duration": 12.0 + i, "subset": "test", "annotations": events} for i in range(6)}
    Path("a.json").write_text(json.dumps({"database": database}))
    if name == "events":
        Path(name).touch()  # a file stays one
    assert main(["predict", str(bundle), "--features", str(features), f"--out={name}"]) == 0
    printed = capsys.readouterr().out.partition("next: ccnet ")[2]
    assert printed.endswith(" --annotations F\n")
    assert main(shlex.split(printed.replace(" F\n", " a.json"))) == 0
    assert "mAP" in capsys.readouterr().out
    known = ["--annotations", "a.json", "--subset", "test"]
    assert main(["predict", str(bundle), "--features", str(features), f"--out={name}", *known]) == 0
    words = shlex.split(capsys.readouterr().out.partition("next: ccnet ")[2])
    assert words[0] == "evaluate"
    assert main(words) == 0
    assert "mAP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e.csv", "'ccnet convert' makes .csv"),
        ("e.VTT", "makes .vtt"),
        ("e.jsonl.gz", "not compressed; give --out - and pipe it through gzip"),
        ("e.parquet.zst", "through zstd"),
    ],
)
def test_a_name_of_another_format_is_refused(
    bundle: Path, features: Path, tmp_path: Path, name: str, message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict(bundle, features, tmp_path / name)
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["bundle", "features"]
