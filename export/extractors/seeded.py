"""Extractor networks of seeded random weights and reduced width, for demonstrations: they see, and know no class.

Random layers behind one another lose what they are given unless each one's output has about the same scale. The batch
norms of I3D get there by seeing a few windows; the other networks keep their scale by how their weights are drawn.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from export.extractors.bundle import Networks, graph_module
from export.extractors.graphs import centre_crop
from export.extractors.i3d import I3D
from export.extractors.raft import RAFT
from export.extractors.vggish import Vggish
from runtime.video.extractor import ExtractorSpec


def seeded_networks(seed: int, *, width: float = 1 / 16, sound_width: float = 1 / 8) -> Networks:
    """Return networks of random weights, in eval mode; the same seed gives the same ones.

    `width` scales the channels of I3D and RAFT, `sound_width` those of VGGish.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        networks = Networks(
            rgb=I3D(3, width=width).eval(),
            flow=I3D(2, width=width).eval(),
            raft=RAFT(width=width).eval(),
            vggish=Vggish(width=sound_width).eval(),
        )
        for network in named(networks).values():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter)
    return networks


def calibrate(networks: Networks, spec: ExtractorSpec, windows: npt.NDArray[np.uint8]) -> None:
    """Set the batch norms of I3D to the statistics of windows [B, 25, H, W, 3], frames of `spec.side` or more."""
    frames = torch.from_numpy(windows).permute(0, 1, 4, 2, 3).float()
    batch, count = frames.shape[:2]
    with torch.no_grad():
        features, context = graph_module("encode", networks, spec)(frames.flatten(0, 1))
        features, context = (part.unflatten(0, (batch, count)) for part in (features, context))
        pairs = features[:, :-1].flatten(0, 1), features[:, 1:].flatten(0, 1), context[:, :-1].flatten(0, 1)
        levels = graph_module("flow", networks, spec)(*pairs).unflatten(0, (batch, count - 1))
        _see(networks.rgb, graph_module("i3d_rgb", networks, spec), centre_crop(frames[:, :-1], spec.crop))
        _see(networks.flow, graph_module("i3d_flow", networks, spec), levels)


def named(networks: Networks) -> dict[str, nn.Module]:
    """Return the networks under the names that a manifest has for them."""
    return {
        "i3d_rgb": networks.rgb,
        "i3d_flow": networks.flow,
        "raft": networks.raft,
        "vggish": networks.vggish,
    }


def weight_hashes(networks: Networks) -> dict[str, str]:
    """Return the SHA-256 of each network's tensors, in place of that of a weight file."""
    return {name: _hash(network.state_dict()) for name, network in named(networks).items()}


def _hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


def _see(network: I3D, graph: nn.Module, stacks: Tensor) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch, not a mixture with the initial ones
        norm.train()
    graph(stacks)
    network.eval()
