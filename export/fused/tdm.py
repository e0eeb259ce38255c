"""The temporal dependency module (TDM) in the fused network, its largest stage: 93 of 131 GFLOP at full size.

Its branches take the levels in two groups of about as many points, the finest level and all others: that halves the
scratch memory of their [P, C H] activations, and wastes less of the attention over time on points of other levels.

Shapes:  B batch   P points of a group   L levels of the network   T steps, T_l those of level l   E level width
         C classes   H hidden width per class
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.network.layers import Block
from ccnet.network.mtgc import TemporalDependency
from export.fused.layout import KERNEL, Layout, sequence_taps
from export.fused.parts import (
    EXCLUDED,
    Mlp,
    Neighbours,
    OneHeadAttention,
    Part,
    Taps,
    attend,
    attention_scale,
    block_taps,
    conv_matrix,
    equal_parts,
    normalize,
    typed,
)


class FusedTemporalDependency(Part):
    """TDM on all levels. Each group has an expand matmul of its own, so that only one group's result is in memory."""

    expand: Tensor
    squeeze: Tensor

    def __init__(self, stage: TemporalDependency, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        groups = [layout.part(0, 1), layout.part(1)]
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
        """Map x [B, P, E] (zero at invalid points), mask [B, P, 1] and key_bias [B, 1, 1, P] to [B, P, E]."""
        # Masked here, where they are narrow, and not behind the matmul: relu(m x W) = m relu(x W).
        rows = self.neighbours(x) * mask
        channels = None if self.channels is None else self.channels(rows)
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
    """Both branches without their depthwise convolutions: the part that the groups share."""

    def __init__(self, stage: TemporalDependency, dtype: torch.dtype):
        super().__init__(dtype)
        self.classes, self.hidden = stage.classes, stage.hidden
        self.temporal = DependencyBranch(stage.temporal, dtype)
        self.cooccurrence = DependencyBranch(stage.cooccurrence, dtype)


class Group(Part):
    """Both branches on the levels of one group, and what the channel branch, where there is one, adds before them."""

    other_level: Tensor  # only where the group has several levels

    def __init__(self, stage: TemporalDependency, layout: Layout, first: int, dtype: torch.dtype):
        """Fold the parts of `stage` for the levels of `layout`, of which `first` is the first."""
        super().__init__(dtype)
        self.channel_expand = ChannelExpand(stage, layout, first, dtype) if stage.channel_branch else None
        self.several = len(layout.steps) > 1
        if self.several:
            self.keep("other_level", layout.other_level() * EXCLUDED, torch.float32)
        self.time_taps = query_key_value_taps(stage.temporal, layout.taps(), dtype)
        self.class_taps = query_key_value_taps(stage.cooccurrence, sequence_taps(stage.classes), dtype)

    def forward(self, branches: Branches, by_class: Tensor, key_bias: Tensor, channels: Tensor | None) -> Tensor:
        """Map by_class [B, P, C H], key_bias [B, 1, 1, P] and channels [B, H, L T] to [B, P, C H]."""
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
    """Fold the depthwise convolutions of a Block, one by one: their results are the network's largest tensors."""
    rows = taps.shape[1]
    return nn.ModuleList(Taps(*block_taps(block, which), taps, dtype, rows=rows, point=True) for which in "qkv")


class DependencyBranch(Part):
    """A branch of TDM behind its depthwise convolutions: one-head attention over time or over classes, then the MLP."""

    query: Tensor
    query_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, block: Block, dtype: torch.dtype):
        super().__init__(dtype)
        folded = OneHeadAttention.fold(block.attention, attention_scale(block))
        for name in ("query", "query_bias", "out", "out_bias"):
            self.keep(name, getattr(folded, name))
        self.mlp = Mlp([block], dtype)

    def project(self, taps: nn.ModuleList, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map normalized sequences [S, T, H] to queries, keys and values [S, T, H]; only queries need a matmul."""
        for_query, for_key, for_value = typed(taps, Taps)
        neighbours = for_query.read(normal)
        query = normalize(for_query.combine(*neighbours)) @ self.query + self.query_bias
        return query, normalize(for_key.combine(*neighbours)), normalize(for_value.combine(*neighbours))

    def residual(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add attention and MLP to x: [B P, C, H] each, and the result; invalid points hold anything."""
        y = x + (attended @ self.out + self.out_bias)
        out: Tensor = y + self.mlp(y)
        return out


class AddNeighbours(nn.Module):
    """What is left of a convolution that multiplied first: every tap's product is added to the neighbour it is for."""

    left: Tensor
    centre: Tensor
    right: Tensor

    def __init__(self, taps: Tensor):
        super().__init__()
        for k, name in enumerate(("left", "centre", "right")):
            self.register_buffer(name, (taps[k] * KERNEL + k).clamp(max=KERNEL * taps.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, P, K E] to [B, P, E]."""
        rows = x.reshape(-1, KERNEL * x.shape[1], x.shape[2] // KERNEL)
        rows = F.pad(rows, (0, 0, 0, 1))  # a zero row at the end
        return rows.index_select(1, self.left) + rows.index_select(1, self.centre) + rows.index_select(1, self.right)


class ChannelBranch(Part):
    """The channel branch of all levels as one batch: L Blocks over H channels whose features are the T steps.

    Coarser levels have T_l = T / 2^l features: theirs are repeated 2^l times, which changes neither mean nor
    variance, so that the native LayerNorm serves; weights read the first copy and write all of them.
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
        self.hidden, self.levels, self.steps = stage.hidden, len(layout.steps), layout.steps[0]
        self.keep("press", conv_matrix(stage.press.weight))
        self._keep_blocks(typed(stage.channel_blocks, Block), dtype)

        # The point that feature j of level l reads.
        starts = [sum(layout.sizes[:level]) for level in range(self.levels)]
        features = torch.arange(self.steps)
        spread = [start + features % steps for start, steps in zip(starts, layout.steps, strict=True)]
        self.keep("spread", torch.cat(spread))

    def _keep_blocks(self, blocks: list[Block], dtype: torch.dtype) -> None:
        """Fold the L Blocks: their weights read the first copy of the features and write every copy."""

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(*(1,) * (value.ndim - 1), self.steps // value.shape[-1])

        def first_copy(value: Tensor) -> Tensor:
            return F.pad(value, (0, self.steps - value.shape[-1]))

        def readers(matrix: Tensor) -> Tensor:
            return first_copy(matrix.T).T

        folded = [OneHeadAttention.fold(block.attention, attention_scale(block)) for block in blocks]
        self.keep("query", torch.stack([readers(first_copy(f.query)) for f in folded]))
        self.keep("query_bias", torch.stack([first_copy(f.query_bias) for f in folded]).unsqueeze(1))
        self.keep("out", torch.stack([readers(repeated(f.out)) for f in folded]))
        self.keep("out_bias", torch.stack([repeated(f.out_bias) for f in folded]).unsqueeze(1))
        mlps = [Mlp.fold(block) for block in blocks]
        self.keep("first", torch.stack([readers(m[0]) for m in mlps]))
        self.keep("first_bias", torch.stack([m[1] for m in mlps]).unsqueeze(1))
        self.keep("second", torch.stack([repeated(m[2]) for m in mlps]))
        self.keep("second_bias", torch.stack([repeated(m[3]) for m in mlps]).unsqueeze(1))

        weight, bias = (
            torch.stack([repeated(value) for value in values], dim=2)[:, :, :, None, None]  # [K, 3, L, 1, 1, T]
            for values in zip(*(block_taps(block, "qkv") for block in blocks), strict=True)
        )
        self.taps = Taps(weight, bias, sequence_taps(self.hidden), dtype, rows=self.hidden)

    def forward(self, rows: Tensor) -> Tensor:
        """Map the masked rows of all levels [B, P, K E] to [B, H, L T], for `ChannelExpand`."""
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
    """The linear layers T_l -> C T_l of some levels as one matmul.

    The released network reads their [H, C T] result as [C, H, T] without a transpose, so (channel, class) pairs keep
    their order and only the step moves to the front.
    """

    read: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, stage: TemporalDependency, layout: Layout, first: int, dtype: torch.dtype):
        """Fold the linear layers of the levels of `layout`, of which `first` is the first."""
        super().__init__(dtype)
        self.classes = stage.classes
        linears = typed(stage.channel_linears, nn.Linear)[first : first + len(layout.steps)]
        weight = torch.zeros(sum(layout.steps), layout.num_points, self.classes, dtype=torch.float64)
        bias = torch.zeros(layout.num_points, self.classes, dtype=torch.float64)
        row = column = 0
        for linear, steps, size in zip(linears, layout.steps, layout.sizes, strict=True):
            by_step = linear.weight.detach().double().view(self.classes, steps, steps)  # [C, t, j]
            weight[row : row + steps, column : column + steps] = by_step.permute(2, 1, 0)
            bias[column : column + steps] = linear.bias.detach().double().view(self.classes, steps).T
            row, column = row + steps, column + size
        self.keep("weight", weight.flatten(1))
        self.keep("bias", bias.flatten())
        features = layout.steps[0] * 2**first  # T
        levels = enumerate(layout.steps, start=first)
        self.keep("read", torch.cat([level * features + torch.arange(steps) for level, steps in levels]))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, H, L T] to [B, P, H, C]."""
        expanded = torch.relu(x.index_select(2, self.read) @ self.weight + self.bias)
        return expanded.reshape(*x.shape[:2], -1, self.classes).transpose(1, 2)
