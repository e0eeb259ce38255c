"""VGGish, the network over log-mel examples of sound, with the layer names of its public weight file.

Shapes: B examples
"""

from __future__ import annotations

from torch import Tensor, nn

EXAMPLE = (96, 64)
"""Frames and mel bands of an example."""


class Vggish(nn.Module):
    """Features of log-mel examples: no PCA, no quantization, and a ReLU at the end, as UnAV-100's features have it."""

    def __init__(self, *, width: float = 1.0) -> None:
        """`width` scales the channels of every layer; the public file has 1."""
        super().__init__()
        c64, c128, c256, c512, c4096 = (max(1, round(count * width)) for count in (64, 128, 256, 512, 4096))
        self.features = nn.Sequential(
            *(nn.Conv2d(1, c64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(c64, c128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(c128, c256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c256, c256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(c256, c512, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c512, c512, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        cells = (EXAMPLE[0] // 16) * (EXAMPLE[1] // 16)
        self.embeddings = nn.Sequential(
            *(nn.Linear(cells * c512, c4096), nn.ReLU(), nn.Linear(c4096, c4096), nn.ReLU()),
            *(nn.Linear(c4096, c128), nn.ReLU()),
        )
        self.feature_dim = c128

    def forward(self, examples: Tensor) -> Tensor:
        """Map log-mel examples [B, 1, 96, 64] to features [B, 128], which are never negative."""
        features: Tensor = self.embeddings(self.flat(examples))
        return features

    def flat(self, examples: Tensor) -> Tensor:
        """Map examples [B, 1, 96, 64] to what the first dense layer sees [B, 12288]: time, band, channel."""
        maps: Tensor = self.features(examples)
        return maps.permute(0, 2, 3, 1).flatten(1)
