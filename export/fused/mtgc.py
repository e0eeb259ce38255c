"""Fused network of the two collaborations of MTGC: all levels side by side, [B, P, E].

Shapes:  B batch   P points of all levels   T_l points of one level   E level width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccnet.network.layers import Block
from ccnet.network.mtgc import CoarseToFine, FineToCoarse
from export.fused.layout import Layout
from export.fused.parts import (
    EXCLUDED,
    HeadedAttention,
    MaxPool,
    Mlp,
    OneHeadAttention,
    Part,
    Taps,
    attend,
    branch_scale,
    equal_parts,
    fold_taps,
    normalize,
    split_heads,
)


def block_taps(block: Block, parts: str, axes: int = 0) -> tuple[Tensor, Tensor]:
    """Depthwise convolutions of some of a Block's queries, keys, values ("q", "kv", "qkv").

    Returns weight and bias, each [K, N, 1, .., C] with `axes` axes of one.
    """
    attention = block.attention
    convs = {"q": attention.query_conv, "k": attention.key_conv, "v": attention.value_conv}
    folded = [fold_taps(convs[part], block.norm_q if part == "q" else block.norm_kv) for part in parts]
    weight, bias = (torch.stack(values, dim=1) for values in zip(*folded, strict=True))
    ones = (1,) * axes
    return weight.view(*weight.shape[:2], *ones, -1), bias.view(*bias.shape[:2], *ones, -1)


class PackedCoarseToFine(Part):
    """All levels in one Block: the stretching layers as one block matrix, attention masked to a point's own level.

    The coarsest level has no coarser one: its branch is multiplied by zero, so that it stays as it is.
    """

    stretch: Tensor
    stretch_bias: Tensor
    refined: Tensor
    other_level: Tensor
    query: Tensor
    query_bias: Tensor
    key_value: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, stage: CoarseToFine, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        block = stage.block
        self.heads = block.attention.heads
        points, level, position, trained = layout.num_points, layout.level(), layout.position(), layout.is_trained()
        stretch = torch.zeros(points, points, dtype=torch.float64)
        bias = torch.zeros(points, dtype=torch.float64)
        linears = [linear for linear in stage.linears if isinstance(linear, nn.Linear)]
        for i, linear in enumerate(linears):
            fine, coarse = ((trained & (level == j)).nonzero()[:, 0] for j in (i, i + 1))
            weight = linear.weight.detach().double()[position[fine]][:, position[coarse]]
            stretch[fine[:, None], coarse] = weight
            bias[fine] = linear.bias.detach().double()[position[fine]]
        self.keep("stretch", stretch.T)
        self.keep("stretch_bias", bias)
        self.keep("refined", (level < len(layout.steps) - 1).float()[:, None])
        self.keep("other_level", layout.other_level() * EXCLUDED, torch.float32)
        self.query_taps = Taps(*block_taps(block, "q"), layout.taps(), dtype, rows=points)
        self.key_value_taps = Taps(*block_taps(block, "kv", 2), layout.taps(), dtype, rows=points)
        folded = HeadedAttention.fold(block.attention, branch_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.keep("key_value", torch.stack([folded.key, folded.value]))
        self.mlp = Mlp([block], dtype)

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """x [B, P, E] (zero at invalid points), mask [B, P, 1], key_bias [B, 1, 1, P] -> [B, P, E]."""
        points = x.shape[1]
        guide = torch.relu(x.transpose(1, 2) @ self.stretch + self.stretch_bias).transpose(1, 2)
        query = normalize(self.query_taps(normalize(guide))) @ self.query + self.query_bias
        query = split_heads(query, points, self.heads)
        key_value = normalize(self.key_value_taps(normalize(x)).flatten(1, 2)) @ self.key_value  # [2, B P, E]
        key, value = equal_parts(split_heads(key_value, points, self.heads), 2)
        attended = attend(query, key, value, key_bias + self.other_level)
        branch = attended.transpose(1, 2).flatten(2) @ self.out + self.out_bias
        branch = branch + self.mlp(x + branch)
        out: Tensor = x + branch * (mask * self.refined)
        return out


class PackedFineToCoarse(Part):
    """Level by level, as each asks the one before; what the queries need is made for all levels at once."""

    def __init__(self, stage: FineToCoarse, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        self.lengths = layout.lengths
        coarse = layout.part(1)
        blocks = [block for block in stage.blocks if isinstance(block, Block)]
        per_level = [fold_taps(block.attention.query_conv, block.norm_q) for block in blocks]
        weight, bias = (
            torch.stack(values)[coarse.level()].transpose(0, 1)  # [K, P, E]
            for values in zip(*per_level, strict=True)
        )
        self.query_taps = Taps(weight, bias, coarse.taps(), dtype, rows=coarse.num_points, point=True)
        self.layers = nn.ModuleList(FineToCoarseLayer(block, layout, i, dtype) for i, block in enumerate(blocks))

    def forward(self, x: Tensor, masks: Sequence[Tensor], key_biases: Sequence[Tensor]) -> Tensor:
        """x [B, P, E], masks per level [B, T_l, 1], key_biases [B, 1, T_l] -> [B, P, E]."""
        finest, rest = _split(x, [self.lengths[0], sum(self.lengths[1:])])
        inputs = _split(rest, self.lengths[1:])
        queries = _split(normalize(self.query_taps(normalize(rest))), self.lengths[1:])
        levels = [finest]
        for layer, own, query, mask, bias in zip(self.layers, inputs, queries, masks[1:], key_biases[1:], strict=True):
            levels.append(layer(levels[-1], own, query, mask, bias))
        return torch.cat(levels, dim=1)


class FineToCoarseLayer(Part):
    """One level: its prepared queries ask the pooled finer level."""

    query: Tensor
    query_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, block: Block, layout: Layout, finer: int, dtype: torch.dtype):
        super().__init__(dtype)
        self.pool = MaxPool(layout.pool_taps(finer))
        taps = layout.part(finer + 1, finer + 2).taps()
        self.taps = Taps(*block_taps(block, "kv", 2), taps, dtype, rows=taps.shape[1])
        folded = OneHeadAttention.fold(block.attention, branch_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.mlp = Mlp([block], dtype)

    def forward(self, finer: Tensor, own: Tensor, query: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """finer [B, T_{l-1}, E], own, query [B, T_l, E], mask [B, T_l, 1], key_bias [B, 1, T_l] -> [B, T_l, E]."""
        pooled = self.pool(finer)
        key, value = equal_parts(normalize(self.taps(normalize(pooled)).flatten(0, 1)), 2)  # [B, T_l, E]
        attended = attend(query @ self.query + self.query_bias, key, value, key_bias)
        y = attended @ self.out + self.out_bias + pooled
        out: Tensor = own + (y + self.mlp(y)) * mask
        return out


def _split(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(x, lengths, dim=1)
