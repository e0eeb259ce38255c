"""The stream: in order, overlapped, bounded, and over when its consumer says so."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import SPEC, OracleBackend, features_with, write_features

from runtime.backends.base import Float32, Int32
from runtime.errors import ConfigError, EngineError, FeatureError
from runtime.features import FeatureFiles, VideoFeatures
from runtime.localizer import Localizer
from runtime.pipeline import Localized


def video(i: int) -> VideoFeatures:
    steps = 10 + (7 * i) % 60
    return features_with(steps, [(1, 6, i % 4, 1.0 + 0.05 * i)])


def check(results: list[Localized], count: int) -> None:
    assert [result.video_id for result in results] == [f"v{i}" for i in range(count)]
    for i, result in enumerate(results):
        assert result.error is None
        assert result.detections is not None
        assert result.detections.labels.tolist()[0] == i % 4
        assert result.duration == video(i).steps


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("long_videos", ["crop", "windows"])
def test_the_stream_gives_what_single_calls_give_in_order(batch_size: int, engines: int, long_videos: Any) -> None:
    localizer = Localizer([OracleBackend() for _ in range(engines)], SPEC, long_videos=long_videos)
    results = list(localizer.stream(((f"v{i}", video(i)) for i in range(25)), batch_size=batch_size, workers=2))
    check(results, 25)
    for i, result in enumerate(results):
        alone = localizer(*video(i))
        assert result.detections is not None
        np.testing.assert_array_equal(result.detections.segments, alone.segments)
        np.testing.assert_array_equal(result.detections.scores, alone.scores)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("long_videos", ["crop", "windows"])
def test_files_arrays_and_functions_give_the_same(tmp_path: Path, batch_size: int, long_videos: Any) -> None:
    for i in range(12):
        write_features(tmp_path, f"v{i}", video(i))
    sources: list[Callable[[int], Any]] = [
        (lambda i: FeatureFiles(tmp_path, f"v{i}")),
        (lambda i: (video(i).visual, video(i).audio)),
        (lambda i: lambda: video(i)),
        (lambda i: lambda: FeatureFiles(tmp_path, f"v{i}")),
    ]
    localizer = Localizer([OracleBackend()], SPEC, long_videos=long_videos)
    for items in (
        *([(f"v{i}", source(i)) for i in range(12)] for source in sources),
        [(f"v{i}", sources[i % 4](i)) for i in range(12)],
    ):
        results = list(localizer.stream(items, batch_size=batch_size, workers=2))
        check(results, 12)
        for i, result in enumerate(results):
            assert result.detections is not None
            assert result.detections.to_json() == localizer(*video(i)).to_json()


def test_batches_are_filled() -> None:
    backend = OracleBackend(max_batch=4)
    list(Localizer([backend], SPEC).stream(((f"v{i}", video(i)) for i in range(10)), batch_size=4))
    assert sorted(backend.batches) == [2, 4, 4]


def test_a_video_of_more_windows_than_a_batch_holds() -> None:
    events = [(30 * i, 30 * i + 6, i % 4, 3.0) for i in range(30)]
    long = features_with(900, events)
    backend = OracleBackend(max_batch=4)
    localizer = Localizer([backend], SPEC, long_videos="windows")
    results = list(localizer.stream([("v0", video(0)), ("long", long), ("v2", video(2))], batch_size=4, workers=1))
    assert [result.error for result in results] == [None] * 3
    found = results[1].detections
    assert found is not None
    assert found.to_json() == localizer(*long).to_json()
    assert len(found) == len(events)
    assert set(backend.batches) <= {1, 2, 3, 4}


def test_a_bad_window_fails_its_video_alone() -> None:
    long = features_with(300)
    long.visual[290, 2] = np.nan
    localizer = Localizer([OracleBackend()], SPEC, long_videos="windows")
    results = list(localizer.stream([("v0", video(0)), ("long", long), ("v2", video(2))], batch_size=2, workers=1))
    assert [str(result.error) for result in results if result.error is not None] == [
        "long: visual: nan at step 290, channel 2 (1 of 192 values are not finite in float32)"
    ]
    assert results[1].detections is None


def test_a_bad_video_comes_out_with_its_error_and_the_others_are_not_touched() -> None:
    def missing() -> VideoFeatures:
        raise FeatureError("v2_seen.npy: no such feature file")

    items: list[Any] = [
        ("v0", video(0)),
        ("v1", FeatureError("given as an error")),
        ("v2", missing),
        ("v3", (np.ones((9, 5)), np.ones((9, 3)))),
        ("v4", lambda: video(4), 17.5),
        ("v5", video(5), -3.0),
    ]
    results = list(Localizer([OracleBackend()], SPEC).stream(items, batch_size=2))
    assert [str(r.error)[:12] if r.error else None for r in results] == [
        None,
        "given as an ",
        "v2_seen.npy:",
        "v3: visual: ",
        None,
        "duration: go",
    ]
    assert results[4].duration == 17.5
    assert all((r.detections is None) == (r.error is not None) for r in results)


class Gated(OracleBackend):
    """Records what happens around it; `infer` takes a moment."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.running = 0
        self.reads_while_running = 0

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        self.running += 1
        time.sleep(0.02)
        try:
            return super().infer(visual, audio, lengths)
        finally:
            self.running -= 1


