"""Losses: against the formulas on plain segments, and what the normaliser and the masks do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ccnet.config import LossConfig
from ccnet.training.losses import DetectionLoss, diou_loss, giou_loss, sigmoid_focal_loss
from ccnet.training.targets import Targets


def case(seed: int = 0, batch: int = 2, points: int = 12, classes: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, points, classes, generator=generator)
    offsets = torch.rand(batch, points, classes, 2, generator=generator) * 4
    positive = (torch.rand(batch, points, classes, generator=generator) < 0.3).float()
    wanted = torch.rand(batch, points, classes, 2, generator=generator) * 4 * positive[..., None]
    valid = torch.ones(batch, points, dtype=torch.bool)
    return logits, offsets, Targets(positive, wanted), valid


def test_focal_loss_is_the_formula() -> None:
    logits = torch.tensor([-2.0, 0.3, 4.0])
    for positive in (0.0, 1.0):
        got = sigmoid_focal_loss(logits, torch.full((3,), positive), alpha=0.25, gamma=2.0)
        p = torch.sigmoid(logits)
        right = p if positive else 1 - p
        weight = 0.25 if positive else 0.75
        torch.testing.assert_close(got, -weight * (1 - right) ** 2 * right.log())


@pytest.mark.parametrize("point", [0.0, 3.25])
def test_iou_losses_are_the_formulas_on_segments(point: float) -> None:
    for first, second in (((1.0, 2.0), (1.5, 0.5)), ((0.2, 3.0), (2.0, 0.1)), ((1.0, 1.0), (1.0, 1.0))):
        a, b = (point - first[0], point + first[1]), (point - second[0], point + second[1])
        shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        union = (a[1] - a[0]) + (b[1] - b[0]) - shared
        hull = max(a[1], b[1]) - min(a[0], b[0])
        generalised = shared / union - (hull - union) / hull
        centres = (a[0] + a[1] - b[0] - b[1]) / 2
        predicted, target = torch.tensor(first), torch.tensor(second)
        assert giou_loss(predicted, target).item() == pytest.approx(1 - generalised, abs=1e-6)
        assert diou_loss(predicted, target).item() == pytest.approx(
            1 - shared / union + (centres / hull) ** 2, abs=1e-6
        )


def test_the_loss_is_both_sums_over_the_running_normaliser() -> None:
    logits, offsets, targets, valid = case()
    criterion = DetectionLoss(LossConfig(offset_weight=0.5))
    losses = criterion(logits, offsets, targets, valid)
    points = (targets.classes.amax(-1) > 0).sum().item()
    normalizer = 0.9 * 250 + 0.1 * points
    assert criterion.normalizer.item() == pytest.approx(normalizer)
    focal = sigmoid_focal_loss(logits, targets.classes, alpha=0.25, gamma=2.0).sum() / normalizer
    chosen = targets.classes.bool()
    iou = giou_loss(offsets[chosen], targets.offsets[chosen]).sum() / normalizer
    torch.testing.assert_close(losses.classification, focal)
    torch.testing.assert_close(losses.offset, iou)
    torch.testing.assert_close(losses.total, focal + 0.5 * iou)


def test_the_two_offset_losses_differ() -> None:
    arguments = case()
    giou, diou = (DetectionLoss(LossConfig(iou=kind))(*arguments).offset for kind in ("giou", "diou"))
    assert diou > giou * 1.001


def test_padded_points_count_nowhere() -> None:
    logits, offsets, targets, valid = case(batch=1, points=20)
    valid[:, 12:] = False
    whole = DetectionLoss(LossConfig())(logits, offsets, targets, valid)
    cut = DetectionLoss(LossConfig())(
        logits[:, :12], offsets[:, :12], Targets(targets.classes[:, :12], targets.offsets[:, :12]), valid[:, :12]
    )
    torch.testing.assert_close(whole, cut)


def test_the_normaliser_is_state_and_stands_still_in_evaluation() -> None:
    arguments = case()
    criterion = DetectionLoss(LossConfig())
    criterion(*arguments)
    after_one = criterion.normalizer.item()
    restored = DetectionLoss(LossConfig())
    restored.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(restored(*arguments), criterion(*arguments), rtol=0, atol=0)
    assert criterion.normalizer.item() < after_one
    criterion.eval()
    before = criterion.normalizer.item()
    criterion(*arguments)
    assert criterion.normalizer.item() == before


def test_a_batch_without_events_has_a_finite_gradient() -> None:
    logits, offsets, _, valid = case()
    offsets = torch.zeros_like(offsets).requires_grad_()
    logits.requires_grad_()
    none = Targets(torch.zeros_like(logits), torch.zeros_like(offsets))
    for kind in ("giou", "diou"):
        losses = DetectionLoss(LossConfig(iou=kind))(logits, offsets, none, valid)
        losses.total.backward()
        assert losses.offset.item() == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert offsets.grad is not None
    assert (offsets.grad == 0).all()


def test_a_point_that_predicts_nothing_yet_is_pulled_open() -> None:
    logits, offsets, targets, valid = case()
    offsets = torch.zeros_like(offsets).requires_grad_()
    DetectionLoss(LossConfig())(logits, offsets, targets, valid).total.backward()
    assert offsets.grad is not None
    pulled = offsets.grad[targets.classes.bool()]
    assert pulled.isfinite().all()
    assert (pulled < 0).all()


def test_sixteen_bit_outputs_are_summed_in_float32() -> None:
    logits, offsets, targets, valid = case(batch=4, points=441, classes=50)
    losses = DetectionLoss(LossConfig(normalizer=1.0, normalizer_momentum=0.0))(
        logits.half(), offsets.half(), targets, valid
    )
    exact = DetectionLoss(LossConfig(normalizer=1.0, normalizer_momentum=0.0))(logits, offsets, targets, valid)
    assert losses.total.dtype == torch.float32
    # Rounding of the inputs to half precision (2^-11 relative), averaged over many terms.
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=1e-3)
    assert math.isfinite(losses.total.item())


def test_nothing_waits_for_the_device() -> None:
    """None of the operations that read a value, or a size that depends on values, back to the host."""

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    seen: set[str] = set()
    arguments = case()
    criterion = DetectionLoss(LossConfig(iou="diou"))
    with Watch():  # type: ignore[no-untyped-call]
        criterion(*arguments)
    assert "aten.binary_cross_entropy_with_logits" in seen  # the watch works
    assert not seen & {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.index"}
