"""The graphs of an extractor: the networks with their inputs' scaling, cut where a result is used more than once.

`encode` once a frame, `flow` once a pair of frames, `i3d_rgb`, `i3d_flow` and `vggish` once a step. The flow graph is
`RAFT.flow` in fewer operations, exact but for rounding: gates that see the same input are one convolution, and the
context, which no iteration changes, is convolved once.

Shapes: see `runtime.video.extractor`, which names them.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.extractors.i3d import I3D
from export.extractors.raft import RAFT, cell_grid, correlate, look_up, upsample
from export.extractors.vggish import Vggish

LARGEST_FLOW = 20.0
"""Pixels; what the flow is clamped to before it is rounded to 256 levels."""
_NORMS = (("conv3d", "batch3d"), ("conv1", "norm1"), ("conv2", "norm2"), ("0", "1"))
"""A convolution and the batch norm of its output, as I3D and RAFT name them."""


class EncodeGraph(nn.Module):
    """Everything that the flow needs of a frame."""

    def __init__(self, raft: RAFT) -> None:
        super().__init__()
        self.raft = raft

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Map padded frames [B, 3, H, W], 0 to 255, to features and context [B, D, h, w]."""
        return self.raft.encode(frames)


class FlowGraph(nn.Module):
    """The flow of a pair of encoded frames, cropped and rounded as the flow stream takes it."""

    def __init__(self, raft: RAFT, *, crop: int, iterations: int) -> None:
        super().__init__()
        self.crop, self.iterations, self.hidden = crop, iterations, raft.hidden
        self.encoder = raft.update_block.encoder
        self.flow_head = raft.update_block.flow_head
        self.mask = raft.update_block.mask
        self.row_gates = MergedGates(raft, 1)
        self.column_gates = MergedGates(raft, 2)

    def forward(self, features: Tensor, following: Tensor, context: Tensor) -> Tensor:
        """Map encodings [B, D, h, w] of a frame and the one after it to flow levels [B, 2, S, S], 0 to 256."""
        pyramid = correlate(features, following)
        hidden, context = torch.split(context, self.hidden, 1)
        gates = [(g, g.of_context(context)) for g in (self.row_gates, self.column_gates)]
        grid = cell_grid(features)
        flow = torch.zeros_like(features[:, :2])
        for _ in range(self.iterations):
            motion = self.encoder(look_up(pyramid, grid + flow), flow)
            for gate, constant in gates:
                hidden = gate(hidden, motion, constant)
            flow = flow + self.flow_head(hidden)
        return flow_levels(centre_crop(upsample(flow, self.mask(hidden)), self.crop))


class MergedGates(nn.Module):
    """One of the two gated recurrent units of `raft.SeparableGRU`, in two convolutions."""

    def __init__(self, raft: RAFT, index: int) -> None:
        super().__init__()
        gru, hidden = raft.update_block.gru, raft.hidden
        layers = [gru.get_submodule(f"conv{gate}{index}") for gate in "zrq"]
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        self.padding = convolutions[0].padding
        weights = [layer.weight.detach() for layer in convolutions]
        biases = [layer.bias.detach() for layer in convolutions if layer.bias is not None]
        recurrent = [torch.cat([w[:, :hidden], w[:, 2 * hidden :]], 1) for w in weights]
        self.register_buffer("update_reset", torch.cat(recurrent[:2]))
        self.register_buffer("proposal", recurrent[2].clone())
        self.register_buffer("context", torch.cat([w[:, hidden : 2 * hidden] for w in weights]))
        self.register_buffer("bias", torch.cat(biases))

    def of_context(self, context: Tensor) -> Tensor:
        """Return what the context adds to all three gates, [B, 3 D, h, w]."""
        return F.conv2d(context, self.get_buffer("context"), self.get_buffer("bias"), padding=self.padding)

    def forward(self, hidden: Tensor, motion: Tensor, constant: Tensor) -> Tensor:
        size = hidden.shape[1]
        both = torch.cat([hidden, motion], 1)
        gates = F.conv2d(both, self.get_buffer("update_reset"), padding=self.padding) + constant[:, : 2 * size]
        update, reset = torch.split(torch.sigmoid(gates), size, 1)
        proposal = F.conv2d(torch.cat([reset * hidden, motion], 1), self.get_buffer("proposal"), padding=self.padding)
        return hidden + update * (torch.tanh(proposal + constant[:, 2 * size :]) - hidden)


class RgbGraph(nn.Module):
    """The rgb stream of I3D behind its scaling."""

    def __init__(self, network: I3D) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """Map stacks of crops [B, F, 3, S, S], 0 to 255, to features [B, 1024]."""
        features: Tensor = self.network(2 * frames.transpose(1, 2) / 255 - 1)
        return features


class FlowFeaturesGraph(RgbGraph):
    """The flow stream of I3D behind its scaling: levels up to 256, so that its input reaches 1.0078."""


class SoundGraph(nn.Module):
    """VGGish over log-mel examples without a channel axis."""

    def __init__(self, network: Vggish) -> None:
        super().__init__()
        self.network = network

    def forward(self, examples: Tensor) -> Tensor:
        """Map log-mel examples [B, 96, 64] to features [B, 128]."""
        features: Tensor = self.network(examples[:, None])
        return features


def without_norms(module: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are part of the convolutions before them: the same function, sooner traced."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for layer, norm in _NORMS:
            after = getattr(part, norm, None)
            if isinstance(after, (nn.BatchNorm2d, nn.BatchNorm3d)):
                setattr(part, layer, fuse_conv_bn_eval(cast(nn.Conv2d | nn.Conv3d, part.get_submodule(layer)), after))
                setattr(part, norm, nn.Identity())
    return module


def centre_crop(pictures: Tensor, side: int) -> Tensor:
    """Return the middle [.., side, side] of pictures [.., H, W], the upper left one where there are two."""
    top, left = (pictures.shape[-2] - side) // 2, (pictures.shape[-1] - side) // 2
    return pictures[..., top : top + side, left : left + side]


def flow_levels(flow: Tensor) -> Tensor:
    """Round flow in pixels to levels: 0 stands for -20 and less, 128 for none, 256 (sic) for 20 and more."""
    return torch.round(128 + 255 / (2 * LARGEST_FLOW) * flow.clamp(-LARGEST_FLOW, LARGEST_FLOW))
