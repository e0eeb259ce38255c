"""Other tools' files: what is written is read back, here and by the formats' own libraries, and bad files are named."""

from __future__ import annotations

import html
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import CCNetError, PredictionError
from runtime.formats.events import Event, Video
from runtime.formats.registry import (
    FORMATS,
    format_of,
    holds_events,
    losses,
    output_format,
    read_predictions,
    read_videos,
    write_videos,
)

LABELS = ("dog barking", "rain & <wind>", "Glocke – läuten", "a, \"quoted\" 'class'", "score")


def scored(seed: int, count: int, duration: float = 40.0) -> list[Event]:
    """Return random events, many of which overlap."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, duration - 12, count)
    end = start + rng.uniform(0.05, 12, count)
    labels = rng.integers(0, len(LABELS), count)
    scores = rng.uniform(0, 1, count).astype(np.float32).astype(float)
    rows = zip(start.tolist(), end.tolist(), labels.tolist(), scores.tolist(), strict=True)
    return [Event(s, e, LABELS[i], p, i) for s, e, i, p in rows]


VIDEOS = [Video("clip.one", scored(0, 30), 40.0), Video("zwei é", scored(1, 12), 40.0, "test")]
SCORED = [name for name, form in FORMATS.items() if "scores" in form.carries]


def rounding(name: str) -> tuple[float, float]:
    """Return the largest errors of times (seconds) and scores: half of the last digit that the format writes."""
    return {"webvtt": (5e-4, 5e-5), "srt": (5e-4, 5e-5), "elan": (5e-4, 0), "audacity": (5e-7, 5e-5)}.get(name, (0, 0))


def assert_same(read: list[Video], written: list[Video], name: str) -> None:
    """Compare videos and events, but for what the format rounds and leaves out, and for order."""
    time_error, score_error = (error * 1.001 for error in rounding(name))
    form = FORMATS[name]
    assert [video.video_id for video in read] == [video.video_id for video in written]
    for got, expected in zip(read, written, strict=True):
        assert got.duration == (expected.duration if "durations" in form.carries else None)
        assert len(got.events) == len(expected.events)
        pairs = zip(
            sorted(got.events, key=lambda e: (e.label, round(e.start, 2), round(e.end, 2))),
            sorted(expected.events, key=lambda e: (e.label, round(e.start, 2), round(e.end, 2))),
            strict=True,
        )
        for g, e in pairs:
            assert g.label == e.label
            assert g.label_id == (e.label_id if "label ids" in form.carries else None)
            assert abs(g.start - e.start) <= time_error
            assert abs(g.end - e.end) <= time_error
            if e.score is None or "scores" not in form.carries:
                assert g.score is None
            else:
                assert g.score is not None
                assert abs(g.score - e.score) <= score_error


@pytest.mark.parametrize("name", SCORED)
def test_events_read_back(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    if name == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / ("out" if form.one_video else f"out{form.suffix}")
    files = write_videos(path, VIDEOS, form)
    assert len(files) == (2 if form.one_video else 1)
    assert format_of(path) is form
    assert_same(read_videos(path, form), VIDEOS, name)
    assert holds_events(tmp_path) is False
    assert not path.is_dir() or holds_events(path)
    predictions = read_predictions(path, LABELS)
    assert list(predictions) == ["clip.one", "zwei é"]
    scores = predictions["clip.one"].scores
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("name", ["annotations", "csv", "labelstudio", "webvtt", "srt", "audacity", "elan"])
def test_events_without_scores_read_back(name: str, tmp_path: Path) -> None:
    """What people annotate: the class alone."""
    form = FORMATS[name]
    videos = [
        Video(v.video_id, [Event(e.start, e.end, e.label, None, e.label_id) for e in v.events], v.duration, "train")
        for v in VIDEOS
    ]
    path = tmp_path / ("out" if form.one_video else f"out{form.suffix}")
    write_videos(path, videos, form)
    assert_same(read_videos(path, form), videos, name)
    with pytest.raises(PredictionError, match=r"has no scores?"):
        read_predictions(path, LABELS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_video_without_events_is_kept_or_said_to_be_lost(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    if name == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / ("out" if form.one_video else f"out{form.suffix}")
    videos = [VIDEOS[0], Video("nothing", [], 9.0, "test")]
    videos = [Video(v.video_id, v.events, v.duration, "test") for v in videos]
    write_videos(path, videos, form)
    kept = [video.video_id for video in read_videos(path, form)]
    lost = "videos without events are left out" in losses(form, videos)
    assert kept == (["clip.one"] if lost else ["clip.one", "nothing"])


def test_what_is_lost_is_said() -> None:
    assert losses(FORMATS["events"], [VIDEOS[0]]) == []
    assert losses(FORMATS["events"], [Video("v", [], 9.0, "test")]) == ["subsets are left out"]
    assert losses(FORMATS["srt"], [VIDEOS[0]]) == [
        "durations are left out",
        "label ids are left out",
        "scores are rounded to 4 decimals",
        "times are rounded to milliseconds",
    ]
    bare = Video("v", [Event(0, 1, "dog")])
    assert losses(FORMATS["audacity"], [bare]) == ["times are rounded to microseconds"]


def test_elan_documents_are_those_of_pympi(tmp_path: Path) -> None:
    elan = pytest.importorskip("pympi.Elan")
    (path,) = write_videos(tmp_path / "v.eaf", [Video("v", scored(3, 25), 40.0)], FORMATS["elan"])
    document = elan.Eaf(str(path))
    written = sorted((e.label, round(e.start * 1000), round(e.end * 1000), e.score) for e in scored(3, 25))
    found = []
    for tier in document.get_tier_names():
        if document.get_parameters_for_tier(tier)["LINGUISTIC_TYPE_REF"] != "event":
            continue
        spans = document.get_annotation_data_for_tier(tier)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "annotations of a tier overlap"
        scores = document.get_ref_annotation_data_for_tier(f"{tier} score")
        by_start = {start: float(value) for start, _, value, *_ in scores}
        found += [(value, start, end, by_start[start]) for start, end, value in spans]
    assert sorted(found) == written

    # What pympi writes, as a person's tool would: annotations of a tier called after a class, and one of no score.
    document = elan.Eaf()
    document.add_tier("rain")
    document.add_annotation("rain", 500, 1500)
    document.add_annotation("rain", 2000, 2500, "storm")
    document.add_linguistic_type("note", "Symbolic_Association", timealignable=False)
    document.add_tier("remarks", "note", parent="rain")
    document.add_ref_annotation("remarks", "rain", 600, "not sure")
    document.to_file(str(tmp_path / "theirs.eaf"))
    (video,) = read_videos(tmp_path / "theirs.eaf", FORMATS["elan"])
    assert video == Video("theirs", [Event(0.5, 1.5, "rain"), Event(2.0, 2.5, "storm")])


def test_subtitles_are_those_of_webvtt_py(tmp_path: Path) -> None:
    webvtt = pytest.importorskip("webvtt")
    for name in ("webvtt", "srt"):
        events = [e for e in scored(4, 30) if name == "webvtt" or "<" not in e.label]  # in SRT that would be markup
        video = Video("v", sorted(events, key=lambda e: (e.start, e.end)), 40.0)
        form = FORMATS[name]
        (path,) = write_videos(tmp_path / f"v{form.suffix}", [video], form)
        cues = webvtt.from_srt(str(path)) if name == "srt" else webvtt.read(str(path))
        assert len(cues) == len(events) > 20
        for cue, event in zip(cues, video.events, strict=True):
            assert abs(cue.start_in_seconds - event.start) < 1.001  # whole seconds in some versions
            assert html.unescape(cue.text).startswith(event.label)
        cues.save(str(tmp_path / "theirs.vtt"))
        assert_same(read_videos(tmp_path / "theirs.vtt", FORMATS["webvtt"]), [Video("theirs", video.events)], name)


def test_subtitles_of_other_tools() -> None:
    text = (
        "WEBVTT - a title\nKind: captions\n\nSTYLE\n::cue { color: red }\n\nNOTE\nof nobody\n\n1\n"
        "00:01.000 --> 01:00:02.500 align:start\n<v Ann>dog\nbarking</v>\n"
    )
    from runtime.formats.subtitles import decode_srt, decode_webvtt

    assert decode_webvtt(text, "v").events == [Event(1.0, 3602.5, "dog barking")]
    text = (
        "1\n0:00:01,5 --> 00:00:02.250 X1:0\n<font color='red'><i>dog</i></font> (0.5)\n\n\n"
        "00:00:03,000 --> 00:00:04,000\nrain (2 mm)\n"
    )
    assert decode_srt(text, "v").events == [Event(1.5, 2.25, "dog", 0.5), Event(3.0, 4.0, "rain (2 mm)")]


LABEL_STUDIO_TASKS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {"type": "object"},
            "predictions": {
                "type": "array",
                "items": {
                    "required": ["result"],
                    "properties": {
                        "model_version": {"type": "string"},
                        "score": {"type": "number", "minimum": 0, "maximum": 1},
                        "result": {"type": "array", "items": {"$ref": "#/$defs/region"}},
                    },
                },
            },
        },
        "additionalProperties": False,
    },
    "$defs": {
        "region": {
            "required": ["id", "type", "from_name", "to_name", "value"],
            "properties": {
                "type": {"const": "labels"},
                "original_length": {"type": "number"},
                "score": {"type": "number"},
                "value": {
                    "required": ["start", "end", "labels"],
                    "properties": {
                        "start": {"type": "number"},
                        "end": {"type": "number"},
                        "channel": {"type": "integer"},
                        "labels": {"type": "array", "items": {"type": "string"}},
                    },
                },
            },
        }
    },
}
"""Label Studio's documented import format of audio regions, of the tags in docs/formats.md."""


