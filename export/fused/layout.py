"""Where the points of the fused network stand, and which of them convolutions and pooling read.

Shapes:  P points of all levels side by side   K kernel taps (3)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KERNEL = 3
ALIGNMENT = 8
"""Points of a level are a multiple of this: engines would otherwise copy the operands of matmuls into padded ones."""


@dataclass(frozen=True)
class Layout:
    """The points of some levels side by side, the finest level first, each padded to a multiple of ALIGNMENT.

    Padding points stand behind the steps of their level. They are never valid, and no step reads them.
    """

    steps: tuple[int, ...]
    """Steps of each level."""

    @property
    def sizes(self) -> list[int]:
        """Points of each level."""
        return [-(-steps // ALIGNMENT) * ALIGNMENT for steps in self.steps]

    @property
    def num_points(self) -> int:
        return sum(self.sizes)

    def part(self, start: int, stop: int | None = None) -> Layout:
        """Return the layout of some consecutive levels alone."""
        return Layout(self.steps[start:stop])

    def level(self) -> Tensor:
        """Return the level [P] of every point, counted from the first one of this layout."""
        return torch.repeat_interleave(torch.arange(len(self.steps)), torch.tensor(self.sizes))

    def position(self) -> Tensor:
        """Return the position [P] of every point in its level."""
        return torch.cat([torch.arange(size) for size in self.sizes])

    def is_step(self) -> Tensor:
        """Return which points [P] bool are steps; the others are padding."""
        return self.position() < torch.tensor(self.steps)[self.level()]

    def other_level(self) -> Tensor:
        """Return [P, P] float: 1 where two points are of different levels, else 0."""
        return (self.level()[:, None] != self.level()).float()

    def taps(self) -> Tensor:
        """Return the points [K, P] that a kernel-3 convolution reads; P, a zero row, stands for no step."""
        steps, start = torch.tensor(self.steps)[self.level()], torch.arange(self.num_points) - self.position()
        return _taps(self.position(), steps, start, zero_row=self.num_points)

    def strided_taps(self, level: int) -> Tensor:
        """Return the points [K, points of `level` + 1] of `level` that a convolution of stride 2 reads.

        The number of points of `level`, a zero row, stands for no step.
        """
        centre = 2 * torch.arange(self.sizes[level + 1])
        return _taps(centre, torch.tensor(self.steps[level]), torch.tensor(0), zero_row=self.sizes[level])

    def pool_taps(self, level: int) -> Tensor:
        """Return the points [K, points of `level` + 1] of `level` that max-pooling reads."""
        taps = 2 * torch.arange(self.sizes[level + 1]) + torch.arange(-1, 2)[:, None]
        return taps.clamp(0, self.sizes[level] - 1)


def sequence_taps(length: int) -> Tensor:
    """Return the places [K, length] of a sequence that a kernel-3 convolution reads; `length` is a zero row."""
    return _taps(torch.arange(length), torch.tensor(length), torch.tensor(0), zero_row=length)


def _taps(centre: Tensor, steps: Tensor, start: Tensor, *, zero_row: int) -> Tensor:
    taps = centre + torch.arange(-1, 2)[:, None]
    return torch.where((taps >= 0) & (taps < steps), start + taps, zero_row)
