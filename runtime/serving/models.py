"""The two models of a server: the raw network, and the localizer around it.

Shapes: n steps of one video   B rows   T steps of the network   P points   C classes   N events
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from runtime.backends.base import Float32, Int32, check_inputs
from runtime.batches import Allocate
from runtime.detections import Detections
from runtime.errors import EngineError, FeatureError, RequestError
from runtime.features import copy_rows
from runtime.pipeline import Localized, Pipeline, Task
from runtime.records import BadRecord, check_duration
from runtime.schema import quote
from runtime.serving.batcher import Batcher, Ticket
from runtime.serving.protocol import Array, InferRequest, Tensor
from runtime.spec import AUDIO, INPUT_TYPES, LENGTHS, LOGITS, OFFSETS, VISUAL, ModelSpec

NETWORK, LOCALIZER = "network", "localizer"
VERSION = "1"

Outputs: TypeAlias = "Mapping[str, Array | Sequence[str]]"
Rows: TypeAlias = "tuple[Float32, Float32, Int32]"
"""visual [B, T, Cv], audio [B, T, Ca], lengths [B]."""


@dataclass(eq=False, slots=True, kw_only=True)
class VideoJob(Task):
    """A video on its way through the pipeline, for somebody who waits for it."""

    ticket: Ticket = field(default_factory=Ticket)

    def outcome(self) -> Localized:
        """Return the result. Raises the video's error."""
        if isinstance(self.result, Localized):
            if self.result.error is not None:
                raise self.result.error
            return self.result
        raise self.result or RuntimeError("a video without a result")


@dataclass(eq=False, slots=True, kw_only=True)
class TensorJob:
    """Rows for the network."""

    ticket: Ticket
    arrays: Rows
    result: tuple[Float32, Float32] | BaseException | None = None
    """logits [B, P, C], offsets [B, P, C, 2]."""

    @property
    def rows(self) -> int:
        """B."""
        return len(self.arrays[2])

    def outcome(self) -> tuple[Float32, Float32]:
        """Return the result. Raises the error that there is instead."""
        if isinstance(self.result, tuple):
            return self.result
        raise self.result or RuntimeError("a request without a result")


@dataclass(frozen=True)
class Model:
    """What the protocol says of a model."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_rows: int = 0
    """Largest first dimension of a request; 0 where a request is one video."""
    properties: Mapping[str, str] = field(default_factory=dict)

    def check(self, request: InferRequest) -> None:
        """Raise RequestError unless the names of inputs and outputs are those of this model."""
        known = [tensor.name for tensor in self.inputs]
        for name in request.inputs:
            if name not in known:
                raise RequestError(f"input {quote(name, 60)}: {self.name} takes {', '.join(known)}")
        for tensor in self.inputs:
            if tensor.name not in request.inputs and not tensor.optional:
                raise RequestError(f"input {tensor.name}: missing; {self.name} takes {', '.join(known)}")
        outputs = [tensor.name for tensor in self.outputs]
        for name in request.outputs:
            if name not in outputs:
                raise RequestError(f"output {quote(name, 60)}: {self.name} gives {', '.join(outputs)}")

    def metadata(self) -> dict[str, Any]:
        """Return what `GET /v2/models/NAME` answers."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "ccnet",
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
        }

    def configuration(self) -> dict[str, Any]:
        """Return what `GET /v2/models/NAME/config` answers, for clients of Triton that ask."""

        def entry(tensor: Tensor) -> dict[str, Any]:
            kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
            dims = list(tensor.shape[1:] if self.max_rows else tensor.shape)
            return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": dims}

        return {
            "name": self.name,
            "platform": "ccnet",
            "backend": "ccnet",
            "max_batch_size": self.max_rows,
            "input": [{**entry(tensor), "optional": tensor.optional} for tensor in self.inputs],
            "output": [entry(tensor) for tensor in self.outputs],
        }


def network_model(spec: ModelSpec, max_rows: int) -> Model:
    """Describe the raw network: tensors of `spec` in and out, up to `max_rows` rows."""
    types: Mapping[type[np.generic], str] = {np.float32: "FP32", np.int32: "INT32"}
    rows = -1
    inputs = tuple(Tensor(name, types[INPUT_TYPES[name]], shape) for name, shape in spec.input_shapes(rows).items())
    outputs = tuple(Tensor(name, "FP32", shape) for name, shape in spec.output_shapes(rows).items())
    return Model(NETWORK, inputs, outputs, max_rows)