def test_label_studio_tasks_fit_their_documented_form(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    (path,) = write_videos(tmp_path / "tasks.json", [*VIDEOS, Video("none", [], 5.0)], FORMATS["labelstudio"])
    tasks = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(tasks, LABEL_STUDIO_TASKS)
    assert tasks[2] == {"data": {"video": "none.mp4", "video_id": "none", "duration": 5.0}}, "nobody annotated it"


def test_label_studio_exports(tmp_path: Path) -> None:
    def region(**changes: Any) -> dict[str, Any]:
        value = {"start": 1.0, "end": 2.5, "channel": 0, "labels": ["dog"]}
        return {"id": "x", "type": "labels", "original_length": 9.5, "value": value} | changes

    frames = {"ranges": [{"start": 1, "end": 25}, {"start": 51, "end": 75}], "timelinelabels": ["rain"]}
    rating = {"type": "rating", "value": {"rating": 3}}
    cancelled = {"was_cancelled": True, "result": [region()]}
    tasks = [
        {
            "data": {"video": "/data/upload/3/1a2b3c4d-my%20clip.mp4"},
            "annotations": [cancelled, {"result": [region(), rating]}],
            "predictions": [{"result": [region(score=0.5), region(score=0.25)]}],
        },
        {
            "data": {"audio": "/data/local-files/?d=media/b.wav", "fps": 25},
            "annotations": [{"result": [{"type": "timelinelabels", "value": frames}]}],
        },
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    first, second = read_videos(path, format_of(path))
    assert first == Video("my clip", [Event(1.0, 2.5, "dog")], 9.5)
    assert second == Video("b", [Event(0.0, 1.0, "rain"), Event(2.0, 3.0, "rain")])


BAD = {
    "activitynet": [
        ('{"results": []}', 'expected an object {"version"'),
        ('{"results": {"v": {}}}', "video 'v': got {}, expected a list"),
        ('{"results": {"v": [{"segment": [1], "label": "a", "score": 1}]}}', r"video 'v', event 0: segment: got \[1\]"),
        ('{"results": {"v": [{"segment": [1, 2], "label": "a"}]}}', "event 0: 'score' is missing"),
        ('{"results": {"v": [{"segment": [1, 2], "label": "a", "score": 1.5}]}}', "score: got 1.5, expected"),
        ('{"results": {"v": [{"segment": [3, 2], "label": "a", "score": 1}]}}', "an end that is not before"),
        ('{"results": {"../v": []}}', "expected a name without path separators"),
        ('{"results": {}, "results": {}}', "key 'results' occurs twice"),
    ],
    "csv": [
        ("", "line 1: columns video_id, start, end, label are missing"),
        ("video_id,start,end,label\nv,1,2\n", "line 2: got 3 cells, expected 4"),
        ("video_id,start,end,label\nv,1,x,dog\n", "line 2: end: got 'x', expected a number"),
        ("video_id,start,end,label,score\nv,1,2,dog,nan\n", "line 2: score: got 'nan'"),
        ("video_id,start,end,label,start\n", "line 1: column 'start' occurs twice"),
        (
            "video_id,start,end,label,duration\nv,1,2,a,3\nv,1,2,a,4\n",
            "line 3: video 'v': got duration 4.0",
        ),
        ("video_id,start,end,label,label_id\nv,1,2,a,0.5\n", "label_id: got 0.5, expected an integer"),
        ("video_id,start,end,label\n,1,2,dog\n", "line 2: video_id: got None"),
        ('video_id,start,end,label\nv,1,2,"dog\n', "line 2: unexpected end of data"),
    ],
    "webvtt": [
        ("1\n", "line 1: got '1', expected WEBVTT"),
        ("WEBVTT\n\n1\n00:01.000 -> 00:02.000\ndog\n", "line 3: got '1', expected a cue"),
        ("WEBVTT\n\n00:01.000 --> 00:61.000\ndog\n", "line 3: got '00:01.000 --> 00:61.000', expected start"),
        ("WEBVTT\n\n00:01.000 --> 00:02.000\n", "line 3: label: got ''"),
    ],
    "srt": [
        ("x\n00:00:01,000 --> 00:00:02,000\ndog\n", "line 1: got 'x', expected a number"),
        ("1\n", "line 1: got '1', expected a number and then the times"),
        ("1\n00:00:03,000 --> 00:00:02,000\ndog\n", r"line 2: segment: got \[3.0, 2.0\]"),
    ],
    "audacity": [
        ("1\t2\tdog\n1\t2\n", "line 2: got .*, expected start, end and label with tabs"),
        ("1\tinf\tdog\n", "line 1: end: got 'inf'"),
        ("1\t2\t\n", "line 1: label: got ''"),
    ],
    "elan": [
        ("<a", "line 1: not valid XML"),
        ("<a/>", "line 1: got <'a'>, expected <ANNOTATION_DOCUMENT>"),
        ("<ANNOTATION_DOCUMENT>\n</ANNOTATION_DOCUMENT>", "line 1: <ANNOTATION_DOCUMENT> has no <HEADER>"),
        (
            '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]>\n<ANNOTATION_DOCUMENT>&z;</ANNOTATION_DOCUMENT>',
            "has a document type",
        ),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">\n<a/>', "has a document type"),
        ("<a>" * 40, "nested deeper than 32"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "not valid XML"),
        (
            '<ANNOTATION_DOCUMENT><HEADER TIME_UNITS="PAL-frames"/></ANNOTATION_DOCUMENT>',
            "TIME_UNITS: got 'PAL-frames', expected milliseconds",
        ),
    ],
    "labelstudio": [
        ("{}", "tasks: got {}, expected a list"),
        ("[1]", "task 0: got 1, expected an object"),
        ('[{"data": {}}]', r"task 0: data: got \[\], expected 'video_id'"),
        (
            '[{"data": {"video_id": "v"}, "annotations": [{"result": []}, {"result": []}]}]',
            "annotations: got 2, expected",
        ),
        ('[{"data": {"video_id": "v"}, "annotations": [{"result": [1]}]}]', "task 0: region 0: got 1"),
        (
            '[{"data": {"video_id": "v"}, "annotations": [{"result": [{"type": "labels", "value": {"labels": ["a"],'
            ' "start": "1", "end": 2}}]}]}]',
            "region 0: got start '1', end 2, expected numbers",
        ),
        (
            '[{"data": {"video_id": "v"}, "annotations": [{"result": [{"type": "timelinelabels",'
            ' "value": {"timelinelabels": ["a"]}}]}]}]',
            "counts frames, but the task's data have no 'fps'",
        ),
        ('[{"data": {"video_id": "v"}}, {"data": {"video_id": "v"}}]', "video 'v' occurs a second time"),
    ],
}


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, cases in BAD.items() for i in range(len(cases))])
def test_bad_files_are_named(name: str, case: int, tmp_path: Path) -> None:
    content, message = BAD[name][case]
    path = tmp_path / f"v{FORMATS[name].suffix}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PredictionError, match=message) as caught:
        read_videos(path, FORMATS[name])
    assert str(caught.value).startswith(f"{path}: ")


