"""Strict records: what both readers refuse, in messages of one line and bounded length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.annotations import read_annotations
from runtime.detections import read_events
from runtime.errors import CCNetError
from runtime.records import BadRecord, LabelTable, check_segment, parse_json
from runtime.schema import section_from_json, show
from runtime.spec import TimeBase

LONG = "x" * 100_000
CONTROL = "a\x1b[2Jb\nccnet: all is well"


def read_one_annotation(path: Path, video_id: str = "v", **event: Any) -> None:
    events = [{"segment": [0, 1], "label": "dog", "label_id": 0} | event]
    path.write_text(
        json.dumps({"database": {video_id: {"duration": 9, "subset": "test", "annotations": events}}}), encoding="utf-8"
    )
    read_annotations(path, ("dog",))


def read_one_event(path: Path, video_id: str = "v", **event: Any) -> None:
    found = [{"segment": [0, 1], "label": "dog", "label_id": 0, "score": 0.5} | event]
    path.write_text(json.dumps({"video_id": video_id, "duration": 9, "events": found}) + "\n", encoding="utf-8")
    read_events(path, ("dog",))


@pytest.mark.parametrize("text", [LONG, CONTROL])
@pytest.mark.parametrize("read", [read_one_annotation, read_one_event])
def test_quoted_text_is_bounded_and_on_one_line(read: Callable[..., None], text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    bad: list[dict[str, Any]] = [
        {"video_id": f"{text}/", "label": "cat"},
        {"video_id": text if text == LONG else "v", "label": "cat"},
        {"label": text},
        {"label": text, "label_id": 1},
        {"label_id": text},
        {"segment": [text, text]},
        {"segment": {text: text}},
    ]
    for changes in bad:
        with pytest.raises(CCNetError) as caught:
            read(path, **changes)
        message = str(caught.value).removeprefix(str(path))
        assert message.isprintable()
        assert len(message) < 300


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 3}', '[{"x": {"a": 1, "a": 1}}]'])
def test_a_key_twice(text: str) -> None:
    with pytest.raises(BadRecord, match="key 'a' occurs twice in one object"):
        parse_json(text)


def test_segments_may_overrun_by_the_rounding_of_durations() -> None:
    assert check_segment([-0.005, 9.005], 9.0) == (-0.005, 9.005)
    for segment in ([-0.02, 5], [5, 9.02], [5, 5], [6, 5], [True, 5], ["0", 5], [0, 5, 6], None):
        with pytest.raises(BadRecord, match="segment: "):
            check_segment(segment, 9.0)


def test_labels_are_pairs() -> None:
    gathered = LabelTable(None)
    assert [gathered.check("dog", 2), gathered.check("cat", 0), gathered.check("dog", 2)] == [2, 0, 2]
    assert gathered.names == {2: "dog", 0: "cat"}
    for name, label_id in (
        ("dog", 0),
        ("cow", 0),
        ("dog", 1),
        ("dog", True),
        ("dog", 2.0),
        (None, 1),
        ("cow", 1 << 20),
    ):
        with pytest.raises(BadRecord):
            gathered.check(name, label_id)


def test_configuration_keys_and_values_are_bounded_too() -> None:
    for data in ({CONTROL: 1}, {LONG: 1}, {"fps": LONG}, {"fps": CONTROL}):
        with pytest.raises(CCNetError) as caught:
            section_from_json(TimeBase, data, where="time_base")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


def test_show_keeps_short_values_as_they_are() -> None:
    assert show([1, "two"]) == "[1, 'two']"
    assert show("\t") == "'\\t'"
    assert len(show(LONG)) == 60
