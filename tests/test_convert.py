"""`ccnet convert`, and `ccnet evaluate` on other tools' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ccnet.cli.main import main

EVENTS = [
    {"video_id": "a", "duration": 10.0, "events": [
        {"segment": [1.0, 3.0], "label": "dog", "label_id": 1, "score": 0.875},
        {"segment": [2.0, 9.5], "label": "cat", "label_id": 0, "score": 0.25},
    ]},
    {"video_id": "b", "duration": 8.0, "events": [
        {"segment": [0.5, 8.0], "label": "dog", "label_id": 1, "score": 0.5},
    ]},
]  # fmt: skip
TRUTH = {
    "database": {
        "a": {"duration": 10.0, "subset": "test", "annotations": [
            {"segment": [1.0, 3.0], "label": "dog", "label_id": 1},
            {"segment": [2.0, 9.5], "label": "cat", "label_id": 0},
        ]},
        "b": {"duration": 8.0, "subset": "test", "annotations": [
            {"segment": [1.0, 8.0], "label": "dog", "label_id": 1},
        ]},
        "c": {"duration": 8.0, "subset": "train", "annotations": []},
    }
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an events file and its annotations."""
    monkeypatch.chdir(tmp_path)
    Path("events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in EVENTS))
    Path("annotations.json").write_text(json.dumps(TRUTH))
    return tmp_path


def score(path: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["evaluate", path, "--annotations", "annotations.json"]) == 0
    return capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("results.json", ["--to", "activitynet"]),
        ("tasks.json", ["--to", "labelstudio"]),
        ("e.csv", []),
        ("e.parquet", []),
        ("vtt", ["--to", "webvtt"]),
        ("srt", ["--to", "srt"]),
        ("eaf", ["--to", "elan"]),
        ("labels", ["--to", "audacity"]),
    ],
)
def test_there_and_back(out: str, options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other format scores the same, and with the annotations all that it left out comes back."""
    if out.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    expected = score("events.jsonl", capsys)
    assert main(["convert", "events.jsonl", "--out", out, *options]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert score(out, capsys) == expected
    assert main(["convert", out, "--out", "back.jsonl", "--annotations", "annotations.json"]) == 0
    assert [json.loads(line) for line in Path("back.jsonl").read_text().splitlines()] == EVENTS


def test_losses_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "events.jsonl", "--out", "srt", "--to", "srt", "--min-score", "0.5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "srt: 2 files, 2 videos, 2 events\n"
    assert "warning: SubRip subtitles: label ids are left out" in captured.err
    assert Path("srt/a.srt").read_text() == "1\n00:00:01,000 --> 00:00:03,000\ndog (0.8750)\n"


def test_to_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "events.jsonl", "--out", "-", "--to", "csv"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "video_id,duration,start,end,label,label_id,score",
        "a,10.0,1.0,3.0,dog,1,0.875",
        "a,10.0,2.0,9.5,cat,0,0.25",
        "b,8.0,0.5,8.0,dog,1,0.5",
    ]


def test_annotated_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Audacity's labels become an annotation file to train on."""
    Path("labels").mkdir()
    Path("labels/x.txt").write_text("0.5\t2\train\n\\\t100\t2000\n1\t3\tdog\n")
    Path("labels/y.txt").write_text("")
    command = ["convert", "labels", "--out", "new.json", "--to", "annotations", "--subset", "train"]
    assert main(command) == 2
    assert "the duration of video 'x' (2 in all) is not known" in capsys.readouterr().err
    Path("durations.csv").write_text("video_id,duration\nx,2.5\ny,4\n")
    assert main([*command, "--durations", "durations.csv"]) == 0
    assert "1 events reached beyond their videos and were cut" in capsys.readouterr().err
    assert json.loads(Path("new.json").read_text())["database"] == {
        "x": {
            "duration": 2.5,
            "subset": "train",
            "annotations": [
                {"segment": [0.5, 2.0], "label": "rain", "label_id": 1},
                {"segment": [1.0, 2.5], "label": "dog", "label_id": 0},
            ],
        },
        "y": {"duration": 4.0, "subset": "train", "annotations": []},
    }
    assert main(["convert", "new.json", "--out", "eaf", "--to", "elan"]) == 0
    assert main(["convert", "labels", "--out", "one.jsonl", "--durations", "durations.csv", "--score", "1"]) == 0
    assert '"score":1.0' in Path("one.jsonl").read_text()


def test_segments_that_other_models_let_leave_the_video(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metric takes them as they are; our own files, which promise more, get them cut."""
    events = [
        {"segment": [-1.0, 3.0], "label": "dog", "score": 0.875},
        {"segment": [9.0, 90.0], "label": "cat", "score": 0.875},
        {"segment": [5.0, 5.0], "label": "cat", "score": 0.8},
    ]
    Path("r.json").write_text(json.dumps({"results": {"a": events}}))
    assert main(["evaluate", "r.json", "--annotations", "annotations.json"]) == 0
    assert "3 predicted events" in capsys.readouterr().out
    assert main(["convert", "r.json", "--out", "r.jsonl", "--annotations", "annotations.json"]) == 0
    error = capsys.readouterr().err
    assert "2 events reached beyond their videos and were cut" in error
    assert "1 events have no length inside their videos and were left out" in error
    line = json.loads(Path("r.jsonl").read_text())
    assert [event["segment"] for event in line["events"]] == [[0.0, 3.0], [9.0, 10.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv", "--out", "x.jsonl"], "absent.csv: no such file"),
        (
            ["events.jsonl", "--out", "x.json"],
            "which format? Name one of annotations, activitynet,",
        ),
        (["events.jsonl", "--out", "x.srt"], "holds one video, got 2"),
        (["events.jsonl", "--out", "x.csv", "--annotations", "other.json"], "does not have the video 'a'"),
        (["events.jsonl", "--out", "x.csv", "--durations", "annotations.json"], "expected video_id and duration"),
        (["annotations.json", "--out", "x.jsonl"], "video 'a', event 0: has no score; 'ccnet convert --score 1'"),
        (["annotations.json", "--out", "x.csv", "--subset", "validation"], "has no video of subset validation"),
        (["empty", "--out", "x.csv"], "got files of none, expected those of one format"),
    ],
)
def test_mistakes(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    other: dict[str, Any] = {"database": {"z": TRUTH["database"]["a"]}}
    Path("other.json").write_text(json.dumps(other))
    before = sorted(path.name for path in folder.iterdir())
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in folder.iterdir()) == before


def test_annotations_have_no_scores_to_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "annotations.json", "--annotations", "annotations.json"]) == 2
    assert "which has no scores; expected predicted events" in capsys.readouterr().err
