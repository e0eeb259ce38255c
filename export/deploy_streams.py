"""Deployment form of the embedding and of CMCC: the visual and the audio stream as one stack [B, 2, T, D].

Shapes:  B batch   T points of a level   D model width   A attentions of a layer (2 Blocks, and 2 gates where present)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ccnet.cmcc import ConsistencyGate, Embedding
from ccnet.layers import Block
from export.deploy_parts import (
    HeadedAttention,
    Mlp,
    Neighbours,
    NormRelu,
    Part,
    Taps,
    attend,
    branch_scale,
    conv_matrix,
    fold_taps,
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

    def __init__(self, embeddings: Sequence[Embedding], taps: Tensor, steps: int, dtype: torch.dtype):
        """taps [K, T] of the level's points, of which `steps` come in and the halo, where there is one, is added."""
        super().__init__(dtype)
        self.keep("visual", conv_matrix(embeddings[0].convs[0].weight), torch.float32)
        self.keep("audio", conv_matrix(embeddings[1].convs[0].weight), torch.float32)
        self.keep("second", torch.stack([conv_matrix(e.convs[1].weight) for e in embeddings]))
        self.keep("positions", embeddings[0].positions[: taps.shape[1]])
        self.input_neighbours = Neighbours(taps.clamp(max=steps))
        self.neighbours = Neighbours(taps)
        self.first_norm = NormRelu([e.norms[0] for e in embeddings], dtype)
        self.second_norm = NormRelu([e.norms[1] for e in embeddings], dtype)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        """visual [B, Cv, steps], audio [B, Ca, steps], mask [B, 1, T, 1] -> [B, 2, T, D]."""
        first_visual = self.input_neighbours(visual.transpose(1, 2)) @ self.visual
        first_audio = self.input_neighbours(audio.transpose(1, 2)) @ self.audio
        x = self.first_norm(torch.stack([first_visual, first_audio], dim=1), mask)
        x = self.second_norm(self.neighbours(x) @ self.second, mask)
        return x + self.positions * mask


