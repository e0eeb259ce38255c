"""WebVTT and SubRip (SRT): events as subtitles, shown by any player. One file a video; a cue is an event.

The text of a cue is `label (0.8734)`, or the label alone. Times have milliseconds.
"""

from __future__ import annotations

import html
import re

from runtime.formats.events import Event, Video, check_event, label_text, parse_label_text
from runtime.formats.text import at
from runtime.records import BadRecord
from runtime.schema import show

_VTT_TIME = r"(?:(\d{2,5}):)?([0-5]\d):([0-5]\d)\.(\d{3})"
_VTT_TIMING = re.compile(rf"{_VTT_TIME}[ \t]+-->[ \t]+{_VTT_TIME}(?:[ \t].*)?").fullmatch
_SRT_TIME = r"(\d{1,5}):([0-5]?\d):([0-5]?\d)[,.](\d{1,3})"
_SRT_TIMING = re.compile(rf"{_SRT_TIME}[ \t]*-->[ \t]*{_SRT_TIME}(?:[ \t].*)?").fullmatch
_SRT_TAG = re.compile(r"</?(?:[bius]|font(?: [^<>]{0,200})?)>", re.IGNORECASE)
_VTT_TAG = re.compile(r"<[^<>]{0,1000}>")


def encode_webvtt(video: Video) -> str:
    """Return a video's events as WebVTT, in the order of time. Raises BadRecord for a label that no cue can hold."""
    cues = [f"{_timing(event, '.')}\n{html.escape(label_text(event), quote=False)}\n" for event in _ordered(video)]
    return "\n".join(["WEBVTT\n", *cues])


def encode_srt(video: Video) -> str:
    """Return a video's events as SRT, in the order of time. Raises BadRecord for a label that no cue can hold."""
    cues = []
    for number, event in enumerate(_ordered(video), 1):
        text = label_text(event)
        if "-->" in text:
            raise BadRecord(f"label {show(event.label)}: SRT can't hold '-->' in a text; use webvtt")
        cues.append(f"{number}\n{_timing(event, ',')}\n{text}\n")
    return "\n".join(cues)


def decode_webvtt(text: str, video_id: str) -> Video:
    """Read WebVTT; notes, styles, regions and cue settings are passed over. Raises BadRecord naming the line."""
    first, _, rest = text.partition("\n")
    if re.fullmatch(r"WEBVTT(?:[ \t].*)?", first) is None:
        raise BadRecord(f"line 1: got {show(first)}, expected WEBVTT")
    events = []
    for begin, lines in _blocks(first + "\n" + rest):
        if begin == 1 or re.match(r"(NOTE|STYLE|REGION)\b", lines[0]):
            continue
        at = next((i for i, line in enumerate(lines[:2]) if "-->" in line), None)
        if at is None:
            raise BadRecord(f"line {begin}: got {show(lines[0])}, expected a cue with its times")
        cue = " ".join(lines[at + 1 :])
        label = html.unescape(_VTT_TAG.sub("", cue)).strip()
        events.append(_event(_VTT_TIMING(lines[at]), lines[at], label, begin + at))
    return Video(video_id, events)


def decode_srt(text: str, video_id: str) -> Video:
    """Read SRT. Raises BadRecord naming the line."""
    events = []
    for begin, lines in _blocks(text):
        at = 0 if "-->" in lines[0] else 1
        if len(lines) <= at or (at and not lines[0].strip().isdecimal()):
            raise BadRecord(f"line {begin}: got {show(lines[0])}, expected a number and then the times of a cue")
        label = _SRT_TAG.sub("", " ".join(lines[at + 1 :])).strip()
        events.append(_event(_SRT_TIMING(lines[at].strip()), lines[at], label, begin + at))
    return Video(video_id, events)


def _event(match: re.Match[str] | None, line: str, text: str, number: int) -> Event:
    with at(f"line {number}"):
        if match is None:
            raise BadRecord(f"got {show(line)}, expected start --> end")
        label, score = parse_label_text(text)
        parts = match.groups()
        return check_event(_seconds(parts[:4]), _seconds(parts[4:]), label, score)


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return float(f"{whole}.{fraction or 0}")


def _blocks(text: str) -> list[tuple[int, list[str]]]:
    """Return the parts between blank lines, each with the number of its first line."""
    blocks: list[tuple[int, list[str]]] = []
    open_block = False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            open_block = False
        elif open_block:
            blocks[-1][1].append(line)
        else:
            blocks.append((number, [line]))
            open_block = True
    return blocks


def _ordered(video: Video) -> list[Event]:
    return sorted(video.events, key=lambda event: (event.start, event.end))


def _timing(event: Event, point: str) -> str:
    start, end = to_milliseconds(event)
    return f"{_clock(start, point)} --> {_clock(end, point)}"


def to_milliseconds(event: Event) -> tuple[int, int]:
    """Return start and end in milliseconds: from 0 on, and at least one long, as the formats demand."""
    start = max(round(event.start * 1000), 0)
    return start, max(round(event.end * 1000), start + 1)


def _clock(milliseconds: int, point: str) -> str:
    seconds, fraction = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{fraction:03}"