def test_text_that_is_not_utf8_and_marks_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_bytes("video_id,start,end,label\r\nv,1,2,caf\xe9\r\n".encode("latin1"))
    with pytest.raises(PredictionError, match="line 2: not UTF-8"):
        read_videos(path, FORMATS["csv"])
    path.write_bytes(b"\xef\xbb\xbfvideo-id,t-start,t-end,label,score\r\nv,1,2,dog,0.5\r\n")
    assert read_videos(path, FORMATS["csv"]) == [Video("v", [Event(1.0, 2.0, "dog", 0.5)])]


def test_parquet_of_other_tools(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "e.PARQUET"
    columns = {"video-id": ["b", "a", "b"], "t-start": [1, 2, 3], "t-end": [2.5, 3, 4], "label": ["x", "y", "x"]}
    parquet.write_table(pa.table({**columns, "score": pa.array([0.5, None, 1], pa.float32())}), path)
    first, second = read_videos(path, format_of(path))
    assert first == Video("b", [Event(1.0, 2.5, "x", 0.5), Event(3.0, 4.0, "x", 1.0)])
    assert second == Video("a", [Event(2.0, 3.0, "y")])
    with pytest.raises(PredictionError, match="video 'a', event 0: has no score"):
        read_predictions(path, ("x", "y"))
    parquet.write_table(pa.table({**columns, "label": [1, 2, 3]}), path)
    with pytest.raises(PredictionError, match="row 1: label: got 1, expected a class name"):
        read_videos(path, FORMATS["parquet"])
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(PredictionError, match="not a Parquet file that can be read"):
        read_videos(path, FORMATS["parquet"])


def test_the_format_is_told_by_suffix_and_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, name in (('{"results": {}}', "activitynet"), ("[]", "labelstudio"), ('{"database": {}}', "annotations")):
        path.write_text(text)
        assert format_of(path).name == name
    path.write_text("{}")
    with pytest.raises(PredictionError, match="of no known format"):
        format_of(path)
    assert format_of(path, "activitynet").name == "activitynet"
    assert format_of("events").name == format_of("-").name == "events"
    for name in ("a.srt", "b.vtt"):
        (tmp_path / name).write_text("")
    with pytest.raises(PredictionError, match="got files of webvtt, srt, expected those of one format"):
        format_of(tmp_path)
    assert output_format("a/b.EAF").name == "elan"
    for name in ("x.json", "folder", "-"):
        with pytest.raises(CCNetError, match="which format"):
            output_format(name)
    assert output_format("-", "csv").name == "csv"


def test_labels_that_a_format_can_not_hold(tmp_path: Path) -> None:
    for name, label, message in (
        ("srt", "two\nlines", "needs a label on one line"),
        ("srt", "a --> b", "SRT can't hold '-->'"),
        ("audacity", "a\tb", "needs a label on one line"),
        ("elan", "a\x01", "needs a label on one line"),
        ("webvtt", " padded", "without space around it"),
        ("webvtt", "dog (0.5)", "ends like a score"),
    ):
        videos = [Video("good", [Event(0, 1, "dog")]), Video("v", [Event(0, 1, label)])]
        with pytest.raises(PredictionError, match=f"video 'v': .*{message}"):
            write_videos(tmp_path / name, videos, FORMATS[name])
        assert [path.stem for path in (tmp_path / name).iterdir()] == ["good"]


def test_what_our_own_files_need(tmp_path: Path) -> None:
    bare = Video("v", [Event(0, 1, "dog", 0.5)])
    for name in ("events", "annotations"):
        with pytest.raises(PredictionError, match="the duration of video 'v' is not known; give --annotations"):
            write_videos(tmp_path / "x", [bare], FORMATS[name])
    with pytest.raises(PredictionError, match="no subset is known; give --subset"):
        write_videos(tmp_path / "x", [Video("v", [], 9.0)], FORMATS["annotations"])
    with pytest.raises(PredictionError, match="holds one video, got 2; give the name of a folder"):
        write_videos(tmp_path / "x.srt", VIDEOS, FORMATS["srt"])
    mixed = [Video("v", [Event(0, 1, "dog", 0.5, 3), Event(0, 1, "cat", 0.5, 3)], 9.0)]
    with pytest.raises(PredictionError, match="label_id 3: got labels 'dog' and 'cat'"):
        write_videos(tmp_path / "x", mixed, FORMATS["events"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "v_rgb.npy"])
def test_a_folder_with_a_note_beside_something_else_has_no_events(name: str, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    assert holds_events(tmp_path)
    (tmp_path / name).write_text("")
    assert not holds_events(tmp_path)


def test_a_folder_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "clip.one.mp4").write_text("a video")
    write_videos(tmp_path, VIDEOS, FORMATS["srt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.one.mp4", "clip.one.srt", "zwei é.srt"]
