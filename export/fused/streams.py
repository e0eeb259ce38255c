"""The embedding and CMCC in the fused network: the visual and the audio stream are one stack [2, B T, D].

Shapes:  B batch   T points of a level   D model width   H heads   d = D / H   A attentions of a layer: two Blocks, and
         in CMCC two gates (DAVEL has none)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.network.cmcc import ConsistencyGate, Embedding
from ccnet.network.layers import Block, MaskedConv1d
from export.fused.layout import Layout
from export.fused.parts import (
    HeadedAttention,
    MaxPool,
    Mlp,
    Neighbours,
    NormRelu,
    Part,
    Taps,
    attend,
    attention_scale,
    conv_matrix,
    equal_parts,
    fold_taps,
    merge_heads,
    normalize,
    split_heads,
    stacked_matmul,
    typed,
)


class StreamEmbedding(Part):
    """Both embeddings. The first convolutions differ in width and stay apart; behind them the streams are a stack.

    The first convolutions stay in float32: raw features have any magnitude, which the LayerNorm behind removes.
    """

    visual: Tensor
    audio: Tensor
    second: Tensor
    positions: Tensor

    def __init__(self, embeddings: Sequence[Embedding], layout: Layout, dtype: torch.dtype):
        """Fold the visual and the audio embedding; `layout` is that of the finest level."""
        super().__init__(dtype)
        convs = [typed(embedding.convs, MaskedConv1d) for embedding in embeddings]
        self.keep("visual", conv_matrix(convs[0][0].weight), torch.float32)
        self.keep("audio", conv_matrix(convs[1][0].weight), torch.float32)
        self.keep("second", torch.stack([conv_matrix(pair[1].weight) for pair in convs]))
        steps, points = layout.steps[0], layout.num_points
        self.keep("positions", F.pad(embeddings[0].positions, (0, 0, 0, points - steps)))
        self.input_neighbours = Neighbours(layout.taps().clamp(max=steps))  # the input has steps alone
        self.neighbours = Neighbours(layout.taps())
        norms = [typed(embedding.norms, nn.LayerNorm) for embedding in embeddings]
        self.first_norm = NormRelu([pair[0] for pair in norms], dtype)
        self.second_norm = NormRelu([pair[1] for pair in norms], dtype)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        """Map visual [B, steps, Cv], audio [B, steps, Ca] and mask [B, T, 1] to [2, B T, D]."""
        first_visual = self.input_neighbours(visual) @ self.visual
        first_audio = self.input_neighbours(audio) @ self.audio
        x: Tensor = self.first_norm(torch.cat([first_visual, first_audio]), mask)
        x = self.second_norm(stacked_matmul(self.neighbours(x), self.second), mask)
        return (x + self.positions * mask).flatten(1, 2)


class StreamLayer(Part):
    """A Block of each stream and, in CMCC, a gate of each stream, as one stack of attentions (paper Eq. 2, 5, 6).

    Serves the self-attention Blocks, where each stream asks itself, and the CMCC layers, where each Block asks the
    other stream and the gates are. Projections are computed per stream that they read: queries, then keys, then
    values, each of the Blocks, then of the gates, each visual, then audio. In CMCC some then change places.
    """

    project: Tensor
    project_bias: Tensor
    order: Tensor  # in CMCC only
    out: Tensor
    out_bias: Tensor

    def __init__(
        self,
        blocks: Sequence[Block],
        gates: Sequence[ConsistencyGate],
        layout: Layout,
        level: int,
        dtype: torch.dtype,
        *,
        cross: bool = False,
    ):
        """Fold the Blocks and gates of both streams that write `level`; `cross`: each Block asks the other stream."""
        super().__init__(dtype)
        self.heads = blocks[0].attention.heads
        strided = blocks[0].stride == 2
        own = layout.part(level, level + 1)
        taps = layout.strided_taps(level - 1) if strided else own.taps()
        self.rows = rows = layout.sizes[level - 1] if strided else own.num_points
        self.pool = MaxPool(layout.pool_taps(level - 1)) if strided else None

        asking: list[Block | ConsistencyGate] = [*(reversed(blocks) if cross else blocks), *gates]
        asked: list[Block | ConsistencyGate] = [*blocks, *gates]
        self.attentions = len(asked)
        folded = {m: HeadedAttention.fold(m.attention, attention_scale(m)) for m in asked}
        convs = [fold_taps(m.attention.query_conv, m.norm_q) for m in asking]
        convs += [fold_taps(m.attention.key_conv, m.norm_kv) for m in asked]
        convs += [fold_taps(m.attention.value_conv, m.norm_kv) for m in asked]
        weight, bias = (torch.stack(part, dim=1) for part in zip(*convs, strict=True))  # [K, 3 A, D]
        shape = (len(weight), -1, 2, 1, 1, weight.shape[-1])
        self.taps = Taps(weight.view(shape), bias.view(shape), taps, dtype, rows=rows)

        project = [folded[m].query for m in asking]
        project += [folded[m].key for m in asked] + [folded[m].value for m in asked]
        self.keep("project", torch.stack(project))
        # Values of gates need their bias per key; those of Blocks are in their output bias.
        value_biases = [folded[m].value_bias * float(isinstance(m, ConsistencyGate)) for m in asked]
        query_biases = [folded[m].query_bias for m in asking]
        no_biases = [torch.zeros_like(b) for b in value_biases]
        self.keep("project_bias", torch.stack(query_biases + no_biases + value_biases)[:, None])
        self.gate = Gates(gates, [folded[gate] for gate in gates], dtype) if gates else None
        self.cross = cross
        if cross:
            # Queries of the Blocks go to the other stream; the gates change places, as each is for the other stream.
            of_gates = [3, 2] if gates else []
            thirds = [[1, 0, *of_gates], [0, 1, *of_gates], [0, 1, *of_gates]]
            count = self.attentions
            self.keep("order", torch.tensor([count * i + j for i, third in enumerate(thirds) for j in third]))
        self.keep("out", torch.stack([folded[m].out for m in blocks]))
        self.keep("out_bias", torch.stack([folded[m].out_bias for m in blocks])[:, None])
        self.mlp = Mlp(blocks, dtype)

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """Map x [2, B rows, D], mask [B, T, 1] and key_bias [A B, 1, 1, T] to [2, B T, D]."""
        steps, flat_mask = mask.shape[1], mask.flatten(0, 1)
        by_video = (2, -1, self.rows, x.shape[2])
        sequences = self.taps(normalize(x).reshape(by_video)).reshape(3 * self.attentions, -1, x.shape[2])
        projected = normalize(sequences) @ self.project + self.project_bias  # [3 A, B T, D]
        if self.gate is not None:
            projected = projected * flat_mask  # keys and values of invalid steps are zero, as the gates need them
        if self.cross:
            projected = projected.index_select(0, self.order)
        query, key, value = equal_parts(split_heads(projected, steps, self.heads), 3)  # [A B, H, T, d]
        attended = merge_heads(attend(query, key, value, key_bias), self.attentions)  # [A, B T, D]

        gain = flat_mask
        if self.gate is not None:
            attended, for_gates = torch.chunk(attended, 2)
            gain = flat_mask + flat_mask * self.gate(for_gates)
        skip = x if self.pool is None else self.pool(x.reshape(by_video)).flatten(1, 2)
        y = attended @ self.out + self.out_bias + skip
        out: Tensor = (y + self.mlp(y)) * gain
        return out


class Gates(Part):
    """Both gates of a layer behind their attention (paper Eq. 5): sigmoid(w (Wp o + bp) + b), u = Wp^T w one vector.

    They stand in the order of the streams they are for: the one computed from audio is for the visual stream.
    """

    vector: Tensor
    bias: Tensor

    def __init__(self, gates: Sequence[ConsistencyGate], folded: Sequence[HeadedAttention], dtype: torch.dtype):
        """Fold the gates computed from the visual and from the audio stream."""
        super().__init__(dtype)
        weights = [gate.linear.weight.detach().double()[0] for gate in gates]
        vectors = [f.out @ w for f, w in zip(folded, weights, strict=True)]
        biases = [
            gate.attention.proj.bias.detach().double() @ w + gate.linear.bias.detach().double()
            for gate, w in zip(gates, weights, strict=True)
        ]
        self.keep("vector", torch.stack(vectors[::-1])[:, None])
        self.keep("bias", torch.stack(biases[::-1]).view(2, 1, 1))

    def forward(self, attended: Tensor) -> Tensor:
        """Map [2, B T, D] to gates [2, B T, 1]."""
        return torch.sigmoid((attended * self.vector).sum(-1, keepdim=True) + self.bias)


def key_steps(layout: Layout, point_steps: Tensor, *, gates: bool) -> Tensor:
    """Return the step [A, 1, 1, P] that must be valid for a point to count as a key in the A attentions of CMCC.

    For Blocks it is the point's own step. Gates of all levels but the finest do not exclude invalid keys (see
    `ConsistencyGate`), which are zero there: any step will do, and only padding points are excluded.
    """
    strided = (layout.level() > 0) & layout.is_step()
    of_gates = [torch.where(strided, -1, point_steps)] * 2 if gates else []
    return torch.stack([point_steps, point_steps, *of_gates])[:, None, None]
