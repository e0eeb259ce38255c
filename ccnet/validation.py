"""Validation while training: the averaged weights through the one evaluation path, from features to mAP."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, cast

from ccnet.learner import Learner
from ccnet.progress import ProgressBar
from ccnet.stopping import StopRequest
from ccnet.torch_backend import TorchBackend
from runtime.annotations import Annotations
from runtime.detections import Detections
from runtime.evaluation import Evaluation, evaluate
from runtime.features import read_video
from runtime.localizer import Localizer

SUBSET = "validation"
_BATCH = 16
"""Videos per call of the network; independent of the training batch."""


def validate(
    learner: Learner, annotations: Annotations, features: Path, *, text: str, quiet: bool, stop: StopRequest
) -> Evaluation | None:
    """mAP on the subset `validation`, in the precision of training; None when it was asked to stop.

    Raises FeatureError for a video that can't be read.
    """
    config = learner.config
    spec = config.spec(annotations.labels)
    backend = TorchBackend(
        learner.average.model, spec, device=learner.device, precision=config.train.precision, max_batch=_BATCH
    )
    videos = annotations.subset(SUBSET)
    read = partial(read_video, features, layout=spec.layout, visual_dim=spec.visual_dim, audio_dim=spec.audio_dim)
    items = ((video.video_id, partial(read, video.video_id), video.duration) for video in videos)
    predictions: dict[str, Detections] = {}
    with (
        Localizer([backend], spec) as localizer,
        contextlib.closing(cast(Any, localizer.stream(items, batch_size=_BATCH))) as stream,
        ProgressBar(text, total=len(videos), quiet=quiet) as bar,
    ):
        for localized in stream:
            if localized.detections is None:
                assert localized.error is not None
                raise localized.error
            predictions[localized.video_id] = localized.detections
            bar.advance()
            if stop:
                return None
    return evaluate(predictions, annotations, SUBSET)
