"""Validation while training: a network through the one evaluation path, from features to mAP."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ccnet.torch_backend import TorchBackend, TorchPrecision
from runtime.annotations import Annotations
from runtime.detections import Detections
from runtime.errors import TrainingStopped
from runtime.evaluation import Evaluation, evaluate
from runtime.features import read_video
from runtime.localizer import Localizer
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.spec import ModelSpec

_BATCH = 16
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
    """mAP of a network with the forward contract of CCNet, on one subset.

    Reading, inference and post-processing overlap. Raises FeatureError for a video that can't be read, TrainingStopped
    when `stop` asks for it.
    """
    backend = TorchBackend(network, spec, device=device, precision=precision, max_batch=_BATCH)
    videos = annotations.subset(subset)
    read = partial(read_video, features, layout=spec.layout, visual_dim=spec.visual_dim, audio_dim=spec.audio_dim)
    items = ((video.video_id, partial(read, video.video_id), video.duration) for video in videos)
    predictions: dict[str, Detections] = {}
    with (
        Localizer([backend], spec) as localizer,
        contextlib.closing(cast(Any, localizer.stream(items, batch_size=_BATCH))) as stream,
        Progress(subset, total=len(videos), quiet=quiet) as progress,
    ):
        for localized in stream:
            if localized.error is not None:
                raise localized.error
            predictions[localized.video_id] = localized.detections
            progress.advance()
            if stop:
                raise TrainingStopped("stopped", stop.number)
    return evaluate(predictions, annotations, subset)