def test_a_batch_is_filled_up_where_videos_fail() -> None:
    backend = Gated(max_batch=4)  # while it takes its time over the first batches, the others come in
    items: list[Any] = [(f"v{i}", FeatureError("bad") if i in (9, 10) else video(i)) for i in range(16)]
    results = list(Localizer([backend], SPEC).stream(items, batch_size=4, workers=1))
    assert [result.error is None for result in results] == [i not in (9, 10) for i in range(16)]
    assert sorted(backend.batches) == [2, 4, 4, 4]


def test_reading_goes_on_while_the_engine_runs() -> None:
    backend = Gated()

    def read(i: int) -> Callable[[], VideoFeatures]:
        def source() -> VideoFeatures:
            backend.reads_while_running += backend.running
            return video(i)

        return source

    results = list(Localizer([backend], SPEC).stream(((f"v{i}", read(i)) for i in range(20)), batch_size=1, workers=1))
    check(results, 20)
    assert backend.reads_while_running > 0


def test_memory_is_bounded_when_the_consumer_is_slow() -> None:
    """An endless stream: only so many videos are read ahead of the consumer."""
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        for i in itertools.count():
            read += 1
            yield f"v{i}", video(i % 30)

    stream = Localizer([OracleBackend()], SPEC).stream(endless(), batch_size=2, workers=2)
    taken = list(itertools.islice(stream, 50))
    time.sleep(0.05)
    assert [result.video_id for result in taken] == [f"v{i}" for i in range(50)]
    # Two batches for each of three threads: two workers and one that waits for the engine.
    assert read <= 50 + 2 * 3 * 2
    stream.close()


def test_memory_is_bounded_when_every_video_is_bad() -> None:
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        for i in itertools.count():
            read += 1
            yield f"v{i}", FeatureError("bad")

    stream = Localizer([OracleBackend()], SPEC).stream(endless(), batch_size=2, workers=2)
    assert all(result.error is not None for result in itertools.islice(stream, 50))
    time.sleep(0.05)
    assert read <= 50 + 2 * 3 * 2
    stream.close()


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ccnet-")]


def drain(stream: Iterator[Localized], seen: list[str]) -> None:
    seen.extend(result.video_id for result in stream)


def test_closing_the_stream_stops_its_threads_and_leaves_the_engine_open() -> None:
    backend = Gated()
    localizer = Localizer([backend], SPEC)
    stream = localizer.stream(((f"v{i}", video(i)) for i in itertools.count()), batch_size=1)
    next(stream)
    assert alive()
    stream.close()
    assert not alive()
    assert backend.closed == 0
    assert localizer(*video(1)).labels[0] == 1


