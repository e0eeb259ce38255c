"""The report's numbers: kinds of errors by hand, their costs against the metric, curves, calibration, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders import edit_manifest, make_bundle, write_features

from ccnet.plots import Gates, read_gates
from ccnet.report.analysis import Analysis, analyse, truth_traits
from ccnet.report.errors import KINDS, working_score
from ccnet.report.gates import GateReader, read_all
from ccnet.report.page import Model, choose_videos, render
from ccnet.report.tables import prediction_table, truth_table
from runtime.annotations import Annotations, VideoAnnotation
from runtime.bundle import FileRecord, read_bundle
from runtime.detections import Detections
from runtime.evaluation import TIOU, evaluate
from runtime.features import FeatureFiles, VideoFeatures
from runtime.files import sha256_file

if TYPE_CHECKING:
    from benchmarks.networks import Networks

NAMES = ("dog", "cat", "cow")
DOG, CAT, COW = range(3)
Event = tuple[float, float, int, float]


def video(video_id: str, *events: tuple[float, float, int]) -> VideoAnnotation:
    table = np.array(events, float).reshape(-1, 3)
    return VideoAnnotation(video_id, 60.0, "test", table[:, :2], table[:, 2].astype(np.int64))


def annotated(*videos: VideoAnnotation) -> Annotations:
    return Annotations(Path("annotations.json"), NAMES, {v.video_id: v for v in videos})


def found(*events: Event) -> Detections:
    table = np.array(sorted(events, key=lambda event: -event[3]), float).reshape(-1, 4)
    return Detections(table[:, :2], table[:, 3].astype(np.float32), table[:, 2].astype(np.int64), NAMES)


TRUTH = annotated(
    video("a", (0, 10, DOG), (20, 30, CAT), (40, 44, COW)),
    video("b", (0, 60, DOG), (5, 9, CAT), (50, 52, COW)),
    video("c"),
)
RIGHT: list[Event] = [(0, 10, DOG, 0.95), (0, 58, DOG, 0.9)]
"""Of video a, and of video b."""
WRONG: dict[str, tuple[str, Event]] = {
    "duplicate": ("a", (1, 10, DOG, 0.85)),
    "bad boundary": ("a", (20, 24, CAT, 0.8)),
    "wrong label": ("a", (40, 44, CAT, 0.75)),
    "wrong label and boundary": ("b", (5, 20, COW, 0.7)),
    "background": ("c", (5, 20, COW, 0.65)),
}
"""One prediction of each kind of error: its video and itself."""


def predictions(wrong: dict[str, tuple[str, Event]], *extra: tuple[str, Event]) -> dict[str, Detections]:
    events = [("a", RIGHT[0]), ("b", RIGHT[1]), *wrong.values(), *extra]
    return {video_id: found(*(event for i, event in events if i == video_id)) for video_id in "abc"}


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse("model", predictions(WRONG), TRUTH, "test")


def test_every_kind_by_hand(analysis: Analysis) -> None:
    kinds = [KINDS[kind] for kind in analysis.judged.kinds]
    by_score = dict(zip(analysis.predicted.scores.round(2).tolist(), kinds, strict=True))
    expected = {round(event[3], 2): kind for kind, (_, event) in WRONG.items()} | {0.95: "right", 0.9: "right"}
    assert by_score == {np.float32(score).round(2).item(): kind for score, kind in expected.items()}
    # The bad boundary and the wrong label of events 1 and 2 have less than the working score.
    assert np.flatnonzero(analysis.judged.missed).tolist() == [1, 2, 4, 5]


def test_the_working_score_has_the_best_f1(analysis: Analysis) -> None:
    """F1 of 6 events is 2/7 for the best prediction, 4/8 for both right ones, and sinks with every wrong one."""
    assert analysis.score == pytest.approx(0.9)
    assert analysis.precision == 1.0
    assert analysis.recall == pytest.approx(2 / 6)
    assert analysis.cases == dict.fromkeys(KINDS[1:], 0) | {"missed": 4}
    nothing = prediction_table(TRUTH.subset("test"), {})
    assert working_score(nothing, np.zeros(0, np.bool_), 6) == 1.0


# What each oracle makes of the predictions. The working score is 0.9, at which four events are missed.
MENDED: dict[str, tuple[str, ...] | tuple[tuple[str, Event], ...]] = {
    "bad boundary": (("a", (20, 30, CAT, 0.8)),),
    "wrong label": (("a", (40, 44, COW, 0.75)),),
    "duplicate": (),
    "wrong label and boundary": (),
    "background": (),
}


@pytest.mark.parametrize("kind", [*MENDED, "missed"])
def test_a_cost_is_what_the_metric_gains(kind: str, analysis: Analysis) -> None:
    """The same predictions, mended by hand, are evaluated at 0.5."""
    if kind == "missed":
        events: list[tuple[str, Event]] = [
            *(("a", (20, 30, CAT, 0.9)), ("a", (40, 44, COW, 0.9))),
            *(("b", (5, 9, CAT, 0.9)), ("b", (50, 52, COW, 0.9))),
        ]
        mended = predictions(WRONG, *events)
    else:
        extra: Any = MENDED[kind]
        mended = predictions({name: event for name, event in WRONG.items() if name != kind}, *extra)
    gain = evaluate(mended, TRUTH, "test").map_at[0.5] - evaluate(predictions(WRONG), TRUTH, "test").map_at[0.5]
    cost = next(cost for cost in analysis.costs if cost.kind == kind)
    assert cost.gains[TIOU.index(0.5)] == pytest.approx(gain, abs=1e-12)
    assert gain > 0 or kind in ("duplicate", "background", "wrong label and boundary")


def test_without_errors_nothing_costs_anything() -> None:
    perfect = {
        v.video_id: Detections(v.segments, np.full(len(v.labels), 0.5, np.float32), v.labels, NAMES)
        for v in TRUTH.subset("test")
    }
    result = analyse("perfect", perfect, TRUTH, "test")
    assert [cost.gains.tolist() for cost in result.costs] == [[0.0] * len(TIOU)] * 6
    assert set(result.cases.values()) == {0}
    nothing = analyse("nothing", {}, TRUTH, "test")
    assert nothing.cases["missed"] == 6
    assert nothing.costs[-1].gains[0] == 1.0


def many(seed: int = 0, videos: int = 40) -> tuple[Annotations, dict[str, Detections]]:
    """Return random annotations, and predictions near them."""
    rng = np.random.default_rng(seed)
    truth, predicted = [], {}
    for number in range(videos):
        start = rng.uniform(0, 50, 4)
        labels = rng.integers(0, 3, 4)
        segments = np.stack([start, start + rng.uniform(0.5, 9, 4)], axis=1)
        truth.append(VideoAnnotation(f"v{number}", 60.0, "test", segments, labels))
        noisy = segments[rng.integers(0, 4, 30)] + rng.normal(0, 1.5, (30, 2))
        noisy[:, 1] = np.maximum(noisy[:, 1], noisy[:, 0] + 0.1)
        scores = np.sort(rng.uniform(0, 1, 30).astype(np.float32))[::-1].copy()
        predicted[f"v{number}"] = Detections(noisy, scores, rng.integers(0, 3, 30), NAMES)
    return annotated(*truth), predicted


def test_curves_and_calibration_agree_with_the_metric() -> None:
    truth, predicted = many(videos=4)
    result = analyse("m", predicted, truth, "test")
    for label, (recall, precision) in enumerate(result.curves):
        assert np.sum(np.diff(recall, prepend=0) * precision) == pytest.approx(result.evaluation.ap[4, label])
    assert sum(b.count for b in result.bins) == 120
    right = result.judged.kinds == 0
    place = np.minimum((result.predicted.scores * 10).astype(int), 9)
    for number, b in enumerate(result.bins):
        assert b.precision == pytest.approx(right[place == number].mean() if b.count else 0)
    assert 0 <= result.calibration_error <= 1


def test_long_curves_keep_their_ends() -> None:
    truth, predicted = many(videos=120)
    result = analyse("m", predicted, truth, "test")
    for recall, precision in result.curves:
        assert 40 < len(recall) <= 48
        assert (np.diff(recall) > 0).all()
        assert (np.diff(precision) <= 0).all()


def test_traits_by_hand() -> None:
    truth = annotated(
        video("a", (0, 4, DOG), (3, 9, DOG), (8, 30, CAT), (59.5, 60, COW)),
        video("b", (0, 60, DOG)),
    )
    counted = truth_traits(truth_table(truth.subset("test"), 3))
    assert counted["duration"] == [2, 1, 2, 0]
    assert counted["overlap"] == [2, 1, 1, 1]  # nothing: cow and the long dog; same: first dog; both: second dog
    assert counted["position"] == [2, 1, 1, 1]
    result = analyse("m", {"a": found((0, 4, DOG, 0.9)), "b": found((0, 60, CAT, 0.8))}, truth, "test")
    assert result.traits["missed"]["duration"] == [1, 1, 2, 0]


def test_videos_with_the_most_errors_are_chosen(analysis: Analysis) -> None:
    assert choose_videos([analysis], TRUTH, "test", 2) == ["a", "b"]
    assert choose_videos([analysis], TRUTH, "test", 1) == ["a"]
    assert choose_videos([analysis], TRUTH, "test", 9) == ["a", "b", "c"]


def content(page: str) -> dict[str, Any]:
    """Return the data of a page as a browser reads it."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def test_names_stay_text() -> None:
    names = ("</script><script>alert(1)</script>", "<!--<script>", "@SCRIPT@ \u2028 & \"'")
    truth = Annotations(
        Path("a&b.json"), names, {"<b>": VideoAnnotation("<b>", 9.0, "test", np.array([[1.0, 2.0]]), np.array([2]))}
    )
    predicted = {"<b>": Detections(np.array([[1.0, 2.0]]), np.array([0.5], np.float32), np.array([2]), names)}
    model = Model(analyse("</script>", predicted, truth, "test"), "<i>.jsonl")
    page = render("<title>&", [model], truth, "test", shown=["<b>"], media={"<b>": "x.mp4"})
    data = content(page)
    assert data["classes"] == list(names)
    assert data["videos"][0]["id"] == "<b>"
    assert data["models"][0]["name"] == "</script>"
    assert page.count("</script>") == 2, "the data and the program"
    assert "<title>&lt;title&gt;&amp;</title>" in page


