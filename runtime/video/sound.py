"""The sound of a video file on the picture's timeline: any codec and channel count, mixed to mono, at 16 kHz.

Shapes: n samples
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import VideoError
from runtime.packages import import_package
from runtime.video.container import (
    ReadOptions,
    ReadReport,
    check_length,
    decoded_frames,
    open_container,
    sound_stream,
    start_seconds,
)

Float64 = npt.NDArray[np.float64]

RATE = 16000
LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Samples a second of the sound of a file; the filter that resamples it grows with the rate."""
_RESAMPLER = {
    "filter_type": "kaiser",
    "kaiser_beta": "14.769656",
    "filter_size": "128",
    "internal_sample_fmt": "dblp",
}
"""libswresample's closest to resampy's `kaiser_best`, with which the public features were made."""
_CUTOFF = 0.9475937
"""Share of the lower of the two rates' frequencies that passes."""
_BLOCK = 1 << 14
_SLACK = Fraction(15, 1000)
"""Seconds that sound may lie off its time stamps, which some containers round, before silence is put in or samples go.
A lost AAC packet is 21 ms or more at up to 48 kHz."""
_CUT_SECONDS = Fraction(1, 2)


def read_sound(path: str, options: ReadOptions, report: ReadReport) -> Iterator[Float64]:
    """Yield the sound of a file at 16 kHz in blocks [n], -1 to 1, from the container's start on.

    Raises VideoError for a file without sound, or whose sound can't be decoded at all.
    """
    with open_container(path, options) as container:
        stream = sound_stream(container)
        if stream is None:
            raise VideoError(f"{path}: has no sound; '--missing-audio silence' takes it as silent")
        rate = stream.codec_context.sample_rate
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise VideoError(f"{path}: states {rate} samples a second, expected {LOWEST_RATE} to {HIGHEST_RATE}")
        yield from resampled(_mono(path, container, stream, options, report), rate)
        if report.damaged_packets:
            report.facts["damaged_packets"] = report.damaged_packets
            report.warn(f"{report.damaged_packets} damaged packets of the sound were replaced by silence")


