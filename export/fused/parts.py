"""Parts of the fused network: the rewrites that its stages share, each with its algebra.

Every part folds weights of eager modules in float64 and keeps the result in its own dtype.

Sequences with weights of their own are stacked along the first axis, [S, B, T, C], and enter matmuls as [S, B T, C]:
engines fuse bias, activation and residual into a matmul of three axes, and not into one of four. Constants stand on
the right of a matmul and have two axes, or three where the left side is a stack too: OpenVINO's fast bfloat16 path
takes no other matmuls.

Shapes:  B batch   P points of all levels side by side   T points of a level   C channels   H heads   K kernel taps (3)
         S stack
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.network.cmcc import ConsistencyGate
from ccnet.network.layers import Block, CrossAttention
from export.fused.layout import KERNEL

Module = TypeVar("Module", bound=nn.Module)

EXCLUDED = -3e4
"""Bias of an invalid key: vanishes in the softmax, is representable in half precision, and no sum of it overflows."""


def typed(modules: Iterable[nn.Module], kind: type[Module]) -> list[Module]:
    """Return the modules, each checked to be of `kind`: containers of PyTorch do not know what they hold.

    Raises TypeError for another module; leaving it out would change what the network computes.
    """
    found = list(modules)
    for module in found:
        if not isinstance(module, kind):
            raise TypeError(f"expected {kind.__name__}, got {type(module).__name__}")
    return cast("list[Module]", found)


def normalize(x: Tensor) -> Tensor:
    """Apply LayerNorm without its affine part to at most three axes.

    Statistics are float32: squares of large values overflow half precision. OpenVINO splits the norm of more than
    three axes into several passes, which in bfloat16 round the variance too.
    """
    assert x.ndim <= 3
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k^T + bias) v (paper Eq. 2), the softmax in float32; q brings the factor 1 / sqrt(d)."""
    scores = (q @ k.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


def split_heads(x: Tensor, steps: int, heads: int) -> Tensor:
    """Map [S, B T, C] to [S B, H, T, C / H], or [B, T, C] to [B, H, T, C / H]."""
    return x.reshape(-1, steps, heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor, stack: int) -> Tensor:
    """Map [S B, H, T, d] to [S, B T, H d]."""
    return x.transpose(1, 2).reshape(stack, -1, x.shape[1] * x.shape[3])


def equal_parts(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split the first axis, which may hold the batch, into equal parts: `torch.chunk` would fix the batch size."""
    return torch.split_with_sizes(x, [x.shape[0] // parts] * parts)


class Part(nn.Module):
    """A part of the fused network: holds constants, by default in the dtype that it computes in."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def keep(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        kept = value.detach().to(dtype or self.dtype) if value.is_floating_point() else value
        self.register_buffer(name, kept.contiguous())


def conv_matrix(weight: Tensor) -> Tensor:
    """Return a Conv1d weight [out, in, K] as the matrix [K in, out] for the rows that Neighbours makes."""
    return weight.detach().double().permute(2, 1, 0).flatten(0, 1)


def stacked_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [S, B, T, C] by weight [S, C, D] to [S, B T, D]."""
    product: Tensor = x.flatten(1, 2) @ weight
    return product


class Neighbours(nn.Module):
    """Each point beside its two neighbours, so that a kernel-3 convolution becomes one matmul."""

    index: Tensor

    def __init__(self, taps: Tensor):
        super().__init__()
        self.register_buffer("index", taps.T.reshape(-1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [.., P, C] to [.., P, K C]."""
        rows = F.pad(x, (0, 0, 0, 1)).index_select(-2, self.index)
        return rows.reshape(*x.shape[:-2], -1, KERNEL * x.shape[-1])


class Taps(Part):
    """Depthwise kernel-3 convolutions of the LayerNorms of one sequence, as shifted multiply-adds.

    conv(g x + b) = sum_k (tap_k g) x_k + sum_k tap_k b, where the second sum leaves out the taps outside the level:
    it is a constant per point. So one LayerNorm without affine part serves all convolutions that read the sequence.
    """

    left_index: Tensor
    centre_index: Tensor
    right_index: Tensor
    left: Tensor
    centre: Tensor
    right: Tensor
    shift: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, taps: Tensor, dtype: torch.dtype, *, rows: int, point: bool = False
    ) -> None:
        """Fold weight and bias, tap_k g and tap_k b [K, .., 1 or P, C], for an input of `rows` rows; taps [K, P].

        With `point`, weights are kept per point and are zero at taps outside the level. It is for large inputs, where
        appending the zero row that these taps otherwise read would cost a copy.
        """
        super().__init__(dtype)
        inside = (taps < rows).double().view(KERNEL, *(1,) * (weight.ndim - 3), -1, 1)
        self.keep("shift", (bias * inside).sum(0))
        elsewhere = (taps[1] != torch.arange(taps.shape[1])) & (taps[1] < rows)
        self.strided = taps.shape[1] != rows or bool(elsewhere.any())
        self.padded = not point
        if point:
            weight, taps = weight * inside, taps.clamp(max=rows - 1)
        for k, name in enumerate(("left", "centre", "right")):
            self.keep(name, weight[k])
            self.register_buffer(f"{name}_index", taps[k].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map x [.., rows, C] to [.., P, C], preceded by the leading axes of the weights: one result for each."""
        return self.combine(*self.read(x))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the left neighbour, the middle and the right neighbour of every point, each [.., P, C]."""
        rows = F.pad(x, (0, 0, 0, 1)) if self.padded else x
        middle = rows.index_select(-2, self.centre_index) if self.strided else x
        return rows.index_select(-2, self.left_index), middle, rows.index_select(-2, self.right_index)

    def combine(self, left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
        """Return the convolutions of what `read` returned."""
        return left * self.left + middle * self.centre + right * self.right + self.shift


class MaxPool(nn.Module):
    """Maximum over three points, stride 2, as gathers: engines fuse them into the element-wise work around them."""

    left: Tensor
    centre: Tensor
    right: Tensor

    def __init__(self, taps: Tensor):
        super().__init__()
        for k, name in enumerate(("left", "centre", "right")):
            self.register_buffer(name, taps[k].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map [.., points of the finer level, C] to [.., points of the coarser level, C]."""
        outer = torch.maximum(x.index_select(-2, self.left), x.index_select(-2, self.right))
        return torch.maximum(outer, x.index_select(-2, self.centre))


def fold_taps(conv: nn.Conv1d, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Fold a depthwise convolution and the LayerNorm before it: tap_k g and tap_k b, each [K, C]."""
    taps = conv.weight.detach().double()[:, 0].T
    return taps * norm.weight.detach().double(), taps * norm.bias.detach().double()


def block_taps(block: Block, which: str, axes: int = 0) -> tuple[Tensor, Tensor]:
    """Fold the depthwise convolutions of some of a Block's queries, keys and values (`which`: "q", "kv", "qkv").

    Returns tap_k g and tap_k b for `Taps`, each [K, N, 1, .., C] with `axes` axes of one.
    """
    attention = block.attention
    convs = {"q": attention.query_conv, "k": attention.key_conv, "v": attention.value_conv}
    folded = [fold_taps(convs[letter], block.norm_q if letter == "q" else block.norm_kv) for letter in which]
    weight, bias = (torch.stack(values, dim=1) for values in zip(*folded, strict=True))
    ones = (1,) * axes
    return weight.view(*weight.shape[:2], *ones, -1), bias.view(*bias.shape[:2], *ones, -1)


def fold_linear(norm: nn.LayerNorm, linear: nn.Linear, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Fold scale * linear(norm(.)) into a matrix [in, out] and a bias [out] to use after `normalize`."""
    weight = linear.weight.detach().double()
    matrix = (weight * norm.weight.detach().double()).T * scale
    return matrix, (weight @ norm.bias.detach().double() + linear.bias.detach().double()) * scale


@dataclass(frozen=True)
class HeadedAttention:
    """The linear layers of a CrossAttention (paper Eq. 2), with their norms and the branch scale folded in.

    A key bias adds the same to every score of a query and vanishes in the softmax. A value bias passes through the
    softmax unchanged where the weights of the valid keys sum to one, and so moves into the output bias.
    """

    query: Tensor
    query_bias: Tensor
    key: Tensor
    value: Tensor
    value_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @classmethod
    def fold(cls, attention: CrossAttention, scale: Tensor | float) -> HeadedAttention:
        """Fold `attention` and the scale behind it, in float64."""
        root = (attention.query.out_features // attention.heads) ** -0.5
        query, query_bias = fold_linear(attention.query_norm, attention.query, root)
        key, _ = fold_linear(attention.key_norm, attention.key)
        value, value_bias = fold_linear(attention.value_norm, attention.value)
        weight = attention.proj.weight.detach().double()
        out_bias = (weight @ value_bias + attention.proj.bias.detach().double()) * scale
        return cls(query, query_bias, key, value, value_bias, weight.T * scale, out_bias)


@dataclass(frozen=True)
class OneHeadAttention:
    """A CrossAttention with one head, whose keys and values need no projection of their own.

    q k^T = x_q (Wq^T Wk) x_k^T + terms that are the same for every key; (p v) Wp^T = (p x_v) (Wp Wv)^T.
    """

    query: Tensor
    query_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @classmethod
    def fold(cls, attention: CrossAttention, scale: Tensor | float) -> OneHeadAttention:
        """Fold `attention` and the scale behind it, in float64."""
        headed = HeadedAttention.fold(attention, scale)
        return cls(
            headed.query @ headed.key.T, headed.query_bias @ headed.key.T, headed.value @ headed.out, headed.out_bias
        )


def attention_scale(module: Block | ConsistencyGate) -> Tensor | float:
    """Return the learned scale [C] of a Block's attention branch; a gate has none, so 1."""
    return module.attention_scale.scale.detach().double() if isinstance(module, Block) else 1.0


class Mlp(Part):
    """The MLP branch of one Block or of a stack of Blocks (paper Eq. 1), with norm and scale folded in."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype):
        super().__init__(dtype)
        folded = [self.fold(block) for block in blocks]
        names = ("first", "first_bias", "second", "second_bias")
        for name, values in zip(names, zip(*folded, strict=True), strict=True):
            value = torch.stack(values) if len(blocks) > 1 else values[0]
            self.keep(name, value.unsqueeze(-2) if name.endswith("bias") and len(blocks) > 1 else value)

    @staticmethod
    def fold(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fold the MLP of `block` in float64: first matrix and bias, second matrix and bias."""
        expand, contract = typed((block.mlp[0], block.mlp[2]), nn.Linear)
        scale = block.mlp_scale.scale.detach().double()
        first, first_bias = fold_linear(block.norm_mlp, expand)
        second, second_bias = contract.weight.detach().double().T * scale, contract.bias.detach().double() * scale
        return first, first_bias, second, second_bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [.., C] to the same shape; a stack of Blocks takes [S, B T, C]."""
        hidden = F.gelu(normalize(x) @ self.first + self.first_bias)
        return hidden @ self.second + self.second_bias


class NormRelu(Part):
    """LayerNorm and ReLU behind a masked convolution, of a stack of sequences: relu(g normalize(x) m + b).

    The convolution zeroes invalid steps, and LayerNorm maps a row of zeros to b.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, norms: Sequence[nn.LayerNorm], dtype: torch.dtype):
        super().__init__(dtype)
        self.keep("gain", torch.stack([norm.weight for norm in norms])[:, None, None])
        self.keep("bias", torch.stack([norm.bias for norm in norms])[:, None, None])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map x [S, B T, C] or [S B, T, C] and mask [B, T, 1] to [S, B, T, C] in the dtype of the part."""
        normal = normalize(x).to(self.dtype).reshape(self.gain.shape[0], -1, mask.shape[1], x.shape[2])
        return torch.relu(normal * mask * self.gain + self.bias)
