"""The training objective: focal loss on the classes, an IoU loss on the offsets.

Shapes:  B batch   P points of all levels   C classes
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccnet.config import LossConfig
from ccnet.training.targets import Targets

_SMALLEST_LENGTH = 1e-8


class Losses(NamedTuple):
    """Scalars of one step. `total = classification + offset_weight * offset` is what to differentiate."""

    total: Tensor
    classification: Tensor
    offset: Tensor


def sigmoid_focal_loss(logits: Tensor, classes: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss of every element (Lin et al. 2017, Eq. 5), not reduced; `classes` is 0 or 1.

    `alpha` weighs positives against negatives (1 - alpha); `gamma` reduces the loss of what is classified well already.
    """
    probability = torch.sigmoid(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, classes, reduction="none")
    wrongness = probability + classes - 2 * probability * classes
    weight = alpha * classes + (1 - alpha) * (1 - classes)
    return weight * wrongness**gamma * entropy


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Compute 1 - generalised IoU of segments given as distances [..., 2] from a shared point, not reduced.

    Generalised IoU (Rezatofighi et al. 2019) subtracts the gap between two segments. Segments that contain the same
    point have none, so it equals the plain IoU here.
    """
    return 1 - _intersection_over_union(predicted, target)


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Compute 1 - distance IoU (Zheng et al. 2020, Eq. 7), the variant of the released code, not reduced.

    It adds (distance of the centres / length of the hull)^2 to 1 - IoU.
    """
    hull = torch.maximum(predicted, target).sum(-1).clamp(min=_SMALLEST_LENGTH)
    shift = 0.5 * ((predicted[..., 1] - predicted[..., 0]) - (target[..., 1] - target[..., 0]))
    return 1 - _intersection_over_union(predicted, target) + (shift / hull) ** 2


def _intersection_over_union(predicted: Tensor, target: Tensor) -> Tensor:
    intersection = torch.minimum(predicted, target).sum(-1)
    union = predicted.sum(-1) + target.sum(-1) - intersection
    return intersection / union.clamp(min=_SMALLEST_LENGTH)


class DetectionLoss(nn.Module):
    """Both losses, each summed and divided by a running number of positive points.

    The running number is a buffer: it belongs to the training state (`state_dict`) and moves with every forward pass
    in training mode only. Nothing here waits for a GPU: positives are selected by multiplication, not by indexing.
    """

    normalizer: Tensor

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self._offset_loss = giou_loss if config.iou == "giou" else diou_loss
        self.register_buffer("normalizer", torch.tensor(config.normalizer, dtype=torch.float32))

    def forward(self, logits: Tensor, offsets: Tensor, targets: Targets, valid: Tensor) -> Losses:
        """Compute the losses of one batch.

        Args:
            logits: [B, P, C].
            offsets: [B, P, C, 2], >= 0, in units of the level's stride.
            targets: as `build_targets` makes them.
            valid: [B, P] bool, true at points where the video has content.
        """
        # In float32 whatever the network computed in: sums over B * P * C terms do not fit a 16-bit format.
        logits, offsets = logits.float(), offsets.float()
        counted = valid[..., None].to(logits.dtype)
        positive = targets.classes * counted  # [B, P, C]
        normalizer = self._advance_normalizer(positive)
        focal = sigmoid_focal_loss(
            logits, targets.classes, alpha=self.config.focal_alpha, gamma=self.config.focal_gamma
        )
        classification = (focal * counted).sum() / normalizer
        offset = (self._offset_loss(offsets, targets.offsets) * positive).sum() / normalizer
        return Losses(classification + self.config.offset_weight * offset, classification, offset)

    def _advance_normalizer(self, positive: Tensor) -> Tensor:
        if self.training:
            points = (positive.amax(-1) > 0).sum().clamp(min=1)
            self.normalizer.lerp_(points.to(self.normalizer.dtype), 1 - self.config.normalizer_momentum)
        return self.normalizer.clone()
