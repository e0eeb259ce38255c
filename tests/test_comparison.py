"""Methods side by side: which tables and published rows, the numbers in them, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, edit_manifest, features_with, make_bundle, write_features

from ccnet.cli.main import main
from ccnet.config import PRESETS, ModelConfig
from ccnet.report.comparison import Method, compare
from ccnet.report.published import SWITCH_TABLES, TABLE_1, describe, published_named, published_of
from runtime.annotations import Annotations, VideoAnnotation
from runtime.detections import Detections, write_events
from runtime.evaluation import score_videos
from runtime.files import write_json

VIDEOS = 12


def truth() -> Annotations:
    """Every video has an event of 4 s of one class and one of 10 s of another."""
    videos = {
        f"v{i}": VideoAnnotation(
            f"v{i}", 30.0, "test", np.array([[3.5, 7.5], [10.5, 20.5]]), np.array([i % 4, (i + 1) % 4])
        )
        for i in range(VIDEOS)
    }
    return Annotations(Path("annotations.json"), LABELS, videos)


def found(wrong: int) -> dict[str, Detections]:
    """Return all events, but for those of the first `wrong` videos, which are of no class that is there."""
    scores = np.array([0.9, 0.8], np.float32)
    return {
        name: Detections(video.segments, scores, (video.labels + 2 * (i < wrong)) % 4, LABELS)
        for i, (name, video) in enumerate(truth().videos.items())
    }


def method(name: str, model: ModelConfig | None, wrong: int) -> Method:
    scores = score_videos(found(wrong), truth(), "test")
    return Method(name, scores, model, published_of(model) if model else published_named(name))


def changed(**switches: Any) -> ModelConfig:
    return dataclasses.replace(ModelConfig(), **switches)


def test_published_rows_of_the_presets() -> None:
    rows = {name: published_of(config.model) for name, config in PRESETS.items()}
    assert {name: row.name if row else None for name, row in rows.items()} == {
        "unav100": "CCNet",
        "unav100_onepeace": "CCNet, ONE-PEACE",
        "davel_unav100": "DAVEL",
        "davel_unav100_onepeace": None,  # the paper has no such row
        "demo": None,
    }
    assert published_of(changed(tcg=False)) is None
    assert published_of(changed(dim=64)) is not None  # another size of the same kind
    row = published_named("davel")
    assert row is not None
    assert row.scores == (50.6, 45.8, 39.8, 32.4, 21.1, 47.8)
    assert all(len(row.scores) == 6 for row in TABLE_1)


def test_rows_of_the_switch_tables() -> None:
    full = [table.row_of(ModelConfig()) for table in SWITCH_TABLES]
    assert full == [3, 3, 1]
    assert [table.row_of(changed(tcg=False)) for table in SWITCH_TABLES] == [None, 1, None]
    assert [table.row_of(changed(f2c=False)) for table in SWITCH_TABLES] == [1, None, None]
    assert [table.row_of(changed(mtgc_order="f2c_c2f")) for table in SWITCH_TABLES] == [None, None, 0]
    assert [table.row_of(PRESETS["davel_unav100"].model) for table in SWITCH_TABLES] == [None, None, None]
    assert describe(changed(tcg=False, mtgc_order="f2c_c2f")) == "CCNet with tcg off, mtgc_order f2c_c2f"


def test_tables_that_two_methods_fill() -> None:
    methods = [method("full", ModelConfig(), 1), method("no gates", changed(tcg=False), 6)]
    text = compare(methods, subset="test", samples=50, seed=0, is_unav100=True).text()
    assert "Table 3: " in text
    assert "Table 2: " not in text  # only one of its rows is given
    assert "Table 4: " not in text
    assert "paper, CCNet" in text
    assert "no gates (CCNet with tcg off) stands beside: Table 3, cmi on, tcg off" in text
    assert "which this is not" not in text


def test_the_numbers_and_their_intervals() -> None:
    methods = [method("A", None, 0), method("B", None, 9)]
    comparison = compare(methods, subset="test", samples=60, seed=0, is_unav100=False)
    record = comparison.to_json()
    perfect, worse = record["methods"]
    assert perfect["map"]["Avg."] == 1.0
    assert perfect["map_interval"]["Avg."] == (1.0, 1.0)
    low, high = worse["map_interval"]["Avg."]
    assert 0 <= low < worse["map"]["Avg."] < high < 1
    [difference] = record["differences"]
    assert difference["value"] == pytest.approx(worse["map"]["Avg."] - 1)
    assert difference["low"] < difference["value"] < difference["high"] < 0
    assert difference["p"] == pytest.approx(1 / 61)
    assert [row["recall"] for row in worse["recall"]] == [0.25, 0.25, None]  # no event is longer than 20 s
    assert json.loads(json.dumps(record)) is not None
    assert "The paper's numbers are of UnAV-100's test subset, which this is not." in comparison.text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    database = {
        name: {
            "duration": video.duration,
            "subset": "test",
            "annotations": [
                {"segment": segment, "label": LABELS[label], "label_id": label}
                for segment, label in zip(video.segments.tolist(), video.labels.tolist(), strict=True)
            ],
        }
        for name, video in truth().videos.items()
    }
    write_json(tmp_path / "annotations.json", {"version": "1", "database": database})
    write_events(tmp_path / "events.jsonl", ((n, 30.0, d) for n, d in found(5).items()))
    (tmp_path / "features").mkdir()
    for i in range(VIDEOS):
        events = [(3, 7, i % 4, 3.0), (10, 20, (i + 1) % 4, 2.0)]
        write_features(tmp_path / "features", f"v{i}", features_with(30, events))
    return tmp_path


def test_the_command_compares_a_bundle_with_events(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    make_bundle(folder / "bundle")
    edit_manifest(folder / "bundle", model=ModelConfig().to_json())
    common = ["--annotations", str(folder / "annotations.json"), "--draws", "20", "--quiet"]
    methods = [f"DAVEL={folder / 'events.jsonl'}", str(folder / "bundle")]
    features = ["--features", str(folder / "features")]
    assert main(["compare", *methods, *common, *features]) == 0
    text = capsys.readouterr().out
    assert "DAVEL stands beside: Table 1, DAVEL" in text
    assert "bundle (CCNet) stands beside: Table 1, CCNet; Table 2, c2f on, f2c on; Table 3" in text
    assert main(["compare", *methods, *common, *features, "--json"]) == 0
    events, bundle = json.loads(capsys.readouterr().out)["methods"]
    assert bundle["map"]["Avg."] == 1.0
    assert events["map"]["Avg."] < 1.0

    np.save(folder / "features" / "v3_seen.npy", np.full((30, SPEC.visual_dim), np.nan, np.float32))
    assert main(["compare", *methods[1:], *common, *features]) == 1
    assert "bundle: v3" in capsys.readouterr().err
    assert main(["compare", *methods, *common]) == 2
    assert "--features is missing" in capsys.readouterr().err


def test_mistakes_are_answered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, annotations = str(folder / "events.jsonl"), str(folder / "annotations.json")
    for arguments, message in (
        ([events, events], "two methods are called 'events'"),
        ([events, "--features", str(folder)], "--features: no bundle is given"),
        ([f"a={folder / 'absent.jsonl'}"], "absent.jsonl: no such events file"),
    ):
        assert main(["compare", *arguments, "--annotations", annotations]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", events, "--annotations", annotations, "--draws", "0"])
