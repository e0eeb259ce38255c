"""Events files: written whole or not at all, read back bit by bit, and checked line by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.detections import Detections, read_events, write_events, write_parquet
from runtime.errors import MissingDependency, PredictionError

NAMES = ("dog", "cat", "cow")


def detections(seed: int, count: int, duration: float = 30.0) -> Detections:
    generator = np.random.default_rng(seed)
    start = generator.uniform(0, duration - 1, count)
    end = start + generator.uniform(0.1, 1, count)
    scores = np.sort(generator.uniform(0, 1, count).astype(np.float32))[::-1].copy()
    return Detections(np.stack([start, end], axis=1), scores, generator.integers(0, 3, count), NAMES)


def test_events_read_back_bit_by_bit(tmp_path: Path) -> None:
    videos = {"a": detections(0, 40), "b c-é": detections(1, 0), "c": detections(2, 7)}
    path = tmp_path / "deep" / "events.jsonl"
    assert write_events(path, ((video_id, 30.0, d) for video_id, d in videos.items())) == 3
    assert [p.name for p in path.parent.iterdir()] == ["events.jsonl"]
    for names in (NAMES, None):
        read = read_events(path, names)
        assert list(read) == list(videos)
        for video_id, expected in videos.items():
            got = read[video_id]
            np.testing.assert_array_equal(got.segments, expected.segments)
            np.testing.assert_array_equal(got.scores, expected.scores)
            np.testing.assert_array_equal(got.labels, expected.labels)
            assert got.label_names == NAMES
            assert [a.dtype for a in (got.segments, got.scores, got.labels)] == [np.float64, np.float32, np.int64]
    assert json.loads(path.read_text().splitlines()[1]) == {"video_id": "b c-é", "duration": 30.0, "events": []}


def test_what_json_can_not_carry_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    good = detections(0, 3)
    for i, bad in enumerate((np.nan, np.inf)):
        segments = good.segments.copy()
        segments[1, i] = bad
        broken = Detections(segments, good.scores, good.labels, NAMES)
        with pytest.raises(PredictionError, match="video 'b': its events hold a number that is not finite"):
            write_events(path, [("a", 30.0, good), ("b", 30.0, broken)])
    with pytest.raises(PredictionError, match="video 'b': its events hold a number that is not finite"):
        write_events(path, [("b", np.nan, good)])
    with pytest.raises(PredictionError, match="can't be written as JSON"):
        write_events(path, [("not UTF-8: \udcff", 30.0, good)])
    assert list(tmp_path.iterdir()) == []


def test_a_class_may_be_called_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    one = Detections(np.array([[1.0, 2.5]]), np.array([0.5], np.float32), np.array([1]), ("null", "[null,null]"))
    write_events(path, [("null", 9.0, one)])
    assert read_events(path)["null"].to_json() == one.to_json()


def test_to_json_names_the_fields() -> None:
    one = Detections(np.array([[1.0, 2.5]]), np.array([0.5], np.float32), np.array([1]), NAMES)
    assert one.to_json() == [{"segment": [1.0, 2.5], "label": "cat", "label_id": 1, "score": 0.5}]
    assert len(one) == 1


@pytest.mark.parametrize("write", [write_events, write_parquet])
def test_an_interrupted_write_leaves_the_old_file(write: Any, tmp_path: Path) -> None:
    if write is write_parquet:
        pytest.importorskip("pyarrow")
    path = tmp_path / "events"
    path.write_text("old")

    def records() -> Iterator[tuple[str, float, Detections]]:
        yield "a", 30.0, detections(0, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, records())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["events"]


def test_events_out_of_order_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [{"segment": [i, i + 1], "label": "dog", "label_id": 0, "score": s} for i, s in enumerate((0.2, 0.9, 0.2))]
    path.write_text(json.dumps({"video_id": "a", "duration": 9, "events": events}) + "\n")
    read = read_events(path)["a"]
    np.testing.assert_array_equal(read.scores, np.array([0.9, 0.2, 0.2], np.float32))
    np.testing.assert_array_equal(read.segments[:, 0], [1, 0, 2])


def test_names_of_ids_that_never_occur(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    event = {"segment": [0, 1], "label": "cow", "label_id": 2, "score": 1}
    path.write_text(json.dumps({"video_id": "a", "duration": 9, "events": [event]}) + "\n")
    assert read_events(path)["a"].label_names == ("class 0", "class 1", "cow")


def line(video: dict[str, Any] | None = None, **event: Any) -> str:
    events = [{"segment": [0, 1], "label": "dog", "label_id": 0, "score": 0.5} | event]
    return json.dumps({"video_id": "b", "duration": 9, "events": events} | (video or {}))


BAD = {
    "half a line": (line()[:-9], "not valid JSON"),
    "a list": ("[]", "expected an object"),
    "no events": ('{"video_id": "b", "duration": 1}', "'events' is missing"),
    "events is an object": (line({"events": {}}), "events: got {}, expected a list"),
    "event is a number": (line({"events": [1]}), "event 0: got 1, expected an object"),
    "path in id": (line({"video_id": "../b"}), "video id: got '../b'"),
    "same video again": (line({"video_id": "a"}), "video 'a' occurs a second time"),
    "duration zero": (line({"duration": 0}), "duration: got 0"),
    "end before start": (line(segment=[2, 1]), r"event 0: segment: got \[2, 1\]"),
    "outside": (line(segment=[2, 9.2]), r"expected it inside the video, \[0, 9.0\]"),
    "infinite": (line(segment=[2, float("inf")]), "segment: got"),
    "score above one": (line(score=1.5), "score: got 1.5"),
    "score NaN": (line(score=float("nan")), "score: got nan"),
    "no score": (line().replace('"score"', '"scores"'), "'score' is missing"),
    "wrong name": (line(label="cat"), "label 'cat': got label_id 0, expected 1"),
    "id is text": (line(label_id="0"), "label_id: got '0', expected an integer"),
    "unknown id": (line(label_id=3, label="hen"), r"label 'hen' \(id 3\): expected one of 3 classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = tmp_path / "events.jsonl"
    path.write_text(line({"video_id": "a"}) + "\n" + text + "\n")
    with pytest.raises(PredictionError, match=message) as caught:
        read_events(path, NAMES)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_missing_events_file(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="no such events file; 'ccnet predict"):
        read_events(tmp_path / "absent.jsonl")
    with pytest.raises(PredictionError, match="got a folder"):
        read_events(tmp_path)


def test_parquet_has_one_row_an_event(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    first, second = detections(0, 4), detections(1, 3)
    records = [("a", 30.0, first), ("none", 30.0, detections(2, 0)), ("b", 31.0, second)]
    assert write_parquet(tmp_path / "events.parquet", records) == 3
    table = parquet.read_table(tmp_path / "events.parquet").to_pydict()
    assert table["video_id"] == ["a"] * 4 + ["b"] * 3
    assert table["duration"] == [30.0] * 4 + [31.0] * 3
    assert table["end"] == [*first.segments[:, 1], *second.segments[:, 1]]
    assert table["label_id"] == [*first.labels, *second.labels]
    assert table["label"] == [NAMES[i] for i in table["label_id"]]
    np.testing.assert_array_equal(np.array(table["score"], np.float32), np.concatenate([first.scores, second.scores]))


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ccnet\[parquet\]'"):
        write_parquet(tmp_path / "events.parquet", [])
    assert list(tmp_path.iterdir()) == []


def test_parquet_is_written_in_row_groups_each_of_one_list_of_classes(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "events.parquet"
    many = detections(0, 40_000)
    others = Detections(many.segments[:2], many.scores[:2], np.array([1, 0]), ("hen", "pig"))
    records = [("a", 30.0, many), ("b", 30.0, many), ("c", 30.0, many), ("d", 30.0, many), ("e", 30.0, others)]
    assert write_parquet(path, records) == 5
    file = parquet.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [120_000, 40_000, 2]
    assert file.read_row_group(2)["label"].to_pylist() == ["pig", "hen"]
    assert file.read_row_group(1)["video_id"].unique().to_pylist() == ["d"]
    table = file.read_row_group(0)
    assert table["label"].to_pylist()[40_000:80_000] == [NAMES[i] for i in many.labels]
    np.testing.assert_array_equal(table["start"].to_numpy(), np.tile(many.segments[:, 0], 3))


def test_a_parquet_file_without_events_has_its_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "events.parquet"
    assert write_parquet(path, [("a", 30.0, detections(0, 0))]) == 1
    assert write_parquet(tmp_path / "none.parquet", []) == 0
    for file in (path, tmp_path / "none.parquet"):
        table = parquet.read_table(file)
        assert table.num_rows == 0
        assert table.column_names == ["video_id", "duration", "start", "end", "label", "label_id", "score"]


@pytest.mark.parametrize("edit", ["bom", "windows", "blank lines", "no last line end"])
def test_what_editors_do_to_a_file_is_taken(edit: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    content = "".join(f"{line({'video_id': name})}\n" for name in ("a", "b")).encode()
    edited = {
        "bom": b"\xef\xbb\xbf" + content,
        "windows": content.replace(b"\n", b"\r\n"),
        "blank lines": b"\n" + content.replace(b"\n", b"\n \n"),
        "no last line end": content[:-1],
    }[edit]
    path.write_bytes(edited)
    assert list(read_events(path)) == ["a", "b"]