def localizer_model(spec: ModelSpec) -> Model:
    """Describe the localizer: features of one video in, its events out."""
    inputs = (
        Tensor(VISUAL, "FP32", (-1, spec.visual_dim)),
        Tensor(AUDIO, "FP32", (-1, spec.audio_dim)),
        Tensor("duration", "FP64", (1,), optional=True),
    )
    outputs = (
        Tensor("segments", "FP64", (-1, 2)),
        Tensor("scores", "FP32", (-1,)),
        Tensor("labels", "INT64", (-1,)),
        Tensor("label_names", "BYTES", (-1,)),
    )
    return Model(LOCALIZER, inputs, outputs)


def network_job(request: InferRequest, spec: ModelSpec, max_rows: int, batch: int) -> TensorJob:
    """Return the job of a request to the raw network, of up to `max_rows` rows; more than `batch` fill a batch alone.

    Raises FeatureError for tensors that don't fit.
    """
    visual, audio, lengths = check_inputs(
        request.inputs[VISUAL], request.inputs[AUDIO], request.inputs[LENGTHS], spec, max_rows
    )
    return TensorJob(ticket=Ticket(rows=min(len(lengths), batch)), arrays=(visual, audio, lengths))


def localizer_source(request: InferRequest) -> tuple[Array, Array, float | None]:
    """Return the features and the duration of a request to the localizer. Raises RequestError for a bad duration."""
    duration = request.inputs.get("duration")
    seconds = None if duration is None else check_seconds(duration.item() if duration.size == 1 else duration.tolist())
    return request.inputs[VISUAL], request.inputs[AUDIO], seconds


def check_seconds(value: Any) -> float:
    """Return a duration. Raises RequestError."""
    try:
        return check_duration(value)
    except BadRecord as error:
        raise RequestError(str(error)) from None


def event_outputs(detections: Detections) -> Outputs:
    """Return events as tensors: segments [N, 2] in seconds, scores [N], labels [N], label_names [N]."""
    return {
        "segments": detections.segments,
        "scores": detections.scores,
        "labels": detections.labels,
        "label_names": [detections.label_names[label] for label in detections.labels.tolist()],
    }


def run_videos(pipeline: Pipeline, size: int, allocate: Allocate | None, batcher: Batcher[VideoJob]) -> None:
    """Process videos in batches of up to `size` rows until the batcher gives no more."""
    pipeline.run(batcher.take, batcher.finish, batcher.infer, pipeline.workspace(size, allocate))  # type: ignore[arg-type]


def run_tensors(spec: ModelSpec, size: int, batcher: Batcher[TensorJob]) -> None:
    """Process requests to the raw network, several in a batch of up to `size` rows, until there are no more."""
    room: Rows | None = None
    while jobs := _collect(batcher, size):
        good = [job for job in jobs if _is_finite(job)]
        if len(good) == 1 and all(array.flags.aligned for array in good[0].arrays):
            _run(good, good[0].arrays, batcher)
        elif good:
            rows = sum(job.rows for job in good)
            if room is None or len(room[2]) < rows:
                room = _room(spec, max(size, rows))
            _run(good, _join(good, room), batcher)
        batcher.finish(jobs)


def _collect(batcher: Batcher[TensorJob], size: int) -> list[TensorJob]:
    jobs: list[TensorJob] = []
    rows = 0
    while rows < size and (taken := batcher.take(size - rows, not jobs)):
        jobs += taken
        rows += sum(job.ticket.rows for job in taken)
    return jobs


def _is_finite(job: TensorJob) -> bool:
    try:
        for row in range(job.rows):
            for array, name in zip(job.arrays[:2], (VISUAL, AUDIO), strict=True):
                copy_rows(array[row], None, f"{name}[{row}]")
    except FeatureError as error:
        job.result = error
        return False
    return True


def _room(spec: ModelSpec, size: int) -> Rows:
    shapes = spec.input_shapes(size)
    visual, audio, lengths = (np.empty(shapes[name], INPUT_TYPES[name]) for name in (VISUAL, AUDIO, LENGTHS))
    return visual, audio, lengths


def _join(jobs: Sequence[TensorJob], room: Rows) -> Rows:
    stop = 0
    for job in jobs:
        start, stop = stop, stop + job.rows
        for target, array in zip(room, job.arrays, strict=True):
            target[start:stop] = array
    return room[0][:stop], room[1][:stop], room[2][:stop]


def _run(jobs: Sequence[TensorJob], inputs: Rows, batcher: Batcher[TensorJob]) -> None:
    try:
        logits, offsets = batcher.infer(*inputs)
    except BaseException as error:  # noqa: BLE001  it is for those who wait
        for job in jobs:
            job.result = error
        return
    stop = 0
    for job in jobs:
        start, stop = stop, stop + job.rows
        found = logits[start:stop], offsets[start:stop]
        finite = all(np.isfinite(array).all() for array in found)
        job.result = (
            found if finite else EngineError(f"{LOGITS}, {OFFSETS}: the network gave values that are not finite")
        )
