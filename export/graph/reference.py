"""The reference graph: the trained network as it is."""

from __future__ import annotations

from torch import Tensor, nn

from ccnet.network.model import released_inputs


class ReferenceGraph(nn.Module):
    """A module with the forward contract of `CCNet` behind the inputs and outputs of `runtime.spec.ModelSpec`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, visual: Tensor, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map visual [B, T, Cv], audio [B, T, Ca], lengths [B] int32 to logits [B, P, C], offsets [B, P, C, 2]."""
        logits, offsets = self.model(*released_inputs(visual, audio, lengths))
        return logits, offsets
