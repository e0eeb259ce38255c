"""Batches: every way into a row gives the same numbers, the rest of a row is zero, and nothing is copied twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.batches import Batch, pack
from runtime.errors import FeatureError
from runtime.features import NOT_REGULAR, TOO_LONG, FeatureFiles, VideoFeatures, check_shapes
from runtime.spec import ModelSpec

SPEC = ModelSpec(length=32, levels=4, visual_dim=6, audio_dim=3, labels=("a", "b"))


def arrays(steps: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    # Eighths, so that they are the same numbers in half precision.
    return tuple(np.round(8 * generator.normal(size=(steps, width))) / 8 for width in (6, 3))  # type: ignore[return-value]


def features(steps: int, seed: int = 0) -> VideoFeatures:
    visual, audio = arrays(steps, seed)
    return VideoFeatures(visual.astype(np.float32), audio.astype(np.float32))


def write(folder: Path, video_id: str, steps: int, seed: int = 0, dtype: Any = np.float32) -> FeatureFiles:
    visual, audio = (array.astype(dtype) for array in arrays(steps, seed))
    np.save(folder / f"{video_id}_rgb.npy", visual[:, :4])
    np.save(folder / f"{video_id}_flow.npy", visual[:, 4:])
    np.save(folder / f"{video_id}_vggish.npy", audio)
    return FeatureFiles(folder, video_id)


def check_row(inputs: Any, row: int, steps: int, seed: int, *, start: int = 0) -> None:
    kept = min(steps - start, SPEC.length)
    assert inputs[2][row] == kept
    for got, expected in zip(inputs, arrays(steps, seed), strict=False):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got[row, :kept], expected[start : start + kept])
        assert not got[row, kept:].any()


def test_pack_pads_and_crops() -> None:
    lengths = [1, 31, 32, 40]
    inputs = pack([features(n, seed) for seed, n in enumerate(lengths)], SPEC)
    assert [array.shape for array in inputs] == [(4, 32, 6), (4, 32, 3), (4,)]
    assert inputs[2].dtype == np.int32
    for row, n in enumerate(lengths):
        check_row(inputs, row, n, row)


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "unaligned", "read-only"])
def test_arrays_of_any_dtype_and_memory_order(dtype: str, layout: str) -> None:
    def arranged(array: Any) -> Any:
        array = array.astype(dtype)
        if layout == "columns":
            return np.asfortranarray(array)
        if layout == "strided":
            return np.repeat(np.repeat(array, 2, axis=0), 3, axis=1)[::2, ::3]
        if layout == "unaligned":
            return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(dtype).reshape(array.shape)
        array.flags.writeable = layout != "read-only"
        return array

    for steps in (17, 32):
        visual, audio = map(arranged, arrays(steps))
        for size in (1, 2):
            batch = Batch(SPEC, size)
            batch.add(check_shapes(visual, audio, SPEC, name="v"), 0, steps, "v")
            check_row(batch.inputs(), 0, steps, 0)


def test_a_video_that_fills_a_batch_of_one_is_not_copied() -> None:
    video, short = features(32), features(31)
    batch = Batch(SPEC, 1)
    batch.add(video, 0, 32, "v")
    assert np.shares_memory(batch.inputs()[0], video.visual)
    check_row(batch.inputs(), 0, 32, 0)
    batch.clear()
    batch.add(short, 0, 31, "v")
    assert not np.shares_memory(batch.inputs()[0], short.visual)
    check_row(batch.inputs(), 0, 31, 0)


def test_memory_mapped_arrays(tmp_path: Path) -> None:
    for name, array in zip(("visual", "audio"), arrays(32), strict=True):
        np.save(tmp_path / name, array.astype(np.float32))
    visual, audio = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("visual", "audio"))
    for size in (1, 2):
        batch = Batch(SPEC, size)
        batch.add(check_shapes(visual, audio, SPEC, name="v"), 0, 32, "v")
        check_row(batch.inputs(), 0, 32, 0)


def test_an_engine_that_has_memory_of_its_own_gets_the_videos_there() -> None:
    made = []

    def allocate(shape: Any, dtype: Any) -> Any:
        made.append(np.full(shape, 7, dtype))
        return made[-1]

    batch = Batch(SPEC, 1, allocate)
    batch.add(features(32), 0, 32, "v")
    for array in batch.inputs():
        assert np.shares_memory(array, made[0])
    assert len(made) == 1  # one block: a full batch is one copy to the device
    check_row(batch.inputs(), 0, 32, 0)


def test_rows_are_filled_again_and_what_was_there_is_gone(tmp_path: Path) -> None:
    batch = Batch(SPEC, 2)
    for steps in (32, 5, 20):
        batch.clear()
        batch.add(features(steps, steps), 0, steps, "v")
        batch.read([write(tmp_path, "v", steps, 100 + steps)], crop=True)
        assert batch.free == 0
        check_row(batch.inputs(), 0, steps, steps)
        check_row(batch.inputs(), 1, steps, 100 + steps)


def test_a_stretch_of_a_video() -> None:
    batch = Batch(SPEC, 2)
    batch.add(features(50), 18, 50, "v")
    batch.add(features(50), 40, 50, "v")
    check_row(batch.inputs(), 0, 50, 0, start=18)
    check_row(batch.inputs(), 1, 50, 0, start=40)


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_files_go_into_the_next_rows(tmp_path: Path, dtype: str) -> None:
    lengths = [1, 31, 32, 40, 700]
    videos = [write(tmp_path, f"v{n}", n, n, dtype) for n in lengths]
    batch = Batch(SPEC, 6)
    batch.add(features(9), 0, 9, "v")
    found = batch.read(videos, crop=True)
    assert found == [(row, [n, n, n]) for row, n in enumerate(lengths, 1)]
    check_row(batch.inputs(), 0, 9, 0)
    for row, n in enumerate(lengths, 1):
        check_row(batch.inputs(), row, n, n)


def test_videos_that_get_no_row_leave_none_empty(tmp_path: Path) -> None:
    good, long = write(tmp_path, "good", 10, 1), write(tmp_path, "long", 33, 2)
    missing, bad_id = FeatureFiles(tmp_path, "missing"), FeatureFiles(tmp_path, "../good")
    nan, zero = write(tmp_path, "nan", 10, 3), FeatureFiles(f"{tmp_path}\0", "good")
    np.save(tmp_path / "nan_vggish.npy", np.full((10, 3), np.nan, np.float32))
    last = write(tmp_path, "last", 32, 4)
    batch = Batch(SPEC, 7)
    rows = [row for row, _ in batch.read([missing, good, long, nan, bad_id, last], crop=False)]
    assert rows == [NOT_REGULAR, 0, TOO_LONG, NOT_REGULAR, NOT_REGULAR, 1]
    assert [row for row, _ in batch.read([zero, good], crop=False)] == [NOT_REGULAR, NOT_REGULAR]
    assert batch.rows == 2
    check_row(batch.inputs(), 0, 10, 1)
    check_row(batch.inputs(), 1, 32, 4)


def test_what_numpy_save_does_not_write_is_left_to_the_closer_look(tmp_path: Path) -> None:
    video = write(tmp_path, "v", 10, 1)
    path = tmp_path / "v_rgb.npy"
    good = path.read_bytes()
    array = np.load(path)
    np.save(path, np.asfortranarray(array))
    fortran = path.read_bytes()
    with open(path, "wb") as stream:
        np.lib.format.write_array(stream, array, version=(2, 0))
    second = path.read_bytes()
    other_text = good.replace(b"'shape': (10, 4), }", b"'shape': (10,4) , }")
    for content in (fortran, second, other_text):
        path.write_bytes(content)
        assert Batch(SPEC, 1).read([video], crop=True)[0][0] == NOT_REGULAR
        np.testing.assert_array_equal(video.read(SPEC).visual, arrays(10, 1)[0])
    for content in (b"", good[:9], good[:127], good[:-1], good.replace(b"<f4", b"<i4")):
        path.write_bytes(content)
        assert Batch(SPEC, 1).read([video], crop=True)[0][0] == NOT_REGULAR
        with pytest.raises(FeatureError, match=r"v_rgb\.npy"):
            video.read(SPEC)


def test_values_that_are_not_finite_are_found_wherever_they_are(tmp_path: Path) -> None:
    for step in (0, 31, 32, 39):
        visual, audio = (array.astype(np.float32) for array in arrays(40))
        audio[step, 2] = np.inf
        if step < 32:
            with pytest.raises(FeatureError, match=rf"video 0: audio: inf at step {step}, channel 2 \(1 of"):
                pack([VideoFeatures(visual, audio)], SPEC)
        write(tmp_path, "v", 40)
        np.save(tmp_path / "v_vggish.npy", audio)
        assert Batch(SPEC, 1).read([FeatureFiles(tmp_path, "v")], crop=True)[0][0] == NOT_REGULAR
    whole = features(32)
    whole.visual[3, 1] = np.nan
    with pytest.raises(FeatureError, match="v: visual: nan at step 3, channel 1"):
        Batch(SPEC, 1).add(whole, 0, 32, "v")
    stretch = features(50)
    stretch.visual[45, 1] = np.nan
    with pytest.raises(FeatureError, match="v: visual: nan at step 45, channel 1"):
        Batch(SPEC, 1).add(stretch, 30, 50, "v")
