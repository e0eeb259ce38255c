"""Feature files and arrays: what is read, what is refused, and how a batch is laid out."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import shared_path

from runtime.errors import FeatureError
from runtime.features import VideoFeatures, check_features, find_videos, read_video
from runtime.spec import FeatureLayout, ModelSpec

LAYOUT = FeatureLayout()
SPEC = ModelSpec(length=32, levels=4, visual_dim=6, audio_dim=3, labels=("a", "b"))


def write(folder: Path, video_id: str = "v", *, rgb: Any = None, flow: Any = None, audio: Any = None) -> None:
    steps = np.arange(10, dtype=np.float32)[:, None]
    np.save(folder / f"{video_id}_rgb.npy", steps + np.zeros((1, 4), np.float32) if rgb is None else rgb)
    np.save(folder / f"{video_id}_flow.npy", steps + np.full((1, 2), 100, np.float32) if flow is None else flow)
    np.save(folder / f"{video_id}_vggish.npy", steps - np.full((1, 3), 50, np.float32) if audio is None else audio)


def read(folder: Path, video_id: str = "v") -> VideoFeatures:
    return read_video(folder, video_id, layout=LAYOUT, visual_dim=6, audio_dim=3)


def test_files_of_a_modality_are_joined_on_channels_in_layout_order(tmp_path: Path) -> None:
    write(tmp_path)
    visual, audio = read(tmp_path)
    assert visual.shape == (10, 6)
    assert audio.shape == (10, 3)
    assert visual.dtype == audio.dtype == np.float32
    np.testing.assert_array_equal(visual[7], [7, 7, 7, 7, 107, 107])
    np.testing.assert_array_equal(audio[7], [-43, -43, -43])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_float_dtypes_byte_orders_and_memory_orders_read_the_same(tmp_path: Path, dtype: Any, order: Any) -> None:
    values = np.arange(40).reshape(10, 4)
    write(tmp_path, rgb=np.asarray(values, dtype=dtype, order=order))
    visual, _ = read(tmp_path)
    assert visual.dtype == np.dtype(np.float32)
    np.testing.assert_array_equal(visual[:, :4], values)


def test_modalities_are_cut_to_the_shortest_file_and_a_large_difference_is_noted(tmp_path: Path) -> None:
    write(tmp_path, flow=np.ones((8, 2), np.float32), audio=np.ones((21, 3), np.float32))
    features = read(tmp_path)
    assert features.steps == 8
    assert features.audio.shape == (8, 3)
    assert features.note is not None
    assert "v_vggish.npy has 21" in features.note
    assert "cut to 8" in features.note


def test_a_small_difference_of_length_is_not_worth_a_note(tmp_path: Path) -> None:
    write(tmp_path, audio=np.ones((11, 3), np.float32))
    features = read(tmp_path)
    assert features.steps == 10
    assert features.note is None


def npy_bytes(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class Trap:
    """Unpickling this would create a file: proof that nothing was executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


GOOD = npy_bytes(np.ones((10, 4), np.float32))
NAN = np.ones((10, 4), np.float32)
NAN[3, 2] = np.nan

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "truncated data": (GOOD[:-5], r"truncated: 155 bytes of data, its header says 160"),
    "truncated header": (GOOD[:40], r"cut inside its header"),
    "absurd size": (GOOD.replace(b"(10, 4), }" + 13 * b" ", b"(10" + 13 * b"0" + b", 4), }"), r"truncated: 160 bytes"),
    "negative size": (GOOD.replace(b"(10, 4)", b"(-1, 4)"), r"there is no content"),
    "empty file": (b"", r"an empty file"),
    "no npy": (b"hello world, this is text", r"not a \.npy file"),
    "plain pickle": (pickle.dumps(np.ones((10, 4))), r"not a \.npy file"),
    "object array": (npy_bytes(np.array([{"a": 1}] * 3), allow_pickle=True), r"pickled Python objects"),
    "integers": (npy_bytes(np.ones((10, 4), np.int32)), r"got dtype int32, expected float16"),
    "complex": (npy_bytes(np.ones((10, 4), np.complex64)), r"got dtype complex64"),
    "bool": (npy_bytes(np.ones((10, 4), np.bool_)), r"got dtype bool"),
    "long double": (npy_bytes(np.ones((10, 4), np.longdouble)), r"expected float16, float32 or float64"),
    "structured": (npy_bytes(np.zeros(10, [("x", "f4")])), r"got dtype"),
    "rank 1": (npy_bytes(np.ones(10, np.float32)), r"got 1 dimension\(s\), shape \(10,\), expected 2"),
    "rank 3": (npy_bytes(np.ones((1, 10, 4), np.float32)), r"got 3 dimension\(s\)"),
    "width": (npy_bytes(np.ones((10, 5), np.float32)), r"v_rgb\.npy \(5\) \+ v_flow\.npy \(2\) are 7 wide, expected 6"),
    "no steps": (npy_bytes(np.ones((0, 4), np.float32)), r"there is no content"),
    "NaN": (npy_bytes(NAN), r"nan at step 3, channel 2 \(1 of 40"),
    "Inf": (npy_bytes(np.where(np.isnan(NAN), -np.inf, NAN)), r"-inf at step 3, channel 2"),
    "too large for float32": (npy_bytes(np.full((10, 4), 1e300)), r"1e\+300 at step 0, channel 0 \(40 of 40"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    write(tmp_path)
    (tmp_path / "v_rgb.npy").write_bytes(content)
    with pytest.raises(FeatureError, match=message) as error:
        read(tmp_path)
    assert "v_rgb.npy" in str(error.value)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    write(tmp_path)
    marker = tmp_path / "executed"
    array = np.empty(2, object)
    array[:] = [Trap(marker), Trap(marker)]
    (tmp_path / "v_rgb.npy").write_bytes(npy_bytes(array, allow_pickle=True))
    with pytest.raises(FeatureError, match="pickled"):
        read(tmp_path)
    (tmp_path / "v_rgb.npy").write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(FeatureError, match="not a .npy file"):
        read(tmp_path)
    assert not marker.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "v_vggish.npy").unlink()
    with pytest.raises(FeatureError, match=r"v_vggish\.npy: no such feature file"):
        read(tmp_path)


