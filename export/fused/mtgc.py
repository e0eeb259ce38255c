"""The two collaborations of MTGC in the fused network, on all levels side by side [B, P, E].

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
    attention_scale,
    block_taps,
    equal_parts,
    fold_taps,
    normalize,
    split_heads,
    typed,
)


class FusedCoarseToFine(Part):
    """Coarse-to-fine collaboration (paper Eq. 8): the shared Block runs once, on all levels.

    The stretching layers are one block matrix, and attention is masked to a point's own level. The coarsest level has
    no coarser one to ask: its branch is multiplied by zero.
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
        points, level, position, is_step = layout.num_points, layout.level(), layout.position(), layout.is_step()
        stretch = torch.zeros(points, points, dtype=torch.float64)
        bias = torch.zeros(points, dtype=torch.float64)
        for i, linear in enumerate(typed(stage.linears, nn.Linear)):
            fine, coarse = ((is_step & (level == j)).nonzero()[:, 0] for j in (i, i + 1))
            weight = linear.weight.detach().double()[position[fine]][:, position[coarse]]
            stretch[fine[:, None], coarse] = weight
            bias[fine] = linear.bias.detach().double()[position[fine]]
        self.keep("stretch", stretch.T)
        self.keep("stretch_bias", bias)
        self.keep("refined", (level < len(layout.steps) - 1).float()[:, None])
        self.keep("other_level", layout.other_level() * EXCLUDED, torch.float32)
        self.query_taps = Taps(*block_taps(block, "q"), layout.taps(), dtype, rows=points)
        self.key_value_taps = Taps(*block_taps(block, "kv", 2), layout.taps(), dtype, rows=points)
        folded = HeadedAttention.fold(block.attention, attention_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.keep("key_value", torch.stack([folded.key, folded.value]))
        self.mlp = Mlp([block], dtype)

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """Map x [B, P, E] (zero at invalid points), mask [B, P, 1] and key_bias [B, 1, 1, P] to [B, P, E]."""
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


class FusedFineToCoarse(Part):
    """Fine-to-coarse collaboration (paper Eq. 9): level by level, as every level asks the updated finer one.

    What the queries need does not depend on that, and is computed for all levels at once.
    """

    def __init__(self, stage: FineToCoarse, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        self.sizes = layout.sizes
        coarse = layout.part(1)
        blocks = typed(stage.blocks, Block)
        per_level = [fold_taps(block.attention.query_conv, block.norm_q) for block in blocks]
        weight, bias = (
            torch.stack(values)[coarse.level()].transpose(0, 1)  # [K, P, E]
            for values in zip(*per_level, strict=True)
        )
        self.query_taps = Taps(weight, bias, coarse.taps(), dtype, rows=coarse.num_points, point=True)
        self.layers = nn.ModuleList(FineToCoarseLayer(block, layout, i, dtype) for i, block in enumerate(blocks))

    def forward(self, x: Tensor, masks: Sequence[Tensor], key_biases: Sequence[Tensor]) -> Tensor:
        """Map x [B, P, E] and, per level, masks [B, T_l, 1] and key_biases [B, 1, T_l] to [B, P, E]."""
        finest, rest = _split(x, [self.sizes[0], sum(self.sizes[1:])])
        inputs = _split(rest, self.sizes[1:])
        queries = _split(normalize(self.query_taps(normalize(rest))), self.sizes[1:])
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
        folded = OneHeadAttention.fold(block.attention, attention_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.mlp = Mlp([block], dtype)

    def forward(self, finer: Tensor, own: Tensor, query: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """Update one level: finer [B, T_{l-1}, E], own and query [B, T_l, E], mask [B, T_l, 1], key_bias [B, 1, T_l].

        Returns [B, T_l, E].
        """
        pooled = self.pool(finer)
        key, value = equal_parts(normalize(self.taps(normalize(pooled)).flatten(0, 1)), 2)  # [B, T_l, E]
        attended = attend(query @ self.query + self.query_bias, key, value, key_bias)
        y = attended @ self.out + self.out_bias + pooled
        out: Tensor = own + (y + self.mlp(y)) * mask
        return out


def _split(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(x, sizes, dim=1)
