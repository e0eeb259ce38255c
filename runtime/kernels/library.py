"""The compiled kernels behind ctypes, which holds no interpreter lock while one runs.

Arrays are given as their address. What a kernel takes is C-contiguous and of the dtype that its source file states:
callers see to that, as nothing here can check it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from runtime.errors import InstallationError
from runtime.kernels.build import BuildError, build
from runtime.spec import Method, PostProcessing, TimeBase


class Settings(ctypes.Structure):
    """`Settings` of kernels.h."""

    _fields_ = (
        ("steps", c_int64),
        ("levels", c_int64),
        ("classes", c_int64),
        ("top_k", c_int64),
        ("max_segments", c_int64),
        ("method", c_int32),
        ("multiclass", c_int32),
        ("logit_below", c_float),
        ("pre_nms_score", c_float),
        ("min_length", c_float),
        ("sigma", c_float),
        ("iou_threshold", c_float),
        ("min_score", c_float),
        ("voting_threshold", c_float),
        ("stride_frames", c_double),
        ("half_window_frames", c_double),
        ("fps", c_double),
    )

    @property
    def most_candidates(self) -> int:
        """How many candidates one output can give: of each level all, or the best."""
        return sum(min((self.steps >> level) * self.classes, self.top_k) for level in range(self.levels))


OUT_OF_MEMORY, LOGITS_NOT_FINITE, OFFSETS_NOT_FINITE, BAD_CANDIDATE = -1, -2, -3, -4
"""Errors of the kernels, as in kernels.h."""

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ccnet_decode": (c_int64, POINTER(Settings), *[c_void_p] * 2, *[c_int64] * 3, *[c_void_p] * 3, POINTER(c_int64)),
    "ccnet_suppress": (
        *(c_int64, POINTER(Settings), c_int64, *[c_void_p] * 3, c_int64, c_int64),
        *(*[c_void_p] * 3, POINTER(c_int64)),
    ),
    "ccnet_detect": (None, POINTER(Settings), c_int64, *[c_void_p] * 4, c_double, *[c_void_p] * 4, c_int64),
    "ccnet_copy_rows": (c_int64, c_int64, c_void_p, *[c_int64] * 4, c_void_p, *[c_int64] * 2),
    "ccnet_read_videos": (
        *(c_int64, c_char_p, c_int64, c_char_p, *[c_int64] * 6),
        *(*[c_void_p] * 3, c_int64, c_void_p),
    ),
    "ccnet_match": (None, *[c_int64] * 3, *[c_void_p] * 8),
    "ccnet_average_precision": (None, *[c_int64] * 3, *[c_void_p] * 5),
    "ccnet_mark_duplicates": (None, c_int64, *[c_void_p] * 2, c_double, c_void_p),
}
"""Result and arguments of each function."""


@functools.cache
def kernels() -> Any:
    """Return the library. A source checkout that was not installed compiles it on the first call.

    Raises InstallationError when that fails.
    """
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        raise InstallationError(str(error)) from None
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.lru_cache(maxsize=64)
def detection_settings(
    post: PostProcessing, steps: int, levels: int, classes: int, time_base: TimeBase | None = None
) -> Settings:
    """Return settings for outputs of `steps` steps; not to be changed. `time_base` is what seconds need."""
    time_base = time_base or TimeBase()
    score = post.pre_nms_score
    return Settings(
        steps=steps,
        levels=levels,
        classes=classes,
        top_k=min(post.pre_nms_top_k, steps * classes),
        max_segments=post.max_segments,
        method=get_args(Method).index(post.method),
        multiclass=post.multiclass,
        # Slightly below the logit of the score: cheap to compare with; the sigmoid decides for what passes.
        logit_below=math.log(score / (1 - score)) - 1e-3 if score > 0 else -math.inf,
        pre_nms_score=score,
        min_length=post.min_length,
        sigma=post.sigma,
        iou_threshold=post.iou_threshold,
        min_score=post.min_score,
        voting_threshold=post.voting_threshold,
        stride_frames=time_base.stride_frames,
        half_window_frames=0.5 * time_base.window_frames,
        fps=time_base.fps,
    )


def address(array: npt.NDArray[Any]) -> int:
    """Return where the data of an array begin."""
    return int(array.ctypes.data)


def floats(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return an array as C-contiguous float32, itself where it is that already."""
    return np.ascontiguousarray(array, np.float32)
