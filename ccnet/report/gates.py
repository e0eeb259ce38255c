"""The gates of the finest level, read from a bundle's graph: without PyTorch and without the checkpoint.

The graph's outputs are logits and offsets alone. The gates are its sigmoids, level by level, the finest first; a copy
of the graph in memory gets the first of them as a further output. In the fused network one node computes both gates
[2, steps, 1], in the reference graph two nodes compute one each [1, steps, 1]; the one from the audio comes first.

Shapes:  n steps of one video   T steps of the network
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ccnet.plots import Gates
from runtime.backends.onnxruntime import load_library
from runtime.batches import pack
from runtime.bundle import Bundle, ModelFile
from runtime.errors import EngineError, FeatureError, MissingDependency
from runtime.features import FeatureFiles
from runtime.packages import import_package
from runtime.spec import INPUT_NAMES

log = logging.getLogger(__name__)


class GateReader:
    """Runs a bundle's graph on single videos and returns their gates."""

    def __init__(self, bundle: Bundle) -> None:
        """Open the graph on the CPU.

        Raises MissingDependency without onnx and onnxruntime, BundleError for an altered file, EngineError for a graph
        that does not load, ValueError for one without gates.
        """
        onnx = import_package("onnx", "Reading gate curves from a bundle")
        runtime = load_library("cpu")
        self.spec = bundle.spec
        model_file = _graph(bundle)
        bundle.verify(model_file)
        model = onnx.load(str(bundle.path(model_file)))
        self._names = [node.output[0] for node in model.graph.node if node.op_type == "Sigmoid"][:2]
        if not self._names:
            raise ValueError("its graph has no gates")
        for name in self._names:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        options: Any = runtime.SessionOptions()
        options.log_severity_level = 3
        try:
            content = model.SerializeToString()
            self._session: Any = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of protobuf (2 GB), of the library
            raise EngineError(f"{bundle.path(model_file)}: can't be opened to read its gates: {error}") from error

    def read(self, features: FeatureFiles) -> Gates:
        """Return the gates [n] of one video.

        Raises FeatureError, EngineError, and ValueError where the graph's sigmoids are not those of two gates.
        """
        video = features.read(self.spec)
        steps = min(video.steps, self.spec.length)
        inputs = dict(zip(INPUT_NAMES, pack([video], self.spec), strict=True))
        try:
            values = self._session.run(self._names, inputs)
        except Exception as error:  # of the library
            raise EngineError(f"ONNX Runtime can't compute its gates: {error}") from error
        first, *second = (np.asarray(value, np.float32) for value in values)
        both = first if first.shape[0] == 2 else np.concatenate([first, *second])
        if both.ndim != 3 or both.shape[0] != 2 or both.shape[1] < steps or both.shape[2] != 1:
            raise ValueError(f"its graph has sigmoids of shape {list(first.shape)}, expected those of two gates")
        return Gates(self.spec.time_base.to_seconds(np.arange(steps)), both[0, :steps, 0], both[1, :steps, 0])


def read_all(bundle: Bundle, folder: str, video_ids: Iterable[str]) -> dict[str, Gates]:
    """Return the gates of those videos that have some, by video id; why there are none is logged."""
    return dict(_read_all(bundle, folder, video_ids))


def _read_all(bundle: Bundle, folder: str, video_ids: Iterable[str]) -> Iterator[tuple[str, Gates]]:
    try:
        reader = GateReader(bundle)
        for video_id in video_ids:
            try:
                gates = reader.read(FeatureFiles(folder, video_id))
            except FeatureError as error:  # noqa: PERF203  a video takes much longer
                log.warning("no gate curves of %s: %s", video_id, error)
            else:
                yield video_id, gates
    except (ValueError, MissingDependency, EngineError) as error:
        log.warning("%s: no gate curves: %s", bundle.folder, error)


def _graph(bundle: Bundle) -> ModelFile:
    """Return the ONNX file of the highest precision."""
    graphs = [model_file for model_file in bundle.manifest.model_files if model_file.format == "onnx"]
    order = ("fp32", "tf32", "fp16", "bf16")
    graphs.sort(key=lambda f: order.index(f.precision) if f.precision in order else len(order))
    if not graphs:
        raise ValueError("it has no ONNX file")
    return graphs[0]
