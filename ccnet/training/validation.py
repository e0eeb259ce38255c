"""Validation: the network in training is scored the way every engine is, from feature files to mAP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ccnet.torch_backend import TorchBackend, TorchPrecision
from runtime.annotations import Annotations
from runtime.evaluation import Evaluation, evaluate_localizer
from runtime.localizer import Localizer
from runtime.signals import StopRequest
from runtime.spec import ModelSpec

BATCH = 16
"""Videos per call of the network; independent of the training batch."""


def evaluate_network(
    network: nn.Module,
    spec: ModelSpec,
    annotations: Annotations,
    features: str | Path,
    subset: str,
    *,
    device: str | torch.device = "cpu",
    precision: TorchPrecision = "fp32",
    quiet: bool = True,
    stop: StopRequest | None = None,
) -> Evaluation:
    """Score a network with the forward contract of CCNet on one subset.

    Raises FeatureError for the first video that can't be used, Interrupted when `stop` is requested.
    """
    backend = TorchBackend(network, spec, device=device, precision=precision, max_batch=BATCH)
    with Localizer([backend], spec) as localizer:
        return evaluate_localizer(
            localizer, features, annotations, subset, strict=True, batch_size=BATCH, quiet=quiet, stop=stop
        )
