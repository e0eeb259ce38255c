"""Networks, features, model files and bundles for tests, each as small as what it shows allows.

- The oracle: a network whose output can be read off its input, in numpy, as ONNX graph, backend and bundle.
- The attention network: what an engine library can get wrong in a CCNet, as an ONNX graph and in numpy.
- Tiny CCNets with random weights.

`python tests/builders.py FOLDER` writes the attention network's graphs for machines without the onnx package, where
tests/test_gpu.py reads them from CCNET_GPU_GRAPHS. Importing this file needs neither torch nor onnx.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ccnet.config import Config, ModelConfig, TrainConfig
from runtime.backends.base import Float32, Int32, check_inputs
from runtime.bundle import MANIFEST, Bundle, Engine, FileRecord, Manifest, ModelFile, read_bundle
from runtime.features import VideoFeatures
from runtime.files import sha256_file, write_json
from runtime.spec import FeatureLayout, ModelSpec, TimeBase

if TYPE_CHECKING:
    from torch import Tensor

    from ccnet.network.model import CCNet
    from export.bundle_writer import Draft
    from export.graph.to_onnx import OnnxInfo


def golden(name: str) -> dict[str, Any]:
    """Read a golden file of tests/data: array name -> array (tests/data/README.md says what each one holds)."""
    with np.load(Path(__file__).parent / "data" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def davel_parameters(file: dict[str, Any]) -> dict[str, Tensor]:
    """Draw the parameters of a DAVEL golden file, by released name. Skip where this torch draws other numbers."""
    import pytest
    import torch

    config = json.loads(str(file["config"]))
    generator = torch.Generator().manual_seed(config["seed"])
    parameters: dict[str, Tensor] = {}
    for name, shape in json.loads(str(file["names"])):
        r = torch.randn(shape, generator=generator)
        if name.endswith("scale"):
            value = 0.5 + 0.1 * r if shape else 1 + 0.2 * r
        elif name.endswith("bias"):
            value = -2.5 + 0.3 * r if "cls_head.cls_head" in name else 0.1 * r
        elif len(shape) == 3 and shape[0] == 1:
            value = 1 + 0.1 * r
        else:
            value = r / r[0].numel() ** 0.5
        factor = {"cls_head.cls_head.conv.weight": 2.0, "reg_head.offset_head.conv.weight": 1.5}.get(name)
        parameters[name] = value if factor is None else value * factor
    sums = np.array([[p.double().sum().item(), p.double().square().sum().item()] for p in parameters.values()])
    if np.abs(sums - file["param_check"]).max() > 1e-3:
        pytest.skip("this version of torch draws other numbers than the one that the golden file was made with")
    return parameters


DAVEL_OPTIONS = [
    *("--model.length=64", "--model.levels=6", "--model.dim=32", "--model.heads=4", "--model.visual_dim=48"),
    *("--model.audio_dim=16", "--model.num_classes=7", "--model.head_dim=24", "--model.tdm_dim=128"),
]
"""The network of the DAVEL golden file, beside a preset."""

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Folder of the reference data beside a checkout."""


def shared_path(relative: str) -> Path:
    """Return a reference file beside the checkout; skip the test, saying why, where it is absent."""
    import pytest

    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference data not available: {relative}")
    return path


# The oracle. At a point p of the pyramid that lies on grid step t: logits[p, c] = visual[t, c] and
# offsets[p, c] = audio[t, 0:2]; logits are very low behind a video's end. So a test chooses the events to be found.

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


def oracle(visual: Float32, audio: Float32, lengths: Int32, spec: ModelSpec = SPEC) -> tuple[Float32, Float32]:
    """Compute the network in numpy."""
    steps = spec.grid.positions.astype(np.int64)
    low = np.where(np.arange(spec.length) < lengths[:, None], np.float32(0), np.float32(_LOW))
    logits = (visual[:, :, : spec.num_classes] + low[:, :, None])[:, steps]
    pairs = np.maximum(audio[:, steps, :2], 0)
    return logits, np.repeat(pairs[:, :, None, :], spec.num_classes, axis=2)


