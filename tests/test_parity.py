"""The parity check passes an equal backend, and each kind of mistake fails the check that is meant to see it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import SPEC, OracleBackend, oracle

from export.parity.compare import TITLES, compare
from export.parity.events import FEWEST_EVENTS, EventAgreement, match_events, without_ties
from export.parity.inputs import ParityVideo, folder_inputs, stress_inputs, stress_lengths, synthetic_inputs
from export.parity.reference import Outputs, Reference, load_reference, record, save_reference
from export.parity.tolerances import TOLERANCES, graph_precision, tolerance
from runtime.backends.base import Float32, Int32
from runtime.detections import Detections
from runtime.errors import ConfigError, ParityError, ReferenceFileError
from runtime.files import write_json
from runtime.spec import ModelSpec

Change = Callable[[Float32, Float32, Int32], tuple[Float32, Float32]]


class ChangedBackend(OracleBackend):
    """The oracle with a mistake: `change(logits, offsets, lengths)` on every answer."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        logits, offsets = super().infer(visual, audio, lengths)
        return self.change(logits.copy(), offsets.copy(), lengths)


@pytest.fixture(scope="module")
def videos() -> list[ParityVideo]:
    """Stress inputs, and synthetic videos rewritten so that the oracle finds their events and little else."""
    rng = np.random.default_rng(0)
    synthetic = []
    for video in synthetic_inputs(SPEC, count=12):
        visual = np.full_like(video.features.visual, -6)
        audio = np.zeros_like(video.features.audio)
        steps = len(visual)
        starts = sorted(rng.choice(steps // 4, min(3, steps // 4), replace=False) * 4)
        labels = rng.integers(0, 4, len(starts))
        for start, label in zip(starts, labels, strict=True):
            visual[start + 1, label] = rng.uniform(0, 3)
            audio[start + 1, :2] = 1.5
        segments = np.array([[start, start + 3] for start in starts], np.float64)
        features = dataclasses.replace(video.features, visual=visual, audio=audio)
        synthetic.append(
            dataclasses.replace(video, features=features, segments=segments, labels=labels, annotated=True)
        )
    return stress_inputs(SPEC) + synthetic


def failing(change: Change, videos: list[ParityVideo], precision: str = "fp32") -> set[str]:
    report = compare(ChangedBackend(change), OracleBackend(), videos, limits=tolerance(precision))
    names = {check.name for check in report.checks if not check.passed}
    assert report.passed == (not names)
    return names


def test_an_equal_backend_passes_every_check(videos: list[ParityVideo]) -> None:
    report = compare(OracleBackend(), OracleBackend(), videos)
    assert report.passed
    assert {check.name for check in report.checks} == set(TITLES)
    assert report.videos == {"stress": len(stress_inputs(SPEC)), "events": 12}
    assert report.metric["ground_truth"] == "annotations"
    assert report.metric["reference"] > 0.3
    assert report.events["videos"]["events"] >= FEWEST_EVENTS
    report.require()
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is True
    assert "passed" in report.text()


def _set(array: Float32, where: tuple[Any, ...], value: Any) -> Float32:
    array[where] = value
    return array


def test_nan_fails_even_at_padded_points(videos: list[ParityVideo]) -> None:
    def change(logits: Float32, offsets: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        if lengths[0] < SPEC.length:
            logits[0, SPEC.grid.level_slices[0].stop - 1, 0] = np.nan
        return logits, offsets

    report = compare(ChangedBackend(change), OracleBackend(), videos)
    assert not report.passed
    assert {"nonfinite"} <= {check.name for check in report.checks if not check.passed}
    json.dumps(report.to_json(), allow_nan=False)
    with pytest.raises(ParityError, match="NaN or infinite"):
        report.require()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x, o, n: (_set(x, (slice(None), 0, 0), x[:, 0, 0] + 2e-4), o), {"max_logits"}),
        (lambda x, o, n: (x + np.float32(5e-5), o), {"mean_logits"}),
        (lambda x, o, n: (x, _set(o, (slice(None), 0, 0, 1), o[:, 0, 0, 1] * 1.001 + 2e-4)), {"max_offsets"}),
        (lambda x, o, n: (x, o * np.float32(1 + 5e-5)), {"mean_offsets"}),
    ],
    ids=["one logit", "all logits a little", "one offset", "all offsets a little"],
)
def test_a_small_difference_fails_its_tensor_alone(
    videos: list[ParityVideo], change: Change, expected: set[str]
) -> None:
    names = failing(change, videos)
    assert expected <= names
    assert not names & {"nonfinite", "batch_logits", "batch_offsets", "events", "map_difference"}


