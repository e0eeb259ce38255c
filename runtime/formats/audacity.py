"""Audacity label tracks: `start<tab>end<tab>label` a line, in seconds. One file a video.

The text of a label is `label (0.8734)`, or the label alone. Lines of frequency ranges (they begin with a backslash) are
passed over.
"""

from __future__ import annotations

from runtime.formats.events import Video, check_event, label_text, parse_label_text, parse_number
from runtime.formats.text import at
from runtime.records import BadRecord
from runtime.schema import show


def encode(video: Video) -> str:
    """Return a video's events as a label track, in the order of time. Raises BadRecord for a label with a tab in it."""
    events = sorted(video.events, key=lambda event: (event.start, event.end))
    return "".join(f"{event.start:.6f}\t{event.end:.6f}\t{label_text(event)}\n" for event in events)


def decode(text: str, video_id: str) -> Video:
    """Read a label track. Raises BadRecord naming the line."""
    events = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("\\"):
            continue
        cells = line.split("\t")
        with at(f"line {number}"):
            if len(cells) != 3:
                raise BadRecord(f"got {show(line)}, expected start, end and label with tabs between them")
            label, score = parse_label_text(cells[2].strip())
            events.append(check_event(parse_number(cells[0], "start"), parse_number(cells[1], "end"), label, score))
    return Video(video_id, events)
