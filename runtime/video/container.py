"""Opening a video file, and the packets of one of its streams, whatever state the file is in.

What comes from outside is bounded before it is decoded: which formats FFmpeg may take the file for (none that refers to
other files), the size of a picture, the length. What is damaged is counted, left out and reported.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from runtime.errors import VideoError
from runtime.packages import import_package
from runtime.schema import quote, require

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,h264,hevc,m4v,gif,nut,ivf,dv,rm,"
    "wav,mp3,aac,flac"
)
"""Demuxers of FFmpeg that a file may be read with. Playlists (hls, concat, dash) are not among them."""
LARGEST_PICTURE = 8192 * 4608
"""Pixels of a frame; a few bytes of a damaged or hostile file ask for as much memory as they like."""
CODEC_LIMITS = {"max_pixels": str(LARGEST_PICTURE)}
"""Options of a decoder: a picture that is larger than its container says is not even given memory."""
LARGEST_ASPECT = 8
"""Longer side / shorter side of a picture; the flow network's memory grows with the fourth power of the sides."""
_DEFAULT, _COVER = 0x1, 0x400
"""FFmpeg's AV_DISPOSITION_DEFAULT and AV_DISPOSITION_ATTACHED_PIC."""
_URL = re.compile(r"(https?|ftps?|rtmps?|rtsp|rtp|tcp|udp|tls|s3|gs|hls|sftp|smb|\w+\+\w+):/", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a video file is read where there is a choice."""

    missing_audio: Literal["error", "silence"] = "error"
    """A video without sound: an error, or as if it were silent; silence also follows a sound that ends early."""
    timestamps: Literal["file", "count"] = "file"
    """Times of the frames: as the file says, or frame number / average rate for a file whose time stamps are wrong."""
    remote: bool = False
    """Whether a URL may be opened."""
    longest_seconds: float = 4 * 3600.0
    """A file that lasts, or says that it lasts, longer is refused."""
    threads: int | None = None
    """Decoding threads of a file; None: one for each core, at most 16."""

    def __post_init__(self) -> None:
        require(self.missing_audio in ("error", "silence"), "missing_audio", self.missing_audio, "error or silence")
        require(self.timestamps in ("file", "count"), "timestamps", self.timestamps, "file or count")
        require(self.longest_seconds > 0, "longest_seconds", self.longest_seconds, "seconds above 0")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")

    @property
    def decoding_threads(self) -> int:
        return self.threads or min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


@dataclass
class ReadReport:
    """What was found while a stream was read; filled as it goes on."""

    warnings: list[str] = field(default_factory=list)
    """For people: what was wrong with the file and what was done about it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Codec, sizes, counts, for the record beside the features."""
    damaged_packets: int = 0

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL of a protocol that reaches beyond this machine."""
    return _URL.match(os.fspath(path)) is not None


@contextlib.contextmanager
def open_container(path: str | os.PathLike[str], options: ReadOptions) -> Iterator[Any]:
    """Open a media file with PyAV.

    Raises VideoError for what is not a readable media file, and for a URL unless `options.remote`; MissingDependency
    without PyAV.
    """
    av = import_package("av", "reading video files")
    name = os.fspath(path)
    if is_remote(name):
        if not options.remote:
            raise VideoError(f"{name}: is a URL; it is opened only when that is asked for (--remote)")
        protocols = "http,https,tcp,tls,crypto"
    else:
        _check_file(name)
        protocols = "file"
        name = os.path.abspath(name)  # a colon in a relative path would be taken for a protocol
    try:
        container = av.open(
            name,
            options={"protocol_whitelist": protocols, "format_whitelist": FORMATS, **CODEC_LIMITS},
            timeout=(30.0, 30.0),
        )
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise VideoError(f"{path}: not a video file that FFmpeg can read ({_reason(error)})") from None
    with container:
        yield container


def start_seconds(container: Any, stream: Any) -> Fraction:
    """Return the time stamp of the container's start, in seconds: time 0 of what is read from it.

    A container gives it in microseconds; a stream's own unit, to which it is rounded, tells it exactly.
    """
    unit = Fraction(stream.time_base)
    return (Fraction(container.start_time or 0, 1_000_000) / unit + Fraction(1, 2)).__floor__() * unit


def stated_seconds(stream: Any, container: Any) -> Fraction | None:
    """Return how long a stream lasts by what the file says; None where it does not say."""
    if stream.duration:
        return Fraction(stream.duration) * Fraction(stream.time_base)
    return Fraction(container.duration, 1_000_000) if container.duration else None


def picture_stream(container: Any, path: object) -> Any:
    """Return the video stream to read: never cover art, else the default one, else the one of the largest picture.

    Raises VideoError when there is none, or no decoder for it.
    """
    pictures = [stream for stream in container.streams.video if not stream.disposition.value & _COVER]
    streams = [
        (bool(stream.disposition.value & _DEFAULT), stream.codec_context.width * stream.codec_context.height, stream)
        for stream in pictures
        if stream.codec_context is not None
    ]
    if streams:
        return max(streams, key=lambda each: each[:2])[2]
    if pictures:
        raise VideoError(f"{path}: its picture is of a codec that this FFmpeg does not know; convert it")
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no streams"
    raise VideoError(f"{path}: has no picture (it holds {kinds}); expected a video stream")


def sound_stream(container: Any) -> Any | None:
    """Return the sound stream to read: the default one, else the one of the most channels. None where there is none."""
    streams = [
        (bool(stream.disposition.value & _DEFAULT), stream.codec_context.channels, stream)
        for stream in container.streams.audio
        if stream.codec_context is not None and stream.codec_context.sample_rate
    ]
    return max(streams, key=lambda each: each[:2])[2] if streams else None


def decoded_frames(container: Any, stream: Any, report: ReadReport) -> Iterator[Any]:
    """Yield what a stream's packets decode to; packets that don't are counted and left out.

    A file that ends, or can't be read any more, in the middle of a packet gives what comes before.
    """
    av = import_package("av", "reading video files")
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError as error:
            report.warn(f"the file can't be read to its end ({_reason(error)}); what comes before was used")
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            report.damaged_packets += 1
            continue
        for frame in frames:
            if getattr(frame, "is_corrupt", False):
                report.facts["corrupt_frames"] = report.facts.get("corrupt_frames", 0) + 1
            yield frame


def check_size(width: int, height: int, path: object) -> None:
    """Raise VideoError for a picture too large to hold, or so long that, resized, it would need gigabytes."""
    if width * height > LARGEST_PICTURE:
        raise VideoError(
            f"{path}: pictures of {width} x {height}, more than {LARGEST_PICTURE} pixels; scale the video down first"
        )
    if max(height, width) > LARGEST_ASPECT * min(height, width):
        raise VideoError(
            f"{path}: pictures of {width} x {height}, one side more than {LARGEST_ASPECT} times as long as the other; "
            "crop the video first"
        )


def check_length(seconds: Fraction | float, path: object, options: ReadOptions) -> None:
    """Raise VideoError for a time beyond the longest video that is read."""
    if seconds > options.longest_seconds:
        raise VideoError(
            f"{path}: has a time of {float(seconds):.0f} s, more than the longest video that is read "
            f"({options.longest_seconds:.0f} s); --max-duration raises the limit"
        )


def _check_file(name: str) -> None:
    """Raise VideoError unless a path is a regular file with content; a pipe or a device might never end."""
    try:
        mode, size = os.stat(name).st_mode, os.stat(name).st_size
        if stat.S_ISREG(mode):
            with open(name, "rb"):
                pass
    except (OSError, ValueError) as error:
        raise VideoError(f"{name}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        raise VideoError(f"{Path(name)}: is not a regular file; expected a video file")
    if size == 0:
        raise VideoError(f"{name}: is empty; copy or download it again")


def _reason(error: Exception) -> str:
    return quote(getattr(error, "strerror", None) or error, 120)
