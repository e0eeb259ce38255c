"""What a training run leaves behind: metrics.csv, steps.csv, TensorBoard events.

The tables are kept in memory and in the training state, and are written whole, atomically. A resumed run continues them
from the rows of its state, so that no row is missing or there twice.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.files import atomic_file
from runtime.packages import missing

METRICS_FILE = "metrics.csv"
STEPS_FILE = "steps.csv"
TENSORBOARD_FOLDER = "tensorboard"

LOSS_COLUMNS = ("loss", "classification_loss", "offset_loss", "gradient_norm")
"""Means over the steps that a row covers; the gradient norm is taken before clipping."""
STEP_COLUMNS = ("step", "epoch", "learning_rate", *LOSS_COLUMNS, "samples_per_second")
EPOCH_COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    *LOSS_COLUMNS,
    "samples_per_second",
    "loading_share",
    "validation_map",
    "validation_map_50",
)
"""`step`: steps done. `loading_share`: part of the epoch's time spent waiting for data. `validation_map`: Avg over tIoU
0.1:0.1:0.9, `validation_map_50` at 0.5; both empty in epochs without validation."""

Row = dict[str, float | int | None]


class Journal:
    """The two tables of a run; TensorBoard gets the same numbers."""

    def __init__(self, folder: Path, epochs: Sequence[Row] = (), steps: Sequence[Row] = ()) -> None:
        """Continue the tables from `epochs` and `steps`, the rows of the state that is resumed."""
        self.folder = folder
        self.epochs: list[Row] = [dict(row) for row in epochs]
        self.steps: list[Row] = [dict(row) for row in steps]
        self._tensorboard = _open_tensorboard(folder / TENSORBOARD_FOLDER, int(_last(self.steps, "step")))

    def add_steps(self, row: Row) -> None:
        """Add a row of `STEP_COLUMNS`; the next `write` puts it on disk."""
        self.steps.append(row)
        self._scalars("train", row, ("learning_rate", *LOSS_COLUMNS, "samples_per_second"))

    def add_epoch(self, row: Row) -> None:
        """Add a row of `EPOCH_COLUMNS`; the next `write` puts it on disk."""
        self.epochs.append(row)
        self._scalars("epoch", row, EPOCH_COLUMNS[3:])

    def add_picture(self, name: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """Show an image [height, width, 3] in TensorBoard."""
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def write(self) -> None:
        """Replace both tables on disk."""
        _write_table(self.folder / METRICS_FILE, EPOCH_COLUMNS, self.epochs)
        _write_table(self.folder / STEPS_FILE, STEP_COLUMNS, self.steps)
        self._tensorboard.flush()

    def close(self) -> None:
        self._tensorboard.close()

    def _scalars(self, group: str, row: Row, columns: Iterable[str]) -> None:
        for column in columns:
            value = row[column]
            if value is not None:
                self._tensorboard.add_scalar(f"{group}/{column}", value, row["step"])


def _open_tensorboard(folder: Path, step: int) -> Any:
    """Return a writer that hides what an abandoned part of the run logged after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise missing("tensorboard", "Training") from error
    writer: Any = SummaryWriter  # untyped in torch
    return writer(str(folder), purge_step=step + 1 if step else None)


def _last(rows: Sequence[Row], column: str) -> float:
    value = rows[-1][column] if rows else 0
    return value or 0


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    with atomic_file(path, "w") as stream:
        stream.write(text.getvalue())


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) or not math.isfinite(value) else f"{value:.8g}"
