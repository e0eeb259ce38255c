"""Feature files and arrays: read, checked, cut to one length, and packed into the tensors a network takes.

Shapes: n steps of one video   Cv, Ca visual / audio feature width   B batch   T steps of the network
"""

from __future__ import annotations

import math
import os
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from runtime.errors import FeatureError
from runtime.records import BadRecord, check_video_id
from runtime.spec import FeatureLayout, ModelSpec

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

# Two modalities that differ by more than this share, and by more than this many steps, are worth a note.
_NOTED_SHARE = 0.1
_NOTED_STEPS = 2


@dataclass(frozen=True)
class VideoFeatures:
    """Checked features of one video, both modalities of the same length. Unpacks as `visual, audio = features`."""

    visual: Float32
    """[n, Cv] float32, finite, n >= 1."""
    audio: Float32
    """[n, Ca] float32, finite."""
    note: str | None = None
    """What a person should know about this video: modalities of clearly different length that were cut."""

    def __iter__(self) -> Iterator[Float32]:
        return iter((self.visual, self.audio))

    @property
    def steps(self) -> int:
        """n: grid steps, not limited to the network's T."""
        return len(self.visual)


@dataclass(frozen=True)
class FeatureFiles:
    """The feature files of one video in a folder: a source for `Localizer.stream`, read when its turn comes."""

    folder: str | Path
    video_id: str

    def read(self, spec: ModelSpec) -> VideoFeatures:
        """Read and check the files; see `read_video`."""
        return read_video(self.folder, self.video_id, spec.layout, spec.visual_dim, spec.audio_dim)


def read_video(
    folder: str | Path, video_id: str, layout: FeatureLayout, visual_dim: int, audio_dim: int
) -> VideoFeatures:
    """Read one video's `<id><suffix>.npy` files.

    The files of a modality are concatenated along the channels; files and modalities of different length are cut
    to the shortest, and `VideoFeatures.note` says so where they differ by more than a tenth.

    Raises FeatureError, naming the file, when one is missing, truncated, pickled, of the wrong rank, width or dtype
    (float16, float32 and float64 are taken), empty, or not finite; and for an id that is no plain file name.
    """
    try:
        check_video_id(video_id)
    except BadRecord as error:
        raise FeatureError(str(error)) from None
    visual = [_read_array(Path(folder) / f"{video_id}{suffix}.npy") for suffix in layout.visual]
    audio = [_read_array(Path(folder) / f"{video_id}{suffix}.npy") for suffix in layout.audio]
    names = [f"{video_id}{suffix}.npy" for suffix in (*layout.visual, *layout.audio)]
    for modality, arrays, suffixes, expected in (
        ("visual", visual, layout.visual, visual_dim),
        ("audio", audio, layout.audio, audio_dim),
    ):
        width = sum(array.shape[1] for array in arrays)
        if width != expected:
            files = " + ".join(f"{video_id}{s}.npy ({a.shape[1]})" for s, a in zip(suffixes, arrays, strict=True))
            raise FeatureError(
                f"{folder}: {modality} features {files} are {width} wide, expected {expected}; "
                "they come from another extractor than the network was trained on"
            )
    steps = min(len(array) for array in (*visual, *audio))
    lengths = dict(zip(names, (len(array) for array in (*visual, *audio)), strict=True))
    return VideoFeatures(_join(visual, steps), _join(audio, steps), _length_note(lengths, steps))


def check_features(visual: Any, audio: Any, spec: ModelSpec, *, name: str = "features") -> VideoFeatures:
    """Check the arrays of one video: visual [n, Cv], audio [m, Ca], float16, float32 or float64.

    Both are cut to the shorter one and converted to float32. `name` stands in front of error messages. Raises
    FeatureError for a wrong type, rank, width or dtype, for zero steps, and for NaN or Inf (with its position).
    """
    seen = _check_array(visual, f"{name}: visual", expected_width=spec.visual_dim)
    heard = _check_array(audio, f"{name}: audio", expected_width=spec.audio_dim)
    steps = min(len(seen), len(heard))
    note = _length_note({"visual": len(seen), "audio": len(heard)}, steps)
    return VideoFeatures(seen[:steps], heard[:steps], note)


