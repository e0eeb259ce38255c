"""The frames of a video file as the extractors see them: 25 a second by presentation times, upright, rgb, resized.

Shapes: h, w sides of a resized frame, the shorter one `side`   H, W of a padded one, multiples of 8
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import VideoError
from runtime.packages import import_package
from runtime.video.container import (
    CODEC_LIMITS,
    LARGEST_PICTURE,
    ReadOptions,
    ReadReport,
    check_length,
    check_size,
    decoded_frames,
    open_container,
    picture_stream,
    start_seconds,
    stated_seconds,
)

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

_MISSING_TAIL = Fraction(1)
"""Seconds that a file may promise beyond its last frame before it counts as cut off."""
_DISORDER = 0.1
"""Share of frames whose time stamp may lie before the one of the frame before."""


@dataclass(frozen=True)
class Shown:
    """A source frame and the output ticks at which it is seen: `first`, `first + 1`, ... before `end`."""

    frame: Any
    first: int
    end: int


def tick(seconds: Fraction, fps: Fraction) -> int:
    """Return the output tick of a presentation time: floor(fps p + 1/2), exactly."""
    return (seconds * fps + Fraction(1, 2)).__floor__()


def shown_frames(
    frames: Iterable[tuple[Fraction, Any]], fps: Fraction, end: Fraction | None, last: Fraction = Fraction(0)
) -> Iterator[Shown]:
    """Choose the frames of a constant rate from (presentation time in seconds, frame), in the order of time.

    Tick n shows the last frame whose own tick is not above n. The first frame is shown from tick 0 on, the last one
    until the tick of `end`, or of its own time + `last` where there is no end.
    """
    current: tuple[int, Any] | None = None
    begin = 0
    time = Fraction(0)
    for time, frame in frames:
        at = tick(time, fps)
        if current is not None and at > begin:
            yield Shown(current[1], begin, at)
            begin = at
        current = (at, frame)
    if current is not None:
        until = tick(time + last if end is None else end, fps)
        if until > begin:
            yield Shown(current[1], begin, until)


def read_frames(
    path: str, side: int, fps: Fraction, options: ReadOptions, report: ReadReport
) -> Generator[UInt8, None, None]:
    """Yield the frames of a video file at `fps`, uint8 rgb [h, w, 3]; the same array again where a frame is repeated.

    Decoding, conversion and resizing run in `options.decoding_threads` threads, a bounded number of frames ahead.
    Raises VideoError for a file without pictures or usable time stamps.
    """
    with open_container(path, options) as container:
        stream = picture_stream(container, path)
        check_size(stream.codec_context.width, stream.codec_context.height, path)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = options.decoding_threads
        stream.codec_context.options = CODEC_LIMITS
        source = _Source(path, container, stream, options, report)
        converter = Converter(side, report)
        shown = source.shown(fps)
        count = 0
        with _in_order(shown, converter, options.decoding_threads) as converted:
            for picture, one in converted:
                for _ in range(one.first, one.end):
                    yield picture
                count = one.end
        source.finish()
        if count == 0:
            hint = (
                "" if stream.codec_context.width else f"; pictures of more than {LARGEST_PICTURE} pixels are not read"
            )
            raise VideoError(f"{path}: no frame of its {stream.codec_context.name} video could be decoded{hint}")
        report.facts |= {"frames": count, "source_frames": source.decoded, "damaged_packets": report.damaged_packets}
        if report.damaged_packets:
            report.warn(f"{report.damaged_packets} damaged packets of the picture were left out")
        if corrupt := report.facts.get("corrupt_frames"):
            report.warn(f"{corrupt} of {source.decoded} frames are damaged; they were used as the decoder mended them")


class Converter:
    """Turns decoded frames into upright, resized rgb; later frames of another size are scaled to that of the first."""

    def __init__(self, side: int, report: ReadReport) -> None:
        av = import_package("av", "reading video files")
        self._image = import_package("PIL.Image", "resizing frames", distribution="pillow")
        self._bt601 = av.video.reformatter.Colorspace.ITU601
        self._side, self._report = side, report
        self._size: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def __call__(self, frame: Any) -> UInt8:
        """Return uint8 [h, w, 3]. BT.601 whatever the file is tagged, as the public features were made."""
        with self._lock:
            if self._size is None:
                self._size = frame.width, frame.height
                facts = {"width": frame.width, "height": frame.height, "pixel_format": frame.format.name}
                self._report.facts |= {**facts, "rotation": frame.rotation}
        scaled = {}
        if (frame.width, frame.height) != self._size:
            self._report.warn("the size of the picture changes; later frames were scaled to the size of the first")
            scaled = {"width": self._size[0], "height": self._size[1]}
        rgb = frame.reformat(
            format="rgb24", src_colorspace=self._bt601, dst_colorspace=self._bt601, **scaled
        ).to_ndarray()
        turns, rest = divmod(int(frame.rotation), 90)
        if rest:
            self._report.warn(f"a rotation by {frame.rotation} degrees, not a multiple of 90, was left out")
        elif turns % 4:
            rgb = np.ascontiguousarray(np.rot90(rgb, turns))
        return resize(rgb, self._side, self._image)


def resize(rgb: UInt8, side: int, image: Any = None) -> UInt8:
    """Resize uint8 [rows, columns, 3] so that the shorter side is `side`; bilinear over the area that shrinks."""
    image = image or import_package("PIL.Image", "resizing frames", distribution="pillow")
    height, width = resized_size(rgb.shape[0], rgb.shape[1], side)
    if (height, width) == rgb.shape[:2]:
        return rgb
    return np.asarray(image.fromarray(rgb).resize((width, height), image.Resampling.BILINEAR))


def resized_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return rows and columns of a resized frame: the shorter one `side`, the longer one truncated."""
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