def test_what_a_video_gets_must_not_depend_on_its_batch(videos: list[ParityVideo]) -> None:
    def change(logits: Float32, offsets: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        # The length of the first video used for all, as a wrongly tiled mask does: equal when videos run alone.
        return logits + np.where(SPEC.grid.valid_points(lengths[:1])[:, :, None], 0, -1).astype(np.float32), offsets

    assert failing(change, videos) == {"batch_logits"}


def test_moved_and_lost_events_fail_events_and_map(videos: list[ParityVideo]) -> None:
    names = failing(lambda x, o, n: (x, o * np.float32(0.7)), videos, "bf16")
    assert {"events", "stress_events", "map_difference"} <= names
    names = failing(lambda x, o, n: (np.roll(x, 1, axis=2), o), videos, "bf16")
    assert {"events", "map_difference"} <= names


def test_scores_that_drift_fail(videos: list[ParityVideo]) -> None:
    names = failing(lambda x, o, n: (x + np.float32(0.15), o), videos, "bf16")
    assert "score_drift" in names
    assert "max_logits" not in names


def test_rounding_to_half_passes_the_limits_of_half_and_not_those_of_fp32(videos: list[ParityVideo]) -> None:
    def half(x: Float32, o: Float32, n: Int32) -> tuple[Float32, Float32]:
        return x.astype(np.float16).astype(np.float32), o.astype(np.float16).astype(np.float32)

    names = failing(half, videos, "fp16")
    assert names <= {"max_logits"}  # the oracle puts -100 at padded and quiet points, where half rounds by 0.03
    assert failing(half, videos) >= {"max_logits", "max_offsets"}


def test_without_annotations_the_references_own_events_are_the_truth(videos: list[ParityVideo]) -> None:
    bare = [dataclasses.replace(v, segments=np.zeros((0, 2)), labels=np.zeros(0, np.int64)) for v in videos]
    report = compare(OracleBackend(), OracleBackend(), bare)
    assert report.passed
    assert report.metric["ground_truth"] == "reference events"
    assert report.metric["reference"] > 0.9
    # That mAP is reported and not judged: with few classes and short events one of them is worth more than the limit.
    report = compare(ChangedBackend(lambda x, o, n: (x, o * np.float32(0.7))), OracleBackend(), bare)
    assert report.metric["difference"] > 0.1
    assert "no limit" in str(next(check for check in report.checks if check.name == "map_difference"))
    assert {check.name for check in report.checks if not check.passed} >= {"events", "max_offsets"}


def test_a_limit_is_not_finer_than_the_sample(videos: list[ParityVideo]) -> None:
    """One lost event of 36 is 0.028 of the events and up to 0.02 mAP: neither shows a share below 0.99."""

    best = record(OracleBackend(), videos[-12:]).logits.max()

    def lose_one(logits: Float32, offsets: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        if logits[0].max() == best:
            logits[0, logits[0].max(1).argmax()] = -6
        return logits, offsets

    report = compare(ChangedBackend(lose_one), OracleBackend(), videos[-12:], limits=tolerance("fp16"))
    checks = {check.name: check for check in report.checks}
    for name in ("events", "map_difference"):
        check = checks[name]
        assert check.value is not None
        assert check.limit is not None
        assert (check.value < check.limit) if check.at_least else (check.value > check.limit)
        assert check.passed
    assert sum(report.metric["class_events"].values()) == report.metric["events"] == sum(len(v.labels) for v in videos)
    assert "classes" in checks["map_difference"].detail
    # Of fp32 all are expected again, and any number of events shows that one is missing.
    assert "events" in failing(lose_one, videos[-12:])


@pytest.mark.parametrize(
    ("lost", "events", "passes"), [(1, 70, True), (4, 70, False), (5, 2400, True), (60, 2400, False)]
)
def test_the_share_of_events_is_judged_by_its_interval(lost: int, events: int, passes: bool) -> None:
    found = EventAgreement(
        threshold=0.1, events=events, matched=events - lost, max_score_drift=0, mean_score_drift=0, lost=()
    )
    assert (found.share + found.uncertainty >= TOLERANCES["fp16"].matched) == passes
    assert dataclasses.replace(found, matched=events).uncertainty == 0


def test_without_any_event_video_the_checks_on_events_fail(videos: list[ParityVideo]) -> None:
    report = compare(OracleBackend(), OracleBackend(), stress_inputs(SPEC))
    assert {c.name for c in report.checks if not c.passed} == {"events", "score_drift", "map_difference"}


def test_an_engine_of_batch_one_has_no_batch_check(videos: list[ParityVideo]) -> None:
    single = OracleBackend(max_batch=1)
    report = compare(single, OracleBackend(), videos)
    assert report.passed
    assert "batch_logits" not in report.summary()
    assert set(single.batches) == {1}


def test_outputs_of_other_inputs_are_refused(videos: list[ParityVideo]) -> None:
    expected = record(OracleBackend(), videos)
    with pytest.raises(ParityError, match="logits"):
        compare(OracleBackend(), expected, videos[1:])


def test_events_match_one_to_one_by_class_and_overlap(videos: list[ParityVideo]) -> None:
    def found(*events: tuple[float, float, float, int]) -> Detections:
        rows = np.array([e[:2] for e in events], np.float64).reshape(-1, 2)
        scores = np.array([e[2] for e in events], np.float32)
        return Detections(rows, scores, np.array([e[3] for e in events], np.int64), SPEC.labels)

    # 20 far-off events, found again, so that the threshold of 0.1 stands
    rest = tuple((100.0 + i, 100.5 + i, 0.2, 0) for i in range(FEWEST_EVENTS))
    wanted = found((0, 10, 0.9, 1), (0, 10, 0.8, 1), (20, 30, 0.7, 2), *rest, (40, 50, 0.05, 3))
    got = found((0, 10, 0.85, 1), (20, 30.05, 0.7, 2), (0, 10, 0.3, 0), *rest)
    agreement = match_events([got], [wanted], videos[:1], 0.99)
    assert (agreement.threshold, agreement.events, agreement.matched) == (0.1, 23, 22)
    assert agreement.max_score_drift == pytest.approx(0.05)
    assert "nothing near it" in agreement.lost[0]
    assert match_events([got], [wanted], videos[:1], 0.999).matched == 21


def test_ties_of_the_reference_are_not_judged(videos: list[ParityVideo]) -> None:
    """Two overlapping candidates of one score: which one Soft-NMS keeps is up to the last bit."""
    logits = np.full((1, *SPEC.output_shapes(1)["logits"][1:]), -12, np.float32)
    offsets = np.ones((1, *SPEC.output_shapes(1)["offsets"][1:]), np.float32) * 4
    logits[0, 4, 0] = logits[0, 5, 0] = 2.0  # neighbours on the finest level
    logits[0, 20, 1] = 1.0
    (video,) = [v for v in videos if v.features.steps == SPEC.length][:1]
    outputs = Outputs(logits, offsets, {})
    moved = TOLERANCES["fp32"].undecided
    found = without_ties(outputs, [video], SPEC, moved, 0.99)[0]
    assert (found.labels == 1).sum() == 1
    assert not ((found.labels == 0) & (found.scores > 0.5)).any()
    everything = without_ties(outputs, [video], SPEC, 0.0, 0.99)[0]
    assert ((everything.labels == 0) & (everything.scores > 0.5)).sum() == 1
    logits[0, 5, 0] += 1e-3
    assert (without_ties(outputs, [video], SPEC, moved, 0.99)[0].labels == 0).sum() == 2


def test_stress_lengths_surround_every_stride() -> None:
    spec = ModelSpec(length=224, levels=6, visual_dim=2, audio_dim=1, labels=("a",))
    lengths = stress_lengths(spec)
    assert {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 223, 224} <= set(lengths)
    assert [v.features.steps for v in stress_inputs(spec)[: len(lengths)]] == lengths
    names = " ".join(v.name for v in stress_inputs(spec))
    assert all(word in names for word in ("silent audio", "black video", "constant", "large values"))


def test_inputs_are_seeded_and_fit_the_network() -> None:
    first, second, other = (
        synthetic_inputs(SPEC, count=3),
        synthetic_inputs(SPEC, count=3),
        synthetic_inputs(SPEC, seed=1),
    )
    np.testing.assert_array_equal(first[2].features.visual, second[2].features.visual)
    assert not np.array_equal(first[0].features.visual[:1], other[0].features.visual[:1])
    assert all(1 <= video.features.steps <= SPEC.length for video in first)
    assert all(len(video.labels) for video in first)


def test_real_videos_from_a_folder(tmp_path: Path) -> None:
    for number in range(5):
        np.save(tmp_path / f"v{number}_seen.npy", np.ones((40, SPEC.visual_dim), np.float32))
        np.save(tmp_path / f"v{number}_heard.npy", np.ones((50, SPEC.audio_dim), np.float32))
    found = folder_inputs(tmp_path, SPEC, count=3)
    assert [video.name for video in found] == ["v0", "v2", "v4"]
    assert all(video.features.steps == SPEC.length for video in found)
    assert len(folder_inputs(tmp_path, SPEC)) == 5


def test_a_reference_file_gives_back_inputs_and_outputs(tmp_path: Path, videos: list[ParityVideo]) -> None:
    path = tmp_path / "ref.npz"
    save_reference(path, Reference(SPEC, "ab" * 32, videos, record(OracleBackend(), videos)))
    read = load_reference(path)
    assert (read.spec, read.checkpoint_sha256) == (SPEC, "ab" * 32)
    assert [video.name for video in read.videos] == [video.name for video in videos]
    for ours, theirs in zip(read.videos, videos, strict=True):
        np.testing.assert_array_equal(ours.features.visual, theirs.features.visual)
        np.testing.assert_array_equal(ours.segments, theirs.segments)
    assert compare(OracleBackend(), read.outputs, read.videos).passed
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ReferenceFileError, match="whole"):
        load_reference(path)
    with pytest.raises(ReferenceFileError, match="no such"):
        load_reference(tmp_path / "gone.npz")
    np.savez(path, header=np.array({"a": 1}, dtype=object))
    with pytest.raises(ReferenceFileError, match="whole"):
        load_reference(path)


def test_tolerances_are_ordered_and_unknown_precisions_refused() -> None:
    fp32, fp16, bf16 = (TOLERANCES[name] for name in ("fp32", "fp16", "bf16"))
    assert fp32.max_logits == fp32.max_offsets == 1e-4
    for name in ("max_logits", "mean_logits", "max_offsets", "mean_offsets", "score_drift"):
        assert getattr(fp32, name) < getattr(fp16, name) < getattr(bf16, name)
    assert fp16.matched == bf16.matched == 0.99
    assert fp16.average_map == bf16.average_map == 1e-3
    assert graph_precision("tf32") == "fp32"
    for name in ("int4", "FP32"):
        with pytest.raises(ConfigError, match="expected one of"):
            tolerance(name)
        with pytest.raises(ConfigError, match="expected one of"):
            graph_precision(name)


def test_the_parity_check_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import export.parity.compare, export.parity.reference, "
    code += "export.parity.check, export.parity.check, export.bundle_writer"
    code += ", export.parity.polygraphy_files, ccnet.cli.verify"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oracle_is_what_the_tests_take_it_for() -> None:
    visual = np.zeros((1, SPEC.length, SPEC.visual_dim), np.float32)
    logits, _ = oracle(visual, visual[..., : SPEC.audio_dim], np.array([SPEC.length], np.int32))
    assert isinstance(Outputs(logits, logits, {}).logits, np.ndarray)
    assert logits.shape == SPEC.output_shapes(1)["logits"]


def test_a_summary_with_nan_can_be_written(tmp_path: Path, videos: list[ParityVideo]) -> None:
    """The manifest takes the summary of an engine that overflows, too: that is whom the parity check is for."""
    report = compare(ChangedBackend(lambda logits, offsets, _: (logits * np.nan, offsets)), OracleBackend(), videos)
    assert not report.passed
    assert report.summary()["max_logits"] is None
    write_json(tmp_path / "summary.json", report.summary())


def test_a_reference_of_the_earlier_schema_is_refused_with_what_to_do(
    tmp_path: Path, videos: list[ParityVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("export.parity.reference.SCHEMA", 1)
        save_reference(
            tmp_path / "ref.npz", Reference(SPEC, "ab" * 32, videos[:1], record(OracleBackend(), videos[:1]))
        )
    with pytest.raises(
        ReferenceFileError,
        match=r"schema: got 1, expected 3, which this version reads.*record it again: ccnet reference CHECKPOINT --out",
    ):
        load_reference(tmp_path / "ref.npz")


@pytest.mark.parametrize(
    ("name", "batches", "sizes"),
    [("openvino", None, {1, 4}), ("tensorrt", None, {1, 4, 20}), ("torch", [1, 2, 16, 64], {1, 2, 4, 16})],
)
def test_every_batch_size_that_counts_is_compared(
    videos: list[ParityVideo], name: str, batches: list[int] | None, sizes: set[int]
) -> None:
    backend = OracleBackend(name=name, max_batch=20)
    assert compare(backend, OracleBackend(), videos, batches=batches).passed
    assert set(backend.batches) == sizes


def test_a_batch_size_that_goes_wrong_is_named(videos: list[ParityVideo]) -> None:
    class WrongAtSixteen(OracleBackend):
        def infer(self, visual: Any, audio: Any, lengths: Any) -> Any:
            logits, offsets = super().infer(visual, audio, lengths)
            return (logits + 1 if len(visual) == 16 else logits), offsets

    report = compare(WrongAtSixteen(max_batch=16), OracleBackend(), videos, batches=[8, 16])
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert failed == {"batch_logits": "in batches of 16"}


@pytest.mark.parametrize("damage", ["empty", "cut", "altered"])
def test_a_damaged_reference_file_is_named(tmp_path: Path, videos: list[ParityVideo], damage: str) -> None:
    path = tmp_path / "ref.npz"
    outputs = record(OracleBackend(), videos[:3])
    save_reference(path, Reference(SPEC, "ab" * 32, videos[:3], outputs))
    whole = path.read_bytes()
    middle = len(whole) // 2
    altered = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 400]) + whole[middle + 400 :]
    path.write_bytes({"empty": b"", "cut": whole[:middle], "altered": altered}[damage])
    with pytest.raises(ReferenceFileError, match=r"ref\.npz: not a whole reference file"):
        load_reference(path)
