"""ELAN documents (.eaf). One file a video; an annotation is an event, and its value the label.

A tier holds annotations that do not overlap, so a class has one tier, or several where its events overlap. The score is
an annotation that is associated with the event's, on a dependent tier of the type `score`. Times have milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from runtime.formats.events import Event, Video, check_event, check_line, parse_number
from runtime.formats.subtitles import to_milliseconds
from runtime.formats.text import at
from runtime.formats.xml import Element, parse_xml
from runtime.records import BadRecord
from runtime.schema import show

_DURATION = "ccnet:duration"
"""Property of the header that holds the seconds of the video; ELAN keeps it."""

_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="ccnet" DATE="2000-01-01T00:00:00+00:00" FORMAT="3.0" VERSION="3.0" \
xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv3.0.xsd">
"""
_TAIL = """    <LINGUISTIC_TYPE GRAPHIC_REFERENCES="false" LINGUISTIC_TYPE_ID="event" TIME_ALIGNABLE="true"/>
    <LINGUISTIC_TYPE CONSTRAINTS="Symbolic_Association" GRAPHIC_REFERENCES="false" LINGUISTIC_TYPE_ID="score" \
TIME_ALIGNABLE="false"/>
    <CONSTRAINT DESCRIPTION="1-1 association with a parent annotation" STEREOTYPE="Symbolic_Association"/>
</ANNOTATION_DOCUMENT>
"""


def encode(video: Video) -> str:
    """Return a video's events as an ELAN document. Raises BadRecord for a label that is not one line."""
    slots: list[int] = []
    tiers: list[str] = []
    number = 0
    for name, events in _tiers(video):
        lines, scores = [], []
        for event in events:
            start, end = to_milliseconds(event)
            slots += start, end
            number += 1
            parent = f"a{number}"
            times = f'TIME_SLOT_REF1="ts{len(slots) - 1}" TIME_SLOT_REF2="ts{len(slots)}"'
            lines.append(_annotation(f'ALIGNABLE_ANNOTATION ANNOTATION_ID="{parent}" {times}', event.label))
            if event.score is not None:
                number += 1
                score = f'REF_ANNOTATION ANNOTATION_ID="a{number}" ANNOTATION_REF="{parent}"'
                scores.append(_annotation(score, repr(event.score)))
        tiers.append(_tier(f'LINGUISTIC_TYPE_REF="event" TIER_ID={quoteattr(name)}', lines))
        if scores:
            child = f'LINGUISTIC_TYPE_REF="score" PARENT_REF={quoteattr(name)} TIER_ID={quoteattr(f"{name} score")}'
            tiers.append(_tier(child, scores))
    properties = f'        <PROPERTY NAME="lastUsedAnnotationId">{number}</PROPERTY>\n'
    if video.duration is not None:
        properties += f'        <PROPERTY NAME="{_DURATION}">{video.duration!r}</PROPERTY>\n'
    header = f'    <HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">\n{properties}    </HEADER>\n'
    order = "".join(
        f'        <TIME_SLOT TIME_SLOT_ID="ts{i}" TIME_VALUE="{value}"/>\n' for i, value in enumerate(slots, 1)
    )
    return f"{_HEAD}{header}    <TIME_ORDER>\n{order}    </TIME_ORDER>\n{''.join(tiers)}{_TAIL}"


def _tiers(video: Video) -> Iterator[tuple[str, list[Event]]]:
    """Yield tiers, each with events of one class that do not overlap."""
    classes: dict[str, list[list[Event]]] = {}
    for event in sorted(video.events, key=lambda event: (event.label, event.start, event.end)):
        tiers = classes.setdefault(check_line(event.label), [])
        start = to_milliseconds(event)[0]
        tier = next((tier for tier in tiers if to_milliseconds(tier[-1])[1] <= start), None)
        if tier is None:
            tiers.append(tier := [])
        tier.append(event)
    used: set[str] = set()
    for label, tiers in classes.items():
        for i, tier in enumerate(tiers):
            name = label if i == 0 else f"{label} #{i + 1}"
            while name in used or f"{name} score" in used:  # a class that is called like a tier of another one
                name += "'"
            used |= {name, f"{name} score"}
            yield name, tier


def _tier(attributes: str, lines: list[str]) -> str:
    return f"    <TIER {attributes}>\n{''.join(lines)}    </TIER>\n"


def _annotation(tag: str, value: str) -> str:
    content = f"<ANNOTATION_VALUE>{escape(value)}</ANNOTATION_VALUE>"
    return f"        <ANNOTATION><{tag}>{content}</{tag.partition(' ')[0]}></ANNOTATION>\n"


def decode(content: bytes, video_id: str) -> Video:
    """Read an ELAN document. Raises BadRecord naming the line.

    Events are the annotations of tiers that depend on no other; one without a value is of the class that the tier is
    named after. Of the dependent tiers, those of the type `score` are read.
    """
    root = parse_xml(content)
    if root.tag != "ANNOTATION_DOCUMENT":
        raise BadRecord(f"line {root.line}: got <{show(root.tag)}>, expected <ANNOTATION_DOCUMENT>")
    header = root.first("HEADER")
    if (unit := header.attributes.get("TIME_UNITS", "milliseconds")) != "milliseconds":
        raise BadRecord(f"line {header.line}: TIME_UNITS: got {show(unit)}, expected milliseconds")
    slots = {slot.attribute("TIME_SLOT_ID"): slot for slot in root.first("TIME_ORDER").all("TIME_SLOT")}
    tiers = list(root.all("TIER"))
    scores = _scores(tiers)
    events = []
    for tier in tiers:
        if "PARENT_REF" in tier.attributes:
            continue
        for annotation in _annotations(tier, "ALIGNABLE_ANNOTATION"):
            with at(f"line {annotation.line}"):
                start, end = (_time(slots, annotation.attribute(f"TIME_SLOT_REF{i}")) for i in (1, 2))
                label = _value(annotation) or tier.attribute("TIER_ID")
                events.append(check_event(start, end, label, scores.get(annotation.attribute("ANNOTATION_ID"))))
    return Video(video_id, events, _duration(header))


def _annotations(tier: Element, kind: str) -> Iterator[Element]:
    return (element for annotation in tier.all("ANNOTATION") for element in annotation.all(kind))


def _scores(tiers: list[Element]) -> dict[str, float]:
    """Return the score of each annotation that has one, by annotation id."""
    scores = {}
    for tier in tiers:
        if "PARENT_REF" in tier.attributes and tier.attributes.get("LINGUISTIC_TYPE_REF") == "score":
            for annotation in _annotations(tier, "REF_ANNOTATION"):
                with at(f"line {annotation.line}"):
                    scores[annotation.attribute("ANNOTATION_REF")] = parse_number(_value(annotation), "score")
    return scores


def _value(annotation: Element) -> str:
    return annotation.first("ANNOTATION_VALUE").text.strip()


def _time(slots: dict[str, Element], name: str) -> float:
    slot = slots.get(name)
    if slot is None:
        raise BadRecord(f"time slot {show(name)} does not exist")
    text = slot.attribute("TIME_VALUE")
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise BadRecord(f"TIME_VALUE of time slot {show(name)}: got {show(text)}, expected milliseconds")
    return int(text) / 1000


def _duration(header: Element) -> float | None:
    for item in header.all("PROPERTY"):
        if item.attributes.get("NAME") == _DURATION:
            return parse_number(item.text, f"line {item.line}: {_DURATION}")
    return None
