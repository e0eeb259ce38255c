"""Embedding, and cross-modal consistency collaboration (CMCC): two streams that attend to and gate each other.

Shapes:  B batch   T steps   T_l steps of level l (T / 2^l, l = 0 is the finest)   C features   D model width
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccnet.config import ModelConfig
from ccnet.network.layers import Block, CrossAttention, MaskedConv1d, sinusoidal_positions


class Embedding(nn.Module):
    """Features of one modality to model width: two masked convolutions, positions, self-attention Blocks."""

    positions: Tensor

    def __init__(self, in_dim: int, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.convs = nn.ModuleList([MaskedConv1d(in_dim, dim), MaskedConv1d(dim, dim)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, drop_path=config.drop_path) for _ in range(config.self_layers)
        )
        table = sinusoidal_positions(config.length, dim) / math.sqrt(dim)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Embed x [B, T, C] under mask [B, T, 1] -> [B, T, D]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x, mask)))
        x = x + self.positions * mask
        for block in self.blocks:
            x = block(x, x, mask)
        return x


class ConsistencyGate(nn.Module):
    """Temporal consistency gate (TCG): per step, how much one modality supports an event there (paper Eq. 5).

    Quirk of the released weights: strided gates leave invalid keys in the softmax (see CrossAttention).
    """

    def __init__(self, dim: int, heads: int, *, stride: int):
        super().__init__()
        self.norm_kv = nn.LayerNorm(dim)
        self.norm_q = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, heads, stride=stride, exclude_invalid_keys=stride == 1)
        self.linear = nn.Linear(dim, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute the gate of x [B, T, D] under mask [B, T, 1] -> [B, T / s, 1] in (0, 1)."""
        attended = self.attention(self.norm_kv(x), self.norm_q(x), mask)
        return torch.sigmoid(self.linear(attended) * mask[:, :: self.attention.stride])


class CrossModalLayer(nn.Module):
    """One pyramid level: cross-modal interaction (CMI), then each modality's gate on the other one (paper Eq. 6)."""

    def __init__(self, config: ModelConfig, *, stride: int):
        super().__init__()
        dim, heads = config.dim, config.heads
        self.cmi = config.cmi
        self.tcg = config.tcg
        self.visual_block = Block(dim, heads, stride=stride, drop_path=config.drop_path)
        self.audio_block = Block(dim, heads, stride=stride, drop_path=config.drop_path)
        if self.tcg:
            self.audio_gate = ConsistencyGate(dim, heads, stride=stride)
            self.visual_gate = ConsistencyGate(dim, heads, stride=stride)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Let visual and audio [B, T, D] attend to and gate each other -> both [B, T / s, D]."""
        visual_out = self.visual_block(visual, audio if self.cmi else visual, mask)
        audio_out = self.audio_block(audio, visual if self.cmi else audio, mask)
        if self.tcg:
            visual_out = visual_out + visual_out * self.audio_gate(audio, mask)
            audio_out = audio_out + audio_out * self.visual_gate(visual, mask)
        return visual_out, audio_out


class CMCC(nn.Module):
    """The pyramid: level 0 keeps the steps, every further level halves them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CrossModalLayer(config, stride=1 if level == 0 else 2) for level in range(config.levels)
        )

    def forward(self, visual: Tensor, audio: Tensor, masks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Build the levels of visual and audio [B, T, D], masks [B, T_l, 1] per level -> [B, T_l, D] per level."""
        visual_levels: list[Tensor] = []
        audio_levels: list[Tensor] = []
        input_masks = [masks[0], *masks[:-1]]
        for layer, mask in zip(self.layers, input_masks, strict=True):
            visual, audio = layer(visual, audio, mask)
            visual_levels.append(visual)
            audio_levels.append(audio)
        return visual_levels, audio_levels
