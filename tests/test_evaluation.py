"""Evaluation and `ccnet evaluate`: the table, the duration buckets, what is counted, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, OracleBackend, features_with, make_bundle, write_features

from ccnet.cli.main import main
from runtime.annotations import Annotations, VideoAnnotation, read_annotations
from runtime.detections import Detections, write_events
from runtime.errors import AnnotationError, FeatureError, Interrupted, PredictionError
from runtime.evaluation import TIOU, evaluate, evaluate_localizer
from runtime.localizer import Localizer
from runtime.signals import StopRequest

NAMES = ("dog", "cat", "cow")


def video(video_id: str, events: list[tuple[float, float, int]], subset: str = "test") -> VideoAnnotation:
    table = np.array(events, float).reshape(-1, 3)
    return VideoAnnotation(video_id, 60.0, subset, table[:, :2], table[:, 2].astype(np.int64))


def annotated(*videos: VideoAnnotation) -> Annotations:
    return Annotations(Path("annotations.json"), NAMES, {v.video_id: v for v in videos})


def found(*events: tuple[float, float, int, float], names: tuple[str, ...] = NAMES) -> Detections:
    table = np.array(events, float).reshape(-1, 4)
    return Detections(table[:, :2], table[:, 3].astype(np.float32), table[:, 2].astype(np.int64), names)


def perfect(videos: Iterable[VideoAnnotation], names: tuple[str, ...]) -> dict[str, Detections]:
    return {
        v.video_id: Detections(v.segments, np.full(len(v.labels), 0.9, np.float32), v.labels, names) for v in videos
    }


TRUTH = annotated(
    video("a", [(0, 5, 0), (10, 30, 1)]),
    video("b", [(0, 20, 0), (20, 40, 0)]),
    video("c", []),
    video("d", [(1, 2, 2)], subset="train"),
)


def test_perfect_predictions_score_one() -> None:
    result = evaluate(perfect(TRUTH.subset("test"), NAMES), TRUTH, "test")
    assert result.average_map == 1.0
    assert result.map_at == dict.fromkeys(TIOU, 1.0)
    assert result.per_class == {"dog": [1.0] * 9, "cat": [1.0] * 9, "cow": None}
    assert [(b.events, b.found) for b in result.buckets] == [(1, 1), (3, 3), (0, 0)]
    assert (result.videos, result.missing, result.outside, result.predictions) == (3, 0, 0, 4)


def test_numbers_by_hand() -> None:
    predictions = {
        "a": found((0, 4, 0, 0.9), (10, 20, 1, 0.8)),  # tIoU 0.8; exactly 0.5: a match, but not "above" 0.5
        "b": found((0, 20, 0, 0.7), (50, 60, 0, 0.95)),
    }
    result = evaluate(predictions, TRUTH, "test")
    dog = {0.5: (1 / 3) * (2 / 3) * 2, 0.9: (1 / 3) * (1 / 3)}
    assert result.map_at[0.5] == pytest.approx((dog[0.5] + 1) / 2)
    assert result.map_at[0.9] == pytest.approx(dog[0.9] / 2)
    assert result.average_map == pytest.approx(np.mean(list(result.map_at.values())))
    assert [(b.events, b.found) for b in result.buckets] == [(1, 1), (3, 1), (0, 0)]
    assert result.missing == 1


def test_missing_and_outside_videos_are_counted() -> None:
    predictions = {"a": perfect(TRUTH.subset("test"), NAMES)["a"], "d": found((1, 2, 2, 0.5))}
    result = evaluate(predictions, TRUTH, "test")
    assert (result.videos, result.missing, result.outside, result.predictions) == (3, 2, 1, 2)
    assert result.map_at[0.5] == pytest.approx((1 / 3 + 1) / 2)
    assert "2 without predictions; 1 of other subsets left out" in result.table()
    nothing = evaluate({}, TRUTH, "test")
    assert (nothing.average_map, nothing.missing) == (0.0, 3)


def test_table_and_json() -> None:
    result = evaluate(perfect(TRUTH.subset("test"), NAMES), TRUTH, "test")
    lines = result.table().splitlines()
    assert lines[0].split() == ["tIoU", "0.5", "0.6", "0.7", "0.8", "0.9", "Avg."]
    assert lines[1].split() == ["mAP", "(%)", *["100.0"] * 6]
    assert "(0, 5] s" in lines[3]
    assert lines[5].endswith("-")
    per_class = result.per_class_table().splitlines()
    assert per_class[1].split() == ["dog", "3", *["100.0"] * 6]
    assert "no ground truth" in per_class[3]
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["average_map"] == 1.0
    assert data["buckets"][1] == {"above": 5, "up_to": 20, "events": 3, "found": 3, "recall": 1.0}
    assert data["per_class"]["cow"] is None


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        PredictionError, match=r"annotations.json does not have the predicted videos 'zzz' \(1 in all\)"
    ):
        evaluate({"zzz": found()}, TRUTH, "test")
    with pytest.raises(PredictionError, match="predicted class 'hen' has id 1, which in annotations.json is 'cat'"):
        evaluate({"a": found((0, 1, 1, 0.5), names=("dog", "hen"))}, TRUTH, "test")
    with pytest.raises(PredictionError, match="predicted class 'pig' has id 3, .* is not used"):
        evaluate({"a": found((0, 1, 3, 0.5), names=(*NAMES, "pig"))}, TRUTH, "test")
    with pytest.raises(AnnotationError, match="no video of subset 'validation'"):
        evaluate({}, TRUTH, "validation")
    with pytest.raises(AnnotationError, match="subset 'test' has 1 videos but no event"):
        evaluate({}, annotated(video("c", [])), "test")
    # A class list that differs only where nothing was predicted is fine.
    assert evaluate({"a": found((0, 5, 0, 0.5), names=("dog",))}, TRUTH, "test").predictions == 1


def write_all(path: Path, predictions: dict[str, Detections], truth: Annotations) -> None:
    write_events(path, ((video_id, truth.videos[video_id].duration, d) for video_id, d in predictions.items()))


def test_command_on_the_published_test_split(
    annotations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = read_annotations(annotations_file)
    events = tmp_path / "events.jsonl"
    write_all(events, perfect(truth.subset("test"), truth.labels), truth)
    arguments = ["evaluate", str(events), "--annotations", str(annotations_file), "--subset", "test", "--per-class"]
    assert main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["mAP", "(%)", *["100.0"] * 6]
    assert "test: 2167 videos" in out
    assert "skateboarding" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["average_map"] == 1.0
    assert sum(b["events"] for b in result["buckets"]) == sum(len(v.labels) for v in truth.subset("test"))
    assert len(result["per_class"]) == 100


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, str]:
    """An annotation file and an events file."""
    content: dict[str, Any] = {"database": {}}
    for v in TRUTH.videos.values():
        events = [
            {"segment": s, "label": NAMES[n], "label_id": n}
            for s, n in zip(v.segments.tolist(), v.labels.tolist(), strict=True)
        ]
        content["database"][v.video_id] = {"duration": 60.0, "subset": v.subset, "annotations": events}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    write_all(tmp_path / "events.jsonl", perfect(TRUTH.subset("test"), NAMES), TRUTH)
    return str(tmp_path / "annotations.json"), str(tmp_path / "events.jsonl")


def test_command_errors(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, events = small
    assert main(["evaluate", events, "--annotations", truth]) == 0
    for arguments, message in (
        ([str(tmp_path / "absent.jsonl"), "--annotations", truth], "no such events file"),
        ([events, "--annotations", str(tmp_path / "absent.json")], "no such annotation file"),
        ([events, "--annotations", truth, "--subset", "validation"], "no video of subset 'validation'"),
        ([events, "--annotations", truth, "--features", str(tmp_path)], "is not a bundle folder"),
        ([str(tmp_path), "--annotations", truth], "has no bundle.json"),
        ([str(tmp_path), "--annotations", truth, "--features", str(tmp_path)], "has no bundle.json"),
    ):
        assert main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("ccnet evaluate: error: ")
        assert "Traceback" not in error


def test_command_on_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path / "bundle").folder
    features = tmp_path / "features"
    features.mkdir()
    database: dict[str, Any] = {}
    for i in range(4):  # one event a video, at grid steps 2 to 8, that is 2.5 to 8.5 s
        event = {"segment": [2.5, 8.5], "label": LABELS[i], "label_id": i}
        database[f"v{i}"] = {"duration": 12.0, "subset": "test", "annotations": [event]}
        write_features(features, f"v{i}", features_with(12, [(2, 8, i, 3.0)]))
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    command = ["evaluate", str(bundle), "--annotations", str(tmp_path / "a.json"), "--features", str(features)]
    assert main([*command, "--json", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["average_map"] == 1.0

    (features / "v3_seen.npy").write_bytes(b"")  # a bad video costs its class, and is named
    assert main([*command, "--json", str(tmp_path / "result.json")]) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["average_map"] == 0.75
    assert list(result["failed"]) == ["v3"]
    captured = capsys.readouterr()
    assert "warning: 1 of 4 videos failed and count as videos in which nothing was found" in captured.err
    assert "v3: " in captured.err
    assert "1 without predictions" in captured.out

    for path in features.iterdir():
        path.write_bytes(b"")
    assert main(command) == 2
    assert "none of the 4 videos could be used; the first, v0: " in capsys.readouterr().err


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Annotations]:
    """Three test videos with one event each at 2.5 to 8.5 s; the middle one lacks a feature file."""
    features = tmp_path / "features"
    features.mkdir()
    for i in range(3):
        write_features(features, f"v{i}", features_with(12, [(2, 8, i, 3.0)]))
    (features / "v1_heard.npy").unlink()
    event = np.array([[2.5, 8.5]])
    videos = {f"v{i}": VideoAnnotation(f"v{i}", 12.0, "test", event, np.array([i])) for i in range(3)}
    return features, Annotations(Path("a.json"), LABELS, videos)


def test_a_localizer_on_a_subset(corpus: tuple[Path, Annotations]) -> None:
    features, truth = corpus
    with Localizer([OracleBackend()], SPEC) as localizer:
        result = evaluate_localizer(localizer, features, truth, "test", batch_size=2)
        assert result.average_map == pytest.approx(2 / 3)
        assert (result.videos, result.missing) == (3, 1)
        assert list(result.failed) == ["v1"]
        assert isinstance(result.failed["v1"], FeatureError)
        assert "v1_heard.npy" in result.to_json()["failed"]["v1"]
        with pytest.raises(FeatureError, match="v1_heard.npy"):
            evaluate_localizer(localizer, features, truth, "test", strict=True)
        with pytest.raises(FeatureError, match="none of the 3 videos could be used; the first, v0: "):
            evaluate_localizer(localizer, features / "empty", truth, "test")


def test_a_localizer_that_is_asked_to_stop(corpus: tuple[Path, Annotations]) -> None:
    features, truth = corpus
    with Localizer([OracleBackend()], SPEC) as localizer, StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as interrupted:
            evaluate_localizer(localizer, features, truth, "test", stop=stop)
    assert interrupted.value.exit_code == 143


def test_ids_that_leave_the_folder_fail(corpus: tuple[Path, Annotations]) -> None:
    features, truth = corpus
    outside = VideoAnnotation("../v0", 12.0, "test", np.array([[2.5, 8.5]]), np.array([3]))
    truth = Annotations(truth.path, truth.labels, {"v0": truth.videos["v0"], "../v0": outside})
    with Localizer([OracleBackend()], SPEC) as localizer:
        failed = evaluate_localizer(localizer, features, truth, "test").failed
    assert "path separators" in str(failed["../v0"])


def test_engine_options_with_events_are_refused(small: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    events, truth = small
    assert main(["evaluate", events, "--annotations", truth, "--backend", "openvino", "--batch", "2"]) == 2
    assert "--backend --batch: " in capsys.readouterr().err


def test_events_longer_than_the_papers_ranges_have_a_row(tmp_path: Path) -> None:
    event = {"segment": [0.0, 270.0], "label": "a", "label_id": 0}
    path = tmp_path / "annotations.json"
    path.write_text(
        json.dumps({"database": {"v": {"duration": 300, "subset": "test", "annotations": [event]}}}), encoding="utf-8"
    )
    result = evaluate({}, read_annotations(path), "test")
    assert [(b.above, b.up_to, b.events) for b in result.buckets][-1] == (60, math.inf, 1)
    assert "events of above 60 s       1   found" in result.table()
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["buckets"][-1]["up_to"] is None


def test_events_bring_the_class_names_that_a_part_of_the_annotations_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, events = tmp_path / "annotations.json", tmp_path / "events.jsonl"
    event = {"segment": [1.0, 4.0], "label": "c", "label_id": 2}
    truth.write_text(json.dumps({"database": {"v": {"duration": 9, "subset": "test", "annotations": [event]}}}))
    others = [{"segment": [1.0, 4.0], "label": name, "label_id": i, "score": 0.5} for i, name in ((0, "a"), (5, "f"))]
    line = {"video_id": "v", "duration": 9.0, "events": [{**event, "score": 0.9}, *others]}
    events.write_text(json.dumps(line) + "\n")
    assert main(["evaluate", str(events), "--annotations", str(truth), "--per-class"]) == 0
    assert "100.0" in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\nf\n")
    classes = ["--classes", str(tmp_path / "classes.txt")]
    assert main(["evaluate", str(events), "--annotations", str(truth), "--per-class", *classes]) == 0
    assert "\nd " in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("a\nb\nx\nd\ne\nf\n")
    assert main(["evaluate", str(events), "--annotations", str(truth), *classes]) == 2
    assert "label 'c'" in capsys.readouterr().err