def pack(videos: Sequence[VideoFeatures], spec: ModelSpec) -> tuple[Float32, Float32, Int32]:
    """Pack videos into one batch: visual [B, T, Cv], audio [B, T, Ca], lengths [B] int32.

    Shorter videos are padded with zeros, longer ones cropped to their first T steps (the paper's crop); a length
    counts the steps of a video that are in the batch. The videos must have been checked against `spec`.
    """
    batch = len(videos)
    visual = np.empty((batch, spec.length, spec.visual_dim), np.float32)
    audio = np.empty((batch, spec.length, spec.audio_dim), np.float32)
    lengths = np.array([min(video.steps, spec.length) for video in videos], np.int32)
    for row, (video, steps) in enumerate(zip(videos, lengths, strict=True)):
        for target, source in ((visual[row], video.visual), (audio[row], video.audio)):
            target[:steps] = source[:steps]
            target[steps:] = 0
    return visual, audio, lengths


def find_videos(folder: str | Path, layout: FeatureLayout) -> list[str]:
    """Ids of the videos that have at least one feature file in `folder`, sorted.

    A video that lacks one of its files is listed too, so that reading it reports what is missing.
    Raises FeatureError when there is no such folder or no feature file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatureError(f"{folder}: no such feature folder")
    endings = tuple(f"{suffix}.npy" for suffix in (*layout.visual, *layout.audio))
    ids = {
        path.name.removesuffix(ending)
        for path in folder.iterdir()
        for ending in endings
        if path.name.endswith(ending) and path.name != ending
    }
    if not ids:
        expected = ", ".join(f"<video id>{ending}" for ending in endings)
        raise FeatureError(f"{folder}: no feature files; expected {expected}")
    return sorted(ids)


def _read_array(path: Path) -> npt.NDArray[Any]:
    """One `.npy` file as a finite float32 [n, C] array. The header is checked before any data are read."""
    try:
        with open(path, "rb") as stream:
            shape, fortran, dtype = _read_header(stream, path)
            _check_shape(shape, dtype, str(path))
            expected = math.prod(shape) * dtype.itemsize
            present = os.fstat(stream.fileno()).st_size - stream.tell()
            data = stream.read(expected) if present >= expected else b""
    except FileNotFoundError as error:
        raise FeatureError(f"{path}: no such feature file") from error
    except OSError as error:
        raise FeatureError(f"{path}: can't be read ({error.strerror or error})") from error
    if len(data) != expected:
        raise FeatureError(
            f"{path}: truncated: {present} bytes of data, its header says {expected} for "
            f"{shape[0]} x {shape[1]} {dtype.name}; extract or copy it again"
        )
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return _as_finite_float32(array, str(path))


def _read_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:  # the header is Python text
        what = "an empty file" if path.stat().st_size == 0 else "not a .npy file, or one cut inside its header"
        raise FeatureError(f"{path}: {what} ({error}); write it with numpy.save") from error
    raise FeatureError(f"{path}: .npy format version {version}; expected 1.0 or 2.0, as numpy.save writes float arrays")


def _check_array(array: Any, name: str, *, expected_width: int) -> Float32:
    if not isinstance(array, np.ndarray):
        try:
            array = np.asarray(array)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FeatureError(f"{name}: got {type(array).__name__}, expected a float array [steps, width]") from error
    _check_shape(array.shape, array.dtype, name)
    if array.shape[1] != expected_width:
        hint = "; the array looks transposed" if array.shape[0] == expected_width else ""
        raise FeatureError(f"{name}: got shape {array.shape}, expected [steps, {expected_width}]{hint}")
    return _as_finite_float32(array, name)


def _check_shape(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """Everything that can be said before looking at the values."""
    if dtype.hasobject:
        raise FeatureError(f"{name}: holds pickled Python objects, which are never loaded; save a plain float array")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise FeatureError(f"{name}: got dtype {dtype}, expected float16, float32 or float64")
    if len(shape) != 2:
        raise FeatureError(f"{name}: got {len(shape)} dimension(s), shape {shape}, expected 2: [steps, width]")
    if min(shape) < 1:
        raise FeatureError(f"{name}: got shape {shape}: there is no content; expected at least one step")


def _as_finite_float32(array: npt.NDArray[Any], name: str) -> Float32:
    with np.errstate(over="ignore"):
        values = array.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(finite.size - np.count_nonzero(finite))
        step, channel = (int(i) for i in np.argwhere(~finite)[0])
        got = array[step, channel]
        raise FeatureError(
            f"{name}: {got} at step {step}, channel {channel} ({bad} of {finite.size} values are not finite in float32)"
        )
    return values


def _join(arrays: Sequence[Float32], steps: int) -> Float32:
    if len(arrays) == 1:
        return arrays[0][:steps]
    return np.concatenate([array[:steps] for array in arrays], axis=1)


def _length_note(lengths: dict[str, int], steps: int) -> str | None:
    longest = max(lengths.values())
    if longest - steps <= max(_NOTED_STEPS, _NOTED_SHARE * longest):
        return None
    found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
    return f"lengths differ: {found} steps; cut to {steps}"
