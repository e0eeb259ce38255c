"""Fused network of the temporal dependency module (TDM), the largest stage: 93 of 131 GFLOP at full size.

Its branches take the levels in two groups of about the same number of points (the finest, and all others): that halves
the scratch memory of their [P, C H] activations, and keeps the attention over time near its useful size.

Shapes:  B batch   P points of a group   L levels of the network   T trained steps, T_l those of level l   E level width
         C classes   H hidden width per class
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.network.layers import Block
from ccnet.network.mtgc import TemporalDependency
from export.fused.layout import KERNEL, Layout, sequence_taps
from export.fused.mtgc import block_taps
from export.fused.parts import (
    EXCLUDED,
    Mlp,
    Neighbours,
    OneHeadAttention,
    Part,
    Taps,
    attend,
    branch_scale,
    conv_matrix,
    equal_parts,
    fold_taps,
    normalize,
)


class PackedTemporalDependency(Part):
    """TDM on all levels. The expand product is made by group, so that only one group's result is held at a time."""

    expand: Tensor
    squeeze: Tensor

    def __init__(self, stage: TemporalDependency, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        groups = [layout.part(0, 1), layout.part(1)] if len(layout.steps) > 1 else [layout]
        self.sizes = [group.num_points for group in groups]
        self.neighbours = Neighbours(layout.taps())
        self.keep("expand", conv_matrix(stage.expand.weight))
        self.channels = ChannelBranch(stage, layout, dtype) if stage.channel_branch else None
        self.branches = Branches(stage, dtype)
        # The second group begins at level 1: a group's first level is its number.
        self.groups = nn.ModuleList(Group(stage, group, first, dtype) for first, group in enumerate(groups))
        # The squeeze convolution multiplies first, [P, C H] -> [P, K E], and adds neighbours after.
        self.keep("squeeze", stage.squeeze.weight.detach().permute(1, 2, 0).flatten(1, 2))
        self.shift = AddNeighbours(layout.taps())

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """x [B, P, E] (zero at invalid points), mask [B, P, 1], key_bias [B, 1, 1, P] -> [B, P, E]."""
        # Masked here, where they are narrow, and not behind the product: relu(m x W) = m relu(x W).
        rows = self.neighbours(x) * mask
        channels = self.channels(rows) if self.channels is not None else None
        done = []
        by_group = (
            torch.split_with_sizes(rows, self.sizes, dim=1),
            torch.split_with_sizes(key_bias, self.sizes, dim=3),
        )
        for group, own, own_bias in zip(self.groups, *by_group, strict=True):
            by_class = torch.relu(own @ self.expand)
            done.append(group(self.branches, by_class, own_bias, channels))
        squeezed: Tensor = self.shift((torch.cat(done, dim=1) @ self.squeeze) * mask)
        return squeezed * mask


class Branches(Part):
    """The two branches behind their depthwise convolutions, which the groups share."""

    def __init__(self, stage: TemporalDependency, dtype: torch.dtype):
        super().__init__(dtype)
        self.classes, self.hidden = stage.classes, stage.hidden
        self.temporal = DependencyBranch(stage.temporal, dtype)
        self.cooccurrence = DependencyBranch(stage.cooccurrence, dtype)


class Group(Part):
    """Both branches on the levels of one group, and what the channel branch adds before them."""

    other_level: Tensor  # only where the group has several levels

    def __init__(self, stage: TemporalDependency, layout: Layout, first: int, dtype: torch.dtype):
        """layout of the group; first: its first level."""
        super().__init__(dtype)
        self.channel_expand = ChannelExpand(stage, layout, first, dtype) if stage.channel_branch else None
        self.several = len(layout.steps) > 1
        if self.several:
            self.keep("other_level", layout.other_level() * EXCLUDED, torch.float32)
        self.time_taps = query_key_value_taps(stage.temporal, layout.taps(), dtype)
        self.class_taps = query_key_value_taps(stage.cooccurrence, sequence_taps(stage.classes), dtype)

    def forward(self, branches: Branches, by_class: Tensor, key_bias: Tensor, channels: Tensor | None) -> Tensor:
        """by_class [B, P, C H], key_bias [B, 1, 1, P], channels [B, H, L T] -> [B, P, C H]."""
        points = by_class.shape[1]
        if self.channel_expand is not None:
            by_class = by_class + self.channel_expand(channels).flatten(2)
        by_class = by_class.reshape(-1, branches.classes, branches.hidden)  # [B P, C, H]

        query, key, value = branches.cooccurrence.project(self.class_taps, normalize(by_class))
        over_classes = branches.cooccurrence.residual(by_class, attend(query, key, value, None))

        shape = (-1, branches.classes, points, branches.hidden)
        series = by_class.reshape(-1, points, branches.classes, branches.hidden).transpose(1, 2)  # [B, C, P, H]
        parts = branches.temporal.project(self.time_taps, normalize(series.reshape(-1, points, branches.hidden)))
        query, key, value = (part.reshape(shape) for part in parts)
        attended = attend(query, key, value, key_bias + self.other_level if self.several else key_bias)
        over_time = branches.temporal.residual(by_class, attended.transpose(1, 2).reshape(by_class.shape))
        return (over_time + over_classes).reshape(-1, points, branches.classes * branches.hidden)


def query_key_value_taps(block: Block, taps: Tensor, dtype: torch.dtype) -> nn.ModuleList:
    """The depthwise convolutions of a Block, apart: their results are the largest tensors of the network."""
    rows = taps.shape[1]
    return nn.ModuleList(Taps(*block_taps(block, which), taps, dtype, rows=rows, point=True) for which in "qkv")


class DependencyBranch(Part):
    """A branch of TDM, behind its depthwise convolutions: one-head attention over time or over classes, then MLP."""

    query: Tensor
    query_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, block: Block, dtype: torch.dtype):
        super().__init__(dtype)
        folded = OneHeadAttention.fold(block.attention, branch_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.mlp = Mlp([block], dtype)

    def project(self, taps: nn.ModuleList, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised sequences [S, T, H] -> queries, keys and values [S, T, H]; keys and values need no product."""
        for_query, for_key, for_value = (part for part in taps if isinstance(part, Taps))
        neighbours = for_query.read(normal)
        query = normalize(for_query.combine(*neighbours)) @ self.query + self.query_bias
        return query, normalize(for_key.combine(*neighbours)), normalize(for_value.combine(*neighbours))

    def residual(self, x: Tensor, attended: Tensor) -> Tensor:
        """[B P, C, H] each -> the same; anything at invalid points."""
        y = x + (attended @ self.out + self.out_bias)
        out: Tensor = y + self.mlp(y)
        return out


class AddNeighbours(nn.Module):
    """The rest of a convolution that multiplied first: [B, P, K E] -> [B, P, E], each tap from its neighbour."""

    left: Tensor
    centre: Tensor
    right: Tensor

    def __init__(self, taps: Tensor):
        super().__init__()
        for k, name in enumerate(("left", "centre", "right")):
            self.register_buffer(name, (taps[k] * KERNEL + k).clamp(max=KERNEL * taps.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, KERNEL * x.shape[1], x.shape[2] // KERNEL)
        rows = F.pad(rows, (0, 0, 0, 1))  # a zero row at the end
        return rows.index_select(1, self.left) + rows.index_select(1, self.centre) + rows.index_select(1, self.right)


class ChannelBranch(Part):
    """The channel branch of all levels as one batch: L Blocks over H channels whose features are the T steps.

    Coarser levels have T_l = T / 2^l features: theirs are repeated 2^l times, which changes neither mean nor
    variance, so that the native LayerNorm serves; weights read the first copy and write all of them. Features are
    the trained steps also where the network is cut: press is zero at steps that are cut off.
    """

    press: Tensor
    spread: Tensor
    query: Tensor
    query_bias: Tensor
    out: Tensor
    out_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def __init__(self, stage: TemporalDependency, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        self.hidden, self.levels, self.steps = stage.hidden, len(layout.steps), layout.trained[0]
        self.keep("press", conv_matrix(stage.press.weight))
        blocks = [block for block in stage.channel_blocks if isinstance(block, Block)]
        self._keep_blocks(blocks, dtype)

        # Point that feature j of level l reads; all that is cut off reads the level's halo, where press is zero.
        starts = [sum(layout.lengths[:level]) for level in range(self.levels)]
        features = torch.arange(self.steps)
        spread = [
            start + (features % trained).clamp(max=steps)
            for start, trained, steps in zip(starts, layout.trained, layout.steps, strict=True)
        ]
        self.keep("spread", torch.cat(spread))

    def _keep_blocks(self, blocks: list[Block], dtype: torch.dtype) -> None:
        """Weights of the L Blocks: read the first copy of the features, write every copy."""

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(*(1,) * (value.ndim - 1), self.steps // value.shape[-1])

        def first_copy(value: Tensor) -> Tensor:
            return F.pad(value, (0, self.steps - value.shape[-1]))

        def readers(matrix: Tensor) -> Tensor:
            return first_copy(matrix.T).T

        folded = [OneHeadAttention.fold(block.attention, branch_scale(block)) for block in blocks]
        self.keep("query", torch.stack([readers(first_copy(f.query)) for f in folded]))
        self.keep("query_bias", torch.stack([first_copy(f.query_bias) for f in folded]).unsqueeze(1))
        self.keep("out", torch.stack([readers(repeated(f.out)) for f in folded]))
        self.keep("out_bias", torch.stack([repeated(f.out_bias) for f in folded]).unsqueeze(1))
        mlps = [Mlp.fold(block) for block in blocks]
        self.keep("first", torch.stack([readers(m[0]) for m in mlps]))
        self.keep("first_bias", torch.stack([m[1] for m in mlps]).unsqueeze(1))
        self.keep("second", torch.stack([repeated(m[2]) for m in mlps]))
        self.keep("second_bias", torch.stack([repeated(m[3]) for m in mlps]).unsqueeze(1))

        weights, biases = [], []
        for part in ("query", "key", "value"):
            pairs = [
                fold_taps(getattr(b.attention, f"{part}_conv"), b.norm_q if part == "query" else b.norm_kv)
                for b in blocks
            ]
            weights.append(torch.stack([repeated(weight) for weight, _ in pairs], dim=1))
            biases.append(torch.stack([repeated(bias) for _, bias in pairs], dim=1))
        weight, bias = (torch.stack(values, dim=1)[:, :, :, None, None] for values in (weights, biases))
        self.taps = Taps(weight, bias, sequence_taps(self.hidden), dtype, rows=self.hidden)

    def forward(self, rows: Tensor) -> Tensor:
        """Masked rows of all levels [B, P, K E] -> [B, H, L T], for `ChannelExpand`."""
        points = torch.relu(rows @ self.press).index_select(1, self.spread)  # [B, L T, H]
        x = points.reshape(-1, self.levels, self.steps, self.hidden).permute(1, 0, 3, 2)  # [L, B, H, T]
        by_level = (self.levels, -1, self.steps)
        read = self.taps(normalize(x.flatten(0, 1)).reshape(x.shape))  # [3, L, B, H, T]
        query, key, value = equal_parts(normalize(read.flatten(0, 2)), 3)  # [L B, H, T]
        asked = query.reshape(by_level) @ self.query + self.query_bias
        attended = attend(asked.reshape(-1, self.hidden, self.steps), key, value, None)
        y = attended.reshape(by_level) @ self.out + self.out_bias + x.reshape(by_level)  # [L, B H, T]
        y = y + (F.gelu(normalize(y) @ self.first + self.first_bias) @ self.second + self.second_bias)
        return y.reshape(x.shape).permute(1, 2, 0, 3).flatten(2)


class ChannelExpand(Part):
    """Linear T_l -> C T_l of some levels as one product.

    The released network reads the [H, C T] result as [C, H, T] without a transpose, so (channel, class) pairs keep
    their order and only the step moves to the front.
    """

    read: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, stage: TemporalDependency, layout: Layout, first: int, dtype: torch.dtype):
        """layout of these levels; first: the first of them."""
        super().__init__(dtype)
        self.classes = stage.classes
        linears = [linear for linear in stage.channel_linears if isinstance(linear, nn.Linear)]
        linears = linears[first : first + len(layout.steps)]
        weight = torch.zeros(sum(layout.trained), layout.num_points, self.classes, dtype=torch.float64)
        bias = torch.zeros(layout.num_points, self.classes, dtype=torch.float64)
        row = column = 0
        for linear, length, trained in zip(linears, layout.lengths, layout.trained, strict=True):
            kept = min(length, trained)
            by_step = linear.weight.detach().double().view(self.classes, trained, trained)[:, :kept]  # [C, t, j]
            weight[row : row + trained, column : column + kept] = by_step.permute(2, 1, 0)
            bias[column : column + kept] = linear.bias.detach().double().view(self.classes, trained)[:, :kept].T
            row, column = row + trained, column + length
        self.keep("weight", weight.flatten(1))
        self.keep("bias", bias.flatten())
        steps = layout.trained[0] * 2**first  # T, the features of a level in the input
        levels = enumerate(layout.trained, start=first)
        self.keep("read", torch.cat([level * steps + torch.arange(trained) for level, trained in levels]))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, L T] -> [B, P, H, C]."""
        expanded = torch.relu(x.index_select(2, self.read) @ self.weight + self.bias)
        return expanded.reshape(*x.shape[:2], -1, self.classes).transpose(1, 2)
