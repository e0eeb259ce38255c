"""The annotation reader: the published file, and everything that can be wrong with one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.annotations import read_annotations, read_class_list
from runtime.errors import AnnotationError
from runtime.records import OVERRUN_SECONDS

GOOD: dict[str, Any] = {
    "version": "x",
    "database": {
        "first": {
            "duration": 10,
            "subset": "train",
            "annotations": [
                {"segment": [1.5, 3], "label": "dog", "label_id": 0},
                {"segment": [2, 9.5], "label": "cat", "label_id": 1},
            ],
        },
        "second": {"duration": 20.5, "subset": "test", "annotations": [], "url": "extra facts are ignored"},
    },
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_videos_labels_and_subsets(tmp_path: Path) -> None:
    annotations = read_annotations(write(tmp_path, GOOD))
    assert annotations.labels == ("dog", "cat")
    assert list(annotations.videos) == ["first", "second"]
    first, second = annotations.videos.values()
    assert first.duration == 10.0
    assert first.segments.dtype == np.float64
    assert first.labels.dtype == np.int64
    np.testing.assert_array_equal(first.segments, [[1.5, 3], [2, 9.5]])
    np.testing.assert_array_equal(first.labels, [0, 1])
    assert second.segments.shape == (0, 2)
    assert annotations.subset("test") == [second]
    with pytest.raises(AnnotationError, match=r"no video of subset 'validation'; the file has: test, train"):
        annotations.subset("validation")


def test_reads_the_published_file(annotations_file: Path) -> None:
    annotations = read_annotations(annotations_file)
    assert len(annotations.videos) == 10790
    assert len(annotations.labels) == 100
    assert {name: len(annotations.subset(name)) for name in ("train", "validation", "test")} == {
        "train": 6489,
        "validation": 2134,
        "test": 2167,
    }
    assert sum(len(video.labels) for video in annotations.videos.values()) == 30059
    raw = json.loads(annotations_file.read_text())["database"]
    for video_id, video in annotations.videos.items():
        np.testing.assert_array_equal(video.segments, [event["segment"] for event in raw[video_id]["annotations"]])


def event(**changes: Any) -> Any:
    content = copy.deepcopy(GOOD)
    content["database"]["first"]["annotations"][1].update(changes)
    return content


def video(**changes: Any) -> Any:
    content = copy.deepcopy(GOOD)
    content["database"]["first"].update(changes)
    return content


def renamed(video_id: str) -> Any:
    return {"database": {video_id: GOOD["database"]["first"]}}


def without(key: str) -> Any:
    content = copy.deepcopy(GOOD)
    del content["database"]["first"]["annotations"][1][key]
    return content


EVENT = "video 'first': event 1: "
BAD = {
    "truncated": (json.dumps(GOOD)[:-30], "not valid JSON"),
    "not an object": ([1, 2], "expected an object"),
    "no database": ({"version": "x"}, "expected an object"),
    "empty database": ({"database": {}}, "holds no video"),
    "no event at all": ({"database": {"a": {"duration": 1, "subset": "test", "annotations": []}}}, "no event"),
    "video is a list": ({"database": {"first": []}}, r"video 'first': got \[\], expected an object"),
    "duplicate video id": ('{"database": {"first": {}, "first": {}}}', "key 'first' occurs twice"),
    "path in id": (renamed("../first"), "video id: got '../first', expected a name without path separators"),
    "backslash in id": (renamed("a\\b"), "video id: got"),
    "dots as id": (renamed(".."), "video id: got"),
    "empty id": (renamed(""), "video id: got"),
    "unknown subset": (video(subset="holdout"), "subset: got 'holdout', expected one of train, validation, test"),
    "negative duration": (video(duration=-1), "duration: got -1, expected seconds above 0"),
    "duration is text": (video(duration="10 s"), "duration: got '10 s'"),
    "duration is endless text": (video(duration="1" * 5000), "duration: got '1111"),
    "duration is NaN": (video(duration=float("nan")), "duration: got nan"),
    "duration is true": (video(duration=True), "duration: got True"),
    "annotations is an object": (video(annotations={}), "annotations: got {}, expected a list"),
    "segment missing": (without("segment"), EVENT + "'segment' is missing"),
    "label id missing": (without("label_id"), EVENT + "'label_id' is missing"),
    "segment of three": (event(segment=[1, 2, 3]), EVENT + "segment: got"),
    "segment of text": (event(segment=["1", "two"]), EVENT + "segment: got"),
    "segment of infinite text": (event(segment=["1", "inf"]), EVENT + "segment: got"),
    "infinite segment": (event(segment=[1, float("inf")]), EVENT + "segment: got"),
    "number too large": (json.dumps(event(segment=[1, 2])).replace("[1, 2]", "[1, 1e999]"), EVENT + "segment: got"),
    "endless digits": (json.dumps(event(segment=[1, 2])).replace("[1, 2]", f"[1, {'9' * 5000}]"), "not valid JSON"),
    "end equals start": (event(segment=[2, 2]), r"got \[2, 2\], expected an end after the start"),
    "end before start": (event(segment=[3, 2]), EVENT + "segment: got"),
    "outside the video": (event(segment=[2, 10.02]), r"expected it inside the video, \[0, 10.0\]"),
    "before the video": (event(segment=[-1, 5]), "expected it inside the video"),
    "id of another label": (event(label_id=0), EVENT + "label_id 0: got label 'cat', elsewhere it is 'dog'"),
    "label of another id": (event(label="dog"), EVENT + "label 'dog': got label_id 1, elsewhere it is 0"),
    "label id is text": (event(label_id="one"), "label_id: got 'one', expected an integer"),
    "label id is half": (event(label_id=0.5), "label_id: got 0.5, expected an integer"),
    "label id negative": (event(label_id=-1), "label_id: got -1"),
    "label empty": (event(label=""), "label: got ''"),
    "a name like that of an unnamed class": (event(label="class 2", label_id=3), "a class is called like 'class 3'"),
}


def test_habits_of_published_files_are_taken(tmp_path: Path) -> None:
    content = copy.deepcopy(GOOD)
    first, second = content["database"].values()
    first["subset"], second["subset"] = "Training", "VAL"
    first["annotations"][0]["label_id"], first["annotations"][1]["label_id"] = 0.0, "1"
    first["annotations"].append({"segment": [4, 5], "label": "cat"})
    del second["annotations"]
    second["duration_second"] = second.pop("duration")
    annotations = read_annotations(write(tmp_path, content))
    assert annotations.labels == ("dog", "cat")
    assert [video.subset for video in annotations.videos.values()] == ["train", "validation"]
    assert annotations.videos["first"].labels.tolist() == [0, 1, 1]
    assert annotations.videos["second"].duration == 20.5
    assert len(annotations.videos["second"].labels) == 0


@pytest.mark.parametrize("style", ["with ids", "without ids"])
def test_what_spreadsheets_and_other_programs_write(style: str, tmp_path: Path) -> None:
    content = event(segment=["1.5", "2"])
    first, second = content["database"]["first"], content["database"]["second"]
    first |= {"duration": "1e1", "subset": "Train "}
    second |= {"annotations": None}
    if style == "without ids":
        for item in first["annotations"]:
            item["label_id"] = None
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content, indent=1).replace("\n", "\r\n").encode())
    annotations = read_annotations(path)
    assert annotations.videos["first"].duration == 10.0
    assert annotations.videos["first"].segments[1].tolist() == [1.5, 2.0]
    assert annotations.videos["first"].subset == "train"
    assert len(annotations.videos["second"].labels) == 0


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (b"\x1f\x8b\xff", "it is compressed by gzip"),
        (b"\xff\xfe", "it is in UTF-16"),
        (b"[\xe9", "byte 1"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_what_is_not_utf_8_is_told(begin: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(begin)
    with pytest.raises(AnnotationError, match=message):
        read_annotations(tmp_path / "a.json")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    content = event(segment=[3, 2])
    content["database"]["first"]["annotations"].append({"segment": [1, 2], "label": "dog", "label_id": 1})
    content["database"]["second"].update(subset="holdout", duration=1)
    content["database"] |= {f"v{i}": {"duration": 1} for i in range(4)}
    with pytest.raises(AnnotationError, match=r"7 problems:\n  video 'first': event 1: segment: got") as caught:
        read_annotations(write(tmp_path, content))
    for words in ("video 'first': event 2: label", "video 'second': subset: got 'holdout'", "... and 2 more"):
        assert words in str(caught.value)


def test_ids_without_events_are_classes_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, event(label_id=3))
    annotations = read_annotations(path)
    assert annotations.labels == ("dog", "class 1", "class 2", "cat")
    assert annotations.unnamed == (1, 2)
    names = ("dog", "cow", "hen", "cat")
    assert read_annotations(path, names).labels == names
    assert read_annotations(path, names).unnamed == ()


def test_class_lists(tmp_path: Path) -> None:
    annotations = write(tmp_path, GOOD)
    assert read_class_list(annotations) == ("dog", "cat")
    lines, listed = tmp_path / "classes.txt", tmp_path / "classes.json"
    lines.write_text("dog\n\ncat\n")
    listed.write_text('["dog", "cat"]')
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    for folder, name, content in (
        (checkpoint, "checkpoint.json", {"labels": ["dog", "cat"]}),
        (bundle, "bundle.json", {"spec": {"labels": ["dog", "cat"]}}),
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
    for path in (lines, listed, checkpoint, bundle):
        assert read_class_list(path) == ("dog", "cat")
    for text in ("dog\ndog\n", ""):
        lines.write_text(text)
        with pytest.raises(AnnotationError, match="expected one or more distinct names"):
            read_class_list(lines)
    with pytest.raises(AnnotationError, match="neither a bundle nor a checkpoint"):
        read_class_list(tmp_path)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = write(tmp_path, content)
    with pytest.raises(AnnotationError, match=message) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(str(path))


def test_missing_file_and_not_text(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no such annotation file"):
        read_annotations(tmp_path / "absent.json")
    with pytest.raises(AnnotationError, match="a folder without durations.csv"):
        read_annotations(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnnotationError, match="not valid JSON"):
        read_annotations(tmp_path / "binary.json")


def test_small_overruns_are_clipped(tmp_path: Path) -> None:
    annotations = read_annotations(write(tmp_path, event(segment=[-OVERRUN_SECONDS / 2, 10 + OVERRUN_SECONDS / 2])))
    np.testing.assert_array_equal(annotations.videos["first"].segments[1], [0, 10])
    with pytest.raises(AnnotationError, match="nothing of it lies inside"):
        read_annotations(write(tmp_path, event(segment=[10, 10 + OVERRUN_SECONDS / 2])))


def test_a_given_class_list_is_binding(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert read_annotations(path, labels=("dog", "cat", "cow")).labels == ("dog", "cat", "cow")
    with pytest.raises(AnnotationError, match=r"label 'cat' \(id 1\): expected one of 1 classes"):
        read_annotations(path, labels=("dog",))
    with pytest.raises(AnnotationError, match="label 'dog': got label_id 0, expected 1"):
        read_annotations(path, labels=("cat", "dog"))
