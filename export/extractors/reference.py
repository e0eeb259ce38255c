"""What the networks make of a few inputs: the reference that every engine of an extractor is compared with.

The inputs are drawn anew wherever they are needed and only the outputs are kept, in a file of the extractor. So engines
are verified on the machine that will run them without the weight files and without torch.

Shapes: see `runtime.video.extractor`, which names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError
from runtime.files import atomic_file
from runtime.video.extractor import GRAPHS, Extractor, ExtractorSpec, GraphName
from runtime.video.logmel import BANDS, EXAMPLE

Float32 = npt.NDArray[np.float32]
Outputs = dict[GraphName, dict[str, Float32]]

REFERENCE = "reference.npz"
PICTURES = 3
"""Frames of two pairs."""


def example_inputs(graph: GraphName, spec: ExtractorSpec, encoded: Mapping[str, Float32]) -> tuple[Float32, ...]:
    """Draw inputs like those of a video: drifting smooth pictures, rounded flow, log-mel of noise.

    `encoded`: what the network makes of those of `encode`, which `flow` begins with.
    """
    draw = np.random.RandomState(GRAPHS.index(graph))  # whose numbers never change
    if graph == "encode":
        rows, columns = spec.side, spec.side + 32
        still = smooth(draw.randint(0, 256, (rows // 8 + 1, columns // 8 + 2, 3)), 8)
        drift = [still[:rows, shift : shift + columns] for shift in (0, 2, 5)[:PICTURES]]
        return (np.ascontiguousarray(np.stack(drift).transpose(0, 3, 1, 2)),)
    if graph == "flow":
        features, context = encoded["features"], encoded["context"]
        return features[:-1], features[1:], context[:-1]
    if graph == "vggish":
        loudness = np.linspace(-3, 1, 2)[:, None, None]
        return ((draw.standard_normal((2, EXAMPLE, BANDS)) + loudness).astype(np.float32),)
    channels, cells = (3 if graph == "i3d_rgb" else 2), -(-spec.crop // 8) + 1
    stacks = [smooth(draw.randint(0, 257, (cells, cells, channels)), 8) for _ in range(2 * spec.window)]
    cropped = np.stack([stack[: spec.crop, : spec.crop] for stack in stacks]).transpose(0, 3, 1, 2)
    return (np.round(cropped).reshape(2, spec.window, channels, spec.crop, spec.crop),)


def smooth(coarse: npt.NDArray[Any], factor: int) -> Float32:
    """Enlarge [h, w, c] linearly between its points, to `factor` times less one point."""
    share = np.arange(factor, dtype=np.float32) / factor
    fine = coarse.astype(np.float32)
    for axis in (0, 1):
        fine = np.moveaxis(fine, axis, 0)
        between = fine[:-1, None] + share[:, None, None] * (fine[1:, None] - fine[:-1, None])
        fine = np.moveaxis(between.reshape(-1, *fine.shape[1:]), 0, axis)
    return fine


def write_reference(path: Path, outputs: Outputs) -> None:
    """Write the outputs of every graph, atomically."""
    with atomic_file(path) as stream:
        arrays = {f"{graph}/{name}": array for graph, named in outputs.items() for name, array in named.items()}
        np.savez(stream, **cast(Any, arrays))


def read_reference(extractor: Extractor) -> Outputs:
    """Check and read the file that `write_reference` wrote. Raises BundleError for another one."""
    if all(record.name != REFERENCE for record in extractor.manifest.files):
        raise BundleError(f"{extractor.folder}: an earlier version made it, without {REFERENCE}; import it again")
    extractor.verify_file(REFERENCE)
    path = extractor.folder / REFERENCE
    outputs: Outputs = {}
    try:
        with np.load(path, allow_pickle=False) as content:
            for graph in GRAPHS:
                names = extractor.spec.tensors(graph).outputs
                outputs[graph] = {name: np.asarray(content[f"{graph}/{name}"], np.float32) for name in names}
    except (KeyError, ValueError, OSError) as error:
        raise BundleError(f"{path}: not the reference of this extractor ({error}); import it again") from None
    return outputs
