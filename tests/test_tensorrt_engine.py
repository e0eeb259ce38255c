"""Engines built for real with TensorRT for RTX, which needs no GPU, and what a build refuses."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.rtx_plan import RtxPlan, read_plan
from export.graph.onnx_file import graph_bytes, read_opset
from export.tensorrt.build import EngineInfo, build_engine
from export.tensorrt.options import EngineOptions
from export.tensorrt.precision import check_inspected, check_size, inspected_precisions, logged_precisions
from runtime.backends.tensorrt import cuda
from runtime.errors import BackendUnavailable, ExportError, Interrupted, MissingDependency
from runtime.schema import section_from_json

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from builders import ATTENTION_OPSETS, ATTENTION_SPEC, attention_outputs, write_attention_onnx  # noqa: E402

Build = Callable[..., EngineInfo]
ADA = ("8.9",)
OUT = "e.engine"


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build an engine of the attention network, or of `graph`, for a GPU that need not be here."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")

    def call(precision: str = "fp32", graph: Path | None = None, **options: Any) -> EngineInfo:
        if graph is None:
            graph = write_attention_onnx(tmp_path / "m.onnx", "fp32" if precision == "tf32" else precision)
        chosen: dict[str, Any] = {
            "format": "tensorrt-rtx",
            "precision": precision,
            "compute_capabilities": ADA,
            **options,
        }
        return build_engine(graph, tmp_path / OUT, EngineOptions(**chosen))

    return call


def plan_of(info: EngineInfo) -> RtxPlan:
    """Read the plan; skip where the parser does not know the plans of this release: no build depends on it."""
    try:
        return read_plan(info.path, info.library_version)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_an_engine_has_the_precision_that_was_asked_for(build: Build, precision: str) -> None:
    info = build(precision, profile=(1, 2, 4))
    graph = "fp32" if precision == "tf32" else precision
    facts = info.build
    assert info.path.read_bytes()[:4] == b"vtrt"
    assert info.path.stat().st_size == facts["engine_bytes"]
    assert facts["delivered_precisions"][graph] >= 5  # matmuls alone are that many
    assert (graph == "fp32") == (set(facts["delivered_precisions"]) == {"fp32"})
    assert (info.library, info.opset) == ("tensorrt_rtx", ATTENTION_OPSETS[graph])
    assert (info.gpu_name, info.compute_capabilities) == (None, ADA)
    model_file = info.model_file(name="engine")
    assert (model_file.files, model_file.max_batch, model_file.profile) == ((OUT,), 4, (1, 2, 4))
    assert section_from_json(EngineOptions, json.loads(json.dumps(model_file.options)), where="options") == info.options
    plan = plan_of(info)
    assert plan.matrix_kernels[graph] >= 5  # of at most 7
    assert not ({"fp16", "bf16"} - {graph}) & set(plan.tensors)
    assert plan.tf32 == (precision != "fp32")
    assert plan.capturable
    # the one attention fuses in half precision, never in fp32 (counts measured with RTX 1.7.1)
    assert plan.fused_attentions == (graph != "fp32")
    assert 8 <= plan.kernels <= 18


def test_two_builds_have_the_same_plan(build: Build) -> None:
    """Not the same bytes: one byte of the header was seen to differ between two builds of one process."""
    first, second = (plan_of(build()) for _ in range(2))
    assert first == second


def test_a_dynamic_graph_with_a_fixed_profile_gives_the_static_plan(build: Build, tmp_path: Path) -> None:
    dynamic = plan_of(build())
    static = write_attention_onnx(tmp_path / "static.onnx", "fp32", batch=1)
    assert dynamic == plan_of(build(graph=static))
    with pytest.raises(ExportError, match="fixed batch of 1, the profile asks for"):
        build(graph=static, profile=(1, 2, 4))


def test_portable_and_multiple_targets(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    portable = build(compute_capabilities=())
    assert (portable.compute_capabilities, plan_of(portable).targets) == ((), ("sm80",))
    two = build(compute_capabilities=("8.6", "12.0"))
    assert (two.compute_capabilities, plan_of(two).targets) == (("8.6", "12.0"), ("sm86", "sm120"))
    monkeypatch.setattr(cuda, "probe", lambda: cuda.Device(0, "this GPU", "8.9", 1 << 34, "13.0"))
    assert build(compute_capabilities=("8.9", "12.0", "current")).compute_capabilities == ("8.9", "12.0")
    assert build(compute_capabilities=("12.0", "current")).compute_capabilities == ("12.0", "8.9")


def test_an_interrupt_ends_the_build(build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Compiler backend is used during engine build" in record.getMessage():
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    handler, logger = Interrupt(), logging.getLogger("runtime.tensorrt")
    caplog.set_level(logging.DEBUG, logger.name)
    logger.addHandler(handler)
    try:
        with pytest.raises(Interrupted):
            build()
    finally:
        logger.removeHandler(handler)
    assert "Engine generation completed" not in caplog.text
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / OUT).exists()


def test_external_weights(build: Build, tmp_path: Path) -> None:
    path = write_attention_onnx(tmp_path / "split.onnx", "fp32", external=True)
    build(graph=path).path.unlink()
    weights = tmp_path / "split.onnx.data"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"(?s)can't read this graph.*split\.onnx\.data"):
        build(graph=path)
    weights.unlink()
    with pytest.raises(ExportError, match=r"(?s)can't read this graph.*split\.onnx\.data"):
        build(graph=path)
    assert not (tmp_path / OUT).exists()


def test_an_unsupported_operator_is_named_with_its_node(build: Build, tmp_path: Path) -> None:
    path = write_attention_onnx(tmp_path / "odd.onnx", "fp32", operator="Shrug")
    with pytest.raises(ExportError, match=r"(?s)odd\.onnx: tensorrt_rtx .*Shrug 'Shrug/middle'"):
        build(graph=path)


def test_files_that_are_no_onnx(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    with pytest.raises(ExportError, match="no such ONNX file"):
        build(graph=path)
    for content in (write_attention_onnx(tmp_path / "m.onnx", "fp32").read_bytes()[:200], b""):
        path.write_bytes(content)
        with pytest.raises(ExportError, match="not an ONNX model"):
            build(graph=path)


@pytest.mark.parametrize(
    ("precision", "graph"), [("fp16", "fp32"), ("bf16", "fp16"), ("fp32", "fp16"), ("tf32", "bf16")]
)
def test_precision_lives_in_the_graph(build: Build, tmp_path: Path, precision: str, graph: str) -> None:
    path = write_attention_onnx(tmp_path / "m.onnx", graph)
    with pytest.raises(ExportError, match=f"asked for a {precision} engine of a graph with .*--precision {precision}"):
        build(precision, graph=path)
    assert not (tmp_path / OUT).exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profile": (2, 1, 4)}, r"profile: got \(2, 1, 4\)"),
        ({"profile": (0, 1, 4)}, r"profile: got \(0, 1, 4\)"),
        ({"compute_capabilities": ("9.0",)}, r"can't build for compute capability 9\.0; it can for: .*8\.9"),
        ({"timing_cache": Path("t.cache")}, r"tensorrt_rtx 1\.\d.* does not support a timing cache"),
        ({"optimization_level": 5}, r"tensorrt_rtx 1\.\d.* does not support builder optimization levels"),
        ({"hardware_compatible": True}, "does not support hardware compatibility"),
        ({"version_compatible": True}, "does not support version compatibility"),
        ({"optimization_level": 9}, "optimization_level: got 9, expected 0 to 5"),
        ({"workspace_bytes": -1}, "workspace_bytes: got -1"),
        ({"workspace_bytes": 1000}, "built no engine"),  # the library's own words follow
        ({"format": "tensorflow"}, "format: got 'tensorflow'"),
        ({"precision": "int8"}, "precision: got 'int8'"),
    ],
)
def test_options_that_cannot_be_met(build: Build, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    graph = write_attention_onnx(tmp_path / "m.onnx", "fp32")
    with pytest.raises(ExportError, match=text):
        build(graph=graph, **options)
    assert not (tmp_path / OUT).exists()


def test_a_gpu_that_is_not_here(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> cuda.Device:
        raise BackendUnavailable("no NVIDIA driver is loaded")

    monkeypatch.setattr(cuda, "probe", probe)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        build(compute_capabilities=("current",))
    with pytest.raises((MissingDependency, BackendUnavailable)):
        build(format="tensorrt", compute_capabilities=())


@pytest.mark.parametrize(
    ("options", "opset", "text"),
    [
        ({}, 18, r"tensorrt 8\.6\.0 reads ONNX up to opset 17 .*this graph has opset 18: export it with --opset 17"),
        ({"precision": "bf16"}, 17, r"tensorrt 8\.6\.0 does not support bfloat16"),
        ({"compute_capabilities": ADA}, 17, r"does not support a build for other GPUs \(compute capabilities 8\.9"),
    ],
)
def test_what_tensorrt_8_does_not_do(options: dict[str, Any], opset: int, text: str) -> None:
    with pytest.raises(ExportError, match=text):
        EngineOptions(**options).check_supported(SimpleNamespace(__name__="tensorrt", __version__="8.6.0"), opset)


def test_opset_of_the_default_domain_only(tmp_path: Path) -> None:
    for precision, opset in ATTENTION_OPSETS.items():
        path = write_attention_onnx(tmp_path / "m.onnx", precision)
        assert read_opset(path) == opset
        model = onnx.load(str(path))
        model.opset_import.insert(0, onnx.helper.make_opsetid("com.example", 99))
        onnx.save(model, str(path))
        assert read_opset(path) == opset


def layer(name: str, **output: str) -> dict[str, Any]:
    return {"Name": name, "Outputs": [{"Name": "o", **output}]}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([layer("a", **{"Format/Datatype": "Row major linear FP16 format"}), layer("b", **{"Format/Datatype": "FP32"})],
         {"fp16": 1, "fp32": 1}),
        ([layer("a", **{"Format/Datatype": "Half"}), layer("b", Format="Linear", Datatype="BF16")],
         {"bf16": 1, "fp16": 1}),
        ([layer("{ForeignNode[a...b]}", Datatype="FP32")], None),
        ([layer("a \x1e \n b", Datatype="Half")], {"fp16": 1}),
        (["only", "names"], None),
        ([], None),
    ],
)  # fmt: skip
def test_inspector_text_of_old_and_new_releases(layers: list[Any], found: dict[str, int] | None) -> None:
    text = json.dumps({"Layers": layers, "Bindings": []})
    assert inspected_precisions(text) == found
    assert inspected_precisions(text.replace("\\u001e", "\x1e").replace("\\n", "\n")) == found  # as 8.6 was seen to
    assert inspected_precisions(text[:-1]) is None


def test_layers_that_the_builder_logs() -> None:
    line = (
        "Name: a_0, LayerType: {}, Inputs: [ {{ Name: x, Datatype: Float }}], Constants: [], Outputs: [{}], StreamId: 0"
    )
    listing = "\n".join(
        [
            "Layers:",
            line.format("shape_call", ""),
            line.format("gemm", " { Name: y, Strides: [1], Datatype: Half, Format: (Linear) }, { Datatype: Float }"),
            line.format("kgen", " { Name: y, Datatype: BFloat16 }"),
            line.format("cast", " { Name: n, Datatype: Int64 }"),
        ]
    )
    assert logged_precisions(listing) == {"bf16": 1, "fp16": 1}
    assert logged_precisions("") is None


def test_inspected_precision_is_enforced() -> None:
    check_inspected(None, "fp16")
    check_inspected({"fp16": 1, "fp32": 9}, "fp16")
    check_inspected({"fp32": 9}, "tf32")
    for delivered, precision in (({"fp32": 9}, "fp16"), ({"fp16": 1, "fp32": 9}, "fp32")):
        with pytest.raises(ExportError, match="nothing was written"):
            check_inspected(delivered, precision)  # type: ignore[arg-type]


def test_weights_in_full_are_noticed_by_their_size() -> None:
    """The full network: 468 MB in fp16, 937 MB in fp32."""
    check_size(480_000_000, 469_000_000, "fp16")
    check_size(940_000_000, 938_000_000, "tf32")
    check_size(900_000, 300_000, "fp16")
    with pytest.raises(ExportError, match=r"asked for fp16, but .* 940 MB for a fp16 graph of 469 MB.*nothing was"):
        check_size(940_000_000, 469_000_000, "fp16")


def test_size_of_a_graph_with_its_weights(tmp_path: Path) -> None:
    for name, size in (("m.onnx", 10), ("m.onnx.data", 1000), ("other.onnx.data", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    assert graph_bytes(tmp_path / "m.onnx") == 1010


def test_the_attention_network_is_what_it_says(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    draw = np.random.default_rng(0)
    shapes = ATTENTION_SPEC.input_shapes(3)
    visual, audio = (draw.standard_normal(shapes[name], dtype=np.float32) for name in ("visual", "audio"))
    lengths = np.array([ATTENTION_SPEC.length, 20, 1], np.int32)
    path = write_attention_onnx(tmp_path / "m.onnx", "fp32")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["logits", "offsets"], {"visual": visual, "audio": audio, "lengths": lengths})
    for got, want in zip(found, attention_outputs(visual, audio, lengths), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
