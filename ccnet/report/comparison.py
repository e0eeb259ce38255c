"""Methods side by side in the form of the paper's tables, with intervals over videos and a paired test.

Shapes:  S draws   U duration buckets
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ccnet.config import ModelConfig
from ccnet.report.published import COLUMNS, SWITCH_TABLES, Published, SwitchTable, describe
from runtime.evaluation import BUCKET_TIOU, BUCKETS, REPORTED, TIOU
from runtime.significance import Draws, Floats, VideoScores, bootstrap, interval, randomization_test

_REPORTED = [TIOU.index(t) for t in REPORTED]
_CELL = 13


@dataclass(frozen=True)
class Method:
    """One column of the comparison's input: a name, and what it found."""

    name: str
    scores: VideoScores
    model: ModelConfig | None
    """None for an events file, which does not say what wrote it."""
    published: Published | None
    """The row of the paper's Table 1 that it stands beside."""


@dataclass(frozen=True)
class Difference:
    """Average mAP of a method less that of the first one."""

    value: float
    low: float
    high: float
    p: float
    """Of the paired randomization test."""


@dataclass(frozen=True)
class Comparison:
    """Scores of all methods on one subset, and how sure they are."""

    subset: str
    methods: tuple[Method, ...]
    draws: Draws
    differences: tuple[Difference, ...]
    """Of the second and later methods."""
    samples: int
    is_unav100: bool
    """Whether the published numbers are of the same videos."""

    def text(self) -> str:
        """Format all tables that the methods fill."""
        parts = [self._methods(), self._differences(), *self._switches(), self._durations(), self._beside()]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values; mAP as shares, not percent."""
        return {
            "subset": self.subset,
            "videos": self.methods[0].scores.videos,
            "draws": self.samples,
            "methods": [self._method_json(i) for i in range(len(self.methods))],
            "differences": [
                {"method": method.name, "against": self.methods[0].name, **vars(difference)}
                for method, difference in zip(self.methods[1:], self.differences, strict=True)
            ],
            "published_numbers_are_of_these_videos": self.is_unav100,
        }

    def _method_json(self, index: int) -> dict[str, Any]:
        method = self.methods[index]
        scores, intervals = _row(method.scores.map_at()), self._intervals(index)
        recall = method.scores.recall().tolist()
        return {
            "name": method.name,
            "network": None if method.model is None else describe(method.model),
            "map": dict(zip(COLUMNS, scores, strict=True)),
            "map_interval": dict(zip(COLUMNS, intervals, strict=True)),
            "recall": [
                {"above": above, "up_to": up_to, "recall": _known(value), "interval": [_known(v) for v in bounds]}
                for (above, up_to), value, bounds in zip(BUCKETS, recall, self._recall_intervals(index), strict=True)
            ],
            "published": None if method.published is None else vars(method.published),
        }

    def _intervals(self, index: int) -> list[tuple[float, float]]:
        """Return the interval of each of `COLUMNS`."""
        draws, scores = self.draws.map_at[index], _row(self.methods[index].scores.map_at())
        columns = [*draws[:, _REPORTED].T, draws.mean(axis=1)]
        return [_share(score, column) for score, column in zip(scores, columns, strict=True)]

    def _recall_intervals(self, index: int) -> list[tuple[float, float]]:
        shares = self.methods[index].scores.recall().tolist()
        return [_share(share, column) for share, column in zip(shares, self.draws.recall[index].T, strict=True)]

    def _methods(self) -> list[str]:
        width = self._width()
        lines = [
            f"Table 1: methods. mAP (%) on {self.subset}, {self.methods[0].scores.videos} videos; 95 % intervals over "
            f"{self.samples} draws of videos",
            f"{'tIoU':<{width}}" + "".join(f"{c:>{_CELL}}" for c in COLUMNS),
        ]
        for index, method in enumerate(self.methods):
            lines += [
                f"{method.name:<{width}}" + _cells(f"{100 * v:.1f}" for v in _row(method.scores.map_at())),
                f"{'  95 %':<{width}}" + _cells(map(_range, self._intervals(index))),
            ]
            if method.published is not None:
                paper = f"  paper, {method.published.name}"
                lines.append(f"{paper:<{width}}" + _cells(f"{v:.1f}" for v in method.published.scores))
        return lines

    def _differences(self) -> list[str]:
        if not self.differences:
            return []
        lines = [f"Average mAP against {self.methods[0].name}, in points, on the same draws"]
        for method, d in zip(self.methods[1:], self.differences, strict=True):
            lines.append(
                f"{method.name:<{self._width()}}{100 * d.value:+13.1f}   95 %: {100 * d.low:+.1f} to "
                f"{100 * d.high:+.1f}   p = {d.p:.3g} (paired randomization test, {self.samples} exchanges)"
            )
        return lines

    def _switches(self) -> Iterator[list[str]]:
        """Yield those of Tables 2 to 4 of which two rows or more are given."""
        for table in SWITCH_TABLES:
            rows = {
                index: row
                for index, method in enumerate(self.methods)
                if method.model is not None and (row := table.row_of(method.model)) is not None
            }
            if len(set(rows.values())) > 1:
                yield self._switch_table(table, rows)

    def _switch_table(self, table: SwitchTable, rows: dict[int, int]) -> list[str]:
        header = "".join(f"{name:>12}" for name in table.settings)
        lines = [
            f"Table {table.number}: {table.title}. mAP (%)",
            f"{'':<{self._width()}}{header}" + "".join(f"{c:>7}" for c in COLUMNS) + f"{'95 % of Avg.':>16}",
        ]
        for index in sorted(rows, key=lambda i: rows[i]):
            method = self.methods[index]
            values = "".join(f"{_switch(value):>12}" for value in table.rows[rows[index]])
            scores = "".join(f"{100 * v:7.1f}" for v in _row(method.scores.map_at()))
            lines.append(f"{method.name:<{self._width()}}{values}{scores}{_range(self._intervals(index)[-1]):>16}")
        return lines

    def _durations(self) -> list[str]:
        width = self._width()
        events = self.methods[0].scores.events.sum(axis=0).tolist()
        header = _cells(f"({above:g}, {up_to:g}] s" for above, up_to in BUCKETS)
        lines = [
            f"Fig. 3: events found (right class, tIoU > {BUCKET_TIOU}) by duration, in percent",
            f"{'':<{width}}{header}",
            f"{'events':<{width}}" + _cells(map(str, events)),
        ]
        for index, method in enumerate(self.methods):
            shares = method.scores.recall().tolist()
            lines += [
                f"{method.name:<{width}}" + _cells("-" if np.isnan(v) else f"{100 * v:.1f}" for v in shares),
                f"{'  95 %':<{width}}" + _cells(map(_range, self._recall_intervals(index))),
            ]
        return lines

    def _beside(self) -> list[str]:
        """Say which published row each method stands beside."""
        lines = []
        for method in self.methods:
            rows = [] if method.published is None else [f"Table 1, {method.published.name}"]
            if method.model is not None:
                rows += [
                    f"Table {table.number}, {_row_text(table, row)}"
                    for table in SWITCH_TABLES
                    if (row := table.row_of(method.model)) is not None
                ]
            what = "" if method.model is None else f" ({describe(method.model)})"
            lines.append(f"{method.name}{what} stands beside: {'; '.join(rows) or 'no row of the paper'}")
        if not self.is_unav100:
            lines.append("The paper's numbers are of UnAV-100's test subset, which this is not.")
        return lines

    def _width(self) -> int:
        names = [m.name for m in self.methods] + [f"  paper, {m.published.name}" for m in self.methods if m.published]
        return max(len(name) for name in names) + 2


def compare(methods: Sequence[Method], *, subset: str, samples: int, seed: int, is_unav100: bool) -> Comparison:
    """Compare methods that were scored on the same videos of a subset."""
    draws = bootstrap([method.scores for method in methods], samples=samples, seed=seed)
    averages = draws.average_map
    first = methods[0].scores
    differences = []
    for index, method in enumerate(methods[1:], 1):
        value = float(method.scores.map_at().mean() - first.map_at().mean())
        low, high = interval(value, averages[index] - averages[0])
        p = randomization_test(first, method.scores, samples=samples, seed=seed)
        differences.append(Difference(value, low, high, p))
    return Comparison(subset, tuple(methods), draws, tuple(differences), samples, is_unav100)


def _row(map_at: Floats) -> list[float]:
    """Return the values of `COLUMNS` from mAP [K] at `TIOU`."""
    return [*map_at[_REPORTED].tolist(), float(map_at.mean())]


def _share(score: float, draws: Floats) -> tuple[float, float]:
    low, high = interval(score, draws)
    return max(low, 0.0), min(high, 1.0)


def _cells(values: Any) -> str:
    return "".join(f"{value:>{_CELL}}" for value in values)


def _range(bounds: tuple[float, float]) -> str:
    return "-" if np.isnan(bounds[0]) else f"{100 * bounds[0]:.1f} - {100 * bounds[1]:.1f}"


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _switch(value: bool | str) -> str:
    return value if isinstance(value, str) else ("on" if value else "off")


def _row_text(table: SwitchTable, row: int) -> str:
    return ", ".join(f"{name} {_switch(value)}" for name, value in zip(table.settings, table.rows[row], strict=True))
