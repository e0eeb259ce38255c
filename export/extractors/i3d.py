"""I3D, the two-stream network over stacks of frames, with the layer names of its public weight files.

Shapes: B stacks   F frames (10 or more)   S side of the square crop   C input channels: 3 of rgb, 2 of flow
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int, int]
"""Along time, rows and columns."""

CLASSES = 400
"""Of Kinetics, on which the public weights were trained."""
_MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of each block: branch 0; branch 1, both layers; branch 2, both layers; branch 3."""
_POOL_BEFORE: dict[str, tuple[Size, Size]] = {
    "mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """Features of a stack of frames, and class scores to check weights with."""

    def __init__(self, channels: int, *, width: float = 1.0) -> None:
        """`channels`: 3 for rgb, 2 for flow. `width` scales the channels of every layer; public files have 1."""
        super().__init__()

        def scaled(count: int) -> int:
            return max(1, round(count * width))

        self.conv3d_1a_7x7 = Unit(channels, scaled(64), (7, 7, 7), (2, 2, 2))
        self.conv3d_2b_1x1 = Unit(scaled(64), scaled(64))
        self.conv3d_2c_3x3 = Unit(scaled(64), scaled(192), (3, 3, 3))
        inputs = scaled(192)
        for name, plan in _MIXED.items():
            sizes = tuple(scaled(count) for count in plan)
            self.add_module(name, Mixed(inputs, sizes))
            inputs = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        self.conv3d_0c_1x1 = ClassLayer(inputs)
        self.feature_dim = inputs

    def forward(self, stacks: Tensor) -> Tensor:
        """Map stacks [B, C, F, S, S] in [-1, 1] to features [B, 1024], which are never negative."""
        return self.pooled(stacks).mean(2)

    def logits(self, stacks: Tensor) -> Tensor:
        """Map stacks [B, C, F, S, S] to class scores [B, 400] of Kinetics, before the softmax."""
        scores: Tensor = self.conv3d_0c_1x1(self.pooled(stacks)[..., None, None])
        return scores.mean((2, 3, 4))

    def pooled(self, stacks: Tensor) -> Tensor:
        """Map stacks [B, C, F, S, S] to averages over two time positions and all of the picture, [B, 1024, t]."""
        x = max_pool(self.conv3d_1a_7x7(stacks), (1, 3, 3), (1, 2, 2))
        x = self.conv3d_2c_3x3(self.conv3d_2b_1x1(x))
        for name in _MIXED:
            if name in _POOL_BEFORE:
                x = max_pool(x, *_POOL_BEFORE[name])
            x = cast(Tensor, self.get_submodule(name)(x))
        x = x.float().mean((3, 4))
        return (x[:, :, :-1] + x[:, :, 1:]) / 2


class Unit(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Size = (1, 1, 1), stride: Size = (1, 1, 1)) -> None:
        super().__init__()
        self.padding = same_padding(kernel, stride)
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.batch3d = nn.BatchNorm3d(outputs, eps=1e-5)  # as the public program has it; other ports have 1e-3

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.padding) if any(self.padding) else x
        return torch.relu(self.batch3d(self.conv3d(x)))


class Mixed(nn.Module):
    """Four branches side by side, concatenated."""

    def __init__(self, inputs: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        a, b, c, d, e, f = sizes
        self.branch_0 = Unit(inputs, a)
        self.branch_1 = nn.Sequential(Unit(inputs, b), Unit(b, c, (3, 3, 3)))
        self.branch_2 = nn.Sequential(Unit(inputs, d), Unit(d, e, (3, 3, 3)))
        self.branch_3 = nn.Sequential(SmoothPool(), Unit(inputs, f))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], 1)


class SmoothPool(nn.Module):
    """Largest value of 3 x 3 x 3 neighbours; has no weights and stands for index 0 of its branch."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x, (3, 3, 3), (1, 1, 1))


class ClassLayer(nn.Module):
    """The layer of the 400 classes; features do not pass it."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.conv3d(x)
        return scores


def max_pool(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    """Pad with zeros, which are harmless behind a ReLU, and pool in ceil mode."""
    return F.max_pool3d(F.pad(x, same_padding(kernel, stride)), kernel, stride, ceil_mode=True)


def same_padding(kernel: Size, stride: Size) -> tuple[int, ...]:
    """Return the padding of each axis, last axis first as `F.pad` takes it: k - s in all, the smaller half in front."""
    padding: list[int] = []
    for k, s in zip(reversed(kernel), reversed(stride), strict=True):
        total = max(k - s, 0)
        padding += [total // 2, total - total // 2]
    return tuple(padding)
