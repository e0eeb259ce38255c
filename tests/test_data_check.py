"""The data check: each finding from data that has it and nothing else, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, features_with, write_features

from ccnet.cli.main import main
from runtime.annotations import read_annotations, survey_annotations
from runtime.data_check import DataReport, check_data
from runtime.errors import FeatureError
from runtime.files import write_json

SUBSETS = ("train", "train", "validation", "validation", "test", "test")
STEPS = 20


def database() -> dict[str, Any]:
    """Return six videos of 20 s, each with two events of 5 s; every class occurs in every subset."""
    return {
        f"v{i}": {
            "duration": 20.0,
            "subset": subset,
            "annotations": [
                {"segment": [2.0 + 8 * k, 7.0 + 8 * k], "label": LABELS[(2 * i + k) % 4], "label_id": (2 * i + k) % 4}
                for k in range(2)
            ],
        }
        for i, subset in enumerate(SUBSETS)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "features").mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(SUBSETS)):
        features = features_with(STEPS)
        features.visual[:] = rng.standard_normal(features.visual.shape)
        features.audio[:] = rng.standard_normal(features.audio.shape)
        write_features(tmp_path / "features", f"v{i}", features)
    return tmp_path


def checked(folder: Path, videos: dict[str, Any] | None = None, **options: Any) -> DataReport:
    write_json(folder / "annotations.json", {"database": videos or database()})
    return check_data(read_annotations(folder / "annotations.json"), folder / "features", SPEC, **options)


def findings(report: DataReport, ignore: tuple[str, ...] = ("rare classes",)) -> dict[str, list[str]]:
    return {f.kind: list(f.cases) for f in report.findings if f.kind not in ignore}


def test_good_data_have_no_finding(folder: Path) -> None:
    report = checked(folder)
    assert findings(report) == {}
    assert report.problems == ()
    assert dict(report.videos) == {"train": 2, "validation": 2, "test": 2}
    assert [(c.label, c.events["train"], c.videos["train"], c.seconds) for c in report.classes] == [
        (label, 1, 1, 5.0) for label in LABELS
    ]


def test_missing_damaged_and_wrong_files(folder: Path) -> None:
    features = folder / "features"
    (features / "v0_seen.npy").unlink()
    nan = np.load(features / "v1_heard.npy")
    nan[3, 1] = np.nan
    np.save(features / "v1_heard.npy", nan)
    np.save(features / "v2_seen.npy", np.zeros((STEPS, 5), np.float32))
    (features / "v3_heard.npy").write_bytes((features / "v3_heard.npy").read_bytes()[:-9])
    report = checked(folder)
    assert findings(report) == {"missing files": ["v0"], "bad files": ["v1", "v2", "v3"]}
    [missing, bad] = report.problems
    assert missing.cases["v0"] == "v0_seen.npy"
    assert "nan at step 3, channel 1" in bad.cases["v1"]
    assert "visual features are 5 wide, expected 6 (model.visual_dim)" in bad.cases["v2"]
    assert "truncated" in bad.cases["v3"]
    quick = findings(checked(folder, quick=True))
    assert quick == {"missing files": ["v0"], "bad files": ["v2", "v3"]}  # values are not looked at


def test_lengths_durations_and_the_time_base(folder: Path) -> None:
    videos = database()
    np.save(folder / "features" / "v0_heard.npy", np.ones((12, SPEC.audio_dim), np.float32))
    videos["v1"]["duration"] = 31.0
    report = checked(folder, videos)
    found = findings(report)
    assert found["lengths"] == ["v0"]
    assert found["duration"] == ["v0", "v1"]
    assert "time base" not in found
    for video in videos.values():
        video["duration"] = 40.0
    twice = [f for f in checked(folder, videos).problems if f.kind == "time base"]
    assert len(twice) == 1
    assert "they seem to have a step every 2" in twice[0].text


def test_events_that_are_never_seen_or_learned(folder: Path) -> None:
    videos = database()
    videos["v0"]["duration"] = 21.0  # the features cover 20 s, and a step is 1 s
    videos["v0"]["annotations"].append({"segment": [20.2, 20.9], "label": LABELS[0], "label_id": 0})
    videos["v1"]["annotations"].append({"segment": [5.6, 6.4], "label": LABELS[0], "label_id": 0})
    report = checked(folder, videos)
    assert findings(report) == {"events outside": ["v0"], "events between steps": ["v1"]}
    assert {f.kind: f.cases for f in report.findings}["events between steps"]["v1"] == "5.60 - 6.40 s"


def test_events_without_a_point_get_no_target(folder: Path) -> None:
    """The check says "never learned" of exactly the events for which training has no positive point."""
    torch = pytest.importorskip("torch")
    from ccnet.training.targets import build_targets

    rng = np.random.default_rng(0)
    videos = database()
    for video in videos.values():
        for _ in range(30):
            start = rng.uniform(0, 19)
            end = min(20.0, start + rng.uniform(0.05, 1.5))
            video["annotations"].append({"segment": [start, end], "label": LABELS[0], "label_id": 0})
    report = checked(folder, videos)
    said = {f.kind: f.cases for f in report.findings}["events between steps"]
    for name, video in videos.items():
        without = 0
        for event in video["annotations"]:
            segment = SPEC.time_base.to_grid(torch.tensor([[event["segment"]]]))
            targets = build_targets(segment, torch.zeros(1, 1, dtype=torch.int64), SPEC.grid, 1)
            valid = torch.from_numpy(SPEC.grid.valid_points(STEPS))
            without += not bool(targets.classes[0, valid].any())
        text = said[name]
        assert text.count(" - ") + (int(text.rpartition("and ")[2].split()[0]) if "more" in text else 0) == without


def test_classes_without_examples_and_missing_subsets(folder: Path) -> None:
    videos = database()
    videos["v0"]["annotations"] = videos["v0"]["annotations"][1:]
    assert findings(checked(folder, videos)) == {"classes without examples": [LABELS[0]]}
    for name in ("v2", "v3"):
        videos[name]["subset"] = "test"
    report = checked(folder, videos)
    assert [f.text for f in report.problems] == ["there is no video of subset 'validation', which training needs"]


def test_identical_files(folder: Path) -> None:
    features = folder / "features"
    (features / "v4_seen.npy").write_bytes((features / "v1_seen.npy").read_bytes())
    [copies] = [f for f in checked(folder).findings if f.kind == "identical files"]
    assert dict(copies.cases) == {"v1_seen.npy": "the same as v4_seen.npy"}


def test_no_folder(folder: Path) -> None:
    checked(folder)
    with pytest.raises(FeatureError, match="no such feature folder"):
        check_data(read_annotations(folder / "annotations.json"), folder / "absent", SPEC)


def test_a_survey_passes_over_bad_videos(folder: Path) -> None:
    videos = database()
    videos["v0"]["annotations"][0]["segment"] = [3.0, 99.0]
    videos["v1"]["subset"] = "holdout"
    write_json(folder / "annotations.json", {"database": videos})
    annotations, wrong = survey_annotations(folder / "annotations.json")
    assert annotations is not None
    assert list(annotations.videos) == ["v2", "v3", "v4", "v5"]
    assert len(wrong) == 2
    assert wrong[0].startswith("video 'v0': event 0: segment: got [3.0, 99.0], expected it inside the video")


OPTIONS = [
    *("--model.length=32", "--model.levels=4", "--model.visual_dim=6", "--model.audio-dim=3"),
    *("--model.num_classes=4", "--layout.visual=_seen", "--layout.audio=_heard"),
    *("--time-base.fps=1", "--time-base.stride_frames=1", "--time-base.window_frames=1"),
]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked(folder)
    data = ["--annotations", str(folder / "annotations.json"), "--features", str(folder / "features"), "--quiet"]
    command = ["check-data", "--preset", "demo", *data, *OPTIONS]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "0 problem(s), 1 note(s): training can start" in text
    assert "training events by class: 1 to 1" in text
    assert main([*command, "--model.num_classes=9"]) == 1
    assert "use --model.num_classes 4" in capsys.readouterr().out

    videos = database()
    videos["v0"]["annotations"][0]["segment"] = [3.0, 99.0]
    write_json(folder / "annotations.json", {"database": videos})
    assert main([*command, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [f["kind"] for f in record["findings"] if f["severity"] == "problem"] == ["annotations"]
    assert main(["check-data", "--preset", "demo", *data[:2], "--features", str(folder / "no"), *OPTIONS]) == 2


def test_findings_of_a_shorter_network(folder: Path) -> None:
    write_json(folder / "annotations.json", {"database": database()})
    short = dataclasses.replace(SPEC, length=8)
    report = check_data(read_annotations(folder / "annotations.json"), folder / "features", short)
    assert set(findings(report)) == {"cropped", "events between steps"}
