"""RAFT, the optical flow network, with the layer names of its public weight file.

The correlation of all pairs of cells is one product with the pooled second feature maps: pooling a product over the
second picture is the product with the pooled picture, so the pyramid is never pooled itself. A lookup reads the 10 x 10
cells around a point of each level once and blends them into the 9 x 9 samples, all at one fraction of a cell.

Shapes: B pairs   H, W sides of a picture, multiples of 8 and at least 128   h, w = H / 8, W / 8   D feature channels
        S cells of all levels of the second picture
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ITERATIONS = 20
LEVELS, RADIUS = 4, 4
_SAMPLES = 2 * RADIUS + 1
_TAPS = _SAMPLES + 1


class Pyramid(NamedTuple):
    """Correlation of every cell of the first picture with every cell of the second, in four resolutions."""

    values: Tensor
    """[B, S, h * w]; the cells of a level row by row, the finest level first."""
    last: Tensor
    """[2, 4, 1, 1] last column and last row of each level."""
    columns: Tensor
    """[4, 1, 1, 1] columns of each level."""
    starts: Tensor
    """[4, 1, 1, 1] index of each level's first cell among the S."""


class RAFT(nn.Module):
    """Flow from one picture to the next, in pixels."""

    def __init__(self, *, width: float = 1.0) -> None:
        """`width` scales the channels of every layer; the public file has 1."""
        super().__init__()
        self.width = width
        self.hidden = self._scaled(128)
        self.fnet = Encoder(width, FullInstanceNorm, self._scaled(256))
        self.cnet = Encoder(width, nn.BatchNorm2d, 2 * self.hidden)
        self.update_block = UpdateBlock(width, self.hidden)

    def forward(self, first: Tensor, second: Tensor, iterations: int = ITERATIONS) -> Tensor:
        """Map two pictures [B, 3, H, W], 0 to 255, to the flow [B, 2, H, W], x then y."""
        features, context = self.encode(first)
        return self.flow(features, self.features(second), context, iterations)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Map pictures [B, 3, H, W] to all that a pair's flow needs of them: features and context, [B, D, h, w]."""
        return self.features(pictures), self.context(pictures)

    def features(self, pictures: Tensor) -> Tensor:
        """Map pictures [B, 3, H, W], 0 to 255, to features [B, D, h, w]."""
        features: Tensor = self.fnet(self._scale(pictures))
        return features.float()

    def context(self, pictures: Tensor) -> Tensor:
        """Map pictures [B, 3, H, W] to the first hidden state and the context, concatenated [B, D, h, w]."""
        hidden, context = torch.split(self.cnet(self._scale(pictures)), self.hidden, 1)
        return torch.cat([torch.tanh(hidden), torch.relu(context)], 1).float()

    def flow(self, features: Tensor, following: Tensor, context: Tensor, iterations: int = ITERATIONS) -> Tensor:
        """Map the encodings of two pictures [B, D, h, w] to the flow [B, 2, H, W]; `context`: of the first one."""
        flow, hidden = self.coarse_flow(features, following, context, iterations)
        return upsample(flow, self.update_block.mask(hidden))

    def coarse_flow(
        self, features: Tensor, following: Tensor, context: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Return the flow in cells [B, 2, h, w] and the hidden state [B, D, h, w] after so many iterations."""
        pyramid = correlate(features, following)
        hidden, context = torch.split(context, self.hidden, 1)
        grid = cell_grid(features)
        flow = torch.zeros_like(features[:, :2])
        for _ in range(iterations):
            sampled = look_up(pyramid, grid + flow)
            hidden, step = self.update_block(hidden, context, sampled, flow)
            flow = flow + step
        return flow, hidden

    def _scale(self, pictures: Tensor) -> Tensor:
        """Map 0 to 255 to -1 to 1, in the type of the weights."""
        return (2 * (pictures / 255) - 1).to(self.fnet.conv1.weight.dtype)

    def _scaled(self, count: int) -> int:
        return max(1, round(count * self.width))


class FullInstanceNorm(nn.InstanceNorm2d):
    """Instance norm whose statistics are float32 in half precision too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Encoder(nn.Module):
    """Residual blocks down to an eighth of the resolution."""

    def __init__(self, width: float, norm: type[nn.Module], outputs: int) -> None:
        super().__init__()
        c64, c96, c128 = (max(1, round(count * width)) for count in (64, 96, 128))
        self.conv1 = nn.Conv2d(3, c64, 7, stride=2, padding=3)
        self.norm1 = norm(c64)
        self.layer1 = nn.Sequential(ResidualBlock(c64, c64, 1, norm), ResidualBlock(c64, c64, 1, norm))
        self.layer2 = nn.Sequential(ResidualBlock(c64, c96, 2, norm), ResidualBlock(c96, c96, 1, norm))
        self.layer3 = nn.Sequential(ResidualBlock(c96, c128, 2, norm), ResidualBlock(c128, c128, 1, norm))
        self.conv2 = nn.Conv2d(c128, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        encoded: Tensor = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return encoded


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut. The public file holds the shortcut's norm twice, also as `norm3`."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride), norm(outputs))
        self.downsample = None if stride == 1 else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu((x if self.downsample is None else self.downsample(x)) + y)


class MotionEncoder(nn.Module):
    """Samples of the correlation, and the flow, as features of the motion."""

    def __init__(self, width: float, outputs: int) -> None:
        super().__init__()
        c64, c128, c192, c256 = (max(1, round(count * width)) for count in (64, 128, 192, 256))
        self.convc1 = nn.Conv2d(LEVELS * _SAMPLES**2, c256, 1)
        self.convc2 = nn.Conv2d(c256, c192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, c128, 7, padding=3)
        self.convf2 = nn.Conv2d(c128, c64, 3, padding=1)
        self.conv = nn.Conv2d(c192 + c64, outputs - 2, 3, padding=1)

    def forward(self, sampled: Tensor, flow: Tensor) -> Tensor:
        seen = torch.relu(self.convc2(torch.relu(self.convc1(sampled))))
        moved = torch.relu(self.convf2(torch.relu(self.convf1(flow))))
        motion = torch.relu(self.conv(torch.cat([seen, moved], 1)))
        return torch.cat([motion, flow], 1)


class SeparableGRU(nn.Module):
    """A gated recurrent unit along rows, then one along columns."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        for index, (kernel, padding) in enumerate((((1, 5), (0, 2)), ((5, 1), (2, 0))), 1):
            for gate in "zrq":
                self.add_module(f"conv{gate}{index}", nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding))

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        for index in (1, 2):
            z, r, q = (self.get_submodule(f"conv{gate}{index}") for gate in "zrq")
            both = torch.cat([hidden, inputs], 1)
            update, reset = torch.sigmoid(z(both)), torch.sigmoid(r(both))
            proposed = torch.tanh(q(torch.cat([reset * hidden, inputs], 1)))
            hidden = (1 - update) * hidden + update * proposed
        return hidden


class FlowHead(nn.Module):
    """The step of the flow from the hidden state."""

    def __init__(self, hidden: int, width: float) -> None:
        super().__init__()
        between = max(1, round(256 * width))
        self.conv1 = nn.Conv2d(hidden, between, 3, padding=1)
        self.conv2 = nn.Conv2d(between, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        step: Tensor = self.conv2(torch.relu(self.conv1(x)))
        return step


class UpdateBlock(nn.Module):
    """One iteration: what the correlation says where the flow points to, and the step that follows from it."""

    def __init__(self, width: float, hidden: int) -> None:
        super().__init__()
        between = max(1, round(256 * width))
        self.encoder = MotionEncoder(width, hidden)
        self.gru = SeparableGRU(hidden, 2 * hidden)
        self.flow_head = FlowHead(hidden, width)
        self.mask = nn.Sequential(nn.Conv2d(hidden, between, 3, padding=1), nn.ReLU(), nn.Conv2d(between, 576, 1))

    def forward(self, hidden: Tensor, context: Tensor, sampled: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        motion = self.encoder(sampled, flow)
        hidden = self.gru(hidden, torch.cat([context, motion], 1))
        return hidden, self.flow_head(hidden)


def correlate(features: Tensor, following: Tensor) -> Pyramid:
    """Return the correlation of all pairs of cells of two feature maps [B, D, h, w]."""
    maps = [following]
    for _ in range(1, LEVELS):
        maps.append(F.avg_pool2d(maps[-1], 2))
    cells = torch.cat([level.flatten(2) for level in maps], 2)  # [B, D, S]
    values = cells.transpose(1, 2) @ (features.flatten(2) / features.shape[1] ** 0.5)
    columns, rows = (torch.cat([_length(level, axis) for level in maps]) for axis in (3, 2))
    starts = torch.cumsum(rows * columns, 0) - rows * columns
    last = torch.stack([columns, rows])[:, :, None, None] - 1
    return Pyramid(values, last, columns.reshape(-1, 1, 1, 1), starts.reshape(-1, 1, 1, 1))


def _length(maps: Tensor, axis: int) -> Tensor:
    """Return the length of an axis as a tensor [1], which an exported graph computes for any size."""
    return torch.arange(1, maps.shape[axis] + 1, dtype=maps.dtype, device=maps.device)[-1:]


def look_up(pyramid: Pyramid, points: Tensor) -> Tensor:
    """Sample the correlation around points [B, 2, h, w] (x, y, in cells of the finest level) -> [B, 324, h, w].

    Bilinear, zero outside, in the type of the correlation. Channel: level * 81 + (x offset + 4) * 9 + (y offset + 4).
    """
    batch, _, height, width = points.shape
    scale = torch.tensor([[0.5**level] for level in range(LEVELS)], dtype=points.dtype, device=points.device)
    taps = torch.arange(-RADIUS, RADIUS + 2, dtype=points.dtype, device=points.device)[:, None]
    flat = points.flatten(2)[:, :, None] * scale  # [B, 2, 4, hw]
    base = torch.floor(flat)
    tap = base[:, :, :, None] + taps  # [B, 2, 4, 10, hw]
    held = torch.minimum(torch.relu(tap), pyramid.last)
    inside = (held == tap).to(pyramid.values.dtype)
    cells = held[:, 1, :, None] * pyramid.columns + pyramid.starts
    index = (cells + held[:, 0, :, :, None]).to(torch.int64)  # [B, 4, 10 along x, 10 along y, hw]
    gathered = torch.gather(pyramid.values, 1, index.flatten(1, 3))
    values = gathered.reshape(batch, LEVELS, _TAPS, _TAPS, height * width)
    share = (flat - base)[:, :, :, None].to(pyramid.values.dtype)  # [B, 2, 4, 1, hw]
    values = values * inside[:, 1, :, None]
    values = values[:, :, :, :-1] + share[:, 1, :, None] * (values[:, :, :, 1:] - values[:, :, :, :-1])
    values = values * inside[:, 0, :, :, None]
    values = values[:, :, :-1] + share[:, 0, :, :, None] * (values[:, :, 1:] - values[:, :, :-1])
    return values.reshape(batch, LEVELS * _SAMPLES**2, height, width)


def cell_grid(features: Tensor) -> Tensor:
    """Return the coordinates x, y of every cell of [B, D, h, w], [2, h, w]."""
    height, width = features.shape[2:]
    x = torch.arange(width, dtype=features.dtype, device=features.device)
    y = torch.arange(height, dtype=features.dtype, device=features.device)
    return torch.stack([x[None].expand(height, width), y[:, None].expand(height, width)])


def upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """Map flow in cells [B, 2, h, w] and weights [B, 576, h, w] to flow in pixels [B, 2, 8h, 8w].

    A pixel is a convex combination of the 3 x 3 cells around its own one.
    """
    batch, _, height, width = flow.shape
    weights = torch.softmax((0.25 * mask).reshape(batch, 1, 9, 8, 8, height, width), 2)
    padded = F.pad(8 * flow, (1, 1, 1, 1))
    around = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    fine = sum(weights[:, :, k] * cells[:, :, None, None] for k, cells in enumerate(around))
    assert isinstance(fine, Tensor)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)