def test_closing_the_stream_ends_a_video_of_many_windows() -> None:
    backend = Gated()
    localizer = Localizer([backend], SPEC, long_videos="windows")
    stream = localizer.stream([("v0", video(0)), ("long", features_with(5000))], batch_size=1, workers=1)
    next(stream)
    stream.close()
    assert not alive()
    assert len(backend.batches) < 50


def test_a_defect_of_a_thread_reaches_the_consumer() -> None:
    class NoMemory(OracleBackend):
        def allocate(self, shape: Any, dtype: Any) -> Any:
            raise MemoryError("no page-locked memory left")

    with pytest.raises(MemoryError, match="page-locked"):
        list(Localizer([NoMemory()], SPEC).stream([("v0", video(0))]))
    assert not alive()


def test_an_engine_failure_ends_the_stream_after_the_good_ones() -> None:
    class Failing(OracleBackend):
        def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
            if video(9).steps in lengths:
                raise EngineError("out of memory")
            return super().infer(visual, audio, lengths)

    seen: list[str] = []
    with pytest.raises(EngineError, match="out of memory"):
        drain(Localizer([Failing()], SPEC).stream(((f"v{i}", video(i)) for i in range(20)), batch_size=2), seen)
    assert seen == [f"v{i}" for i in range(8)]
    assert not alive()


@pytest.mark.parametrize("place", ["iterable", "source"])
def test_a_programming_error_surfaces_after_the_good_ones(place: str) -> None:
    def items() -> Iterator[Any]:
        for i in range(5):
            yield f"v{i}", video(i)
        if place == "iterable":
            raise KeyError("broken iterable")
        yield "v5", lambda: dict[str, Any]()["broken source"]

    seen: list[str] = []
    with pytest.raises(KeyError, match="broken"):
        drain(Localizer([OracleBackend()], SPEC).stream(items(), batch_size=2), seen)
    assert seen == [f"v{i}" for i in range(5)]
    assert not alive()


class Forking(Gated):
    """An engine that can be forked: two contexts work at the same time."""

    together = 0
    count = 0
    children: list[Forking]

    def __init__(self, family: list[Forking] | None = None) -> None:
        super().__init__()
        self.children = [] if family is None else family
        self.children.append(self)

    def fork(self) -> Forking:
        return Forking(self.children)

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        root = self.children[0]
        root.together = max(root.together, 1 + sum(child.running for child in root.children))
        assert self.running == 0, "one context, two threads"
        return super().infer(visual, audio, lengths)


def test_an_engine_that_forks_runs_two_batches_at_once_and_its_forks_are_closed() -> None:
    backend = Forking()
    results = list(Localizer([backend], SPEC).stream(((f"v{i}", video(i)) for i in range(24)), batch_size=2, workers=2))
    check(results, 24)
    assert backend.together == 2
    assert [child.closed for child in backend.children] == [0, 1]


def test_an_unstarted_stream_makes_no_threads_and_bad_settings_are_refused_at_once() -> None:
    localizer = Localizer([OracleBackend(max_batch=4)], SPEC)
    localizer.stream([("v0", video(0))])
    assert not alive()
    with pytest.raises(ConfigError, match="batch_size: got 5, expected 1 to 4"):
        localizer.stream([], batch_size=5)
    with pytest.raises(ConfigError, match="workers"):
        localizer.stream([], workers=0)
    assert list(localizer.stream([])) == []


def test_a_result_that_waits_does_not_keep_its_features() -> None:
    class Watched(VideoFeatures):
        """`VideoFeatures` that can be referred to weakly."""

    watched = [Watched(*video(i)) for i in range(4)]
    references = [weakref.ref(features) for features in watched]
    slow = threading.Event()

    def items() -> Iterator[Any]:
        yield "first", lambda: (slow.wait(60), video(0))[1]
        while watched:
            yield "next", watched.pop()

    stream = Localizer([OracleBackend()], SPEC).stream(items(), batch_size=1, workers=2)
    consumer = threading.Thread(target=lambda: list(stream))
    consumer.start()
    deadline = time.monotonic() + 10
    while any(reference() is not None for reference in references) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [len(watched), sum(reference() is not None for reference in references)]
    slow.set()
    consumer.join()
    assert left == [0, 0]
