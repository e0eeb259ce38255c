"""CCNet, the whole network, read downwards: embed, collaborate across modalities, across granularities, decode.

Shapes:  B batch   T steps   Cv, Ca visual / audio feature width   T_l = T / 2^l steps of level l   D model width
         P points of all levels (level 0, the finest, first)   C classes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccnet.config import ModelConfig
from ccnet.network.cmcc import CMCC, Embedding
from ccnet.network.heads import ClassHead, OffsetHead, prior_bias
from ccnet.network.mtgc import MTGC
from runtime.errors import FeatureError


class CCNet(nn.Module):
    """Dense audio-visual event localization (AAAI 2025), in the layer layout of the released weights.

    What a video gets never depends on the other videos of its batch.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_visual = Embedding(config.visual_dim, config)
        self.embed_audio = Embedding(config.audio_dim, config)
        self.cmcc = CMCC(config)
        self.mtgc = MTGC(config)
        self.class_head = ClassHead(config)
        self.offset_head = OffsetHead(config)
        self._initialize()

    def forward(self, visual: Tensor, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Localize the events of visual [B, Cv, T], audio [B, Ca, T] -> logits [B, P, C], offsets [B, P, C, 2].

        mask [B, 1, T] is bool, a prefix of True. Offsets are distances to start and end, >= 0, in units of the level's
        stride. Raises FeatureError when the shapes are not those of the configuration.
        """
        self._check(visual, audio, mask)
        masks = self.level_masks(mask)
        embedded_visual = self.embed_visual(visual.transpose(1, 2), masks[0])  # [B, T, D]
        embedded_audio = self.embed_audio(audio.transpose(1, 2), masks[0])  # [B, T, D]
        visual_levels, audio_levels = self.cmcc(embedded_visual, embedded_audio, masks)  # per level [B, T_l, D]
        levels = [torch.cat(pair, dim=2) for pair in zip(visual_levels, audio_levels, strict=True)]  # [B, T_l, 2 D]
        levels = self.mtgc(levels, masks)  # [B, T_l, 2 D]
        return self.class_head(levels, masks), self.offset_head(levels, masks)

    def level_masks(self, mask: Tensor) -> list[Tensor]:
        """Return the mask [B, T_l, 1] of each level from the mask [B, 1, T] of the input."""
        steps = mask.transpose(1, 2)
        return [steps[:, :: 2**level] for level in range(self.config.levels)]

    def _check(self, visual: Tensor, audio: Tensor, mask: Tensor) -> None:
        config = self.config
        expected = {"visual": config.visual_dim, "audio": config.audio_dim, "mask": 1}
        for (name, channels), tensor in zip(expected.items(), (visual, audio, mask), strict=True):
            if tensor.ndim != 3 or tuple(tensor.shape[1:]) != (channels, config.length):
                got = list(tensor.shape)
                raise FeatureError(f"{name}: got shape {got}, expected [batch, {channels}, {config.length}]")
        if mask.dtype != torch.bool:
            raise FeatureError(f"mask: got {mask.dtype}, expected torch.bool")

    def _initialize(self) -> None:
        """Keep PyTorch's own weights; set biases to zero, as the baseline does, and the class prior."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        bias = self.class_head.output.bias
        assert bias is not None
        nn.init.constant_(bias, prior_bias())


def released_inputs(visual: Tensor, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the inputs of an engine into those of `CCNet`, on their device.

    visual [B, T, Cv], audio [B, T, Ca], lengths [B] -> visual [B, Cv, T], audio [B, Ca, T], mask [B, 1, T].
    """
    steps = torch.arange(visual.shape[1], device=lengths.device)
    mask = steps < lengths[:, None, None]
    return visual.transpose(1, 2).contiguous(), audio.transpose(1, 2).contiguous(), mask
