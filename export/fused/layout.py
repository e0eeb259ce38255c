"""Where the points of the fused network stand, and which of them convolutions and pooling read.

Shapes:  P points of all levels side by side   K kernel taps (3)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KERNEL = 3
ALIGNMENT = 8
"""Points of a level are a multiple of this: engines else copy operands of matrix matmuls into padded ones."""


@dataclass(frozen=True)
class Layout:
    """Points of some levels side by side, the finest first; every level a multiple of ALIGNMENT, for the matmuls.

    Points behind a level's steps are never valid. Behind the steps of a network that was cut to fewer of them, the
    first such point is a *halo*, which stands for all the padding that was cut off: what an invalid step holds
    depends on biases, time-axis layers and valid steps alone, so the halo holds what the first cut step would hold,
    and valid points beside it see what they saw before. No valid point ever reads the other ones.
    """

    steps: tuple[int, ...]
    """Steps per level that an input can fill."""
    trained: tuple[int, ...]
    """Steps per level of the trained network."""

    @property
    def cut(self) -> bool:
        return self.steps != self.trained

    @property
    def lengths(self) -> list[int]:
        """Points per level."""
        return [-(-(n + self.cut) // ALIGNMENT) * ALIGNMENT for n in self.steps]

    @property
    def num_points(self) -> int:
        return sum(self.lengths)

    def part(self, start: int, stop: int | None = None) -> Layout:
        """The layout of some consecutive levels alone."""
        return Layout(self.steps[start:stop], self.trained[start:stop])

    def level(self) -> Tensor:
        """[P] level of every point, counted from the first one of this layout."""
        return torch.repeat_interleave(torch.arange(len(self.steps)), torch.tensor(self.lengths))

    def position(self) -> Tensor:
        """[P] place of every point in its level."""
        return torch.cat([torch.arange(n) for n in self.lengths])

    def is_step(self) -> Tensor:
        """[P] bool: the point is a step that an input can fill."""
        return self.position() < torch.tensor(self.steps)[self.level()]

    def is_trained(self) -> Tensor:
        """[P] bool: the trained network has this step, too; elsewhere a point is there for alignment alone."""
        return self.position() < torch.tensor(self.trained)[self.level()]

    def other_level(self) -> Tensor:
        """[P, P] float: 1 where the two points are of different levels, else 0."""
        return (self.level()[:, None] != self.level()).float()

    def taps(self) -> Tensor:
        """[K, P] the points that a kernel-3 convolution reads; P, a zero row, outside the trained level."""
        start = torch.arange(self.num_points) - self.position()
        return self._taps(self.position(), start, torch.tensor(self.lengths)[self.level()], self.level())

    def strided_taps(self, level: int) -> Tensor:
        """[K, points of `level` + 1] the points of `level` that a stride-2 convolution reads; else its length."""
        points = 2 * torch.arange(self.lengths[level + 1])
        return self.part(level, level + 1)._taps(points, torch.tensor(0), torch.tensor(self.lengths[level]), None)

    def _taps(self, position: Tensor, start: Tensor, length: Tensor, level: Tensor | None) -> Tensor:
        trained = torch.tensor(self.trained)[level if level is not None else 0]
        taps = position + torch.arange(-1, 2)[:, None]
        inside = (taps >= 0) & (taps < torch.minimum(length, trained))
        return torch.where(inside, start + taps, self.num_points)

    def pool_taps(self, level: int) -> Tensor:
        """[K, points of `level` + 1] the points of `level` that max-pooling reads."""
        taps = 2 * torch.arange(self.lengths[level + 1]) + torch.arange(-1, 2)[:, None]
        return taps.clamp(0, self.lengths[level] - 1)


def sequence_taps(length: int) -> Tensor:
    """[K, length] the places that a kernel-3 convolution reads in a plain sequence; `length`, a zero row, outside."""
    taps = torch.arange(length) + torch.arange(-1, 2)[:, None]
    return torch.where((taps >= 0) & (taps < length), taps, length)
