"""The compiled post-processing against plain NumPy, bit by bit, on awkward outputs; and how it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from postprocess_oracle import Bad, decode_oracle, detect_oracle

from runtime.decode import decode
from runtime.detections import Detections
from runtime.errors import CCNetError, EngineError
from runtime.kernels.build import FOLDER, find_compiler, library_path
from runtime.machine import machine_facts
from runtime.postprocess import PostProcessor, detect
from runtime.spec import ModelSpec, PostProcessing

needs_fma = pytest.mark.skipif(
    "fma" not in machine_facts()["cpu_flags"], reason="NumPy's exp rounds otherwise without fused multiply-add"
)

OUTPUTS = ("random", "whole numbers", "quarters and both zeros", "all equal", "large", "huge offsets", "damaged")


def spec_of(length: int, classes: int) -> ModelSpec:
    return ModelSpec(length=length, levels=4, visual_dim=2, audio_dim=2, labels=tuple(map(str, range(classes))))


def outputs(kind: str, spec: ModelSpec, generator: np.random.Generator) -> tuple[Any, Any]:
    shape = (spec.grid.num_points, spec.num_classes)
    logits = generator.normal(generator.choice([-8, -4, -1, 3]), generator.choice([0.5, 2, 6]), shape)
    offsets = generator.gamma(2, generator.choice([0.1, 1, 10]), (*shape, 2))
    if kind == "whole numbers":
        logits, offsets = np.round(logits), np.round(offsets)
    elif kind == "quarters and both zeros":
        logits = np.where(generator.random(shape) < 0.3, -0.0, np.round(4 * logits) / 4)
    elif kind == "all equal":
        logits[:], offsets = 1.0, np.round(offsets)
    elif kind == "large":
        logits *= 50
    elif kind == "huge offsets":
        offsets[generator.random(offsets.shape) < 0.02] = 3e38
    elif kind == "damaged":
        for array in (logits, offsets):
            if generator.random() < 0.7:
                array[tuple(generator.integers(0, size) for size in array.shape)] = generator.choice([np.nan, np.inf])
    return logits.astype(np.float32), offsets.astype(np.float32)


def attempt(function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except Bad as error:
        return str(error)
    except CCNetError as error:
        return error


def check_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert str(got).startswith(expected)
        return
    if isinstance(got, Detections):
        got = got.segments, got.scores, got.labels
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@needs_fma
@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(OUTPUTS),
    length=st.sampled_from([8, 32, 64]),
    classes=st.sampled_from([1, 3, 20]),
    valid=st.floats(0, 1),
    post=st.builds(
        PostProcessing,
        pre_nms_score=st.sampled_from([0.0, 0.001, 0.05]),
        pre_nms_top_k=st.sampled_from([1, 20, 500, 2000]),
        min_length=st.sampled_from([0.0, 0.05, 2.0]),
        method=st.sampled_from(["soft", "soft", "hard", "none"]),
        sigma=st.sampled_from([0.05, 0.4, 0.9]),
        iou_threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        min_score=st.sampled_from([0.0, 0.001, 0.2]),
        max_segments=st.sampled_from([1, 7, 100, 5000]),
        multiclass=st.booleans(),
        voting_threshold=st.just(0.0),
    ),
)
def test_every_bit_is_that_of_plain_numpy(
    seed: int, kind: str, length: int, classes: int, valid: float, post: PostProcessing
) -> None:
    spec = spec_of(length, classes)
    logits, offsets = outputs(kind, spec, np.random.default_rng(seed))
    steps = round(valid * length)
    check_equal(
        attempt(decode, logits, offsets, steps, spec.grid, post),
        attempt(decode_oracle, logits, offsets, steps, spec.grid, post),
    )
    check_equal(
        attempt(detect, logits, offsets, valid_steps=steps, duration=9.5, spec=spec, post=post),
        attempt(detect_oracle, logits, offsets, steps, 9.5, spec, post),
    )


@needs_fma
def test_scores_are_numpys_sigmoid_over_the_whole_range() -> None:
    spec = spec_of(4096, 64)
    logits = np.linspace(-100, 100, spec.grid.num_points * 64, dtype=np.float32).reshape(-1, 64)
    offsets = np.ones((*logits.shape, 2), np.float32)
    post = PostProcessing(pre_nms_score=0.0, pre_nms_top_k=2**20)
    _, scores, _ = decode(logits, offsets, spec.length, spec.grid, post)
    one = np.float32(1)
    expected = one / (one + np.exp(-np.maximum(logits.ravel(), np.float32(-80))))
    np.testing.assert_array_equal(np.sort(scores), np.sort(expected))


def test_a_batch_gives_each_video_its_own_events_or_error() -> None:
    spec = spec_of(64, 5)
    generator = np.random.default_rng(0)
    pairs = [outputs("random", spec, generator) for _ in range(6)]
    pairs[2][0][3, 1] = np.nan
    pairs[4][1][:] = np.inf
    lengths, durations = [64, 0, 64, 17, 64, 64], [30.0, 30.0, 30.0, 5.0, 30.0, -1.0]
    logits, offsets = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    post_process = PostProcessor(spec, None, 6)
    together = post_process(logits, offsets, np.array(lengths, np.int32), durations)
    kinds = [str(found).split(":")[0] if isinstance(found, CCNetError) else len(found) > 0 for found in together]
    assert kinds == [True, False, "logits", True, "offsets", "duration"]
    for b in (0, 1, 3):
        alone = detect(logits[b], offsets[b], valid_steps=lengths[b], duration=durations[b], spec=spec)
        check_equal(together[b], (alone.segments, alone.scores, alone.labels))
    assert post_process(logits[:0], offsets[:0], np.array([], np.int32), []) == []
    # The room is used again; what was found before stays.
    (again,) = post_process(logits[:1], offsets[:1], np.array([30], np.int32), [9.0])
    alone = detect(logits[0], offsets[0], valid_steps=30, duration=9.0, spec=spec)
    check_equal(again, (alone.segments, alone.scores, alone.labels))
    first = detect(logits[0], offsets[0], valid_steps=64, duration=30.0, spec=spec)
    check_equal(together[0], (first.segments, first.scores, first.labels))
    with pytest.raises(EngineError, match=r"offsets: got shape \[6, 120, 5, 2\], expected \[5, 120, 5, 2\]"):
        post_process(logits[:5], offsets, np.full(5, 64, np.int32), [1.0] * 5)


def test_threads_do_not_disturb_each_other() -> None:
    spec = spec_of(64, 20)
    generator = np.random.default_rng(1)
    cases = [outputs("random", spec, generator) for _ in range(8)]
    expected = [detect(*case, valid_steps=64, duration=30.0, spec=spec) for case in cases]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for turn in range(100):
            i = (turn + offset) % len(cases)
            found = detect(*cases[i], valid_steps=64, duration=30.0, spec=spec)
            if not (
                np.array_equal(found.segments, expected[i].segments) and (found.scores == expected[i].scores).all()
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def copy_of_kernels(folder: Path) -> Path:
    """Copy the runtime's sources; nothing has been compiled there."""
    shutil.copytree(FOLDER.parent, folder / "runtime", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder / "runtime" / "kernels"


def suppress_in(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from runtime.suppression import suppress; print(suppress([[0, 1]], [0.5], [0])[1])"
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
def test_a_checkout_compiles_itself_once_and_again_when_a_source_changes(tmp_path: Path) -> None:
    kernels = copy_of_kernels(tmp_path)
    for _ in range(2):
        done = suppress_in(tmp_path)
        assert done.stdout.strip() == "[0.5]", done.stderr
    (first,) = kernels.glob("*.so")
    assert first.name == library_path().name
    (kernels / "vote.c").write_text("/* one more */\n")
    assert suppress_in(tmp_path).stdout.strip() == "[0.5]"
    (second,) = kernels.glob("*.so")
    assert second != first
    assert not list(kernels.glob(".build-*"))


def test_without_a_compiler_the_error_says_what_to_do(tmp_path: Path) -> None:
    copy_of_kernels(tmp_path)
    done = suppress_in(tmp_path, PATH="", CC="no-such-compiler")
    assert "InstallationError" in done.stderr
    assert "no working C compiler; install from the source folder by 'pip install .'" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
