"""A network whose output can be read off its input, as numpy, as an ONNX graph and as a whole bundle.

At a point p of the pyramid that lies on grid step t:  logits[p, c] = visual[c, t],  offsets[p, c] = audio[0:2, t],
and logits are very low where the mask is false. So a test synthesizes the events that it wants to find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Bool, Float32
from runtime.backends.checks import check_inputs
from runtime.bundle import MANIFEST, Bundle, Engine, FileRecord, Manifest, ModelFile, read_bundle
from runtime.features import VideoFeatures
from runtime.files import sha256_file, write_json
from runtime.spec import FeatureLayout, ModelSpec, TimeBase

LABELS = ("speech", "dog", "engine", "bell")
SPEC = ModelSpec(
    length=32,
    levels=4,
    visual_dim=6,
    audio_dim=3,
    labels=LABELS,
    time_base=TimeBase(fps=1, stride_frames=1, window_frames=1),
    layout=FeatureLayout(visual=("_seen",), audio=("_heard",)),
)
"""One grid step is one second, and grid position g stands for g + 0.5 s."""

_LOW = -100.0


def oracle(visual: Float32, audio: Float32, mask: Bool, spec: ModelSpec = SPEC) -> tuple[Float32, Float32]:
    """The network in numpy."""
    steps = spec.grid.positions.astype(np.int64)
    low = np.where(mask, np.float32(0), np.float32(_LOW))
    logits = (visual[:, : spec.num_classes] + low)[:, :, steps].transpose(0, 2, 1)
    pairs = np.maximum(audio[:, :2, steps], 0).transpose(0, 2, 1)
    offsets = np.repeat(pairs[:, :, None, :], spec.num_classes, axis=2)
    return np.ascontiguousarray(logits), np.ascontiguousarray(offsets)


class OracleBackend:
    """The numpy network behind the Backend protocol. Records the batch sizes that it was asked for."""

    def __init__(self, spec: ModelSpec = SPEC, *, name: str = "fake", max_batch: int = 4) -> None:
        self.name, self.precision = name, "fp32"
        self.spec, self.max_batch = spec, max_batch
        self.batches: list[int] = []
        self.closed = 0

    def infer(self, visual: Float32, audio: Float32, mask: Bool) -> tuple[Float32, Float32]:
        visual, audio, mask = check_inputs(visual, audio, mask, self.spec, self.max_batch)
        self.batches.append(len(visual))
        return oracle(visual, audio, mask, self.spec)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "precision": self.precision}

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> OracleBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def synthesize(steps: int, events: Sequence[tuple[int, int, int, float]] = (), spec: ModelSpec = SPEC) -> VideoFeatures:
    """Features of a video in which exactly these events are found: (start, end, label, logit), in grid steps.

    An event is synthetic on the odd step in its middle, which is a point of the finest level alone; events must not
    share that step.
    """
    visual = np.full((steps, spec.visual_dim), _LOW, np.float32)
    audio = np.zeros((steps, spec.audio_dim), np.float32)
    for start, end, label, logit in events:
        step = (start + end) // 2 | 1
        visual[step, label] = logit
        audio[step, :2] = step - start, end - step
    return VideoFeatures(visual, audio)


def write_features(folder: Path, video_id: str, features: VideoFeatures) -> None:
    """The feature files of one video, as `SPEC.layout` names them."""
    np.save(folder / f"{video_id}_seen.npy", features.visual)
    np.save(folder / f"{video_id}_heard.npy", features.audio)


def write_onnx(path: Path, spec: ModelSpec = SPEC) -> None:
    """The same network as an ONNX graph with a dynamic batch axis."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    steps, points, classes = spec.grid.positions.astype(np.int64), spec.grid.num_points, spec.num_classes
    constants = {
        "steps": steps,
        "zero": np.array([0]),
        "two": np.array([2]),
        "classes": np.array([classes]),
        "one_axis": np.array([1]),
        "low": np.array(_LOW, np.float32),
        "nothing": np.array(0, np.float32),
        "column": np.array([-1, points, 1, 2]),
        "repeated": np.array([1, 1, classes, 1]),
    }
    nodes = [
        helper.make_node("Slice", ["visual", "zero", "classes", "one_axis"], ["seen"]),
        helper.make_node("Where", ["mask", "nothing", "low"], ["added"]),
        helper.make_node("Add", ["seen", "added"], ["masked"]),
        helper.make_node("Gather", ["masked", "steps"], ["gathered"], axis=2),
        helper.make_node("Transpose", ["gathered"], ["logits"], perm=[0, 2, 1]),
        helper.make_node("Slice", ["audio", "zero", "two", "one_axis"], ["heard"]),
        helper.make_node("Relu", ["heard"], ["positive"]),
        helper.make_node("Gather", ["positive", "steps"], ["pairs"], axis=2),
        helper.make_node("Transpose", ["pairs"], ["by_point"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["by_point", "column"], ["columns"]),
        helper.make_node("Tile", ["columns", "repeated"], ["offsets"]),
    ]

    def tensors(shapes: dict[str, tuple[int, ...]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name, TensorProto.BOOL if name == "mask" else TensorProto.FLOAT, ["batch", *shape[1:]]
            )
            for name, shape in shapes.items()
        ]

    graph = helper.make_graph(
        nodes,
        "oracle",
        tensors(spec.input_shapes(1)),
        tensors(spec.output_shapes(1)),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def make_bundle(
    folder: Path,
    engines: Sequence[Engine] | None = None,
    *,
    spec: ModelSpec = SPEC,
    lengths: Sequence[int] = (32,),
    engine_files: Sequence[ModelFile] = (),
) -> Bundle:
    """A bundle with one ONNX file per length (`onnx-fp32-t<length>`) and the given engines and engine files.

    Without `engines`: one verified ONNX Runtime engine per length. Engine files are a few arbitrary bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model_files = []
    for length in lengths:
        name = f"model-t{length}.onnx"
        write_onnx(folder / name, spec.with_length(length))
        model_files.append(onnx_model_file(length, name))
    for file in engine_files:
        (folder / file.files[0]).write_bytes(b"not really an engine")
        model_files.append(file)
    if engines is None:
        engines = [engine("onnxruntime", length=length) for length in lengths]
    names = [name for model_file in model_files for name in model_file.files]
    manifest = Manifest(
        schema=1,
        spec=spec,
        model={},
        checkpoint_sha256="0" * 64,
        versions={"ccnet": "0"},
        created="2000-01-01T00:00:00+00:00",
        files=tuple(
            FileRecord(name=name, size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
            for name in names
        ),
        model_files=tuple(model_files),
        engines=tuple(engines),
    )
    write_json(folder / MANIFEST, manifest.to_json())
    return read_bundle(folder)


def onnx_model_file(length: int = 32, file: str | None = None) -> ModelFile:
    return ModelFile(
        name=f"onnx-fp32-t{length}",
        format="onnx",
        files=(file or f"model-t{length}.onnx",),
        precision="fp32",
        length=length,
        max_batch=4,
        opset=17,
    )


def engine(
    backend: str, precision: str = "fp32", *, length: int = 32, model_file: str | None = None, **options: Any
) -> Engine:
    values = {"status": "verified", **options}
    return Engine(
        name=f"{backend}-{precision}-t{length}",
        backend=backend,
        precision=precision,
        model_file=model_file or f"onnx-fp32-t{length}",
        **values,
    )


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Replace fields of a bundle's manifest on disk."""
    manifest = dataclasses.replace(read_bundle(folder).manifest, **changes)
    write_json(folder / MANIFEST, manifest.to_json())
