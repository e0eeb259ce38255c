"""The fused network: the trained network as an equivalent one of fewer and larger operations, made for engines.

`fused_network(model)` computes what `model` computes at valid points, to float32 rounding: the same sums in another
order. The rewrites: all levels lie side by side as one sequence of points; the two streams are one stack; kernel-3
convolutions are matmuls with gathered neighbours; norms, scales and projections are folded into the matmuls beside
them. Each rewrite stands with its algebra in the module that applies it.

Shapes:  B batch   T steps   Cv, Ca feature widths   P points of all levels, padding included (see Layout)
         T_l points of a level   D model width   E = 2 D   C classes
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from ccnet.config import ModelConfig
from ccnet.network.cmcc import ConsistencyGate, CrossModalLayer
from ccnet.network.layers import Block, MaskedConv1d
from ccnet.network.model import CCNet
from ccnet.network.mtgc import CoarseToFine, FineToCoarse, TemporalDependency
from export.fused.layout import Layout
from export.fused.mtgc import FusedCoarseToFine, FusedFineToCoarse
from export.fused.parts import (
    EXCLUDED,
    Neighbours,
    NormRelu,
    Part,
    conv_matrix,
    equal_parts,
    stacked_matmul,
    typed,
)
from export.fused.streams import StreamEmbedding, StreamLayer, key_steps
from export.fused.tdm import FusedTemporalDependency
from runtime.errors import ExportError

BEHIND_ALL = torch.iinfo(torch.int32).max
"""Step of a padding point: no video is that long."""
BOUND = 1e30
"""Far above every output, so that a clamp to it changes nothing. Computing in bfloat16, OpenVINO writes a last matmul
that ends in an activation directly in float32, and rounds any other to bfloat16 first: logits would tie."""


def fused_network(model: CCNet, *, dtype: torch.dtype = torch.float32) -> FusedNetwork:
    """Fuse a trained network; the result takes and returns the tensors of `runtime.spec.ModelSpec`.

    dtype: float32, float16 or bfloat16, of weights and arithmetic; softmax, normalization statistics, the first and
    the last layers stay in float32. Raises ExportError for another dtype or a network of another structure than the
    paper's (see `unfusable`).
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ExportError(f"dtype: got {dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    if reason := unfusable(model.config):
        raise ExportError(f"{reason}: the fused network has no such form; use --graph reference")
    with torch.no_grad():
        return FusedNetwork(model, dtype).eval()


def unfusable(config: ModelConfig) -> str | None:
    """Return the settings that make a network one for the reference graph alone, or None.

    What DAVEL, the baseline, does not have (gates, C2F, F2C, the channel branch of TDM) can be left out here, too.
    """
    ablated = [] if config.cmi else ["cmi"]
    if config.mtgc_order != "c2f_f2c" and (config.c2f or config.f2c):
        ablated.append("mtgc_order")
    if config.levels == 1:
        ablated.append("levels")
    return ", ".join(f"model.{name} = {json.dumps(getattr(config, name))}" for name in ablated) or None


class FusedNetwork(nn.Module):
    """The rewritten network. Made by `fused_network`."""

    point_steps: Tensor
    key_steps: Tensor
    step_points: Tensor

    def __init__(self, model: CCNet, dtype: torch.dtype):
        super().__init__()
        self.config = config = model.config
        self.dtype = dtype
        strides = [2**level for level in range(config.levels)]
        layout = Layout(tuple(config.length // stride for stride in strides))
        self.sizes = layout.sizes

        steps = layout.position() * torch.tensor(strides)[layout.level()]
        self.register_buffer("point_steps", torch.where(layout.is_step(), steps, BEHIND_ALL).int())
        self.register_buffer("step_points", layout.is_step().nonzero()[:, 0])
        self.padded = not bool(layout.is_step().all())

        embeddings = [model.embed_visual, model.embed_audio]
        self.embed = StreamEmbedding(embeddings, layout.part(0, 1), dtype)
        pairs = zip(*(typed(embedding.blocks, Block) for embedding in embeddings), strict=True)
        self.self_layers = nn.ModuleList(StreamLayer(pair, [], layout, 0, dtype) for pair in pairs)
        self.register_buffer("key_steps", key_steps(layout, self.point_steps, gates=config.tcg))
        self.cross_layers = nn.ModuleList(
            StreamLayer([layer.visual_block, layer.audio_block], _gates(layer), layout, level, dtype, cross=True)
            for level, layer in enumerate(typed(model.cmcc.layers, CrossModalLayer))
        )
        stages = model.mtgc.stages
        self.coarse_to_fine: FusedCoarseToFine | None = None
        self.fine_to_coarse: FusedFineToCoarse | None = None
        if "c2f" in stages:
            [coarse_to_fine] = typed([stages["c2f"]], CoarseToFine)
            self.coarse_to_fine = FusedCoarseToFine(coarse_to_fine, layout, dtype)
        [temporal_dependency] = typed([stages["tdm"]], TemporalDependency)
        self.temporal_dependency = FusedTemporalDependency(temporal_dependency, layout, dtype)
        if "f2c" in stages:
            [fine_to_coarse] = typed([stages["f2c"]], FineToCoarse)
            self.fine_to_coarse = FusedFineToCoarse(fine_to_coarse, layout, dtype)
        self.heads = FusedHeads(model, layout, dtype)

    def forward(self, visual: Tensor, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map visual [B, T, Cv], audio [B, T, Ca], lengths [B] int32 to logits [B, P, C], offsets [B, P, C, 2]."""
        lengths = lengths.reshape(-1, 1, 1)
        point_mask = (self.point_steps[:, None] < lengths).to(self.dtype)  # [B, P, 1]
        masks = torch.split_with_sizes(point_mask, self.sizes, dim=1)
        key_bias = torch.where(self.point_steps < lengths, 0.0, EXCLUDED)  # [B, 1, P]
        cross_bias = torch.where(self.key_steps < lengths, 0.0, EXCLUDED).reshape(-1, 1, 1, key_bias.shape[2])
        cross_biases = torch.split_with_sizes(cross_bias, self.sizes, dim=3)  # [A B, 1, 1, T_l]
        # At the finest level all attentions exclude invalid keys: self-attention takes the biases of the Blocks.
        self_bias = equal_parts(cross_biases[0], 2)[0] if self.config.tcg else cross_biases[0]

        streams = self.embed(visual, audio, masks[0])  # [2, B T, D]
        for layer in self.self_layers:
            streams = layer(streams, masks[0], self_bias)
        levels = []
        for layer, level_mask, bias in zip(self.cross_layers, masks, cross_biases, strict=True):
            streams = layer(streams, level_mask, bias)
            levels.append(streams.reshape(2, -1, level_mask.shape[1], streams.shape[2]))
        x = torch.cat(levels, dim=2).permute(1, 2, 0, 3).flatten(2)  # [B, P, E]: visual, then audio channels

        if self.coarse_to_fine is not None:
            x = self.coarse_to_fine(x, point_mask, key_bias.unsqueeze(1))
        x = self.temporal_dependency(x, point_mask, key_bias.unsqueeze(1))
        if self.fine_to_coarse is not None:
            x = self.fine_to_coarse(x, masks, torch.split_with_sizes(key_bias, self.sizes, dim=2))
        logits, offsets = self.heads(x, point_mask)
        if self.padded:
            logits, offsets = logits.index_select(1, self.step_points), offsets.index_select(1, self.step_points)
        return logits, offsets.reshape(-1, offsets.shape[1], offsets.shape[2] // 2, 2)


def _gates(layer: CrossModalLayer) -> list[ConsistencyGate]:
    return [layer.visual_gate, layer.audio_gate] if layer.tcg else []


class FusedHeads(Part):
    """Both heads on all levels at once: the first layers are one matmul, the second a stack of two; the last, of other
    widths, stay apart and in float32."""

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
        convs = [typed(head.convs, MaskedConv1d) for head in heads]
        norms = [typed(head.norms, nn.LayerNorm) for head in heads]
        self.keep("first", torch.cat([conv_matrix(pair[0].weight) for pair in convs], dim=1))
        self.keep("second", torch.stack([conv_matrix(pair[1].weight) for pair in convs]))
        self.first_norm = NormRelu([pair[0] for pair in norms], dtype)
        self.second_norm = NormRelu([pair[1] for pair in norms], dtype)
        for name, output in (("class", model.class_head.output), ("offset", model.offset_head.output)):
            self.keep(f"{name}_weight", conv_matrix(output.weight), torch.float32)
            self.keep(f"{name}_bias", output.get_parameter("bias"), torch.float32)
        scales = torch.stack([scale.detach() for scale in model.offset_head.scales])
        self.keep("level_scale", scales[layout.level()][:, None], torch.float32)
        self.neighbours = Neighbours(layout.taps())

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [B, P, E] and mask [B, P, 1] to float32 logits [B, P, C] and offsets [B, P, 2 C]."""
        both = torch.cat(torch.chunk(self.neighbours(x) @ self.first, 2, dim=-1))
        x = self.first_norm(both, mask)  # [2, B, P, head_dim]
        x = self.second_norm(stacked_matmul(self.neighbours(x), self.second), mask)
        class_rows, offset_rows = equal_parts(self.neighbours(x).float().flatten(0, 1), 2)  # [B, P, K head_dim]
        mask = mask.float()
        logits = (class_rows @ self.class_weight + self.class_bias).clamp(-BOUND, BOUND) * mask
        offsets = offset_rows @ self.offset_weight + self.offset_bias
        offsets = offsets.clamp(-BOUND, BOUND) * (mask * self.level_scale)
        return logits, torch.relu(offsets)
