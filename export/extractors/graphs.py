"""The graphs of an extractor: the networks with their inputs' scaling, cut where a result is used more than once.

`encode` once a frame, `flow` once a pair of frames, `i3d_rgb`, `i3d_flow` and `vggish` once a step. The flow graph is
`RAFT.flow` in fewer operations, exact but for rounding: gates that see the same input are one convolution, and the
context, which no iteration changes, is convolved once.

In half precision inputs and outputs stay float32, and so do the norms over a picture, the matmul of the correlation,
coordinates and flow, and the averages at the end of I3D. The correlation itself is rounded: read and blended in
float32 it takes three more kernels an iteration.

Shapes: see `runtime.video.extractor`, which names them.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.extractors.i3d import I3D
from export.extractors.raft import RAFT, cell_grid, correlate, look_up, upsample
from export.extractors.vggish import Vggish

Network = TypeVar("Network", bound=nn.Module)

LARGEST_FLOW = 20.0
"""Pixels; what the flow is clamped to before it is rounded to 256 levels."""
_NORMS = (("conv3d", "batch3d"), ("conv1", "norm1"), ("conv2", "norm2"), ("0", "1"))
"""A convolution and the batch norm of its output, as I3D and RAFT name them."""


class EncodeGraph(nn.Module):
    """Everything that the flow needs of a frame."""

    def __init__(self, raft: RAFT, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.raft = in_type(raft, dtype)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Map padded frames [B, 3, H, W], 0 to 255, to features and context [B, D, h, w]."""
        return self.raft.encode(frames)