def resampled(blocks: Iterable[Float64], rate: int) -> Iterator[Float64]:
    """Resample mono blocks [n] of `rate` to 16 kHz; int(n * 16000 / rate) samples in all."""
    if rate == RATE:
        yield from blocks
        return
    graph = _Graph(rate)
    taken = given = 0
    for block in blocks:
        for start in range(0, len(block), _BLOCK):
            part = block[start : start + _BLOCK]
            taken += len(part)
            for out in graph.push(part):
                out = out[: taken * RATE // rate - given]
                given += len(out)
                yield out
    missing = taken * RATE // rate - given
    for out in graph.finish() if taken else ():
        out = out[:missing]
        missing -= len(out)
        if len(out):
            yield out
    if missing > 0:
        yield np.zeros(missing)


class _Graph:
    """libswresample in a filter graph."""

    def __init__(self, rate: int) -> None:
        self._av = import_package("av", "reading sound")
        self._rate, self._time = rate, 0
        graph = self._av.filter.Graph()
        source = graph.add_abuffer(
            format="dbl", sample_rate=rate, layout="mono", time_base=Fraction(1, rate), name="in"
        )
        cutoff = _CUTOFF * min(1.0, rate / RATE)  # libswresample means a share of the output's, also where that is more
        settings = ":".join(f"{name}={value}" for name, value in {**_RESAMPLER, "cutoff": cutoff}.items())
        resample = graph.add("aresample", f"{RATE}:{settings}")
        wanted = graph.add("aformat", f"sample_fmts=dbl:sample_rates={RATE}:channel_layouts=mono")
        sink = graph.add("abuffersink")
        source.link_to(resample)
        resample.link_to(wanted)
        wanted.link_to(sink)
        graph.configure()
        self._graph, self._source, self._sink = graph, source, sink

    def push(self, block: Float64) -> Iterator[Float64]:
        frame = self._av.AudioFrame.from_ndarray(
            np.ascontiguousarray(block, np.float64)[None], format="dbl", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._time, Fraction(1, self._rate)
        self._time += len(block)
        self._source.push(frame)
        yield from self._pull()

    def finish(self) -> Iterator[Float64]:
        self._source.push(None)
        yield from self._pull()

    def _pull(self) -> Iterator[Float64]:
        while True:
            try:
                frame = self._sink.pull()
            except (self._av.error.BlockingIOError, self._av.error.EOFError):
                return
            yield frame.to_ndarray().reshape(-1)


def _mono(path: str, container: Any, stream: Any, options: ReadOptions, report: ReadReport) -> Iterator[Float64]:
    """Yield the stream's sound as the mean of its channels, in blocks without gaps from the container's start on.

    Samples are rounded to 16 bits first, as the public features were made from wav files.
    """
    rate, start = stream.codec_context.sample_rate, start_seconds(container, stream)
    stream.thread_type = "AUTO"
    convert = _Converter(rate, report)
    written, decoded, silence = 0, 0, 0
    end = None
    first: Fraction | None = None
    for frame in decoded_frames(container, stream, report):
        if frame.pts is not None:
            time = Fraction(frame.pts) * frame.time_base - start
        elif first is None:
            time = Fraction(0)
        else:
            time = Fraction(written, rate)
        check_length(time, path, options)
        if first is None:
            first = time
            if stream.duration:
                end = round((time + Fraction(stream.duration) * stream.time_base) * rate)
            report.facts |= {"codec": stream.codec_context.name, "rate": rate, "channels": frame.layout.nb_channels}
        for mono in convert(frame):
            length = len(mono)
            at = round(time * rate)
            gap = at - written
            if gap > _SLACK * rate or (decoded == 0 and gap > 0):
                silence += gap if decoded else 0
                yield from _zeros(gap)
                written += gap
            elif gap < -_SLACK * rate or (decoded == 0 and gap < 0):
                mono = mono[-gap:]  # before the start, or heard already
            decoded += length
            if end is not None and written + len(mono) > end:
                mono = mono[: max(0, end - written)]
            written += len(mono)
            time += Fraction(length, rate)
            if len(mono):
                yield mono
    if decoded == 0:
        raise VideoError(f"{path}: nothing of its {stream.codec_context.name} sound could be decoded")
    report.facts |= {"seconds": round(written / rate, 3)}
    if silence:
        report.facts["silence_seconds"] = round(silence / rate, 3)
        report.warn(f"{silence / rate:.2f} s of sound are missing inside the file; they are silent")
    if end is not None and end - written > _CUT_SECONDS * rate:
        report.facts["stated_seconds"] = round(end / rate, 3)
        report.warn(
            f"the file states {end / rate:.2f} s of sound, {written / rate:.2f} s could be decoded: it is cut off or "
            "damaged"
        )


class _Converter:
    """Turns decoded sound into mono of one rate, whatever the stream changes to on the way."""

    def __init__(self, rate: int, report: ReadReport) -> None:
        self._av, self._rate, self._report = import_package("av", "reading sound"), rate, report
        self._setting: tuple[Any, ...] | None = None

    def __call__(self, frame: Any) -> Iterator[Float64]:
        """Yield the samples [n] of a frame, -1 to 1."""
        setting = frame.sample_rate, frame.layout.name, frame.format.name
        if setting != self._setting:
            if self._setting is not None:
                self._report.warn("the rate or the channels of the sound change; later ones were converted")
            self._setting = setting
            self._resampler = self._av.AudioResampler(format="s16", layout=frame.layout.name, rate=self._rate)
        for whole in self._resampler.resample(frame):
            samples = whole.to_ndarray().reshape(-1, whole.layout.nb_channels)
            yield samples.mean(1, dtype=np.float64) / 32768


def _zeros(count: int) -> Iterator[Float64]:
    for start in range(0, count, _BLOCK):
        yield np.zeros(min(_BLOCK, count - start))