def test_what_a_page_holds(analysis: Analysis) -> None:
    gates = Gates(np.array([0.5, 1.0, 1.5]), np.array([0.0, 0.5, 1.0]), np.array([1.0, 1.0, 0.2]))
    model = Model(analysis, "e.jsonl", {"a": gates})
    data = content(render("t", [model], TRUTH, "test", shown=["a", "c"]))
    first, last = data["videos"]
    assert first["duration"] == 6000
    assert first["truth"] == [0, 1000, DOG, 2000, 3000, CAT, 4000, 4400, COW]
    assert first["models"][0]["events"][:6] == [0, 1000, DOG, 950, 0, 0]
    assert first["models"][0]["missed"] == [1, 2]
    assert first["gates"] == [{"start": 0.5, "step": 0.5, "audio": "AID/", "visual": "//8z"}]
    assert last["gates"] == [None]
    assert last["models"][0]["events"] == [500, 2000, COW, 650, KINDS.index("background"), -1]
    assert data["models"][0]["map"] == pytest.approx(list(analysis.evaluation.map_at.values()), abs=1e-5)
    assert data["total"] == 3


def test_a_page_of_a_hundred_videos_and_two_models_is_small() -> None:
    """Under 2 MB with 100 events a video, 100 classes and gates of 224 steps."""
    rng = np.random.default_rng(0)
    names = tuple(f"a class with a name {i}" for i in range(100))
    steps = np.arange(224) * 0.32
    videos, predicted, gates = {}, {}, {}
    for number in range(100):
        key = f"video-{number:05d}"
        ends = np.sort(rng.uniform(0, 60, (100, 2)), axis=1) + np.array([0, 0.01])
        videos[key] = VideoAnnotation(key, 60.1, "test", ends[:5], rng.integers(0, 100, 5))
        scores = np.sort(rng.uniform(0, 1, 100).astype(np.float32))[::-1].copy()
        predicted[key] = Detections(ends, scores, rng.integers(0, 100, 100), names)
        gates[key] = Gates(steps, rng.random(224), rng.random(224))
    truth = Annotations(Path("annotations.json"), names, videos)
    model = Model(analyse("m", predicted, truth, "test"), "e.jsonl", gates)
    page = render("t", [model, model], truth, "test", shown=list(videos))
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize("form", ["fused", pytest.param("reference", marks=pytest.mark.slow)])
def test_gates_of_a_bundle_are_those_of_the_network(
    form: str, tiny_networks: Networks, tiny_graph: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    spec = tiny_networks.spec
    bundle = make_bundle(tmp_path / "bundle", spec=spec)
    graph = bundle.folder / "model.onnx"
    graph.write_bytes(tiny_graph(form).read_bytes())
    record = FileRecord(name=graph.name, size=graph.stat().st_size, sha256=sha256_file(graph))
    edit_manifest(bundle.folder, files=(record,))
    rng = np.random.default_rng(0)
    visual, audio = (rng.standard_normal((11, n)).astype(np.float32) for n in (spec.visual_dim, spec.audio_dim))
    features = VideoFeatures(visual, audio)
    (tmp_path / "features").mkdir()
    names = [*spec.layout.visual, *spec.layout.audio]
    parts = [*np.split(features.visual, len(spec.layout.visual), axis=1), features.audio]
    for suffix, part in zip(names, parts, strict=True):
        np.save(tmp_path / "features" / f"v{suffix}.npy", part)

    read = GateReader(read_bundle(bundle.folder)).read(FeatureFiles(tmp_path / "features", "v"))
    expected = read_gates(tiny_networks.eager(), spec, features)
    for got, wanted in zip(read, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)  # measured 3e-7
    assert np.abs(expected.audio - expected.visual).max() > 0.01


def test_a_graph_that_does_not_load_costs_the_gates_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path / "bundle")
    graph = bundle.folder / "model.onnx"
    model = onnx.load(str(graph))
    model.graph.node.append(onnx.helper.make_node("Sigmoid", ["nowhere"], ["gate"]))
    onnx.save(model, str(graph))
    record = FileRecord(name=graph.name, size=graph.stat().st_size, sha256=sha256_file(graph))
    edit_manifest(bundle.folder, files=(record,))
    assert read_all(read_bundle(bundle.folder), str(tmp_path), ["v"]) == {}
    assert "no gate curves: " in caplog.text
    assert "can't be opened to read its gates" in caplog.text


def test_a_graph_without_gates_is_said_to_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path / "bundle")
    write_features(tmp_path, "v", VideoFeatures(np.zeros((5, 6), np.float32), np.zeros((5, 3), np.float32)))
    assert read_all(bundle, str(tmp_path), ["v"]) == {}
    assert "no gate curves: its graph has no gates" in caplog.text