class FlowGraph(nn.Module):
    """The flow of a pair of encoded frames, cropped and rounded as the flow stream takes it."""

    def __init__(self, raft: RAFT, *, crop: int, iterations: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.crop, self.iterations, self.hidden, self.dtype = crop, iterations, raft.hidden, dtype
        raft = in_type(raft, dtype)
        self.encoder = raft.update_block.encoder
        self.flow_head = raft.update_block.flow_head
        self.mask = raft.update_block.mask
        self.row_gates = MergedGates(raft, 1)
        self.column_gates = MergedGates(raft, 2)

    def forward(self, features: Tensor, following: Tensor, context: Tensor) -> Tensor:
        """Map encodings [B, D, h, w] of a frame and the one after it to flow levels [B, 2, S, S], 0 to 256."""
        pyramid = correlate(features, following)
        pyramid = pyramid._replace(values=pyramid.values.to(self.dtype))
        hidden, context = torch.split(context.to(self.dtype), self.hidden, 1)
        gates = [(g, g.of_context(context)) for g in (self.row_gates, self.column_gates)]
        grid = cell_grid(features)
        flow = torch.zeros_like(features[:, :2])
        for _ in range(self.iterations):
            motion = self.encoder(look_up(pyramid, grid + flow), flow.to(self.dtype))
            for gate, constant in gates:
                hidden = gate(hidden, motion, constant)
            flow = flow + self.flow_head(hidden).float()
        return flow_levels(centre_crop(upsample(flow, self.mask(hidden).float()), self.crop))


class MergedGates(nn.Module):
    """One of the two gated recurrent units of `raft.SeparableGRU`, in two convolutions.

    What follows the second one is computed in three axes: compilers of engines fuse a convolution with what has its own
    shape, and then have to copy the update gate out of what the first one gave. Apart from the convolution it is one
    kernel with the next concatenation.
    """

    def __init__(self, raft: RAFT, index: int) -> None:
        super().__init__()
        gru, hidden = raft.update_block.gru, raft.hidden
        layers = [gru.get_submodule(f"conv{gate}{index}") for gate in "zrq"]
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        self.padding = convolutions[0].padding
        weights = [layer.weight.detach() for layer in convolutions]
        biases = [layer.bias.detach() for layer in convolutions if layer.bias is not None]
        recurrent = [torch.cat([w[:, :hidden], w[:, 2 * hidden :]], 1) for w in weights]
        of_context = [w[:, hidden : 2 * hidden] for w in weights]
        for name, parts in (("recurrent", recurrent), ("context", of_context), ("bias", biases)):
            self.register_buffer(f"gates_{name}", torch.cat(parts[:2]))
            self.register_buffer(f"proposal_{name}", parts[2].clone())

    def of_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the context adds to update and reset gate [B, 2 D, h, w], and to the proposal [B, D, h, w]."""
        gates, proposal = (
            F.conv2d(context, self.get_buffer(f"{n}_context"), self.get_buffer(f"{n}_bias"), padding=self.padding)
            for n in ("gates", "proposal")
        )
        return gates, proposal

    def forward(self, hidden: Tensor, motion: Tensor, constant: tuple[Tensor, Tensor]) -> Tensor:
        gates = self._convolve("gates", hidden, motion) + constant[0]
        update, reset = torch.split(torch.sigmoid(gates), hidden.shape[1], 1)
        proposal = self._convolve("proposal", reset * hidden, motion) + constant[1]
        update, before = update.flatten(2), hidden.flatten(2)
        return (before + update * (torch.tanh(proposal.flatten(2)) - before)).reshape(hidden.shape)

    def _convolve(self, name: str, hidden: Tensor, motion: Tensor) -> Tensor:
        both = torch.cat([hidden, motion], 1)
        return F.conv2d(both, self.get_buffer(f"{name}_recurrent"), padding=self.padding)


class RgbGraph(nn.Module):
    """The rgb stream of I3D behind its scaling."""

    def __init__(self, network: I3D, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network, self.dtype = in_type(network, dtype), dtype

    def forward(self, frames: Tensor) -> Tensor:
        """Map stacks of crops [B, F, 3, S, S], 0 to 255, to features [B, 1024]."""
        features: Tensor = self.network((2 * frames.transpose(1, 2) / 255 - 1).to(self.dtype))
        return features.float()


class FlowFeaturesGraph(RgbGraph):
    """The flow stream of I3D behind its scaling: levels up to 256, so that its input reaches 1.0078."""


class SoundGraph(nn.Module):
    """VGGish over log-mel examples without a channel axis."""

    def __init__(self, network: Vggish, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network, self.dtype = in_type(network, dtype), dtype

    def forward(self, examples: Tensor) -> Tensor:
        """Map log-mel examples [B, 96, 64] to features [B, 128]."""
        features: Tensor = self.network(examples[:, None].to(self.dtype))
        return features.float()


def in_type(network: Network, dtype: torch.dtype) -> Network:
    """Return the network with weights of a type; for half precision a copy, its batch norms folded before rounding."""
    return network if dtype == torch.float32 else without_norms(network).to(dtype)


def without_norms(module: Network) -> Network:
    """Return a copy whose batch norms are part of the convolutions before them: the same function, sooner traced."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for layer, norm in _NORMS:
            after = getattr(part, norm, None)
            if isinstance(after, nn.BatchNorm2d | nn.BatchNorm3d):
                before = part.get_submodule(layer)
                assert isinstance(before, nn.Conv2d | nn.Conv3d)
                setattr(part, layer, fuse_conv_bn_eval(before, after))
                setattr(part, norm, nn.Identity())
    return module


def centre_crop(pictures: Tensor, side: int) -> Tensor:
    """Return the middle [.., side, side] of pictures [.., H, W], the upper left one where there are two."""
    top, left = (pictures.shape[-2] - side) // 2, (pictures.shape[-1] - side) // 2
    return pictures[..., top : top + side, left : left + side]


def flow_levels(flow: Tensor) -> Tensor:
    """Round flow in pixels to levels: 0 stands for -20 and less, 128 for none, 256 (sic) for 20 and more."""
    return torch.round(128 + 255 / (2 * LARGEST_FLOW) * flow.clamp(-LARGEST_FLOW, LARGEST_FLOW))
