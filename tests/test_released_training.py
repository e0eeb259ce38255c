"""Training against the authors' program: targets, losses, their gradients, and the learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import golden

from ccnet.config import LossConfig, TrainConfig
from ccnet.training.losses import DetectionLoss
from ccnet.training.optimizer import learning_rate
from ccnet.training.targets import Targets, build_targets
from runtime.spec import point_grid


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return golden("training")


def test_targets_equal_the_released_program(data: dict[str, Any]) -> None:
    grid = point_grid(int(data["T"]), int(data["levels"]))
    segments, labels = torch.from_numpy(data["segments"]), torch.from_numpy(data["labels"])
    targets = build_targets(segments, labels, grid, int(data["classes"]))
    np.testing.assert_array_equal(targets.classes.numpy(), data["class_targets"])
    # Where two events of one class hold a point, theirs keeps the last one and ours the shorter one.
    other = (targets.offsets.numpy() != data["offset_targets"]).any(-1)
    assert other.sum() == 4
    for video, point, label in np.argwhere(other):
        events = data["segments"][video][data["labels"][video] == label]
        position, stride = grid.positions[point], grid.point_strides[point]
        lengths = []
        for left, right in (targets.offsets[video, point, label].numpy(), data["offset_targets"][video, point, label]):
            segment = position - left * stride, position + right * stride
            assert np.abs(events - segment).max(axis=1).min() < 1e-5
            lengths.append(segment[1] - segment[0])
        assert lengths[0] < lengths[1]


@pytest.fixture(scope="module")
def losses(data: dict[str, Any]) -> dict[str, float | np.ndarray]:
    """Our losses of the released targets, and the gradient of their sum."""
    logits, offsets = (torch.from_numpy(data[name]).requires_grad_() for name in ("logits", "offsets"))
    targets = Targets(torch.from_numpy(data["class_targets"]), torch.from_numpy(data["offset_targets"]))
    grid = point_grid(int(data["T"]), int(data["levels"]))
    valid = grid.valid_points(data["lengths"])
    criterion = DetectionLoss(LossConfig(iou="diou", normalizer=float(data["loss_normalizer_before"])))
    found = criterion(logits, offsets, targets, torch.from_numpy(valid))
    found.total.backward()
    assert logits.grad is not None
    assert offsets.grad is not None
    return {
        "loss_normalizer_after": criterion.normalizer.item(),
        "cls_loss": found.classification.item(),
        "reg_loss_diou": found.offset.item(),
        "grad_logits": logits.grad.numpy(),
        "grad_offsets": offsets.grad.numpy(),
    }


@pytest.mark.parametrize("name", ["loss_normalizer_after", "cls_loss", "reg_loss_diou"])
def test_losses_equal_the_released_program(data: dict[str, Any], losses: dict[str, float], name: str) -> None:
    assert losses[name] == pytest.approx(float(data[name]), rel=1e-6)  # measured: 1.5e-7


@pytest.mark.parametrize("name", ["grad_logits", "grad_offsets"])
def test_gradients_equal_the_released_program(data: dict[str, Any], losses: dict[str, Any], name: str) -> None:
    np.testing.assert_allclose(losses[name], data[name], rtol=0, atol=1e-8)  # measured: 5e-10 of up to 4e-3


def test_rates_equal_the_released_program_after_the_warm_up(data: dict[str, Any]) -> None:
    steps, warmup = int(data["lr_steps_per_epoch"]), int(data["lr_warmup_epochs"])
    config = TrainConfig(learning_rate=float(data["lr_base"]), epochs=int(data["lr_epochs"]), warmup_epochs=warmup)
    rates = np.array([learning_rate(step, steps_per_epoch=steps, config=config) for step in range(len(data["lr"]))])
    start = warmup * steps
    np.testing.assert_allclose(rates[start:], data["lr"][start:], rtol=1e-9)  # measured: 2e-13
    # Within the warm-up theirs starts at 0, ours one step later, so that no step is without effect.
    assert data["lr"][0] == 0 < rates[0]
    np.testing.assert_allclose(rates[:start], data["lr"][:start], rtol=0, atol=1.01 * rates[0])
