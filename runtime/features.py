"""Feature files and arrays of one video: found, read, checked and cut to one length.

Shapes: n steps of one video   Cv, Ca visual / audio feature width
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from runtime.coverage import files_note, length_note
from runtime.errors import FeatureError
from runtime.files import is_sidecar, open_regular
from runtime.kernels.library import OUT_OF_MEMORY, address, kernels
from runtime.records import BadRecord, check_video_id
from runtime.schema import quote, show
from runtime.spec import FeatureLayout, ModelSpec

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_LARGEST_HEADER = 1 << 17
"""Bytes that a `.npy` header is looked for in; numpy reads none above 10,000."""

_POINTER = b"version https://git-lfs"

NOT_REGULAR, TOO_LONG = -1, -2
"""Why `read_into` gave a video no row."""


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
    prefix = os.path.join(folder, video_id)
    regular = _read_regular(prefix, layout, visual_dim, audio_dim)
    if regular is not None:
        return regular
    visual, audio = (
        {f"{video_id}{suffix}.npy": _read_array(Path(folder) / f"{video_id}{suffix}.npy") for suffix in suffixes}
        for suffixes in (layout.visual, layout.audio)
    )
    return join_files(visual, audio, visual_dim, audio_dim, where=str(folder))


def join_files(
    visual: Mapping[str, Float32], audio: Mapping[str, Float32], visual_dim: int, audio_dim: int, *, where: str
) -> VideoFeatures:
    """Return the features of one video, given the arrays [n, C] of its files by name.

    See `read_video`, which also says what is cut. Raises FeatureError, with `where` in front, for a wrong width.
    """
    for modality, arrays, expected in (("visual", visual, visual_dim), ("audio", audio, audio_dim)):
        width = sum(array.shape[1] for array in arrays.values())
        if width != expected:
            files = " + ".join(f"{name} ({array.shape[1]})" for name, array in arrays.items())
            raise FeatureError(
                f"{where}: {modality} features {files} are {width} wide, expected {expected}; "
                "they come from another extractor than the network was trained on"
            )
    lengths = {name: len(array) for name, array in (*visual.items(), *audio.items())}
    steps = min(lengths.values())
    seen, heard = (_join(list(arrays.values()), steps) for arrays in (visual, audio))
    return VideoFeatures(seen, heard, length_note(lengths))


def parse_npy(data: bytes | memoryview, name: str) -> Float32:
    """Return the finite float32 array [n, C] of a `.npy` file in memory; a view where its content allows.

    Raises FeatureError, with `name` in front, as `read_video` does for a file.
    """
    try:
        start, shape, fortran, dtype = _checked_header(io.BytesIO(data[:_LARGEST_HEADER]), len(data), name)
    except ValueError as error:
        raise FeatureError(f"{name}: can't be read ({error})") from error
    array = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order="F" if fortran else "C")
    return _finite_float32(array, name)


def check_features(visual: Any, audio: Any, spec: ModelSpec, *, name: str = "features") -> VideoFeatures:
    """Check the arrays of one video: visual [n, Cv], audio [m, Ca], float16, float32 or float64.

    Both are cut to the shorter one and converted to float32. `name` stands in front of error messages. Raises
    FeatureError for a wrong type, rank, width or dtype, for zero steps, and for NaN or Inf (with its position).
    """
    features = check_shapes(visual, audio, spec, name=name)
    seen, heard = (_finite_float32(a, f"{name}: {kind}") for a, kind in zip(features, ("visual", "audio"), strict=True))
    return VideoFeatures(seen, heard, features.note)


def check_shapes(visual: Any, audio: Any, spec: ModelSpec, *, name: str) -> VideoFeatures:
    """Do all of `check_features` but convert the arrays and look at the values of the steps that both have.

    That is for `copy_rows` to do, in the same pass as the copy into a batch.
    """
    seen = _check_array(visual, f"{name}: visual", expected_width=spec.visual_dim)
    heard = _check_array(audio, f"{name}: audio", expected_width=spec.audio_dim)
    if len(seen) == len(heard):
        return VideoFeatures(seen, heard)
    steps = min(len(seen), len(heard))
    for array, kind in ((seen, "visual"), (heard, "audio")):
        copy_rows(array[steps:], None, f"{name}: {kind}", first_step=steps)
    return VideoFeatures(seen[:steps], heard[:steps], length_note({"visual": len(seen), "audio": len(heard)}))


def copy_rows(array: npt.NDArray[Any], target: Float32 | None, name: str, *, first_step: int = 0) -> None:
    """Copy floats [n, C] of any dtype and memory order into the first n rows of target [T, C], float32.

    Every value is checked in the same pass, also where there is no target or it has fewer rows. `first_step` is the
    step of the first row. Raises FeatureError, saying where, for a value that is not finite in float32.
    """
    size = array.dtype.itemsize
    finite = kernels().ccnet_copy_rows(
        size if array.dtype.isnative else -size,
        address(array),
        *array.shape,
        *array.strides,
        None if target is None else address(target),
        0 if target is None else target.strides[0] // 4,
        0 if target is None else len(target),
    )
    if finite == OUT_OF_MEMORY:
        raise MemoryError
    if not finite:
        raise _not_finite(array, name, first_step)


def read_into(
    prefixes: Sequence[str],
    layout: FeatureLayout,
    visual: Float32,
    audio: Float32,
    lengths: Int32,
    *,
    crop: bool,
) -> npt.NDArray[np.int64]:
    """Read videos from files straight into rows of a batch: visual [B, T, Cv], audio [B, T, Ca], lengths [B].

    A prefix is a video's path up to the suffix. One compiled call without the interpreter lock reads, converts, checks
    and pads. Returns [videos, 1 + files]: the row that a video got, one after the other from 0, and the steps of each
    of its files; no row but TOO_LONG where a video has more than T steps and is not to be cropped; NOT_REGULAR where
    something needs the closer look of `read_video`.
    """
    suffixes = [f"{suffix}.npy".encode() for suffix in (*layout.visual, *layout.audio)]
    found = np.full((len(prefixes), 1 + len(suffixes)), NOT_REGULAR, np.int64)
    paths = os.fsencode("\0".join(prefixes))
    if paths.count(0) != len(prefixes) - 1:  # a path with a zero in it
        return found
    done = kernels().ccnet_read_videos(
        paths,
        len(prefixes),
        b"\0".join(suffixes),
        len(layout.visual),
        len(suffixes),
        visual.shape[2],
        audio.shape[2],
        visual.shape[1],
        crop,
        address(visual),
        address(audio),
        address(lengths),
        len(visual),
        address(found),
    )
    if done == OUT_OF_MEMORY:
        raise MemoryError
    return found


def find_videos(folder: str | Path, layout: FeatureLayout) -> list[str]:
    """Return the ids of the videos that have at least one feature file in `folder`, sorted.

    A video that lacks one of its files is listed too, so that reading it reports what is missing.
    Raises FeatureError when there is no such folder or no feature file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatureError(f"{folder}: no such feature folder")
    return videos_of_files(os.listdir(folder), layout, where=str(folder))


