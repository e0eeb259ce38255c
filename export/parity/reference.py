"""What a network put out for the inputs of the parity check, and the file that carries it to machines without torch.

Shapes:  N videos   T steps   P points   C classes   Cv, Ca visual / audio feature width   M events of all videos
"""

from __future__ import annotations

import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.parity.inputs import NUM_VIDEOS, ParityVideo, parity_inputs
from runtime.backends.base import Backend, Float32
from runtime.batches import pack
from runtime.errors import ConfigError, ReferenceFileError
from runtime.features import VideoFeatures
from runtime.files import atomic_file
from runtime.records import BadRecord, parse_json
from runtime.schema import quote, require, section_from_json
from runtime.spec import AUDIO, LENGTHS, LOGITS, OFFSETS, VISUAL, ModelSpec

if TYPE_CHECKING:
    from ccnet.checkpoint import Checkpoint
    from ccnet.network.model import CCNet

SCHEMA = 3

_LARGEST_HEADER = 1 << 24
_LARGEST_ARRAY = 1 << 32
_NPY_HEADER = 1 << 16
_MOST_EVENTS = 1 << 20


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
        "videos": [
            {"name": v.name, "duration": v.duration, "stress": v.stress, "annotated": v.annotated} for v in videos
        ],
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
    """Read what `save_reference` wrote. Raises ReferenceFileError for anything else.

    Every array must have the dtype and the shape that follow from the header, which are known before it is read.
    """
    path = Path(path)
    again = f"ccnet reference CHECKPOINT --out {path}"
    if not path.is_file():
        raise ReferenceFileError(f"{path}: no such reference file; '{again}' writes one")
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(archive)
    except (ConfigError, BadRecord) as error:
        raise ReferenceFileError(f"{path}: not a whole reference file ({error}); record it again: {again}") from None
    except (
        *(KeyError, ValueError, SyntaxError, TypeError, NotImplementedError, RuntimeError, tokenize.TokenError),
        *(OSError, EOFError, struct.error, zipfile.BadZipFile, zlib.error, MemoryError),
    ) as error:
        reason = quote(error) or type(error).__name__
        raise ReferenceFileError(f"{path}: not a whole reference file ({reason}); record it again: {again}") from error


@dataclass(frozen=True, kw_only=True)
class _Video:
    name: str
    duration: float
    stress: bool
    annotated: bool


@dataclass(frozen=True, kw_only=True)
class _Header:
    schema: int
    spec: ModelSpec
    checkpoint_sha256: str
    source: dict[str, Any]
    videos: tuple[_Video, ...]


def _load(archive: zipfile.ZipFile) -> Reference:
    data = parse_json(str(_text(archive, "header")))
    found = data.get("schema") if isinstance(data, dict) else None
    require(found == SCHEMA, "schema", found, f"{SCHEMA}, which this version reads")
    header = section_from_json(_Header, data, where="header")
    spec, n = header.spec, len(header.videos)
    require(n >= 1, "header.videos", n, "one or more")
    inputs, outputs = spec.input_shapes(n), spec.output_shapes(n)
    lengths = _array(archive, "lengths", np.int32, (n,))
    events = _array(archive, "events_per_video", np.int64, (n,))
    _check("lengths", (lengths >= 1) & (lengths <= spec.length), f"1 to {spec.length}")
    _check("events_per_video", (events >= 0) & (events <= _MOST_EVENTS), f"0 to {_MOST_EVENTS}")
    count = int(events.sum())
    labels = _array(archive, "labels", np.int64, (count,))
    segments = _array(archive, "segments", np.float64, (count, 2))
    _check("labels", (labels >= 0) & (labels < spec.num_classes), f"0 to {spec.num_classes - 1}")
    _check("segments", np.isfinite(segments), "finite seconds")
    _check("segments", segments[:, 0] < segments[:, 1], "an end after the start")
    floats = {
        name: _array(archive, name, np.float32, shape)
        for name, shape in (*inputs.items(), *outputs.items())
        if name != LENGTHS
    }
    for name, array in floats.items():
        _check(name, np.isfinite(array), "finite numbers")
    videos = []
    for i, (video, end) in enumerate(zip(header.videos, np.cumsum(events), strict=True)):
        require(video.duration > 0, f"header.videos[{i}].duration", video.duration, "seconds above 0")
        rows = slice(end - events[i], end)
        features = VideoFeatures(floats[VISUAL][i, : lengths[i]], floats[AUDIO][i, : lengths[i]])
        facts = (video.name, features, video.duration, video.stress, segments[rows], labels[rows], video.annotated)
        videos.append(ParityVideo(*facts))
    return Reference(spec, header.checkpoint_sha256, videos, Outputs(floats[LOGITS], floats[OFFSETS], header.source))


def _text(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(f"{name}.npy") as stream:
        _, _, dtype = _array_header(stream)
        require(dtype.kind == "U" and dtype.itemsize <= _LARGEST_HEADER, name, dtype, "text of at most 16 MB")
        return np.frombuffer(stream.read(dtype.itemsize), dtype)[0]


def _array(archive: zipfile.ZipFile, name: str, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Read an array that must have this dtype and shape; nothing is allocated before its entry says so too."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        found_shape, fortran, found = _array_header(stream)
        good = found == dtype and found_shape == shape and (not fortran or len(shape) < 2)
        require(good, name, f"{found} {found_shape}", f"{np.dtype(dtype)} {shape}")
        require(0 <= member.file_size - size <= _NPY_HEADER, name, member.file_size, f"{size} bytes and a header")
        require(size <= _LARGEST_ARRAY, name, size, f"at most {_LARGEST_ARRAY} bytes")
        data = stream.read(size + 1)  # one more: the end is where the checksum is looked at
    require(len(data) == size, name, len(data), f"{size} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    require(version == (1, 0), ".npy version", version, "1.0")
    return np.lib.format.read_array_header_1_0(stream)


def _check(name: str, good: npt.NDArray[np.bool_], expected: str) -> None:
    require(bool(good.all()), name, "a value outside", expected)