def padding(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) that make both sides multiples of 8; the smaller half comes first."""
    columns, rows = -width % 8, -height % 8
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def padded(frame: UInt8) -> Float32:
    """Return a resized frame [h, w, 3] as float32 [3, H, W], 0 to 255, its edges repeated."""
    left, right, top, bottom = padding(*frame.shape[:2])
    whole = np.pad(frame, ((top, bottom), (left, right), (0, 0)), mode="edge") if left + right + top + bottom else frame
    return np.ascontiguousarray(whole.transpose(2, 0, 1), np.float32)


def centre_crop(frame: UInt8, side: int) -> Float32:
    """Return the middle of a resized frame [h, w, 3] as float32 [3, S, S], 0 to 255."""
    top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
    return np.ascontiguousarray(frame[top : top + side, left : left + side].transpose(2, 0, 1), np.float32)


class TimeStamps:
    """The time stamps of decoded frames: those of presentation unless those of decoding are in better order.

    The rule is that of FFmpeg and so of the public program. AVI files have no others than those of decoding.
    """

    def __init__(self) -> None:
        self._presented = self._decoded = -math.inf
        self._bad_presented = self._bad_decoded = 0

    def of(self, frame: Any) -> int | None:
        """Return the time stamp of the next frame, in its time base; None where it has neither."""
        pts: int | None = frame.pts
        dts: int | None = frame.dts
        if dts is not None:
            self._bad_decoded += dts <= self._decoded
            self._decoded = dts
        elif pts is not None:
            self._decoded = pts
        if pts is not None:
            self._bad_presented += pts <= self._presented
            self._presented = pts
        elif dts is not None:
            self._presented = dts
        return pts if pts is not None and (dts is None or self._bad_presented <= self._bad_decoded) else dts


class _Source:
    """Times and frames of one video stream, checked."""

    def __init__(self, path: str, container: Any, stream: Any, options: ReadOptions, report: ReadReport) -> None:
        self._path, self._container, self._stream = path, container, stream
        self._options, self._report = options, report
        self._rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
        self._start = start_seconds(container, stream)
        self._first: Fraction | None = None
        self._last = self._frame_seconds = Fraction(0)
        self._stamps = TimeStamps()
        self.decoded = self._backwards = 0
        codec = stream.codec_context
        report.facts |= {"codec": codec.name, "rate": float(self._rate), "format": container.format.name}

    def shown(self, fps: Fraction) -> Iterator[Shown]:
        """Yield the frames that are seen at a constant rate. Raises VideoError for times that can't be right."""
        previous: Shown | None = None
        for one in shown_frames(self._timed(), fps, None, Fraction(0)):
            yield one
            previous = one
        end = tick(self._end(), fps)
        begin = 0 if previous is None else previous.end
        if self._newest is not None and end > begin:
            yield Shown(self._newest, begin, end)

    def _timed(self) -> Iterator[tuple[Fraction, Any]]:
        self._newest: Any = None
        for frame in decoded_frames(self._container, self._stream, self._report):
            check_size(frame.width, frame.height, self._path)
            time = self._time(frame)
            self.decoded += 1
            if self._first is None:
                self._first = time
            elif time < self._last:
                self._backwards += 1
                continue
            check_length(time, self._path, self._options)
            self._last, self._newest = time, frame
            self._frame_seconds = self._seconds_of(frame)
            yield time, frame

    def _time(self, frame: Any) -> Fraction:
        """Return when a frame is shown, in seconds from the container's start."""
        if self._options.timestamps == "count":
            if not self._rate:
                raise VideoError(f"{self._path}: states no frame rate, so its frames can't be counted into times")
            return self.decoded / self._rate
        stamp = self._stamps.of(frame)
        if stamp is None:
            raise VideoError(
                f"{self._path}: frame {self.decoded} has no time stamp; '--timestamps count' takes frame number / "
                f"average rate ({float(self._rate):g} a second) instead"
            )
        return stamp * Fraction(frame.time_base) - self._start

    def _seconds_of(self, frame: Any) -> Fraction:
        """Return how long a frame says that it is shown; else one frame of the average rate."""
        if self._options.timestamps == "file" and frame.duration:
            return Fraction(frame.duration) * Fraction(frame.time_base)
        return 1 / self._rate if self._rate else Fraction(0)

    def _end(self) -> Fraction:
        """Return when the last frame ends: as the file states, unless it is cut off, or ends later than that."""
        own = self._last + self._frame_seconds
        stated = None
        if self._options.timestamps == "file" and self._stream.duration and self._first is not None:
            stated = self._first + Fraction(self._stream.duration) * Fraction(self._stream.time_base)
        if stated is None or not self._last < stated <= own + _MISSING_TAIL:
            return own
        return stated

    def finish(self) -> None:
        """Report what the whole stream shows. Raises VideoError for time stamps that say nothing."""
        if self.decoded > 1 and self._last == self._first:
            raise VideoError(
                f"{self._path}: all {self.decoded} frames have the same time stamp; '--timestamps count' takes frame "
                "number / average rate instead"
            )
        if self._backwards > max(1, _DISORDER * self.decoded):
            raise VideoError(
                f"{self._path}: the time stamps of {self._backwards} of {self.decoded} frames go backwards; "
                "'--timestamps count' takes frame number / average rate instead"
            )
        if self._backwards:
            self._report.warn(f"{self._backwards} frames whose time stamps go backwards were left out")
        stated = stated_seconds(self._stream, self._container)
        found = self._last + self._frame_seconds - (self._first or 0)
        self._report.facts |= {"seconds": round(float(found), 3)}
        if stated is not None:
            self._report.facts |= {"stated_seconds": round(float(stated), 3)}
            if self._stream.duration and stated > found + _MISSING_TAIL:
                self._report.warn(
                    f"the file states {float(stated):.2f} s of picture, {float(found):.2f} s could be decoded: it is "
                    "cut off or damaged"
                )


@contextlib.contextmanager
def _in_order(shown: Iterator[Shown], convert: Converter, threads: int) -> Iterator[Iterator[tuple[UInt8, Shown]]]:
    """Convert frames in several threads, a bounded number ahead, and hand them out in their order."""
    with ThreadPoolExecutor(threads, thread_name_prefix="ccnet-frames") as pool:
        waiting: deque[tuple[Future[UInt8], Shown]] = deque()

        def results() -> Iterator[tuple[UInt8, Shown]]:
            for one in shown:
                waiting.append((pool.submit(convert, one.frame), one))
                if len(waiting) > threads + 2:
                    future, done = waiting.popleft()
                    yield future.result(), done
            while waiting:
                future, done = waiting.popleft()
                yield future.result(), done

        try:
            yield results()
        finally:
            for future, _ in waiting:
                future.cancel()
