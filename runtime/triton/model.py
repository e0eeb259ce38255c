"""Post-processing as a model of Triton's Python backend; `model.py` of a repository is one import of it.

Triton starts a process for each instance, gives it requests that waited together, and takes one response for each.

Shapes:  B rows of a request   P points   C classes   K events kept of a video
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.detections import Detections
from runtime.errors import CCNetError, RequestError
from runtime.postprocess import PostProcessor
from runtime.records import BadRecord, parse_json
from runtime.spec import LENGTHS, LOGITS, OFFSETS, ModelSpec

SPEC_FILE = "spec.json"
DURATION = "duration"
OUTPUTS = ("segments", "scores", "labels", "count")


class PostProcessing:
    """From the network's tensors to events of a fixed number: rows behind a video's last event are empty."""

    def __init__(self, spec: ModelSpec, max_batch: int) -> None:
        self._spec = spec
        self._process = PostProcessor(spec, None, max_batch)
        self._max_batch = max_batch

    def __call__(self, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Post-process logits [B, P, C], offsets [B, P, C, 2], lengths [B, 1] steps, duration [B, 1] seconds.

        Returns segments [B, K, 2] seconds, scores [B, K], labels [B, K] (-1 behind the last event), count [B, 1].
        Raises RequestError for lengths out of range, and for a video whose outputs or duration are bad.
        """
        lengths = np.ascontiguousarray(tensors[LENGTHS].reshape(-1), np.int32)
        durations = tensors[DURATION].reshape(-1).tolist()
        batch = len(lengths)
        if not 1 <= batch <= self._max_batch or len(durations) != batch:
            raise RequestError(f"got {batch} lengths and {len(durations)} durations, expected 1 to {self._max_batch}")
        if lengths.min() < 1 or lengths.max() > self._spec.length:
            raise RequestError(f"{LENGTHS}: got {lengths.tolist()}, expected 1 to {self._spec.length} valid steps")
        found = self._process(tensors[LOGITS], tensors[OFFSETS], lengths, durations)
        bad = next((result for result in found if isinstance(result, CCNetError)), None)
        if bad is not None:
            raise RequestError(f"video {found.index(bad)} of the request: {bad}")
        return _padded([result for result in found if isinstance(result, Detections)], self._spec.post.max_segments)


def _padded(found: Sequence[Detections], most: int) -> dict[str, npt.NDArray[Any]]:
    batch = len(found)
    segments, scores = np.zeros((batch, most, 2), np.float64), np.zeros((batch, most), np.float32)
    labels, count = np.full((batch, most), -1, np.int64), np.zeros((batch, 1), np.int32)
    for row, detections in enumerate(found):
        events = len(detections)
        segments[row, :events], scores[row, :events] = detections.segments, detections.scores
        labels[row, :events], count[row] = detections.labels, events
    return dict(zip(OUTPUTS, (segments, scores, labels, count), strict=True))


def read_spec(folder: Path) -> ModelSpec:
    """Read the spec that lies beside `model.py`. Raises RequestError where it is damaged."""
    try:
        return ModelSpec.from_json(parse_json((folder / SPEC_FILE).read_bytes()))
    except (OSError, BadRecord, CCNetError) as error:
        raise RequestError(f"{folder / SPEC_FILE}: {error}; write the repository again") from None


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the spec of this version; an error keeps the model from getting ready, and Triton prints it."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self._run = PostProcessing(read_spec(folder), int(json.loads(args["model_config"])["max_batch_size"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return the response of each request; a bad one gets an error of its own."""
        import triton_python_backend_utils as triton

        responses = []
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                outputs = self._run(tensors)
            except CCNetError as error:
                responses.append(triton.InferenceResponse([], triton.TritonError(str(error))))
                continue
            wanted = set(request.requested_output_names())
            kept = [triton.Tensor(name, array) for name, array in outputs.items() if name in wanted]
            responses.append(triton.InferenceResponse(kept))
        return responses
