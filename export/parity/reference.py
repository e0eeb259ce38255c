"""What a network put out for the inputs of the parity check, and the file that carries it to machines without torch.

Shapes:  N videos   T steps   P points   C classes   Cv, Ca visual / audio feature width   M events of all videos
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.parity.inputs import NUM_VIDEOS, ParityVideo, parity_inputs
from runtime.backends.base import Backend, Float32
from runtime.batches import pack
from runtime.errors import ConfigError, ParityError
from runtime.features import VideoFeatures
from runtime.files import atomic_file
from runtime.spec import ModelSpec

if TYPE_CHECKING:
    from ccnet.checkpoint import Checkpoint
    from ccnet.network.model import CCNet

SCHEMA = 2


@dataclass(frozen=True)
class Outputs:
    """Outputs of one backend, every video run alone."""

    logits: Float32
    """[N, P, C]"""
    offsets: Float32
    """[N, P, C, 2]"""
    source: dict[str, Any]
    """`Backend.describe` of what made them."""


@dataclass(frozen=True)
class Reference:
    """Inputs, and what the eager network made of them."""

    spec: ModelSpec
    checkpoint_sha256: str
    videos: list[ParityVideo]
    outputs: Outputs


def eager_reference(
    checkpoint: Checkpoint,
    model: CCNet,
    *,
    features: str | Path | None = None,
    annotations: str | Path | None = None,
    count: int = NUM_VIDEOS,
    device: str = "cpu",
) -> Reference:
    """Run the fp32 network on the inputs of the parity check (see `parity_inputs`), each alone. Needs torch.

    Raises FeatureError, AnnotationError, ConfigError for annotations without features, BackendUnavailable for an
    absent device.
    """
    from ccnet.torch_backend import TorchBackend

    videos = parity_inputs(checkpoint.spec, features=features, annotations=annotations, count=count)
    with TorchBackend(model, checkpoint.spec, device=device) as backend:
        outputs = record(backend, videos)
    model.cpu()
    return Reference(checkpoint.spec, checkpoint.weights_sha256, videos, outputs)


def record(backend: Backend, videos: Sequence[ParityVideo]) -> Outputs:
    """Run every video alone. Raises what the backend raises."""
    found = [backend.infer(*pack([video.features], backend.spec)) for video in videos]
    logits = np.concatenate([logits for logits, _ in found])
    offsets = np.concatenate([offsets for _, offsets in found])
    return Outputs(logits, offsets, backend.describe())


def save_reference(path: str | Path, reference: Reference) -> None:
    """Write a reference as one .npz file without pickled objects, whole or not at all."""
    videos = reference.videos
    visual, audio, lengths = pack([video.features for video in videos], reference.spec)
    header = {
        "schema": SCHEMA,
        "spec": reference.spec.to_json(),
        "checkpoint_sha256": reference.checkpoint_sha256,
        "source": reference.outputs.source,
        "videos": [{"name": v.name, "duration": v.duration, "stress": v.stress} for v in videos],
    }
    with atomic_file(path) as stream:
        np.savez_compressed(
            stream,
            header=np.array(json.dumps(header)),
            visual=visual,
            audio=audio,
            lengths=lengths,
            logits=reference.outputs.logits,
            offsets=reference.outputs.offsets,
            events_per_video=np.array([len(v.labels) for v in videos], np.int64),
            segments=np.concatenate([v.segments for v in videos]),
            labels=np.concatenate([v.labels for v in videos]),
        )


def load_reference(path: str | Path) -> Reference:
    """Read what `save_reference` wrote. Raises ParityError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ParityError(f"{path}: no such reference file; 'ccnet reference CHECKPOINT --out {path}' writes one")
    try:
        # np.load given a path leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays: dict[str, npt.NDArray[Any]] = {name: file[name] for name in file.files}
        header = json.loads(str(arrays["header"]))
        if header["schema"] != SCHEMA:
            raise ParityError(
                f"{path}: got schema {header['schema']!r}, this version reads {SCHEMA}; record it again: "
                f"ccnet reference CHECKPOINT --out {path}"
            )
        spec = ModelSpec.from_json(header["spec"])
        outputs = Outputs(arrays["logits"], arrays["offsets"], header["source"])
        videos = _unpack(header["videos"], arrays)
        expected = spec.output_shapes(len(videos))
        if (outputs.logits.shape, outputs.offsets.shape) != (expected["logits"], expected["offsets"]):
            raise ParityError(f"{path}: outputs {outputs.logits.shape} do not fit its {len(videos)} videos")
    except (
        *(KeyError, IndexError, TypeError, ValueError, AttributeError, ConfigError),
        *(OSError, EOFError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ParityError(f"{path}: not a whole reference file ({error}); record it again") from error
    return Reference(spec, header["checkpoint_sha256"], videos, outputs)


def _unpack(facts: list[dict[str, Any]], arrays: dict[str, npt.NDArray[Any]]) -> list[ParityVideo]:
    ends = np.cumsum(arrays["events_per_video"])
    lengths = arrays["lengths"]
    videos = []
    for i, fact in enumerate(facts):
        visual, audio = (arrays[name][i, : lengths[i]] for name in ("visual", "audio"))
        events = slice(ends[i] - arrays["events_per_video"][i], ends[i])
        videos.append(
            ParityVideo(
                fact["name"],
                VideoFeatures(visual, audio),
                fact["duration"],
                fact["stress"],
                arrays["segments"][events],
                arrays["labels"][events],
            )
        )
    return videos