class StreamLayer(Part):
    """A Block of each stream and, where present, a gate of each stream, in one stack of attentions.

    Serves the self-attention Blocks (each stream to itself) and the CMCC layers (queries from the other stream).
    Projections are made per stream that they read, [query, gate query, key, gate key, value, gate value] x [visual,
    audio]; queries of the Blocks then change places. Keys of invalid steps are zero, as the strided gates need them:
    those do not exclude invalid keys, and the halo's key then counts for all the steps that were cut.
    """

    project: Tensor
    query_bias: Tensor
    query_order: Tensor
    exclude: Tensor
    cut_keys: Tensor
    out: Tensor
    out_bias: Tensor
    gate_value_bias: Tensor
    gate_vector: Tensor
    gate_bias: Tensor
    gate_order: Tensor

    def __init__(
        self,
        blocks: Sequence[Block],
        gates: Sequence[ConsistencyGate],
        taps: Tensor,
        *,
        rows: int,
        cut: int,
        cross: bool,
        dtype: torch.dtype,
    ):
        """blocks, gates: of the visual and the audio stream; taps [K, T]; rows: T of the input; cut: steps cut off."""
        super().__init__(dtype)
        self.heads = blocks[0].attention.heads
        self.stride = blocks[0].stride
        self.attentions = len(blocks) + len(gates)
        askers = list(reversed(blocks)) if cross else list(blocks)  # whose queries read the visual, the audio stream
        folded = {id(m): HeadedAttention.fold(m.attention, _scale(m)) for m in (*blocks, *gates)}

        queries: list[Block | ConsistencyGate] = [*askers, *gates]
        readers: list[Block | ConsistencyGate] = [*blocks, *gates]
        convs = [fold_taps(m.attention.query_conv, m.norm_q) for m in queries]
        convs += [fold_taps(m.attention.key_conv, m.norm_kv) for m in readers]
        convs += [fold_taps(m.attention.value_conv, m.norm_kv) for m in readers]
        weight, bias = (
            torch.stack(part, dim=1).unflatten(1, (-1, 2)).unsqueeze(-2) for part in zip(*convs, strict=True)
        )
        self.taps = Taps(weight, bias, taps, dtype, rows=rows)
        self.keep(
            "project",
            torch.stack(
                [folded[id(m)].query for m in queries]
                + [folded[id(m)].key for m in readers]
                + [folded[id(m)].value for m in readers]
            ),
        )
        self.keep("query_bias", torch.stack([folded[id(m)].query_bias for m in queries]).unsqueeze(1))
        order = [1, 0] if cross else [0, 1]
        self.keep("query_order", torch.tensor([*order, *range(2, self.attentions)]))
        self.crossed = cross

        self.keep("out", torch.stack([folded[id(m)].out for m in blocks]))
        self.keep("out_bias", torch.stack([folded[id(m)].out_bias for m in blocks]).unsqueeze(1))
        self.mlp = Mlp(blocks, dtype)

        self.gated = bool(gates)
        if gates:
            self._keep_gates(gates, [folded[id(gate)] for gate in gates], taps.shape[1], cut)

    def _keep_gates(
        self, gates: Sequence[ConsistencyGate], folded: Sequence[HeadedAttention], length: int, cut: int
    ) -> None:
        """linear(proj(o)) is one vector u = Wp^T w per gate; value biases only count where the key is valid."""
        vectors = [f.out @ gate.linear.weight.detach().double().T for gate, f in zip(gates, folded, strict=True)]
        self.keep("gate_vector", torch.stack(vectors))
        biases = [
            gate.attention.proj.bias.detach().double() @ gate.linear.weight.detach().double()[0]
            + gate.linear.bias.detach().double()
            for gate in gates
        ]
        self.keep("gate_bias", torch.stack(biases).view(2, 1, 1))
        value_bias = torch.stack([f.value_bias for f in folded])
        self.keep("gate_value_bias", torch.cat([torch.zeros_like(value_bias), value_bias]).unsqueeze(1))
        self.keep("gate_order", torch.tensor([1, 0]))
        excluded = [1.0, 1.0] + [float(gate.attention.exclude_invalid_keys) for gate in gates]
        self.keep("exclude", torch.tensor(excluded).view(-1, 1, 1), torch.float32)
        self.all_exclude = all(excluded)
        self.halo = cut > 0
        counts = torch.zeros(self.attentions, 1, length)
        if cut > 0:
            counts[2:, :, -1] = math.log(cut)
        self.keep("cut_keys", counts, torch.float32)

    def forward(self, x: Tensor, mask: Tensor, key_bias: Tensor) -> Tensor:
        """x [B, 2, rows, D], mask [B, 1, T, 1], key_bias [B, 1, 1, T] -> [B, 2, T, D]."""
        sequences = normalize(self.taps(normalize(x)).flatten(1, 2))
        if self.gated:
            sequences = sequences * mask
        query, key, value = (sequences @ self.project).split(self.attentions, dim=1)
        query = query + self.query_bias
        if self.crossed:
            query = query.index_select(1, self.query_order)
        if self.gated:
            value = value + self.gate_value_bias * mask
        attended = attend(
            split_heads(query, self.heads),
            split_heads(key, self.heads),
            split_heads(value, self.heads),
            self._bias(key_bias),
        )
        attended = merge_heads(attended, self.attentions)

        gain = mask
        if self.gated:
            attended, gate = attended.split(2, dim=1)
            logits = (gate @ self.gate_vector + self.gate_bias).index_select(1, self.gate_order)
            gain = mask * (1 + torch.sigmoid(logits))
        skip = x if self.stride == 1 else F.max_pool2d(x, (3, 1), stride=(2, 1), padding=(1, 0))
        x = skip + (attended @ self.out + self.out_bias)
        return (x + self.mlp(x)) * gain

    def _bias(self, key_bias: Tensor) -> Tensor:
        """[B, 1, 1, T] -> one bias per attention, [B A, 1, 1, T]."""
        if self.gated and not self.all_exclude:
            bias = key_bias * self.exclude
            if self.halo:
                bias = bias + self.cut_keys
        else:
            bias = key_bias.expand(-1, self.attentions, -1, -1)
        return bias.reshape(-1, 1, 1, key_bias.shape[-1])


def _scale(module: Block | ConsistencyGate) -> Tensor | float:
    return branch_scale(module) if isinstance(module, Block) else 1.0
