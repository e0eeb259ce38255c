"""Building blocks of CCNet: masked convolution, masked cross attention, the transformer Block.

Everything is channels-last. Shapes:  B batch   T steps   s stride   C channels   H heads   K kernel size
A mask is [B, T, 1] bool, true where a step has content; the output of a strided layer has the mask `mask[:, ::s]`.

Invalid steps are not zero everywhere: a masked convolution, a value, an attention output and an MLP output are
zeroed there, but a LayerNorm writes its bias, and the convolution that follows reads it beside the last valid
step. The weights were trained with that (paper section 3; layout of the released weights).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedConv1d(nn.Conv1d):
    """Convolution over time with zero padding K // 2, zeroed at invalid steps. Weight [Cout, Cin / groups, K]."""

    def __init__(
        self, in_dim: int, out_dim: int, *, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
    ):
        super().__init__(in_dim, out_dim, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve x [B, T, Cin] under mask [B, T, 1] -> [B, T / s, Cout]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2) * mask[:, :: self.stride[0]]


class CrossAttention(nn.Module):
    """Masked multi-head attention: queries from one sequence, keys and values from another (paper Eq. 2).

    Depthwise masked convolutions (kernel 3, stride s), a LayerNorm and a linear layer make each of q, k, v.
    `exclude_invalid_keys=False` leaves invalid keys in the softmax, where they all equal one constant, with their
    values zeroed: what the released weights do in the strided gates.
    """

    def __init__(self, dim: int, heads: int, *, stride: int = 1, exclude_invalid_keys: bool = True):
        super().__init__()
        self.heads = heads
        self.stride = stride
        self.exclude_invalid_keys = exclude_invalid_keys
        self.query_conv = MaskedConv1d(dim, dim, stride=stride, groups=dim)
        self.key_conv = MaskedConv1d(dim, dim, stride=stride, groups=dim)
        self.value_conv = MaskedConv1d(dim, dim, stride=stride, groups=dim)
        self.query_norm = nn.LayerNorm(dim)
        self.key_norm = nn.LayerNorm(dim)
        self.value_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, kv: Tensor, q: Tensor, mask: Tensor) -> Tensor:
        """Attend from q to kv, both [B, T, C], under mask [B, T, 1] -> [B, T / s, C], zero at invalid steps."""
        query = self.query(self.query_norm(self.query_conv(q, mask)))
        key = self.key(self.key_norm(self.key_conv(kv, mask)))
        value = self.value(self.value_norm(self.value_conv(kv, mask)))
        mask = mask[:, :: self.stride]
        bias = None
        if self.exclude_invalid_keys:
            # Finite, so that a row without any valid key gives a mean of zeroed values and not NaN.
            lowest = torch.finfo(query.dtype).min / 2
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
            bias = bias.transpose(1, 2).unsqueeze(1)  # [B, 1, 1, T]
        out = F.scaled_dot_product_attention(
            self._split(query), self._split(key), self._split(value * mask), attn_mask=bias
        )
        merged: Tensor = self.proj(out.transpose(1, 2).flatten(2)) * mask
        return merged

    def _split(self, x: Tensor) -> Tensor:
        """Split the heads: [B, T, C] -> [B, H, T, C / H]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class ScaledDropPath(nn.Module):
    """Learned per-channel scale, and stochastic depth: in training a whole sample's branch is dropped at `rate`."""

    def __init__(self, dim: int, rate: float):
        super().__init__()
        self.rate = rate
        self.scale = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """Scale, and in training drop, a branch x [B, T, C]."""
        x = x * self.scale
        if not self.training or self.rate == 0:
            return x
        keep = torch.empty((len(x), 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block: x1 gives keys, values and the residual, x2 gives the queries (paper Eq. 1).

    With stride 2 the residual is max-pooled. The result is zero at invalid steps.
    """

    def __init__(self, dim: int, heads: int, *, stride: int = 1, hidden: int | None = None, drop_path: float = 0.0):
        super().__init__()
        hidden = hidden or 4 * dim
        self.stride = stride
        self.norm_kv = nn.LayerNorm(dim)
        self.norm_q = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, heads, stride=stride)
        self.attention_scale = ScaledDropPath(dim, drop_path)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.mlp_scale = ScaledDropPath(dim, drop_path)

    def forward(self, x1: Tensor, x2: Tensor, mask: Tensor) -> Tensor:
        """Transform x1 by what x2 asks, both [B, T, C], under mask [B, T, 1] -> [B, T / s, C]."""
        attended = self.attention(self.norm_kv(x1), self.norm_q(x2), mask)
        skip = x1 if self.stride == 1 else max_pool(x1)
        mask = mask[:, :: self.stride]
        y = skip * mask + self.attention_scale(attended)
        out: Tensor = y + self.mlp_scale(self.mlp(self.norm_mlp(y)) * mask)
        return out


def max_pool(x: Tensor) -> Tensor:
    """Take the maximum over three steps with stride 2 and padding 1: [B, T, C] -> [B, T / 2, C]."""
    return F.max_pool1d(x.transpose(1, 2), 3, stride=2, padding=1).transpose(1, 2)


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Return the fixed positions [T, C]: angle(p, j) = p / 10000^(2 (j // 2) / C), sine on even j, cosine on odd j."""
    exponent = torch.arange(dim, dtype=torch.float64) // 2 * 2 / dim
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(-math.log(10000.0) * exponent)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()
