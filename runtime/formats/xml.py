"""XML of other tools, read strictly and bounded: no document type, so no entities; no more than a few levels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from runtime.records import BadRecord
from runtime.schema import show

_DEEPEST = 32


@dataclass(eq=False)
class Element:
    """An element, with the text directly inside it."""

    tag: str
    attributes: dict[str, str]
    line: int
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> Iterator[Element]:
        """Yield the children of one kind."""
        return (child for child in self.children if child.tag == tag)

    def first(self, tag: str) -> Element:
        """Return the first child of one kind. Raises BadRecord where there is none."""
        for child in self.all(tag):
            return child
        raise BadRecord(f"line {self.line}: <{self.tag}> has no <{tag}>")

    def attribute(self, name: str) -> str:
        """Return an attribute. Raises BadRecord where it is missing."""
        try:
            return self.attributes[name]
        except KeyError:
            raise BadRecord(f"line {self.line}: <{self.tag}> has no attribute {name}") from None


def parse_xml(content: bytes) -> Element:
    """Return the root of an XML text. Raises BadRecord naming the line."""
    parser = expat.ParserCreate()
    parser.buffer_text = True
    top = Element("", {}, 1)
    opened = [top]

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(opened) > _DEEPEST:
            raise BadRecord(f"line {parser.CurrentLineNumber}: nested deeper than {_DEEPEST} elements")
        element = Element(tag, attributes, parser.CurrentLineNumber)
        opened[-1].children.append(element)
        opened.append(element)

    def end(tag: str) -> None:
        opened.pop()

    def text(data: str) -> None:
        opened[-1].text += data

    def doctype(*_: object) -> None:
        raise BadRecord(f"line {parser.CurrentLineNumber}: has a document type (DOCTYPE), expected a file without one")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise BadRecord(f"line {error.lineno}: not valid XML ({expat.ErrorString(error.code)})") from None
    except (ValueError, LookupError) as error:  # an encoding that Python does not know, or that is not one of bytes
        raise BadRecord(f"not valid XML ({show(str(error))})") from None
    return top.children[0]
