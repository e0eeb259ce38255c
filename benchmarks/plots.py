"""The pictures of the benchmark results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ccnet.plots import new_figure, save_figure


def bars(path: Path, values: Mapping[str, float], *, title: str, unit: str) -> None:
    """One horizontal bar per name, the first name on top."""
    figure = new_figure(8.0, 1.2 + 0.35 * len(values))
    axes = figure.subplots()
    drawn = axes.barh(list(values), list(values.values()))
    axes.bar_label(drawn, fmt="%.4g", padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.margins(x=0.12)
    save_figure(figure, path)


def curves(path: Path, panels: Mapping[str, tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]]) -> None:
    """One panel per title: (x label, y label, curves by name as (x, y) points)."""
    figure = new_figure(8.0 if len(panels) == 1 else 5.0 * len(panels), 4.0)
    for axes, (title, (x_label, y_label, lines)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    save_figure(figure, path)
