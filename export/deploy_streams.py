"""Deployment form of the embedding and of CMCC: the visual and the audio stream as one stack [B, 2, T, D].

Shapes:  B batch   T points of a level   D model width   H heads   d = D / H   A attentions of a layer: two Blocks, and
         two gates where present
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.cmcc import ConsistencyGate, Embedding
from ccnet.layers import Block
from export.deploy_parts import (
    EXCLUDED,
    HeadedAttention,
    Layout,
    MaxPool,
    Mlp,
    Neighbours,
    NormRelu,
    Part,
    Taps,
    attend,
    branch_scale,
    conv_matrix,
    fold_taps,
    layer_norms,
    merge_heads,
    normalize,
    split_heads,
)


class StreamEmbedding(Part):
    """Both embeddings. The first convolutions differ in width and stay apart; from there on the streams are a stack.

    The first convolutions stay in float32: raw features have any magnitude; the LayerNorm behind takes it out.
    """

    visual: Tensor
    audio: Tensor
    second: Tensor
    positions: Tensor

    def __init__(self, embeddings: Sequence[Embedding], layout: Layout, dtype: torch.dtype):
        """layout of the finest level, whose steps come in."""
        super().__init__(dtype)
        convs = [[conv for conv in e.convs if isinstance(conv, nn.Conv1d)] for e in embeddings]
        self.keep("visual", conv_matrix(convs[0][0].weight), torch.float32)
        self.keep("audio", conv_matrix(convs[1][0].weight), torch.float32)
        self.keep("second", torch.stack([conv_matrix(pair[1].weight) for pair in convs]))
        positions = embeddings[0].positions[: layout.num_points]
        self.keep("positions", F.pad(positions, (0, 0, 0, layout.num_points - len(positions))))
        self.input_neighbours = Neighbours(layout.taps().clamp(max=layout.steps[0]))
        self.neighbours = Neighbours(layout.taps())
        norms = [layer_norms(e.norms) for e in embeddings]
        self.first_norm = NormRelu([pair[0] for pair in norms], dtype)
        self.second_norm = NormRelu([pair[1] for pair in norms], dtype)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        """visual [B, Cv, steps], audio [B, Ca, steps], mask [B, 1, T, 1] -> [B, 2, T, D]."""
        first_visual = self.input_neighbours(visual.transpose(1, 2)) @ self.visual
        first_audio = self.input_neighbours(audio.transpose(1, 2)) @ self.audio
        x: Tensor = self.first_norm(torch.stack([first_visual, first_audio], dim=1), mask)
        x = self.second_norm(self.neighbours(x) @ self.second, mask)
        return x + self.positions * mask


class StreamLayer(Part):
    """A Block of each stream and, where present, a gate of each stream, in one stack of attentions.

    Serves the self-attention Blocks (each stream to itself) and the CMCC layers (queries from the other stream).
    Projections are made per stream that they read: queries, then keys, then values, each of the Blocks, then of the
    gates, each visual, then audio. Queries that read the other stream then change places.
    """

    project: Tensor
    query_bias: Tensor
    query_order: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(
        self,
        blocks: Sequence[Block],
        gates: Sequence[ConsistencyGate],
        layout: Layout,
        level: int,
        *,
        cross: bool,
        dtype: torch.dtype,
    ):
        """blocks, gates: of the visual and the audio stream; level: the one written."""
        super().__init__(dtype)
        self.heads = blocks[0].attention.heads
        self.crossed, self.gated = cross, bool(gates)
        strided = blocks[0].stride == 2
        own = layout.part(level, level + 1)
        taps = layout.strided_taps(level - 1) if strided else own.taps()
        rows = layout.lengths[level - 1] if strided else own.num_points
        self.pool = MaxPool(layout.pool_taps(level - 1)) if strided else None

        asking: list[Block | ConsistencyGate] = [*(reversed(blocks) if cross else blocks), *gates]
        asked: list[Block | ConsistencyGate] = [*blocks, *gates]
        self.stacked_heads = len(asked) * self.heads
        folded = {id(m): HeadedAttention.fold(m.attention, _scale(m)) for m in asked}
        convs = [fold_taps(m.attention.query_conv, m.norm_q) for m in asking]
        convs += [fold_taps(m.attention.key_conv, m.norm_kv) for m in asked]
        convs += [fold_taps(m.attention.value_conv, m.norm_kv) for m in asked]
        weight, bias = (torch.stack(part, dim=1)[:, :, None] for part in zip(*convs, strict=True))  # [K, 3 A, 1, D]
        shape = (len(weight), -1, 2, 1, weight.shape[-1])
        self.taps = Taps(weight.view(shape), bias.view(shape), taps, dtype, rows=rows, stack=2, point=False)

        project = [folded[id(m)].query for m in asking]
        project += [folded[id(m)].key for m in asked] + [folded[id(m)].value for m in asked]
        self.keep("project", torch.stack(project))
        self.keep("query_bias", self._by_head([folded[id(m)].query_bias for m in asking]))
        block_order = [1, 0] if cross else [0, 1]
        order = torch.tensor([*block_order, *range(2, len(asked))])
        self.keep("query_order", (order[:, None] * self.heads + torch.arange(self.heads)).flatten())
        self.keep("out", torch.stack([folded[id(m)].out for m in blocks]))
        self.keep("out_bias", torch.stack([folded[id(m)].out_bias for m in blocks])[:, None])
        self.mlp = Mlp(blocks, dtype)
        self.gate = Gates(gates, [folded[id(gate)] for gate in gates], own, dtype) if gates else None

    def _by_head(self, biases: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(biases)).view(self.stacked_heads, 1, -1)

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """x [B, 2, rows, D], mask [B, 1, T, 1], key_bias [B, 1, 1, T] -> [B, 2, T, D]."""
        sequences = normalize(self.taps(normalize(x)))
        if self.gate is not None:
            sequences = sequences * mask  # keys of invalid steps are zero, as the gates need them
        projected = split_heads(sequences @ self.project, self.heads)  # [B, 3 A H, T, d]
        query, key, value = torch.chunk(projected, 3, dim=1)
        query = query + self.query_bias
        if self.crossed:
            query = query.index_select(1, self.query_order)
        if self.gate is not None:
            value, key_bias = value + self.gate.value_bias * mask, self.gate.key_bias(key_bias)
        attended = merge_heads(attend(query, key, value, key_bias), self.heads)  # [B, A, T, D]

        gain = mask
        if self.gate is not None:
            attended, for_gates = torch.chunk(attended, 2, dim=1)
            gain = mask + mask * self.gate(for_gates)
        skip = x if self.pool is None else self.pool(x)
        y = skip + (attended @ self.out + self.out_bias)
        y = y + self.mlp(y)
        out: Tensor = y * gain
        return out


class Gates(Part):
    """Both gates of a layer, behind their attention: sigmoid(w (Wp o + bp) + b) with u = Wp^T w one vector.

    Strided gates do not exclude invalid keys; those are zero up to a bias that all keys share. The halo's key counts
    for all the steps that were cut off, by a bias of log(number). Value biases count where the key is valid.
    """

    vector: Tensor
    bias: Tensor
    order: Tensor
    value_bias: Tensor
    exclude: Tensor
    extra: Tensor

    def __init__(
        self, gates: Sequence[ConsistencyGate], folded: Sequence[HeadedAttention], own: Layout, dtype: torch.dtype
    ):
        super().__init__(dtype)
        heads = gates[0].attention.heads
        weights = [gate.linear.weight.detach().double()[0] for gate in gates]
        self.keep("vector", torch.stack([f.out @ w for f, w in zip(folded, weights, strict=True)])[:, None])
        biases = [
            gate.attention.proj.bias.detach().double() @ w + gate.linear.bias.detach().double()
            for gate, w in zip(gates, weights, strict=True)
        ]
        self.keep("bias", torch.stack(biases).view(2, 1, 1))
        self.keep("order", torch.tensor([1, 0]))  # the gate of one stream is for the other
        value_bias = torch.stack([f.value_bias for f in folded])
        value_bias = torch.cat([torch.zeros_like(value_bias), value_bias])  # those of Blocks are in their output bias
        self.keep("value_bias", value_bias.view(4 * heads, 1, -1))

        self.excludes = gates[0].attention.exclude_invalid_keys
        self.keep("exclude", torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat_interleave(heads).view(-1, 1, 1), torch.float32)
        steps, trained = own.steps[0], own.trained[0]
        extra = torch.zeros(4 * heads, 1, own.num_points)
        extra[2 * heads :, :, steps:] = EXCLUDED
        if own.cut:
            extra[2 * heads :, :, steps] = math.log(trained - steps)
        self.has_extra = own.num_points > steps
        self.keep("extra", extra, torch.float32)

    def key_bias(self, key_bias: Tensor) -> Tensor:
        """[B, 1, 1, T] -> the biases of all attentions of the layer, [B, 1 or A H, 1, T]."""
        if self.excludes:
            return key_bias
        key_bias = key_bias * self.exclude
        return key_bias + self.extra if self.has_extra else key_bias

    def forward(self, attended: Tensor) -> Tensor:
        """[B, 2, T, D] of the visual and the audio gate -> [B, 2, T, 1] for the visual and the audio stream."""
        logits = (attended * self.vector).sum(-1, keepdim=True) + self.bias
        return torch.sigmoid(logits.index_select(1, self.order))


def _scale(module: Block | ConsistencyGate) -> Tensor | float:
    return branch_scale(module) if isinstance(module, Block) else 1.0