class OracleBackend:
    """The numpy network behind the Backend protocol. Records the batch sizes that it was asked for."""

    def __init__(self, spec: ModelSpec = SPEC, *, name: str = "fake", max_batch: int = 4) -> None:
        self.name, self.precision = name, "fp32"
        self.spec, self.max_batch = spec, max_batch
        self.batches: list[int] = []
        self.closed = 0

    def infer(self, visual: Float32, audio: Float32, lengths: Int32) -> tuple[Float32, Float32]:
        visual, audio, lengths = check_inputs(visual, audio, lengths, self.spec, self.max_batch)
        self.batches.append(len(visual))
        return oracle(visual, audio, lengths, self.spec)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "precision": self.precision}

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> OracleBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def features_with(
    steps: int, events: Sequence[tuple[int, int, int, float]] = (), spec: ModelSpec = SPEC
) -> VideoFeatures:
    """Return features in which exactly these events are found: (start, end, label, logit), in grid steps.

    An event lies on the odd step in its middle, which is a point of the finest level alone; events must not
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
    """Write the feature files of one video, as `SPEC.layout` names them."""
    np.save(folder / f"{video_id}_seen.npy", features.visual)
    np.save(folder / f"{video_id}_heard.npy", features.audio)


def write_oracle_onnx(path: Path, spec: ModelSpec = SPEC) -> None:
    """Write the same network as an ONNX graph with a dynamic batch axis."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    steps, points, classes = spec.grid.positions.astype(np.int64), spec.grid.num_points, spec.num_classes
    constants = {
        "steps": steps,
        "every_step": np.arange(spec.length, dtype=np.int32),
        "zero": np.array([0]),
        "two": np.array([2]),
        "classes": np.array([classes]),
        "step_axis": np.array([1]),
        "channel_axis": np.array([2]),
        "low": np.array(_LOW, np.float32),
        "nothing": np.array(0, np.float32),
        "column": np.array([-1, points, 1, 2]),
        "repeated": np.array([1, 1, classes, 1]),
    }
    nodes = [
        helper.make_node("Slice", ["visual", "zero", "classes", "channel_axis"], ["seen"]),
        helper.make_node("Unsqueeze", ["lengths", "step_axis"], ["ends"]),
        helper.make_node("Less", ["every_step", "ends"], ["inside"]),
        helper.make_node("Unsqueeze", ["inside", "channel_axis"], ["valid"]),
        helper.make_node("Where", ["valid", "nothing", "low"], ["added"]),
        helper.make_node("Add", ["seen", "added"], ["masked"]),
        helper.make_node("Gather", ["masked", "steps"], ["logits"], axis=1),
        helper.make_node("Slice", ["audio", "zero", "two", "channel_axis"], ["heard"]),
        helper.make_node("Relu", ["heard"], ["positive"]),
        helper.make_node("Gather", ["positive", "steps"], ["pairs"], axis=1),
        helper.make_node("Reshape", ["pairs", "column"], ["columns"]),
        helper.make_node("Tile", ["columns", "repeated"], ["offsets"]),
    ]

    def tensors(shapes: dict[str, tuple[int, ...]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name, TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT, ["batch", *shape[1:]]
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
    engine_files: Sequence[ModelFile] = (),
    engine_content: bytes = b"not really an engine",
) -> Bundle:
    """Write a bundle with one ONNX file, `onnx-fp32`, the given engines and engine files.

    Without `engines`: one verified ONNX Runtime engine. All engine files hold `engine_content`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_oracle_onnx(folder / "model.onnx", spec)
    model_files = [onnx_model_file()]
    for file in engine_files:
        (folder / file.files[0]).write_bytes(engine_content)
        model_files.append(file)
    if engines is None:
        engines = [engine("onnxruntime")]
    names = [name for model_file in model_files for name in model_file.files]
    manifest = Manifest(
        schema=2,
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


def onnx_model_file(name: str = "onnx-fp32") -> ModelFile:
    return ModelFile(
        name=name,
        format="onnx",
        files=("model.onnx",),
        precision="fp32",
        max_batch=4,
        opset=17,
    )


def tensorrt_model_file(name: str = "tensorrt-fp16") -> ModelFile:
    return ModelFile(
        name=name,
        format="tensorrt",
        files=(f"{name}.engine",),
        precision="fp16",
        max_batch=4,
        profile=(1, 1, 4),
    )


def engine(backend: str, precision: str = "fp32", *, model_file: str = "onnx-fp32", **options: Any) -> Engine:
    values = {"status": "verified", **options}
    return Engine(
        name=f"{backend}-{precision}",
        backend=backend,
        precision=precision,
        model_file=model_file,
        **values,
    )


def fill_draft(draft: Draft) -> None:
    """Put the oracle's ONNX file and one verified engine into a bundle that is being written."""
    write_oracle_onnx(draft.folder / "model.onnx")
    draft.add_model_file(onnx_model_file())
    draft.set_engine(engine("onnxruntime"), {"passed": True, "checks": []})


def edit_manifest(folder: Path, *, read: Callable[[Path], Any] = read_bundle, **changes: Any) -> None:
    """Replace fields of the manifest of a bundle, or of what `read` reads, on disk."""
    manifest = dataclasses.replace(read(folder).manifest, **changes)
    write_json(folder / manifest.FILE, manifest.to_json())


# The attention network: one masked attention, one layer normalization and the two heads. Precision lives in the graph
# as in the real one: float32 at the edges, half or bfloat16 inside.

ATTENTION_SPEC = ModelSpec(length=32, levels=2, visual_dim=24, audio_dim=8, labels=("a", "b", "c", "d", "e"))
_WIDTH, _HEADS = 64, 2
ATTENTION_OPSETS = {"fp32": 17, "fp16": 17, "bf16": 22}


def attention_weights() -> dict[str, np.ndarray]:
    """Return weights that float16 and bfloat16 hold exactly, so that all precisions compute one function."""
    draw = np.random.default_rng(7)
    classes = ATTENTION_SPEC.num_classes

    def matrix(*shape: int) -> np.ndarray:
        values: np.ndarray = np.round(draw.standard_normal(shape) * shape[0] ** -0.5 * 128) / 128
        return values.astype(np.float32)

    return {
        "w_visual": matrix(ATTENTION_SPEC.visual_dim, _WIDTH),
        "w_audio": matrix(ATTENTION_SPEC.audio_dim, _WIDTH),
        "w_query": matrix(_WIDTH, _WIDTH),
        "w_key": matrix(_WIDTH, _WIDTH),
        "w_value": matrix(_WIDTH, _WIDTH),
        "w_logits": matrix(_WIDTH, classes),
        "w_offsets": matrix(_WIDTH, 2 * classes),
    }


def write_attention_onnx(
    path: Path,
    precision: str,
    *,
    batch: int | None = None,
    operator: str | None = None,
    external: bool = False,
    spec: ModelSpec = ATTENTION_SPEC,
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

    for name, values in attention_weights().items():
        constant(name, values)
    constant("ones", np.ones(_WIDTH))
    constant("zeros", np.zeros(_WIDTH))
    constant("scale", np.array((_WIDTH // _HEADS) ** -0.5))
    constant("far", np.array(-10000.0))
    constant("one", np.array(1.0))

    initializers.append(numpy_helper.from_array(np.arange(spec.length, dtype=np.int32), "every_step"))
    op("Unsqueeze", "lengths axes12", "ends")
    op("Less", "every_step ends", "inside")
    op("Cast", "inside", "valid", to=kind)  # [B, 1, T]
    op("Transpose", "valid", "valid_rows", perm=[0, 2, 1])
    for name in ("visual", "audio"):
        op("Cast", name, f"{name}_in", to=kind)
        op("MatMul", f"{name}_in w_{name}", f"{name}_wide")
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
        value(n, s, TensorProto.INT32 if n == "lengths" else TensorProto.FLOAT) for n, s in spec.input_shapes(1).items()
    ]
    outputs = [value(n, s) for n, s in spec.output_shapes(1).items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ATTENTION_OPSETS[precision])])
    model.ir_version = 8
    onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


_SHAPES = {
    "split": [0, 0, _HEADS, _WIDTH // _HEADS],
    "join": [0, 0, _WIDTH],
    "pairs": [0, 0, ATTENTION_SPEC.num_classes, 2],
    "from": [0],
    "to": [ATTENTION_SPEC.length],
    "step": [2],
    "axis1": [1],
    "axes12": [1, 2],
}


def attention_outputs(visual: np.ndarray, audio: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the network in float64."""
    p = {name: value.astype(np.float64) for name, value in attention_weights().items()}
    batch = len(visual)
    valid = (np.arange(ATTENTION_SPEC.length) < lengths[:, None, None]).astype(np.float64)
    x = visual @ p["w_visual"] + audio @ p["w_audio"]
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    q, k, v = (
        (x @ p[f"w_{n}"]).reshape(batch, -1, _HEADS, _WIDTH // _HEADS).transpose(0, 2, 1, 3)
        for n in ("query", "key", "value")
    )
    scores = q @ k.transpose(0, 1, 3, 2) * (_WIDTH // _HEADS) ** -0.5 + ((1 - valid) * -10000.0)[:, None]
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(batch, -1, _WIDTH)
    fine = (mixed + x) * valid.transpose(0, 2, 1)
    points = np.concatenate([fine, fine[:, ::2]], 1)
    offsets = np.maximum(points @ p["w_offsets"], 0).reshape(batch, -1, ATTENTION_SPEC.num_classes, 2)
    return (points @ p["w_logits"]).astype(np.float32), offsets.astype(np.float32)


# Tiny CCNets.

TINY = ModelConfig(
    length=32, levels=4, visual_dim=12, audio_dim=6, dim=16, heads=4, num_classes=3, head_dim=10, tdm_dim=8
)
SMALLEST = Config(
    model=ModelConfig(
        length=8,
        levels=2,
        visual_dim=5,
        audio_dim=3,
        dim=8,
        heads=2,
        self_layers=1,
        num_classes=3,
        head_dim=8,
        tdm_dim=4,
    ),
    train=TrainConfig(workers=0, device="cpu"),
)
"""What a checkpoint or a training state of a few kilobytes is made of."""
SMALLEST_LABELS = ("dog", "rain", "bell")
SWITCHES: dict[str, dict[str, Any]] = {
    "all": {},
    "no_cmi": {"cmi": False},
    "no_tcg": {"tcg": False},
    "no_c2f": {"c2f": False},
    "no_f2c": {"f2c": False},
    "f2c_first": {"mtgc_order": "f2c_c2f"},
    "no_channel_branch": {"tdm_channel_branch": False},
    "no_self_attention": {"self_layers": 0},
    "one_level": {"levels": 1},
}
"""Changes of `ModelConfig`, each of one part of the network."""


def random_network(config: ModelConfig, seed: int = 0) -> CCNet:
    """Return a network whose every parameter is random and not small: no branch hides behind its initial value."""
    import torch

    from ccnet.network.model import CCNet

    torch.manual_seed(seed)
    model = CCNet(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1:
            base = 1.0 if name.endswith(("weight", "scale")) or ".scales." in name else 0.0
            torch.nn.init.normal_(parameter, base, 0.3)
    return model


def copying_exporter(graph: Path) -> Callable[..., OnnxInfo]:
    """Return what can stand for `export_onnx`: it takes no time and writes a copy of `graph`, whatever is asked for."""
    from export.graph.to_onnx import OnnxInfo

    def export_onnx(module: object, spec: object, path: Path, *, opset: int = 20, **options: object) -> OnnxInfo:
        shutil.copy(graph, path)
        return OnnxInfo(path=path, files=(path.name,), opset=opset, nodes=1, operators={}, weight_bytes=1, seconds=0.0)

    return export_onnx


@dataclass(frozen=True)
class Exported:
    """A network, and the ONNX file of its fused network."""

    network: CCNet
    spec: ModelSpec
    path: Path


def random_batch(config: ModelConfig, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return random features `[B, C, T]` of videos of these many steps, zero behind their end, and the mask."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(config.length) < torch.tensor(lengths)[:, None, None]
    visual = torch.randn(len(lengths), config.visual_dim, config.length, generator=generator) * mask
    audio = torch.randn(len(lengths), config.audio_dim, config.length, generator=generator) * mask
    return visual, audio, mask


def engine_inputs(visual: Tensor, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of a CCNet as those of an engine: visual `[B, T, Cv]`, audio `[B, T, Ca]`, lengths `[B]`."""
    return visual.transpose(1, 2).contiguous(), audio.transpose(1, 2).contiguous(), mask.sum((1, 2)).int()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for name in ATTENTION_OPSETS:
        write_attention_onnx(Path(sys.argv[1]) / f"{name}.onnx", name)
