"""Log-mel spectrograms of sound, and the examples of 0.96 s every 0.32 s that VGGish sees.

Shapes: n samples at 16 kHz   m spectrogram frames, 10 ms apart   64 mel bands
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from runtime.video.sound import RATE

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

WINDOW, HOP, BANDS = 400, 160, 64
EXAMPLE, EXAMPLE_HOP = 96, 32
"""Frames of an example, and between the starts of two."""
_FFT, _LOW, _HIGH = 512, 125.0, 7500.0
_BLOCK = 512


def log_mel(wave: npt.ArrayLike) -> Float32:
    """Map a wave [n] to its log-mel spectrogram [m, 64], m = 1 + (n - 400) // 160, or no frame below 400 samples."""
    wave = np.asarray(wave, np.float64)
    if len(wave) < WINDOW:
        return np.zeros((0, BANDS), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    out = np.empty((len(windows), BANDS), np.float32)
    for start in range(0, len(windows), _BLOCK):
        spectrum = np.abs(np.fft.rfft(windows[start : start + _BLOCK] * hann, _FFT))
        out[start : start + _BLOCK] = np.log(spectrum @ filterbank() + 0.01)
    return out


@functools.cache
def filterbank() -> Float64:
    """Return the mel filters [257, 64]: triangles of height 1, linear in mel, without the constant of the signal."""
    mel = 1127.0 * np.log1p(np.arange(_FFT // 2 + 1) * (RATE / _FFT) / 700.0)
    low, high = (1127.0 * np.log1p(hertz / 700.0) for hertz in (_LOW, _HIGH))
    edges = np.linspace(low, high, BANDS + 2)
    rising = (mel[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel[:, None]) / (edges[2:] - edges[1:-1])
    filters: Float64 = np.maximum(0.0, np.minimum(rising, falling))
    filters[0] = 0.0
    return filters


def examples(spectrogram: Float32) -> Float32:
    """Cut a spectrogram [m, 64] into examples [k, 96, 64], one every 0.32 s; what is left at the end is dropped."""
    if len(spectrogram) < EXAMPLE:
        return np.zeros((0, EXAMPLE, BANDS), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(spectrogram, EXAMPLE, axis=0)[::EXAMPLE_HOP]
    return np.ascontiguousarray(windows.transpose(0, 2, 1))


def stream_examples(blocks: Iterable[Float64]) -> Iterator[Float32]:
    """Yield the examples [k, 96, 64] of sound that comes in blocks [n], as soon as they are complete."""
    wave = np.zeros(0)
    frames = np.zeros((0, BANDS), np.float32)
    waiting: list[Float64] = []
    ready = 0
    for block in blocks:
        waiting.append(block)
        ready += len(block)
        if ready < RATE:
            continue
        wave = np.concatenate([wave, *waiting])
        waiting, ready = [], 0
        found = log_mel(wave)
        wave = wave[HOP * len(found) :]
        frames = np.concatenate([frames, found])
        complete = examples(frames)
        if len(complete):
            frames = frames[EXAMPLE_HOP * len(complete) :]
            yield complete
    found = log_mel(np.concatenate([wave, *waiting]))
    complete = examples(np.concatenate([frames, found]))
    if len(complete):
        yield complete
