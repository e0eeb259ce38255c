"""A small ONNX network with CCNet's inputs and outputs, made with onnx.helper, and the same in numpy.

One masked attention, one convolution, layer normalization and the two heads; precision lives in the graph as in the
real one: float32 at the edges, half or bfloat16 inside. `python tests/small_network.py FOLDER` writes the graphs, for
machines without the onnx package (tests/test_gpu.py reads them from CCNET_GPU_GRAPHS).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from runtime.spec import ModelSpec

SPEC = ModelSpec(length=32, levels=2, visual_dim=24, audio_dim=8, labels=("a", "b", "c", "d", "e"))
WIDTH, HEADS = 64, 2
OPSETS = {"fp32": 17, "fp16": 17, "bf16": 22}


def weights() -> dict[str, np.ndarray]:
    """Weights that float16 and bfloat16 hold exactly, so that all precisions compute one function."""
    draw = np.random.default_rng(7)
    classes = SPEC.num_classes

    def matrix(*shape: int) -> np.ndarray:
        return (np.round(draw.standard_normal(shape) * shape[0] ** -0.5 * 128) / 128).astype(np.float32)

    return {
        "w_visual": matrix(SPEC.visual_dim, WIDTH),
        "w_audio": matrix(SPEC.audio_dim, WIDTH),
        "w_query": matrix(WIDTH, WIDTH),
        "w_key": matrix(WIDTH, WIDTH),
        "w_value": matrix(WIDTH, WIDTH),
        "w_logits": matrix(WIDTH, classes),
        "w_offsets": matrix(WIDTH, 2 * classes),
    }


def write_onnx(
    path: Path,
    precision: str,
    *,
    batch: int | None = None,
    operator: str | None = None,
    external: bool = False,
    spec: ModelSpec = SPEC,
) -> Path:
    """Write the network. `batch` fixes the batch size, `operator` puts an operator of that name in the middle."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    nodes: list[Any] = []
    initializers = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in _SHAPES.items()]

    def constant(name: str, values: np.ndarray) -> None:
        flat = np.asarray(values, np.float32)
        if precision == "bf16":
            made = helper.make_tensor(name, kind, flat.shape, flat.ravel())
        else:
            made = numpy_helper.from_array(flat.astype(np.float16 if precision == "fp16" else np.float32), name)
        initializers.append(made)

    def op(op_type: str, takes: str, gives: str, **attributes: object) -> None:
        nodes.append(helper.make_node(op_type, takes.split(), gives.split(), name=f"{op_type}/{gives}", **attributes))

    for name, values in weights().items():
        constant(name, values)
    constant("ones", np.ones(WIDTH))
    constant("zeros", np.zeros(WIDTH))
    constant("scale", np.array((WIDTH // HEADS) ** -0.5))
    constant("far", np.array(-10000.0))
    constant("one", np.array(1.0))

    op("Cast", "mask", "valid", to=kind)  # [B, 1, T]
    op("Transpose", "valid", "valid_rows", perm=[0, 2, 1])
    for name in ("visual", "audio"):
        op("Cast", name, f"{name}_in", to=kind)
        op("Transpose", f"{name}_in", f"{name}_rows", perm=[0, 2, 1])
        op("MatMul", f"{name}_rows w_{name}", f"{name}_wide")
    op("Add", "visual_wide audio_wide", "sum")
    op("LayerNormalization", "sum ones zeros", "normed", axis=-1)
    source = "normed"
    if operator:
        op(operator, "normed", "middle")
        source = "middle"
    for name in ("query", "key", "value"):
        op("MatMul", f"{source} w_{name}", f"{name}_flat")
        op("Reshape", f"{name}_flat split", f"{name}_split")
        op("Transpose", f"{name}_split", name, perm=[0, 2, 3, 1] if name == "key" else [0, 2, 1, 3])
    op("Mul", "query scale", "query_scaled")
    op("MatMul", "query_scaled key", "scores")
    op("Sub", "one valid", "invalid")
    op("Mul", "invalid far", "bias_flat")
    op("Unsqueeze", "bias_flat axis1", "bias")
    op("Add", "scores bias", "masked")
    op("Softmax", "masked", "weights", axis=-1)
    op("MatMul", "weights value", "mixed_split")
    op("Transpose", "mixed_split", "mixed_turned", perm=[0, 2, 1, 3])
    op("Reshape", "mixed_turned join", "mixed")
    op("Add", "mixed normed", "joined")
    op("Mul", "joined valid_rows", "fine")
    op("Slice", "fine from to axis1 step", "coarse")
    op("Concat", "fine coarse", "points", axis=1)
    op("MatMul", "points w_logits", "logits_half")
    op("Cast", "logits_half", "logits", to=TensorProto.FLOAT)
    op("MatMul", "points w_offsets", "offsets_flat")
    op("Relu", "offsets_flat", "offsets_positive")
    op("Cast", "offsets_positive", "offsets_wide", to=TensorProto.FLOAT)
    op("Reshape", "offsets_wide pairs", "offsets")

    first: str | int = batch or "batch"

    def value(name: str, shape: tuple[int, ...], element: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, element, [first, *shape[1:]])

    inputs = [
        value(n, s, TensorProto.BOOL if n == "mask" else TensorProto.FLOAT) for n, s in spec.input_shapes(1).items()
    ]
    outputs = [value(n, s) for n, s in spec.output_shapes(1).items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSETS[precision])])
    model.ir_version = 8
    onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


_SHAPES = {
    "split": [0, 0, HEADS, WIDTH // HEADS],
    "join": [0, 0, WIDTH],
    "pairs": [0, 0, SPEC.num_classes, 2],
    "from": [0],
    "to": [SPEC.length],
    "step": [2],
    "axis1": [1],
}


def reference(visual: np.ndarray, audio: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The network in float64."""
    p = {name: value.astype(np.float64) for name, value in weights().items()}
    batch = len(visual)
    valid = mask.astype(np.float64)
    x = visual.transpose(0, 2, 1) @ p["w_visual"] + audio.transpose(0, 2, 1) @ p["w_audio"]
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    q, k, v = (
        (x @ p[f"w_{n}"]).reshape(batch, -1, HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3)
        for n in ("query", "key", "value")
    )
    scores = q @ k.transpose(0, 1, 3, 2) * (WIDTH // HEADS) ** -0.5 + ((1 - valid) * -10000.0)[:, None]
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(batch, -1, WIDTH)
    fine = (mixed + x) * valid.transpose(0, 2, 1)
    points = np.concatenate([fine, fine[:, ::2]], 1)
    offsets = np.maximum(points @ p["w_offsets"], 0).reshape(batch, -1, SPEC.num_classes, 2)
    return (points @ p["w_logits"]).astype(np.float32), offsets.astype(np.float32)


if __name__ == "__main__":
    for name in OPSETS:
        write_onnx(Path(sys.argv[1]) / f"{name}.onnx", name)
