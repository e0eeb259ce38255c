"""Videos -> the input arrays of one engine call, each value copied once.

Shapes: n steps of one video   Cv, Ca visual / audio feature width   B rows of the batch   T steps of the network
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.blocks import BlockLayout
from runtime.features import NOT_REGULAR, FeatureFiles, Float32, Int32, VideoFeatures, copy_rows, read_into
from runtime.records import BadRecord, check_video_id
from runtime.spec import AUDIO, INPUT_TYPES, LENGTHS, VISUAL, ModelSpec

Allocate: TypeAlias = Callable[[tuple[int, ...], Any], npt.NDArray[Any]]
"""(shape, dtype) -> an array of any content."""


class Batch:
    """Input arrays of up to `size` rows, filled row by row and used again. One thread at a time.

    Shorter videos are padded with zeros; a longer one gives a row for each stretch of at most T steps.
    """

    def __init__(self, spec: ModelSpec, size: int, allocate: Allocate | None = None) -> None:
        """Allocate the arrays when the first row needs them, by `allocate` where an engine has memory of its own.

        They lie in one block, so that an engine can take a full batch by one copy.
        """
        self.size = size
        self.rows = 0
        self._spec = spec
        self._allocate = allocate
        self._arrays: tuple[Float32, Float32, Int32] | None = None
        self._whole: tuple[Float32, Float32, Int32] | None = None

    @property
    def free(self) -> int:
        """Rows that are not filled."""
        return self.size - self.rows

    def clear(self) -> None:
        """Make all rows free."""
        self.rows, self._whole = 0, None

    def inputs(self) -> tuple[Float32, Float32, Int32]:
        """Return visual [B, T, Cv], audio [B, T, Ca], lengths [B] of the filled rows; good until `clear`."""
        visual, audio, lengths = self._whole or self._buffers()
        return visual[: self.rows], audio[: self.rows], lengths[: self.rows]

    def add(self, features: VideoFeatures, start: int, stop: int, name: str) -> None:
        """Fill the next row with the steps [start, stop) of a video, at most T.

        Any float dtype and memory order is taken. The arrays of a video that fills a batch of one row as it is are not
        copied, only checked. Raises FeatureError, with `name` in front, for a value that is not finite.
        """
        pieces = [array[start:stop] for array in features]
        if self._is_batch(pieces):
            for array, modality in zip(pieces, ("visual", "audio"), strict=True):
                copy_rows(array, None, f"{name}: {modality}", first_step=start)
            visual, audio = pieces
            self._whole = (visual[None], audio[None], np.array([stop - start], np.int32))
        else:
            visual, audio, lengths = self._buffers()
            for array, target, modality in zip(pieces, (visual, audio), ("visual", "audio"), strict=True):
                copy_rows(array, target[self.rows], f"{name}: {modality}", first_step=start)
                target[self.rows, stop - start :] = 0
            lengths[self.rows] = stop - start
        self.rows += 1

    def read(self, videos: Sequence[FeatureFiles], *, crop: bool) -> list[tuple[int, list[int]]]:
        """Read videos, no more than are free, into the next rows; see `runtime.features.read_into`.

        Returns the row of each video, and the steps of each of its files. `FeatureFiles.read` has to be asked about one
        that got no row (a negative one): it is to be cut into windows, of an unusual format, or can't be read.
        """
        visual, audio, lengths = self._buffers()
        plain = [i for i, video in enumerate(videos) if _is_plain(video)]
        prefixes = [os.path.join(videos[i].folder, videos[i].video_id) for i in plain]
        results: list[tuple[int, list[int]]] = [(NOT_REGULAR, [])] * len(videos)
        if plain:
            first, layout = self.rows, self._spec.layout
            rows = read_into(prefixes, layout, visual[first:], audio[first:], lengths[first:], crop=crop).tolist()
            for i, (row, *steps) in zip(plain, rows, strict=True):
                results[i] = (row if row < 0 else row + first, steps)
        self.rows += sum(row >= 0 for row, _ in results)
        return results

    def _buffers(self) -> tuple[Float32, Float32, Int32]:
        if self._arrays is None:
            layout = BlockLayout.of(self._spec.input_shapes(self.size), INPUT_TYPES)
            arrays = layout.arrays((self._allocate or np.empty)((layout.nbytes,), np.uint8))
            self._arrays = arrays[VISUAL], arrays[AUDIO], arrays[LENGTHS]
        return self._arrays

    def _is_batch(self, pieces: Sequence[npt.NDArray[Any]]) -> bool:
        """Return whether arrays can be passed on as they are; an engine with memory of its own wants them there."""
        whole = self.size == 1 and self._allocate is None and len(pieces[0]) == self._spec.length
        return whole and all(
            array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned for array in pieces
        )


def pack(
    videos: Sequence[VideoFeatures], spec: ModelSpec, allocate: Allocate | None = None
) -> tuple[Float32, Float32, Int32]:
    """Return videos as one batch: visual [B, T, Cv], audio [B, T, Ca], lengths [B]; `allocate` as for `Batch`.

    Shorter videos are padded with zeros, longer ones cropped to their first T steps (the paper's crop). Every value is
    copied once, into arrays that are the caller's. Raises FeatureError for a value that is not finite.
    """
    batch = Batch(spec, len(videos), allocate or np.empty)
    for i, video in enumerate(videos):
        batch.add(video, 0, min(video.steps, spec.length), f"video {i}")
    return batch.inputs()


def _is_plain(video: FeatureFiles) -> bool:
    try:
        check_video_id(video.video_id)
    except BadRecord:
        return False
    return True