def videos_of_files(names: Iterable[str], layout: FeatureLayout, *, where: str) -> list[str]:
    """Return the ids of the videos that file names belong to, sorted; raises FeatureError when there is none."""
    endings = tuple(f"{suffix}.npy" for suffix in (*layout.visual, *layout.audio))
    ids = {
        name.removesuffix(ending)
        for name in names
        for ending in endings
        if name.endswith(ending) and name != ending and not is_sidecar(name)
    }
    if not ids:
        expected = ", ".join(f"<video id>{ending}" for ending in endings)
        raise FeatureError(f"{where}: no feature files; expected {expected}")
    return sorted(ids)


def _read_regular(prefix: str, layout: FeatureLayout, visual_dim: int, audio_dim: int) -> VideoFeatures | None:
    """Read files that are as numpy.save writes them; None where something needs a closer look."""
    visual, audio = (np.empty((1, 0, width), np.float32) for width in (visual_dim, audio_dim))
    lengths = np.empty(1, np.int32)
    row, *steps = read_into([prefix], layout, visual, audio, lengths, crop=False)[0].tolist()  # no room: headers alone
    if row != TOO_LONG:
        return None
    visual, audio = (np.empty((1, min(steps), width), np.float32) for width in (visual_dim, audio_dim))
    row, *steps = read_into([prefix], layout, visual, audio, lengths, crop=False)[0].tolist()
    return VideoFeatures(visual[0], audio[0], files_note(prefix, layout, steps)) if row == 0 else None


