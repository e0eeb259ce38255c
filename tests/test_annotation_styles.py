"""Annotation files of ActivityNet and THUMOS14."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.annotations import read_annotations
from runtime.errors import AnnotationError

ACTIVITYNET: dict[str, Any] = {
    "version": "VERSION 1.3",
    "taxonomy": [{"nodeName": "Root", "nodeId": 0, "parentId": None}],
    "database": {
        "one": {
            "duration": 82.5,
            "subset": "training",
            "resolution": "320x240",
            "url": "https://example.org",
            "annotations": [
                {"segment": [6.25, 19.5], "label": "Drinking coffee"},
                {"segment": [80, 82.73], "label": "Archery"},
                {"segment": [82.6, 82.9], "label": "Archery"},
            ],
        },
        "two": {"duration": 10, "subset": "Validation", "annotations": [{"segment": [1, 2], "label": "Archery"}]},
        "three": {"duration": 9.0, "subset": "testing"},
    },
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_activitynet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotations = read_annotations(write(tmp_path, ACTIVITYNET))
    assert annotations.labels == ("Archery", "Drinking coffee")
    assert {v.video_id: v.subset for v in annotations.videos.values()} == {
        "one": "train",
        "two": "validation",
        "three": "test",
    }
    assert annotations.videos["one"].segments.tolist() == [[6.25, 19.5], [80, 82.5]]
    assert annotations.videos["one"].labels.tolist() == [1, 0]
    assert len(annotations.videos["three"].labels) == 0
    assert "2 events reach beyond their videos" in caplog.text


def test_ids_come_from_the_class_list_where_there_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, ACTIVITYNET)
    labels = ("Surfing", "Drinking coffee", "Archery")
    annotations = read_annotations(path, labels)
    assert annotations.labels == labels
    assert annotations.videos["two"].labels.tolist() == [2]
    with pytest.raises(AnnotationError, match="label 'Archery': expected one of 1 classes"):
        read_annotations(path, labels[:1])


def thumos(folder: Path, **files: str) -> Path:
    contents = {
        "Diving_val": "video_validation_1  72.80 76.40\nvideo_validation_1 1 2\n",
        "CliffDiving_val": "video_validation_1 73 76\n",
        "Diving_test": "video_test_9 0.5 3\n\n",
        "Ambiguous_test": "video_test_9 5 6\n",
    }
    for name, text in {**contents, **files}.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "durations.csv").write_text("video_id,duration\nvideo_validation_1,100\nvideo_test_9,12.5\n")
    return folder


def test_thumos(tmp_path: Path) -> None:
    annotations = read_annotations(thumos(tmp_path))
    assert annotations.labels == ("CliffDiving", "Diving")
    validation, test = annotations.videos["video_validation_1"], annotations.videos["video_test_9"]
    assert (validation.subset, validation.duration) == ("validation", 100.0)
    assert validation.segments.tolist() == [[73, 76], [72.8, 76.4], [1, 2]]
    assert validation.labels.tolist() == [0, 1, 1]
    assert (test.subset, test.segments.tolist()) == ("test", [[0.5, 3]])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"Diving_val": "video_validation_1 72.80\n"}, "Diving_val.txt, line 1: got 'video_validation_1 72.80'"),
        ({"Diving_val": "v 1 2\n"}, "Diving_val.txt, line 1: video 'v' is not in durations.csv"),
        ({"Diving_test": "video_validation_1 1 2\n"}, "is of subset validation in CliffDiving_val.txt"),
        ({"readme": "hello"}, "readme.txt: expected a name like Diving_val.txt"),
        ({"Diving_val": "video_validation_1 5 4\n"}, "expected an end after the start"),
    ],
)
def test_bad_thumos_files(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_annotations(thumos(tmp_path, **files))


def test_thumos_needs_durations(tmp_path: Path) -> None:
    folder = thumos(tmp_path)
    (folder / "durations.csv").write_text("video_id,duration\nx,1e999\n")
    with pytest.raises(AnnotationError, match="durations.csv, line 2: got"):
        read_annotations(folder)
    (folder / "durations.csv").unlink()
    with pytest.raises(AnnotationError, match="a folder without durations.csv"):
        read_annotations(folder)