@pytest.mark.parametrize("video_id", ["", ".", "..", "../v", "a/b", "a\\b", "/etc/passwd", "a\0b"])
def test_ids_that_could_leave_the_folder_are_refused(tmp_path: Path, video_id: str) -> None:
    with pytest.raises(FeatureError, match="video id: got .*, expected a name"):
        read(tmp_path, video_id)


def test_arrays_get_the_same_checks_as_files() -> None:
    visual, audio = np.ones((9, 6)), np.ones((7, 3), np.float16)
    features = check_features(visual, audio, SPEC)
    assert features.visual.shape == (7, 6)
    assert features.audio.dtype == np.float32
    bad: list[tuple[Any, Any, str]] = [
        (visual.T, audio, r"visual: got shape \(6, 9\), expected \[steps, 6\]; the array looks transposed"),
        (visual, audio[:, :2], r"audio: got shape \(7, 2\), expected \[steps, 3\]"),
        (visual[None], audio, r"visual: got 3 dimension"),
        (visual.astype(int), audio, r"visual: got dtype int64"),
        (visual[:0], audio, r"no content"),
        (None, audio, r"visual: holds pickled|visual: got dtype object"),
        (visual, np.full((7, 3), np.nan), r"audio: nan at step 0, channel 0"),
    ]
    for seen, heard, message in bad:
        with pytest.raises(FeatureError, match=message):
            check_features(seen, heard, SPEC)


def test_a_value_that_is_not_finite_is_found_behind_the_shortest_file_too(tmp_path: Path) -> None:
    audio = np.ones((700, 3), np.float32)
    audio[650, 1] = np.nan
    write(tmp_path, audio=audio)
    with pytest.raises(FeatureError, match=r"v_vggish\.npy: nan at step 650, channel 1 \(1 of 2100"):
        read(tmp_path)
    with pytest.raises(FeatureError, match=r"v: audio: nan at step 650, channel 1"):
        check_features(np.ones((9, 6)), audio, SPEC, name="v")


def test_find_videos_lists_ids_with_any_file(tmp_path: Path) -> None:
    write(tmp_path, "b")
    write(tmp_path, "-a_rgb")
    (tmp_path / "c_flow.npy").touch()
    (tmp_path / "notes.txt").touch()
    assert find_videos(tmp_path, LAYOUT) == ["-a_rgb", "b", "c"]


def test_what_macos_leaves_beside_files_is_no_video(tmp_path: Path) -> None:
    for name in ("b_rgb.npy", "._b_rgb.npy", ".DS_Store", "..c_rgb.npy", ".d_rgb.npy"):
        (tmp_path / name).touch()
    assert find_videos(tmp_path, LAYOUT) == ["..c", ".d", "b"]


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    for suffix in (*LAYOUT.visual, *LAYOUT.audio):
        (tmp_path / f"v{suffix}.npy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(FeatureError, match="a Git LFS pointer, not the file"):
        read_video(tmp_path, "v", LAYOUT, 3, 2)


def test_find_videos_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"expected <video id>_rgb\.npy"):
        find_videos(tmp_path, LAYOUT)
    with pytest.raises(FeatureError, match="no such feature folder"):
        find_videos(tmp_path / "absent", LAYOUT)


def test_real_features_read_and_note_their_difference() -> None:
    folder = shared_path("data/real_features")
    features = read_video(folder, "women_long_jump", layout=LAYOUT, visual_dim=2048, audio_dim=128)
    assert features.steps == 14
    assert features.note is not None
    assert "women_long_jump_vggish.npy has 36" in features.note
    assert np.isfinite(features.visual).all()
    assert features.visual.std() > 0


def test_a_header_that_is_cut_inside_its_text_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "v_rgb.npy"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(FeatureError, match=r"v_rgb\.npy: not a \.npy file, or one cut inside its header"):
        read(tmp_path)
