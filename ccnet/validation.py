"""Validation while training: the averaged weights through the one evaluation path, from features to mAP."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

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
"""Videos per call; independent of the training batch, whose results it does not touch."""


def validate(
    learner: Learner, annotations: Annotations, features: Path, *, text: str, quiet: bool, stop: StopRequest
) -> Evaluation | None:
    """mAP on the subset `validation`, in the precision of training; None when it was asked to stop.

    Raises FeatureError for a video that can't be read.
    """
    config = learner.config
    spec = config.spec(annotations.labels)
    model = config.model
    backend = TorchBackend(
        learner.average.model, spec, device=learner.device, precision=config.train.precision, max_batch=_BATCH
    )
    localizer = Localizer([backend], spec)
    videos = annotations.subset(SUBSET)
    predictions: dict[str, Detections] = {}
    waiting = iter(videos)
    with ProgressBar(text, total=len(videos), quiet=quiet) as bar:
        while chunk := list(islice(waiting, _BATCH)):
            if stop:
                return None
            inputs = [
                (*read_video(features, v.video_id, spec.layout, model.visual_dim, model.audio_dim), v.duration)
                for v in chunk
            ]
            for video, detections in zip(chunk, localizer.batch(inputs), strict=True):
                predictions[video.video_id] = detections
            bar.advance(len(chunk))
    return evaluate(predictions, annotations, SUBSET)
