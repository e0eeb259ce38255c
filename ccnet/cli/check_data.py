"""`ccnet check-data`: look at annotations and features before training.

Exit status: 0 when nothing was found that stops training or makes its result meaningless (notes are for a person to
judge), 1 when something was, 2 when it could not be checked.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ccnet.cli.options import add_config_arguments, add_json_argument, print_result, read_config
from runtime.annotations import SUBSETS, Annotations, read_class_list, survey_annotations
from runtime.coverage import video_list
from runtime.data_check import ClassCount, DataReport, Finding, check_data
from runtime.errors import AnnotationError

TAKES_OVERRIDES = True

_SHOWN = 5
"""Cases of a finding, and classes, that are printed."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check-data",
        help="look at annotations and features before training",
        usage="ccnet check-data [--config FILE] --preset P --annotations F --features DIR [--classes C] [--quick] "
        "[--per-class] [--quiet] [--json] [--section.field value ...]",
        description="Check annotations and feature files against a preset and settings: lengths against durations, the "
        "time base, values that are not finite, identical files, events that are never seen, classes without examples. "
        "Exit status 1 when something would stop training or make its result meaningless.",
    )
    add_config_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="headers alone: no values, no identical files")
    parser.add_argument("--per-class", action="store_true", help="print the counts of every class")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json_argument(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = read_config(arguments, overrides)
    labels = None if arguments.classes is None else read_class_list(arguments.classes)
    annotations, wrong = survey_annotations(arguments.annotations, labels)
    bad = dict.fromkeys(wrong, "")
    if annotations is None:
        raise AnnotationError(f"{arguments.annotations}: no video of it can be used:\n{_listed(bad)}")
    model = dataclasses.replace(config.model, num_classes=len(annotations.labels))
    spec = dataclasses.replace(config, model=model).spec(annotations.labels)
    report = check_data(annotations, arguments.features, spec, quick=arguments.quick, quiet=arguments.quiet)
    first: list[Finding] = []
    if bad:
        text = "annotations are wrong (their videos were left out here); training does not start with them"
        first.append(Finding("problem", "annotations", text, bad))
    if config.model.num_classes != len(annotations.labels):
        text = (
            f"the file has {len(annotations.labels)} classes, model.num_classes is {config.model.num_classes}; use "
            f"--model.num_classes {len(annotations.labels)}"
        )
        first.append(Finding("problem", "number of classes", text))
    report = dataclasses.replace(report, findings=(*first, *report.findings))
    record = {"annotations": str(arguments.annotations), "features": str(arguments.features), **report.to_json()}
    print_result(arguments, record, "\n".join(_text(report, annotations, per_class=arguments.per_class)))
    return 1 if report.problems else 0


def _text(report: DataReport, annotations: Annotations, *, per_class: bool) -> Iterator[str]:
    counts = ", ".join(f"{count} {name}" for name, count in report.videos.items())
    yield f"{annotations.path}: {counts} videos, {len(annotations.labels)} classes"
    if not report.values_read:
        yield "only headers were read: values and identical files are not checked"
    for finding in report.findings:
        count = f" ({len(finding.cases)})" if finding.cases else ""
        yield f"\n{finding.severity.upper()}: {finding.text}{count}"
        if finding.cases:
            yield _listed(finding.cases)
    yield ""
    yield from _classes(report.classes, every=per_class)
    yield ""
    problems, notes = len(report.problems), len(report.findings) - len(report.problems)
    yield f"{problems} problem(s), {notes} note(s)" + ("" if problems else ": training can start")


def _listed(cases: Mapping[str, str]) -> str:
    return video_list(cases, limit=_SHOWN).replace(": \n", "\n").removesuffix(": ")


def _classes(classes: Sequence[ClassCount], *, every: bool) -> Iterator[str]:
    """Yield the counts of classes by training events: all, or the rarest and the most frequent ones."""
    ordered = sorted(classes, key=lambda count: count.events["train"])
    events = [count.events["train"] for count in ordered]
    yield (
        f"training events by class: {events[0]} to {events[-1]}, median {events[len(events) // 2]}; an even share is "
        f"{sum(events) / len(events):.1f}"
    )
    width = max(len(count.label) for count in classes)
    yield f"  {'class':<{width}}" + "".join(f"{name:>12}" for name in SUBSETS) + f"{'times even':>12}{'median s':>10}"
    cut = not every and len(ordered) > 2 * _SHOWN
    shown = [*ordered[:_SHOWN], *ordered[-_SHOWN:]] if cut else ordered
    for i, count in enumerate(shown):
        if cut and i == _SHOWN:
            yield f"  ... {len(ordered) - 2 * _SHOWN} more (--per-class)"
        share = count.events["train"] * len(classes) / max(1, sum(events))
        yield (
            f"  {count.label:<{width}}"
            + "".join(f"{count.events[name]:>12}" for name in SUBSETS)
            + f"{share:>12.2f}{count.seconds:>10.1f}"
        )
