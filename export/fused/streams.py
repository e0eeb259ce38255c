"""Fused network of the embedding and of CMCC: the visual and the audio stream as one stack [2, B T, D].

Shapes:  B batch   T points of a level   D model width   H heads   d = D / H   A attentions of a layer: two Blocks, and
         two gates where present
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.network.cmcc import ConsistencyGate, Embedding
from ccnet.network.layers import Block
from export.fused.layout import Layout
from export.fused.parts import (
    EXCLUDED,
    HeadedAttention,
    MaxPool,
    Mlp,
    Neighbours,
    NormRelu,
    Part,
    Taps,
    attend,
    branch_scale,
    conv_matrix,
    equal_parts,
    fold_taps,
    layer_norms,
    merge_heads,
    normalize,
    split_heads,
    stacked_matmul,
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
        """visual [B, Cv, steps], audio [B, Ca, steps], mask [B, T, 1] -> [2, B T, D]."""
        first_visual = self.input_neighbours(visual.transpose(1, 2)) @ self.visual
        first_audio = self.input_neighbours(audio.transpose(1, 2)) @ self.audio
        x: Tensor = self.first_norm(torch.cat([first_visual, first_audio]), mask)
        x = self.second_norm(stacked_matmul(self.neighbours(x), self.second), mask)
        return (x + self.positions * mask).flatten(1, 2)


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
        strided = blocks[0].stride == 2
        own = layout.part(level, level + 1)
        taps = layout.strided_taps(level - 1) if strided else own.taps()
        self.rows = rows = layout.lengths[level - 1] if strided else own.num_points
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
        # Queries of the Blocks go to the other stream; the gates change places, as each is for the other stream.
        swapped = [1, 0] if cross else [0, 1]
        check_order, plain = ([3, 2] if gates else []), [0, 1]
        in_thirds = [[*swapped, *check_order], [*plain, *check_order], [*plain, *check_order]]
        self.keep(
            "order", torch.tensor([third * len(asked) + i for third, order in enumerate(in_thirds) for i in order])
        )
        self.reordered = cross or bool(gates)
        self.keep("out", torch.stack([folded[id(m)].out for m in blocks]))
        self.keep("out_bias", torch.stack([folded[id(m)].out_bias for m in blocks])[:, None])
        self.mlp = Mlp(blocks, dtype)
        self.gate = Gates(gates, [folded[id(gate)] for gate in gates], dtype) if gates else None

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """x [2, B rows, D], mask [B, T, 1], key_bias [A B, 1, 1, T] -> [2, B T, D]."""
        steps, flat_mask = mask.shape[1], mask.flatten(0, 1)
        by_video = (2, -1, self.rows, x.shape[2])
        sequences = self.taps(normalize(x).reshape(by_video)).reshape(3 * self.attentions, -1, x.shape[2])
        projected = normalize(sequences) @ self.project + self.project_bias  # [3 A, B T, D]
        if self.gate is not None:
            projected = projected * flat_mask  # keys and values of invalid steps are zero, as the gates need them
        if self.reordered:
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
    """Both gates of a layer, behind their attention: sigmoid(w (Wp o + bp) + b), where u = Wp^T w is one vector.

    They come in the order of the streams they are for: first the one made from audio, for the visual stream.
    """

    vector: Tensor
    bias: Tensor

    def __init__(self, gates: Sequence[ConsistencyGate], folded: Sequence[HeadedAttention], dtype: torch.dtype):
        """gates: made from the visual, and from the audio stream."""
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
        """[2, B T, D] -> [2, B T, 1]."""
        return torch.sigmoid((attended * self.vector).sum(-1, keepdim=True) + self.bias)


class KeyBiases(Part):
    """Attention biases of the CMCC layers, of all levels at once: invalid keys are excluded, but in strided gates.

    There they count, zero as they are, and the halo's key counts for all the steps that were cut off, by a bias of
    log(number); the points for alignment are excluded. Always float32.
    """

    exclude: Tensor
    extra: Tensor

    def __init__(self, layout: Layout, *, gated: bool, dtype: torch.dtype):
        super().__init__(dtype)
        self.lengths = layout.lengths
        of_level = layout.level()
        keeps_invalid = (of_level > 0).repeat(4 if gated else 2, 1, 1, 1)  # [A, 1, 1, P]
        keeps_invalid[:2] = False  # gates of all levels but the finest
        cut = (torch.tensor(layout.trained) - torch.tensor(layout.steps))[of_level]
        is_halo = layout.cut & (layout.position() == torch.tensor(layout.steps)[of_level])
        behind = torch.where(layout.is_step(), 0.0, torch.where(is_halo, cut.clamp(min=1).double().log(), EXCLUDED))
        self.keep("exclude", (~keeps_invalid).float(), torch.float32)
        self.keep("extra", torch.where(keeps_invalid, behind, 0.0), torch.float32)

    def forward(self, key_bias: Tensor) -> tuple[Tensor, ...]:
        """[B, 1, P] -> per level [A B, 1, 1, T_l]."""
        biases = (key_bias * self.exclude + self.extra).reshape(-1, 1, 1, key_bias.shape[2])
        return torch.split_with_sizes(biases, self.lengths, dim=3)


def _scale(module: Block | ConsistencyGate) -> Tensor | float:
    return branch_scale(module) if isinstance(module, Block) else 1.0