def _read_array(path: Path) -> npt.NDArray[Any]:
    """Read one `.npy` file as a finite float32 [n, C] array. The header is checked before any data are read."""
    with _opened(path) as (stream, shape, fortran, dtype):
        data = stream.read(math.prod(shape) * dtype.itemsize)
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return _finite_float32(array, str(path))


def feature_header(path: Path) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Return shape (steps, width) and dtype of a feature file of which only header and size are looked at.

    Raises FeatureError for everything that reading the file would, but for values that are not finite.
    """
    with _opened(path) as (_, shape, _, dtype):
        return (shape[0], shape[1]), dtype


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """Open a `.npy` file of floats [n, C] that is as long as its header says: stream, shape, Fortran order, dtype."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            _, shape, fortran, dtype = _checked_header(stream, size, str(path))
            yield stream, shape, fortran, dtype
    except FileNotFoundError as error:
        raise FeatureError(f"{path}: no such feature file") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise FeatureError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from error


def _checked_header(stream: IO[bytes], size: int, name: str) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Return where the data of a `.npy` file of `size` bytes start, their shape, if in Fortran order, and dtype."""
    shape, fortran, dtype = _read_header(stream, name, empty=size == 0)
    _check_shape(shape, dtype, name)
    present, expected = size - stream.tell(), math.prod(shape) * dtype.itemsize
    if present < expected:
        raise FeatureError(
            f"{name}: truncated: {present} bytes of data, its header says {expected} for "
            f"{shape[0]} x {shape[1]} {dtype.name}; extract or copy it again"
        )
    return stream.tell(), shape, fortran, dtype


def _read_header(stream: IO[bytes], name: str, *, empty: bool) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    except (
        *(ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError),
        *(tokenize.TokenError, OverflowError, RecursionError, MemoryError),
    ) as error:  # the header is Python text, and may name any dtype
        stream.seek(0)
        if stream.read(len(_POINTER)) == _POINTER:
            raise FeatureError(f"{name}: a Git LFS pointer, not the file; 'git lfs pull' fetches it") from None
        what = "an empty file" if empty else "not a .npy file, or one cut inside its header"
        raise FeatureError(f"{name}: {what} ({quote(error)}); write it with numpy.save") from error
    raise FeatureError(f"{name}: .npy format version {version}; expected 1.0 or 2.0, as numpy.save writes float arrays")


def _check_array(array: Any, name: str, *, expected_width: int) -> npt.NDArray[Any]:
    if not isinstance(array, np.ndarray):
        try:
            array = np.asarray(array)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FeatureError(f"{name}: got {type(array).__name__}, expected a float array [steps, width]") from error
    _check_shape(array.shape, array.dtype, name)
    if array.shape[1] != expected_width:
        hint = "; the array looks transposed" if array.shape[0] == expected_width else ""
        raise FeatureError(f"{name}: got shape {array.shape}, expected [steps, {expected_width}]{hint}")
    checked: npt.NDArray[Any] = array
    return checked


def _check_shape(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """Check everything that can be said before looking at the values."""
    if dtype.hasobject:
        raise FeatureError(f"{name}: holds pickled Python objects, which are never loaded; save a plain float array")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise FeatureError(f"{name}: got dtype {quote(dtype, 60)}, expected float16, float32 or float64")
    if len(shape) != 2:
        raise FeatureError(f"{name}: got {len(shape)} dimension(s), shape {show(shape)}, expected 2: [steps, width]")
    if min(shape) < 1:
        raise FeatureError(f"{name}: got shape {show(shape)}: there is no content; expected at least one step")


def _finite_float32(array: npt.NDArray[Any], name: str) -> Float32:
    if array.dtype == np.float32:
        copy_rows(array, None, name)
        return array
    values = np.empty(array.shape, np.float32)
    copy_rows(array, values, name)
    return values


def _not_finite(array: npt.NDArray[Any], name: str, first_step: int) -> FeatureError:
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False))
    bad = int(finite.size - np.count_nonzero(finite))
    step, channel = (int(i) for i in np.argwhere(~finite)[0])
    return FeatureError(
        f"{name}: {array[step, channel]} at step {first_step + step}, channel {channel} "
        f"({bad} of {finite.size} values are not finite in float32)"
    )


def _join(arrays: Sequence[Float32], steps: int) -> Float32:
    if len(arrays) == 1:
        return arrays[0][:steps]
    return np.concatenate([array[:steps] for array in arrays], axis=1)
