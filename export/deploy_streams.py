"""Deployment form of the embedding and of CMCC: the visual and the audio stream as one stack [2, B, T, D].

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
    normalize,
    split_heads,
    stacked_product,
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
        """visual [B, Cv, steps], audio [B, Ca, steps], mask [B, T, 1] -> [2, B, T, D]."""
        first_visual = self.input_neighbours(visual.transpose(1, 2)) @ self.visual
        first_audio = self.input_neighbours(audio.transpose(1, 2)) @ self.audio
        x: Tensor = self.first_norm(torch.stack([first_visual, first_audio]), mask)
        x = stacked_product(self.neighbours(x), self.second).view(x.shape)
        x = self.second_norm(x, mask)
        return x + self.positions * mask


class StreamLayer(Part):
    """A Block of each stream and, where present, a gate of each stream, in one stack of attentions.

    Serves the self-attention Blocks (each stream to itself) and the CMCC layers (queries from the other stream).
    Projections are made per stream that they read: queries, then keys, then values, each of the Blocks, then of the
    gates, each visual, then audio. Queries that read the other stream then change places.
    """

    project: Tensor
    project_bias: Tensor
    order: Tensor
    out: Tensor
    out_bias: Tensor
    exclude: Tensor
    extra: Tensor

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
        self.crossed = cross
        strided = blocks[0].stride == 2
        own = layout.part(level, level + 1)
        taps = layout.strided_taps(level - 1) if strided else own.taps()
        rows = layout.lengths[level - 1] if strided else own.num_points
        self.pool = MaxPool(layout.pool_taps(level - 1)) if strided else None

        asking: list[Block | ConsistencyGate] = [*(reversed(blocks) if cross else blocks), *gates]
        asked: list[Block | ConsistencyGate] = [*blocks, *gates]
        self.attentions = len(asked)
        folded = {id(m): HeadedAttention.fold(m.attention, _scale(m)) for m in asked}
        convs = [fold_taps(m.attention.query_conv, m.norm_q) for m in asking]
        convs += [fold_taps(m.attention.key_conv, m.norm_kv) for m in asked]
        convs += [fold_taps(m.attention.value_conv, m.norm_kv) for m in asked]
        weight, bias = (torch.stack(part, dim=1) for part in zip(*convs, strict=True))  # [K, 3 A, D]
        shape = (len(weight), -1, 2, 1, 1, weight.shape[-1])
        self.taps = Taps(weight.view(shape), bias.view(shape), taps, dtype, rows=rows)

        project = [folded[id(m)].query for m in asking]
        project += [folded[id(m)].key for m in asked] + [folded[id(m)].value for m in asked]
        self.keep("project", torch.stack(project))
        # Values of gates need their bias per key; those of Blocks are in their output bias.
        value_biases = [folded[id(m)].value_bias * float(isinstance(m, ConsistencyGate)) for m in asked]
        query_biases = [folded[id(m)].query_bias for m in asking]
        no_biases = [torch.zeros_like(b) for b in value_biases]
        self.keep("project_bias", torch.stack(query_biases + no_biases + value_biases)[:, None])
        self.keep("order", torch.tensor([1, 0, *range(2, 3 * len(asked))]))
        self.keep("out", torch.stack([folded[id(m)].out for m in blocks]))
        self.keep("out_bias", torch.stack([folded[id(m)].out_bias for m in blocks])[:, None])
        self.mlp = Mlp(blocks, dtype)
        self.gate = Gates(gates, [folded[id(gate)] for gate in gates], dtype) if gates else None
        self._keep_key_biases(asked, own)

    def _keep_key_biases(self, asked: Sequence[Block | ConsistencyGate], own: Layout) -> None:
        """Which attentions exclude invalid keys, and the biases of the points behind the steps for those that do not.

        Strided gates exclude no invalid key. The halo's counts for all the steps that were cut off, by a bias of
        log(number); the points for alignment are excluded.
        """
        excludes = torch.tensor([m.attention.exclude_invalid_keys for m in asked]).view(-1, 1, 1, 1, 1)
        steps, trained = own.steps[0], own.trained[0]
        extra = torch.zeros(own.num_points)
        extra[steps:] = EXCLUDED
        if own.cut:
            extra[steps] = math.log(trained - steps)
        self.has_extra = own.num_points > steps and not bool(excludes.all())
        self.keep("exclude", excludes.float(), torch.float32)
        self.keep("extra", torch.where(excludes, 0.0, extra), torch.float32)

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """x [2, B, rows, D], mask [B, T, 1], key_bias [B, 1, T] -> [2, B, T, D]."""
        steps, flat_mask = mask.shape[1], mask.flatten(0, 1)
        sequences = normalize(self.taps(normalize(x))).flatten(0, 1)  # [3 A, B, T, D]
        projected = stacked_product(sequences, self.project) + self.project_bias
        if self.gate is not None:
            projected = projected * flat_mask  # keys and values of invalid steps are zero, as the gates need them
        if self.crossed:
            projected = projected.index_select(0, self.order)
        query, key, value = torch.chunk(split_heads(projected, steps, self.heads), 3)  # [A B, H, T, d]
        attended = attend(query, key, value, self._key_bias(key_bias))
        attended = attended.transpose(1, 2).reshape(self.attentions, -1, x.shape[3])  # [A, B T, D]

        gain = flat_mask
        if self.gate is not None:
            attended, for_gates = torch.chunk(attended, 2)
            gain = flat_mask + flat_mask * self.gate(for_gates)
        skip = (x if self.pool is None else self.pool(x)).flatten(1, 2)
        y = attended @ self.out + self.out_bias + skip
        out: Tensor = (y + self.mlp(y)) * gain
        return out.reshape(2, -1, steps, x.shape[3])

    def _key_bias(self, key_bias: Tensor) -> Tensor:
        """[B, 1, T] -> the biases of all attentions, [A B, 1, 1, T]."""
        biases = self.exclude * key_bias.unsqueeze(1)
        if self.has_extra:
            biases = biases + self.extra
        return biases.reshape(-1, 1, 1, key_bias.shape[2])


class Gates(Part):
    """Both gates of a layer, behind their attention: sigmoid(w (Wp o + bp) + b), where u = Wp^T w is one vector."""

    vector: Tensor
    bias: Tensor
    order: Tensor

    def __init__(self, gates: Sequence[ConsistencyGate], folded: Sequence[HeadedAttention], dtype: torch.dtype):
        super().__init__(dtype)
        weights = [gate.linear.weight.detach().double()[0] for gate in gates]
        self.keep("vector", torch.stack([f.out @ w for f, w in zip(folded, weights, strict=True)])[:, None])
        biases = [
            gate.attention.proj.bias.detach().double() @ w + gate.linear.bias.detach().double()
            for gate, w in zip(gates, weights, strict=True)
        ]
        self.keep("bias", torch.stack(biases).view(2, 1, 1))
        self.keep("order", torch.tensor([1, 0]))  # the gate of one stream is for the other

    def forward(self, attended: Tensor) -> Tensor:
        """[2, B T, D] of the visual and the audio gate -> [2, B T, 1] for the visual and the audio stream."""
        logits = (attended * self.vector).sum(-1, keepdim=True) + self.bias
        return torch.sigmoid(logits.index_select(0, self.order))


def _scale(module: Block | ConsistencyGate) -> Tensor | float:
    return branch_scale(module) if isinstance(module, Block) else 1.0
