"""Timelines of a few validation videos for TensorBoard, so that a run is looked at while it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ccnet.network.model import CCNet
from ccnet.plots import read_gates, rendered, timeline_figure
from ccnet.torch_backend import TorchBackend
from runtime.annotations import VideoAnnotation
from runtime.evaluation import find_events
from runtime.features import FeatureFiles
from runtime.localizer import Localizer
from runtime.spec import ModelSpec

log = logging.getLogger(__name__)

VIDEOS = 3
"""Videos that are drawn, the same ones in the whole run."""
SHARE = 0.05
"""After a validation there are no pictures where they would take more than this share of the time since the last."""
_FIRST_SECONDS = 1.0
"""What the first pictures are taken to cost: most of it is loading matplotlib."""


class Picture(NamedTuple):
    """One video's timeline."""

    video_id: str
    image: npt.NDArray[np.uint8]
    """[height, width, 3]"""


class ValidationPictures:
    """Draws the timelines and gates of the validation videos with the most classes, and of those the first ones."""

    def __init__(self, spec: ModelSpec, videos: list[VideoAnnotation], features: Path) -> None:
        self.spec = spec
        self.features = features
        self.videos = sorted(videos, key=lambda video: -len(set(video.labels.tolist())))[:VIDEOS]
        self._works = True
        self._seconds = _FIRST_SECONDS
        self._drawn_at = time.perf_counter()

    @property
    def due(self) -> bool:
        """Whether the time since the last pictures allows new ones; where validations take minutes, it always does."""
        return self._works and (time.perf_counter() - self._drawn_at) * SHARE >= self._seconds

    def draw(self, network: nn.Module, device: torch.device) -> list[Picture]:
        """Run the network on the videos, in float32, and return their pictures.

        Drawing that fails costs the pictures, not the run: it is logged, and there are none any more.
        """
        started = time.perf_counter()
        try:
            pictures = list(self._draw(network, device))
        except Exception as error:  # noqa: BLE001  of a library for pictures that nothing depends on
            log.warning("no timelines in TensorBoard from now on: %s", error)
            self._works, pictures = False, []
        self._drawn_at = time.perf_counter()
        self._seconds = self._drawn_at - started
        return pictures

    def _draw(self, network: nn.Module, device: torch.device) -> Iterator[Picture]:
        assert isinstance(network, CCNet)
        backend = TorchBackend(network, self.spec, device=device, max_batch=VIDEOS)
        with Localizer([backend], self.spec) as localizer:
            found = find_events(localizer, self.features, self.videos).predictions
        for video in self.videos:
            if video.video_id in found:
                gates = None
                if network.config.tcg:
                    gates = read_gates(network, self.spec, FeatureFiles(self.features, video.video_id).read(self.spec))
                figure = timeline_figure(truth=video, predictions=found[video.video_id], gates=gates)
                yield Picture(video.video_id, rendered(figure))
