"""Decoder heads, shared by the levels: class logits and class-aware offsets.

Shapes:  B batch   T_l steps of level l   E level width   P points of all levels   C classes
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccnet.config import ModelConfig
from ccnet.network.layers import MaskedConv1d

PRIOR = 0.01
"""Score that every class starts from, so that easy negatives do not dominate the first focal losses."""


class Head(nn.Module):
    """Two masked convolutions with LayerNorm and ReLU, then a masked convolution to `out_dim` channels."""

    def __init__(self, config: ModelConfig, out_dim: int):
        super().__init__()
        width, hidden = 2 * config.dim, config.head_dim
        self.convs = nn.ModuleList([MaskedConv1d(width, hidden), MaskedConv1d(hidden, hidden)])
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.output = MaskedConv1d(hidden, out_dim, bias=True)

    def level(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the head to one level: x [B, T_l, E], mask [B, T_l, 1] -> [B, T_l, out_dim]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x, mask)))
        out: Tensor = self.output(x, mask)
        return out


class ClassHead(Head):
    """A logit per class."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.num_classes)

    def forward(self, levels: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Classify the points of levels [B, T_l, E] -> logits [B, P, C]."""
        return torch.cat([self.level(x, mask) for x, mask in zip(levels, masks, strict=True)], dim=1)


class OffsetHead(Head):
    """Distances to start and end per class, in units of the level's stride; channel = 2 c + side."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, 2 * config.num_classes)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in range(config.levels))

    def forward(self, levels: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Regress the offsets of levels [B, T_l, E] -> [B, P, C, 2], >= 0."""
        offsets = [
            torch.relu(self.level(x, mask) * scale) for x, mask, scale in zip(levels, masks, self.scales, strict=True)
        ]
        points = torch.cat(offsets, dim=1)
        return points.view(*points.shape[:2], -1, 2)


def prior_bias() -> float:
    """Return the logit of `PRIOR`, the initial bias of the class head (focal loss, Lin et al. 2017, section 3.3)."""
    return -math.log((1 - PRIOR) / PRIOR)
