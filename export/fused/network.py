"""The fused network: the trained network as an equivalent one of fewer and larger operations, made for engines.

`fused_network(model)` computes what `model` computes at valid points (to float32 rounding: the same sums in another
order). What is rewritten: all levels lie side by side as one sequence of points; the two streams are one stack;
kernel-3 convolutions are matmuls with gathered neighbours; norms, scales and projections are folded into the
matmuls beside them. Each rewrite stands with its algebra in the module that makes it.

Shapes:  B batch   T steps   Cv, Ca feature widths   P points of all levels (with halos, see Layout)   T_l points of a
         level   D model width   E = 2 D   C classes
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccnet.config import ModelConfig
from ccnet.network.cmcc import CrossModalLayer, Embedding
from ccnet.network.layers import Block
from ccnet.network.model import CCNet
from ccnet.network.mtgc import CoarseToFine, FineToCoarse, TemporalDependency
from export.fused.layout import Layout
from export.fused.mtgc import PackedCoarseToFine, PackedFineToCoarse
from export.fused.parts import (
    EXCLUDED,
    Neighbours,
    NormRelu,
    Part,
    conv_matrix,
    equal_parts,
    layer_norms,
    stacked_matmul,
)
from export.fused.streams import KeyBiases, StreamEmbedding, StreamLayer
from export.fused.tdm import PackedTemporalDependency
from runtime.errors import ExportError

BOUND = 1e30
"""Far above every output, so a clamp to it changes nothing. Computing in bfloat16, OpenVINO writes a last product that
ends in an activation directly in float32, and rounds another one to bfloat16 first: logits would tie."""


def fused_network(model: CCNet, *, length: int | None = None, dtype: torch.dtype = torch.float32) -> FusedNetwork:
    """The fused network of a trained network, with the forward contract of `CCNet` (float32 in and out).

    length: steps the network takes, a multiple of 2^(levels - 1) up to the trained length. For every video that
    fits, outputs at valid points equal those of the full length (see Layout). dtype: type of weights and arithmetic,
    float32, float16 or bfloat16; softmax, normalisation statistics, the first and the last layers stay in float32.
    Raises ExportError for a length or type that can't be had.
    """
    config = model.config
    length = config.length if length is None else length
    multiple = 2 ** (config.levels - 1)
    if not 0 < length <= config.length or length % multiple:
        raise ExportError(f"length: got {length}, expected a multiple of {multiple} from {multiple} to {config.length}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ExportError(f"dtype: got {dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    with torch.no_grad():
        return FusedNetwork(model, length, dtype).eval()


class FusedNetwork(nn.Module):
    """The rewritten network. Made by `fused_network`."""

    config: ModelConfig
    point_steps: Tensor
    real_points: Tensor

    def __init__(self, model: CCNet, length: int, dtype: torch.dtype):
        super().__init__()
        trained = model.config
        self.config = dataclasses.replace(trained, length=length)
        self.dtype = dtype
        strides = [2**level for level in range(trained.levels)]
        layout = Layout(tuple(length // s for s in strides), tuple(trained.length // s for s in strides))
        self.lengths = layout.lengths

        # The step whose mask a point takes; points behind a level's steps read an invalid step added at the end.
        steps = layout.position() * torch.tensor(strides)[layout.level()]
        self.register_buffer("point_steps", torch.where(layout.is_step(), steps, length))
        self.register_buffer("real_points", layout.is_step().nonzero()[:, 0])
        self.has_extra = not bool(layout.is_step().all())

        self.embed = StreamEmbedding([model.embed_visual, model.embed_audio], layout.part(0, 1), dtype)
        pairs = zip(blocks_of(model.embed_visual), blocks_of(model.embed_audio), strict=True)
        self.self_layers = nn.ModuleList(StreamLayer(pair, [], layout, 0, cross=False, dtype=dtype) for pair in pairs)
        layers = [layer for layer in model.cmcc.layers if isinstance(layer, CrossModalLayer)]
        self.cross_layers = nn.ModuleList(
            StreamLayer(
                [layer.visual_block, layer.audio_block],
                [layer.visual_gate, layer.audio_gate] if layer.tcg else [],
                layout,
                level,
                cross=layer.cmi,
                dtype=dtype,
            )
            for level, layer in enumerate(layers)
        )
        self.key_biases = KeyBiases(layout, gated=trained.tcg, dtype=dtype)
        self.gated = trained.tcg
        self.stages = nn.ModuleList(_packed(stage, layout, dtype) for stage in model.mtgc.stages.values())
        self.heads = PackedHeads(model, layout, dtype)

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """visual [B, Cv, T], audio [B, Ca, T], mask [B, 1, T] bool -> logits [B, P, C], offsets [B, P, C, 2]."""
        valid = mask.float()
        if self.has_extra:
            valid = F.pad(valid, (0, 1))
        allowed = valid.index_select(2, self.point_steps)  # [B, 1, P] float32
        point_mask = allowed.transpose(1, 2).to(self.dtype)  # [B, P, 1]
        masks = torch.split_with_sizes(point_mask, self.lengths, dim=1)
        key_bias = (1 - allowed) * EXCLUDED
        key_biases = torch.split_with_sizes(key_bias, self.lengths, dim=2)
        cross_biases = self.key_biases(key_bias)
        # At the finest level all attentions exclude invalid keys: those of the Blocks serve without gates, too.
        self_bias = equal_parts(cross_biases[0], 2)[0] if self.gated else cross_biases[0]

        streams = self.embed(visual, audio, masks[0])  # [2, B T, D]
        for layer in self.self_layers:
            streams = layer(streams, masks[0], self_bias)
        levels = []
        for layer, level_mask, bias in zip(self.cross_layers, masks, cross_biases, strict=True):
            streams = layer(streams, level_mask, bias)
            levels.append(streams.reshape(2, -1, level_mask.shape[1], streams.shape[2]))
        x = torch.cat(levels, dim=2).permute(1, 2, 0, 3).flatten(2)  # [B, P, E]: visual, then audio channels

        for stage in self.stages:
            by_level = isinstance(stage, PackedFineToCoarse)
            x = stage(x, masks, key_biases) if by_level else stage(x, point_mask, key_bias.unsqueeze(1))
        logits, offsets = self.heads(x, point_mask)
        if self.has_extra:
            logits, offsets = logits.index_select(1, self.real_points), offsets.index_select(1, self.real_points)
        return logits, offsets.reshape(-1, offsets.shape[1], offsets.shape[2] // 2, 2)


def blocks_of(embedding: Embedding) -> list[Block]:
    return [block for block in embedding.blocks if isinstance(block, Block)]


def _packed(stage: nn.Module, layout: Layout, dtype: torch.dtype) -> nn.Module:
    if isinstance(stage, CoarseToFine):
        return PackedCoarseToFine(stage, layout, dtype)
    if isinstance(stage, FineToCoarse):
        return PackedFineToCoarse(stage, layout, dtype)
    assert isinstance(stage, TemporalDependency)
    return PackedTemporalDependency(stage, layout, dtype)


class PackedHeads(Part):
    """Both heads over all levels at once: the first layers as one product, the second as a stack; the last, of other
    widths, apart and in float32."""

    first: Tensor
    second: Tensor
    class_weight: Tensor
    class_bias: Tensor
    offset_weight: Tensor
    offset_bias: Tensor
    level_scale: Tensor

    def __init__(self, model: CCNet, layout: Layout, dtype: torch.dtype):
        super().__init__(dtype)
        heads = (model.class_head, model.offset_head)
        convs = [[conv for conv in head.convs if isinstance(conv, nn.Conv1d)] for head in heads]
        norms = [layer_norms(head.norms) for head in heads]
        self.keep("first", torch.cat([conv_matrix(pair[0].weight) for pair in convs], dim=1))
        self.keep("second", torch.stack([conv_matrix(pair[1].weight) for pair in convs]))
        self.first_norm = NormRelu([pair[0] for pair in norms], dtype)
        self.second_norm = NormRelu([pair[1] for pair in norms], dtype)
        for name, output in (("class", model.class_head.output), ("offset", model.offset_head.output)):
            assert output.bias is not None
            self.keep(f"{name}_weight", conv_matrix(output.weight), torch.float32)
            self.keep(f"{name}_bias", output.bias, torch.float32)
        scales = torch.stack([scale.detach() for scale in model.offset_head.scales])
        self.keep("level_scale", scales[layout.level()][:, None], torch.float32)
        self.neighbours = Neighbours(layout.taps())

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, P, E], mask [B, P, 1] -> float32 logits [B, P, C], offsets [B, P, 2 C]."""
        both = torch.cat(torch.chunk(self.neighbours(x) @ self.first, 2, dim=-1))
        x = self.first_norm(both, mask)  # [2, B, P, head_dim]
        x = self.second_norm(stacked_matmul(self.neighbours(x), self.second), mask)
        class_rows, offset_rows = equal_parts(self.neighbours(x).float().flatten(0, 1), 2)  # [B, P, K head_dim]
        mask = mask.float()
        logits = (class_rows @ self.class_weight + self.class_bias).clamp(-BOUND, BOUND) * mask
        offsets = offset_rows @ self.offset_weight + self.offset_bias
        offsets = offsets.clamp(-BOUND, BOUND) * (mask * self.level_scale)
        return logits, torch.relu(offsets)
