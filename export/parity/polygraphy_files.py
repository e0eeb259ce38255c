"""Inputs and outputs of the parity check as files of `polygraphy run`, so that a second tool can be asked.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes); every video is its own batch of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.parity.compare import ParityReport, compare
from export.parity.reference import Outputs, Reference
from export.parity.tolerances import tolerance
from runtime.backends.base import Float32, Int32
from runtime.batches import pack
from runtime.errors import ParityError
from runtime.packages import missing
from runtime.spec import INPUT_NAMES, LOGITS, OFFSETS, ModelSpec

INPUTS, EXPECTED, RESULTS = "inputs.json", "expected.json", "results.json"


def write_inputs(folder: Path, reference: Reference) -> None:
    """Write `inputs.json` (for --load-inputs) and `expected.json` (for --load-outputs)."""
    polygraphy = _polygraphy()
    folder.mkdir(parents=True, exist_ok=True)
    feeds = [dict(zip(INPUT_NAMES, pack([v.features], reference.spec), strict=True)) for v in reference.videos]
    polygraphy.json.save_json(feeds, str(folder / INPUTS), description="inputs")
    result = polygraphy.comparator.IterationResult
    iterations = [
        result({LOGITS: logits[None], OFFSETS: offsets[None]}, runner_name="eager")
        for logits, offsets in zip(reference.outputs.logits, reference.outputs.offsets, strict=True)
    ]
    results = polygraphy.comparator.RunResults([("eager", iterations)])
    results.save(str(folder / EXPECTED))


def judge_results(folder: Path, reference: Reference, precision: str) -> ParityReport:
    """Put `results.json` (of --save-outputs) through the check. Raises ParityError when it is of other inputs."""
    polygraphy = _polygraphy()
    path = folder / RESULTS
    try:
        results = polygraphy.comparator.RunResults.load(str(path))
        runner, iterations = next((name, list(found)) for name, found in results.items() if name != "eager")
        logits = np.concatenate([np.asarray(found[LOGITS], np.float32) for found in iterations])
        offsets = np.concatenate([np.asarray(found[OFFSETS], np.float32) for found in iterations])
    except Exception as error:
        raise ParityError(f"{path}: not the outputs of 'polygraphy run --save-outputs' ({error})") from error
    expected = reference.spec.output_shapes(len(reference.videos))
    for name, array in ((LOGITS, logits), (OFFSETS, offsets)):
        if array.shape != expected[name]:
            raise ParityError(f"{path}: got {name} {array.shape}, expected {expected[name]}, a row for each input")
    recorded = _Recorded(Outputs(logits, offsets, {"backend": runner}), reference.spec, precision)
    return compare(recorded, reference.outputs, reference.videos, limits=tolerance(precision))


class _Recorded:
    """Outputs from a file as a backend that is asked for each video alone, in order."""

    max_batch = 1

    def __init__(self, outputs: Outputs, spec: ModelSpec, precision: str) -> None:
        self.name = str(outputs.source["backend"])
        self.precision = precision
        self.spec = spec
        self._rows = iter(zip(outputs.logits, outputs.offsets, strict=True))

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        logits, offsets = next(self._rows)
        return logits[None], offsets[None]

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "precision": self.precision, "from": "polygraphy"}

    def close(self) -> None:
        pass

    def __enter__(self) -> _Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _polygraphy() -> Any:
    try:
        import polygraphy.comparator
        import polygraphy.json
    except ModuleNotFoundError as error:
        raise missing("polygraphy", "files for polygraphy") from error
    return polygraphy
