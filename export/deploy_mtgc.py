"""Deployment form of MTGC: every stage takes and gives all levels side by side, [B, P, E].

Shapes:  B batch   P points of all levels   T_l points of one level   L levels   E level width   C classes
         H hidden width per class (`tdm_dim`)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ccnet.layers import Block
from ccnet.mtgc import CoarseToFine, FineToCoarse
from export.deploy_parts import (
    EXCLUDED,
    HeadedAttention,
    Layout,
    Mlp,
    OneHeadAttention,
    Part,
    Taps,
    attend,
    branch_scale,
    fold_taps,
    merge_heads,
    normalize,
    split_heads,
)


def stacked_taps(
    block: Block, parts: str, taps: Tensor, dtype: torch.dtype, *, axis: int = -2, batched: bool = False
) -> Taps:
    """The depthwise convolutions of some of a Block's queries, keys and values ("q", "kv", "qkv").

    axis: where the sequence lies in the input; batched: the input has another axis before it.
    """
    attention = block.attention
    every = {
        "q": (attention.query_conv, block.norm_q),
        "k": (attention.key_conv, block.norm_kv),
        "v": (attention.value_conv, block.norm_kv),
    }
    weight, bias = (
        torch.stack(values, dim=1).unsqueeze(-2) for values in zip(*(fold_taps(*every[p]) for p in parts), strict=True)
    )
    if batched:
        weight, bias = weight.unsqueeze(2), bias.unsqueeze(2)
    return Taps(weight, bias, taps, dtype, rows=taps.shape[1], axis=axis)


class PackedCoarseToFine(Part):
    """All levels in one Block: the stretching layers as one block matrix, attention masked to a point's own level.

    The coarsest level has no coarser one; its branch is multiplied by zero, so that it stays as it is.
    """

    stretch: Tensor
    stretch_bias: Tensor
    refined: Tensor
    own_level: Tensor
    query: Tensor
    query_bias: Tensor
    key_value: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, stage: CoarseToFine, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        block = stage.block
        self.heads = block.attention.heads
        points, level, position = layout.num_points, layout.level(), layout.position()
        stretch = torch.zeros(points, points, dtype=torch.float64)
        bias = torch.zeros(points, 1, dtype=torch.float64)
        for i, linear in enumerate(stage.linears):
            fine, coarse = level == i, level == i + 1
            weight = linear.weight.detach().double()[position[fine]][:, position[coarse]]
            stretch[fine.nonzero(), coarse.nonzero().T] = weight
            bias[fine] = linear.bias.detach().double()[position[fine], None]
        self.keep("stretch", stretch)
        self.keep("stretch_bias", bias)
        self.keep("refined", (level < len(layout.steps) - 1).float()[:, None])
        self.keep("own_level", layout.own_level().float(), torch.float32)
        self.query_taps = stacked_taps(block, "q", layout.taps(), dtype)
        self.key_value_taps = stacked_taps(block, "kv", layout.taps(), dtype)
        folded = HeadedAttention.fold(block.attention, branch_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.keep("key_value", torch.stack([folded.key, folded.value]))
        self.mlp = Mlp([block], dtype)

    def forward(self, x: Tensor, mask: Tensor, allowed: Tensor) -> Tensor:
        """x [B, P, E] (zero at invalid points), mask [B, P, 1], allowed [B, 1, P] -> [B, P, E]."""
        guide = torch.relu(self.stretch @ x + self.stretch_bias)
        query = normalize(self.query_taps(normalize(guide))) @ self.query + self.query_bias  # [B, 1, P, E]
        key, value = (normalize(self.key_value_taps(normalize(x))) @ self.key_value).split(1, dim=1)
        bias = (self.own_level * allowed - 1) * -EXCLUDED
        attended = attend(
            split_heads(query, self.heads), split_heads(key, self.heads), split_heads(value, self.heads), bias[:, None]
        )
        branch = merge_heads(attended, 1).squeeze(1) @ self.out + self.out_bias
        branch = branch + self.mlp(x + branch)
        return x + branch * (mask * self.refined)


class PackedFineToCoarse(Part):
    """Level by level, as each asks the one before; what the queries need is made for all levels at once."""

    def __init__(self, stage: FineToCoarse, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        self.lengths = layout.lengths
        coarse = layout.part(1)
        blocks = [block for block in stage.blocks if isinstance(block, Block)]
        taps = [fold_taps(block.attention.query_conv, block.norm_q) for block in blocks]
        level = coarse.level()
        weight, bias = (torch.stack(values)[level].permute(1, 0, 2).unsqueeze(1) for values in zip(*taps, strict=True))
        self.query_taps = Taps(weight, bias, coarse.taps(), dtype, rows=coarse.num_points)
        self.layers = torch.nn.ModuleList(
            _FineToCoarseLayer(block, coarse.part(i, i + 1).taps(), dtype) for i, block in enumerate(blocks)
        )

    def forward(self, x: Tensor, masks: Sequence[Tensor], key_biases: Sequence[Tensor]) -> Tensor:
        """x [B, P, E], masks per level [B, T_l, 1], key_biases [B, 1, T_l] -> [B, P, E]."""
        finest, rest = x.split([self.lengths[0], sum(self.lengths[1:])], dim=1)
        queries = normalize(self.query_taps(normalize(rest))).squeeze(1).split(self.lengths[1:], dim=1)
        levels = [finest]
        inputs = rest.split(self.lengths[1:], dim=1)
        for layer, own, query, mask, bias in zip(self.layers, inputs, queries, masks[1:], key_biases[1:], strict=True):
            levels.append(layer(levels[-1], own, query, mask, bias))
        return torch.cat(levels, dim=1)


class _FineToCoarseLayer(Part):
    """One level: its prepared queries ask the pooled finer level."""

    query: Tensor
    query_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, block: Block, taps: Tensor, dtype: torch.dtype):
        super().__init__(dtype)
        self.taps = stacked_taps(block, "kv", taps, dtype)
        folded = OneHeadAttention.fold(block.attention, branch_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.mlp = Mlp([block], dtype)

    def forward(self, finer: Tensor, own: Tensor, query: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """finer [B, T_{l-1}, E], own, query [B, T_l, E], mask [B, T_l, 1], key_bias [B, 1, T_l] -> [B, T_l, E]."""
        pooled = F.max_pool2d(finer.unsqueeze(1), (3, 1), stride=(2, 1), padding=(1, 0)).squeeze(1)
        key, value = normalize(self.taps(normalize(pooled))).split(1, dim=1)
        attended = attend(query @ self.query + self.query_bias, key.squeeze(1), value.squeeze(1), key_bias)
        x = pooled + (attended @ self.out + self.out_bias)
        return own + (x + self.mlp(x)) * mask
