"""Multi-temporal granularity collaboration (MTGC): coarse-to-fine, temporal dependencies, fine-to-coarse.

Shapes:  B batch   T_l steps of level l (l = 0 is the finest)   L levels   E = 2 D level width (visual, then audio)
         C classes   H hidden width per class (`tdm_dim`)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccnet.config import ModelConfig
from ccnet.network.layers import Block, MaskedConv1d, max_pool


class CoarseToFine(nn.Module):
    """Every level attends to the next coarser one, stretched over time by a linear layer (paper Eq. 8).

    The linear layers over the time axis fix the number of steps of a network.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        lengths = level_lengths(config)
        self.linears = nn.ModuleList(nn.Linear(coarse, fine) for fine, coarse in itertools.pairwise(lengths))
        self.block = Block(2 * config.dim, config.heads, drop_path=config.drop_path)

    def forward(self, levels: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Refine levels [B, T_l, E]. The coarsest one stays; the guide is always an *input* level."""
        refined = []
        for x, mask, coarser, linear in zip(levels[:-1], masks[:-1], levels[1:], self.linears, strict=True):
            guide = torch.relu(linear(coarser.transpose(1, 2))).transpose(1, 2)  # [B, T_l, E], not masked
            refined.append(self.block(x, guide, mask))
        return [*refined, levels[-1]]


class FineToCoarse(nn.Module):
    """Every level queries the next finer, already updated level and adds the result (paper Eq. 9)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(2 * config.dim, heads=1, drop_path=config.drop_path) for _ in range(config.levels - 1)
        )

    def forward(self, levels: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Update levels [B, T_l, E], from fine to coarse."""
        updated = [levels[0]]
        for x, mask, block in zip(levels[1:], masks[1:], self.blocks, strict=True):
            updated.append(x + block(max_pool(updated[-1]), x, mask))
        return updated


class TemporalDependency(nn.Module):
    """Temporal dependency module (TDM) of the baseline: every class gets H channels, related over time and classes.

    All parts are shared by the levels but `channel_blocks` and `channel_linears`. The channel branch is in the
    released weights, not in the paper's text.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.classes, self.hidden = config.num_classes, config.tdm_dim
        width, wide = 2 * config.dim, config.num_classes * config.tdm_dim

        def block(dim: int) -> Block:
            return Block(dim, heads=1, hidden=config.tdm_dim, drop_path=config.drop_path)

        self.expand = MaskedConv1d(width, wide)
        self.temporal = block(config.tdm_dim)
        self.cooccurrence = block(config.tdm_dim)
        self.squeeze = MaskedConv1d(wide, width)
        self.channel_branch = config.tdm_channel_branch
        if self.channel_branch:
            self.press = MaskedConv1d(width, config.tdm_dim)
            self.channel_blocks = nn.ModuleList(block(length) for length in level_lengths(config))
            self.channel_linears = nn.ModuleList(
                nn.Linear(length, config.num_classes * length) for length in level_lengths(config)
            )

    def forward(self, levels: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Relate steps and classes in levels [B, T_l, E]; the result replaces the level."""
        return [self._level(x, mask, level) for level, (x, mask) in enumerate(zip(levels, masks, strict=True))]

    def _level(self, x: Tensor, mask: Tensor, level: int) -> Tensor:
        batch, steps, _ = x.shape
        by_class = torch.relu(self.expand(x, mask)).view(batch, steps, self.classes, self.hidden)
        if self.channel_branch:
            by_class = by_class + self._channels(x, mask, level)

        rows = by_class.transpose(1, 2).reshape(batch * self.classes, steps, self.hidden)
        row_mask = mask.unsqueeze(1).expand(-1, self.classes, -1, -1).reshape(batch * self.classes, steps, 1)
        over_time = self.temporal(rows, rows, row_mask).view(batch, self.classes, steps, self.hidden).transpose(1, 2)

        rows = by_class.reshape(batch * steps, self.classes, self.hidden)
        row_mask = mask.expand(-1, -1, self.classes).reshape(batch * steps, self.classes, 1)
        over_classes = self.cooccurrence(rows, rows, row_mask).view_as(over_time)

        squeezed: Tensor = self.squeeze((over_time + over_classes).flatten(2), mask)
        return squeezed

    def _channels(self, x: Tensor, mask: Tensor, level: int) -> Tensor:
        """Attend over the H channels: x [B, T_l, E] -> [B, T_l, C, H].

        The [B, H, C * T_l] result is read as [B, C, H, T_l] without a transpose: (channel h, class c) becomes the
        (h C + c)-th pair of the other order, the step stays. Invalid steps are not zero in it.
        """
        batch, steps, _ = x.shape
        channels = torch.relu(self.press(x, mask)).transpose(1, 2)  # [B, H, T_l]
        every_channel = torch.ones((batch, self.hidden, 1), dtype=torch.bool, device=x.device)
        channels = self.channel_blocks[level](channels, channels, every_channel)
        wide = torch.relu(self.channel_linears[level](channels))  # [B, H, C * T_l]
        return wide.reshape(batch, self.classes, self.hidden, steps).permute(0, 3, 1, 2)


class MTGC(nn.Module):
    """Coarse-to-fine, TDM, fine-to-coarse; `mtgc_order="f2c_c2f"` swaps the two directions around TDM (Table 4)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        several = config.levels > 1  # a single level has no other one to collaborate with
        c2f = [("c2f", CoarseToFine)] if config.c2f and several else []
        f2c = [("f2c", FineToCoarse)] if config.f2c and several else []
        first, second = (c2f, f2c) if config.mtgc_order == "c2f_f2c" else (f2c, c2f)
        self.stages = nn.ModuleDict(
            {name: stage(config) for name, stage in [*first, ("tdm", TemporalDependency), *second]}
        )

    def forward(self, levels: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Collaborate across the levels [B, T_l, E] under masks [B, T_l, 1]."""
        for stage in self.stages.values():
            levels = stage(levels, masks)
        return list(levels)


def level_lengths(config: ModelConfig) -> list[int]:
    """Return T_l of every level, the finest first."""
    return [config.length // 2**level for level in range(config.levels)]
