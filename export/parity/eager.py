"""What the eager network makes of the parity check's inputs: the reference that every engine is held against."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ccnet.torch_backend import TorchBackend
from export.parity.inputs import NUM_VIDEOS, ParityVideo, folder_inputs, stress_inputs, synthetic_inputs
from export.parity.reference import Reference, record
from runtime.annotations import read_annotations
from runtime.errors import ConfigError

if TYPE_CHECKING:
    from ccnet.checkpoint import Checkpoint
    from ccnet.network.model import CCNet
    from runtime.spec import ModelSpec


def eager_reference(
    checkpoint: Checkpoint,
    model: CCNet,
    *,
    features: str | Path | None = None,
    annotations: str | Path | None = None,
    count: int = NUM_VIDEOS,
    device: str = "cpu",
) -> Reference:
    """Stress inputs and `count` videos through the fp32 network, each alone.

    The videos are real ones from the folder `features` (with their events, where `annotations` has them), else
    synthetic.

    Raises FeatureError, AnnotationError, ConfigError for annotations without features, BackendUnavailable for an
    absent device.
    """
    spec = checkpoint.spec
    videos = stress_inputs(spec) + _videos(spec, features, annotations, count)
    with TorchBackend(model, spec, device=device) as backend:
        outputs = record(backend, videos)
    model.cpu()
    return Reference(spec, checkpoint.weights_sha256, videos, outputs)


def _videos(
    spec: ModelSpec, features: str | Path | None, annotations: str | Path | None, count: int
) -> list[ParityVideo]:
    if features is None and annotations is not None:
        raise ConfigError(f"annotations: got {annotations} without a feature folder; synthetic videos have their own")
    if features is None:
        return synthetic_inputs(spec, count=count)
    known = None if annotations is None else read_annotations(annotations, spec.labels)
    return folder_inputs(features, spec, annotations=known, count=count)
