"""What features do not cover of a video is said, in the same words, by everything that reads features."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import SPEC, OracleBackend, features_with, make_bundle, write_features

from ccnet.cli.main import main
from ccnet.config import Config, ModelConfig
from ccnet.training.dataset import check_folder
from export.parity.inputs import folder_inputs
from runtime.annotations import VideoAnnotation, read_annotations
from runtime.coverage import Gaps, common_gaps, find_gaps
from runtime.errors import FeatureError
from runtime.localizer import Localizer
from runtime.spec import TimeBase

PUBLISHED = TimeBase()
"""A step every 0.32 s that sees 0.96 s."""
SETTINGS: dict[str, Any] = {"time_base": PUBLISHED, "duration": None, "longest": 224}


def gaps_of(steps: int, lengths: str | None = None, **changes: Any) -> str:
    return str(find_gaps(steps, lengths, **{**SETTINGS, **changes}) or "")


@pytest.mark.parametrize("seconds", [0.5, 5.0, 10.0, 45.0, 60.0])
def test_features_as_they_are_published_are_no_gap(seconds: float) -> None:
    steps = max(1, 1 + int((seconds * 25 - 24) // 8))
    assert gaps_of(steps, duration=seconds) == ""
    assert gaps_of(steps) == ""


@pytest.mark.parametrize(("stride", "noted"), [(0.5, True), (0.8, True), (0.95, False), (1.3, True), (4, True)])
def test_another_stride_is_noted(stride: float, noted: bool) -> None:
    steps = int(142 / stride)  # of 46.1 s
    assert ("the duration is 46.1 s" in gaps_of(steps, duration=46.1)) == noted


def test_what_is_beyond_t_is_noted() -> None:
    demo = TimeBase(stride_frames=16, window_frames=32)
    text = gaps_of(1100, duration=704.6, time_base=demo, longest=96)
    assert text == "62.1 of 704.6 s are used, T = 96 of 1100 steps; --long-videos windows sees all of it"
    assert gaps_of(1100, time_base=demo, longest=96) == text
    assert gaps_of(1100, duration=704.6, time_base=demo, longest=None) == ""
    assert gaps_of(98, time_base=demo, longest=96) == ""


def test_all_facts_of_a_video_are_told() -> None:
    text = gaps_of(300, "lengths differ", duration=400.0)
    assert text.startswith(
        "lengths differ; the features cover 96.6 s, the duration is 400.0 s; 72.3 of 96.6 s are used"
    )


def test_what_holds_for_nearly_all_videos_is_a_setting() -> None:
    found = {f"v{i}": find_gaps(34, None, time_base=PUBLISHED, duration=46.0, longest=224) for i in range(9)}
    gaps = {name: gap for name, gap in found.items() if gap is not None}
    (fact,) = common_gaps(gaps, 10, PUBLISHED)
    assert "9 of 10 videos" in fact
    assert "a step every 1.36 s, expected is a step every 0.32 s" in fact  # (46 - 0.96) / 33
    assert common_gaps(gaps, 11, PUBLISHED) == []
    longer = {"v": Gaps(cropped="x")}
    assert len(common_gaps(longer, 1, PUBLISHED)) == 1
    assert common_gaps(longer, 1, PUBLISHED, cropped=False) == []


@pytest.fixture(scope="module")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, an annotation file, and features of every fourth second only; one video is longer than T = 32."""
    folder = tmp_path_factory.mktemp("quarter")
    make_bundle(folder / "bundle")
    (folder / "features").mkdir()
    database = {}
    for i in range(4):
        write_features(folder / "features", f"v{i}", features_with(40 if i == 3 else 6, [(1, 4, i, 2.0)]))
        event = {"segment": [1.0, 4.0], "label": SPEC.labels[i], "label_id": i}
        database[f"v{i}"] = {"duration": 160.0 if i == 3 else 24.0, "subset": "test", "annotations": [event]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    return folder


EXPECTED = (
    "4 of 4 videos are not covered as a whole:\n  v0: the features cover 6.0 s, the duration is 24.0 s\n",
    "  v3: the features cover 40.0 s, the duration is 160.0 s; 32.0 of 40.0 s are used, T = 32 of 40 steps",
    "NEARLY ALL VIDEOS: the features of 4 of 4 videos do not cover the annotated duration; they seem to have a step "
    "every 4.6 s, expected is a step every 1 s",
)


def test_predict_and_evaluate_say_the_same(quarter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, where = str(quarter / "bundle"), ["--features", str(quarter / "features"), "--quiet"]
    annotations = ["--annotations", str(quarter / "annotations.json"), "--subset", "test"]
    assert main(["predict", bundle, *where, *annotations, "--out", str(tmp_path / "events.jsonl")]) == 0
    predicted = capsys.readouterr().err
    assert main(["evaluate", bundle, *where, *annotations, "--json", str(tmp_path / "scores.json")]) == 0
    evaluated = capsys.readouterr()
    assert predicted == evaluated.err
    for words in EXPECTED:
        assert words in predicted
    assert "4 not covered as annotated" in evaluated.out
    assert set(json.loads((tmp_path / "scores.json").read_text())["notes"]) == {"v0", "v1", "v2", "v3"}


def test_the_parity_check_says_it(quarter: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_inputs(
        quarter / "features", SPEC, annotations=read_annotations(quarter / "annotations.json", SPEC.labels), count=4
    )
    for words in (EXPECTED[0], EXPECTED[2]):
        assert words in caplog.text


def test_python_calls_say_it(caplog: pytest.LogCaptureFixture) -> None:
    video = features_with(20)
    with Localizer([OracleBackend()], SPEC) as localizer, caplog.at_level(logging.WARNING):
        localizer(video.visual, video.audio, 20.0)
        assert caplog.text == ""
        localizer(video.visual, video.audio, 80.0)
        assert "the features cover 20.0 s, the duration is 80.0 s" in caplog.text
        localizer(*features_with(50))
        assert "32.0 of 50.0 s are used" in caplog.text


def test_training_on_such_features_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config(model=ModelConfig(length=96, visual_dim=4, audio_dim=3, dim=8, heads=2, num_classes=2))
    videos = [VideoAnnotation(f"v{i}", 24.0, "train", np.array([[1.0, 4.0]]), np.array([0])) for i in range(8)]

    def write(seconds: float, audio: int | None = None) -> None:
        for i, video in enumerate(videos):
            steps = int(PUBLISHED.to_grid(24.0 if i == 0 else seconds)) - 1
            np.save(tmp_path / f"{video.video_id}_rgb.npy", np.ones((steps, 2), np.float32))
            np.save(tmp_path / f"{video.video_id}_flow.npy", np.ones((steps, 2), np.float32))
            np.save(tmp_path / f"{video.video_id}_vggish.npy", np.ones((audio or steps, 3), np.float32))

    write(6.0)
    check_folder(tmp_path, [*videos[:2], videos[0]], config)  # one of three is one bad file
    assert "1 of 3 videos are not covered as a whole" in caplog.text
    with pytest.raises(FeatureError, match="the features of 7 of 7 videos do not cover the annotated duration"):
        check_folder(tmp_path, videos[1:], config)
    write(24.0, audio=24)
    with pytest.raises(FeatureError, match="modalities of 8 of 8 videos differ in their number of steps"):
        check_folder(tmp_path, videos, config)
