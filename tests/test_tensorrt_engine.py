"""Engines built for real with TensorRT-RTX, which needs no GPU; the rest of the builder against its error paths."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rtx_plan import RtxPlan, read_plan
from export.graph.onnx_file import read_opset
from export.tensorrt.build import EngineInfo, build_engine
from export.tensorrt.options import EngineOptions
from export.tensorrt.precision import check_inspected, check_requested, inspected_precisions, logged_precisions
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, ExportError, Interrupted, MissingDependency
from runtime.schema import section_from_json

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from builders import ATTENTION_OPSETS, ATTENTION_SPEC, write_attention_onnx  # noqa: E402

ADA = ("8.9",)


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for precision in ATTENTION_OPSETS:
        write_attention_onnx(folder / f"{precision}.onnx", precision)
    return folder


def build(models: Path, out: Path, precision: str = "fp32", **options: Any) -> EngineInfo:
    graph = options.pop("graph", "fp32" if precision == "tf32" else precision)
    settings: dict[str, Any] = {"format": "tensorrt-rtx", "profile": (1, 2, 4), "compute_capabilities": ADA, **options}
    path = graph if isinstance(graph, Path) else models / f"{graph}.onnx"
    return build_engine(path, out / f"{precision}.engine", EngineOptions(precision=precision, **settings))  # type: ignore[arg-type]


def plan_of(info: EngineInfo) -> RtxPlan:
    """Skips where the parser does not know the plans of this release: no build depends on it."""
    try:
        return read_plan(info.path, info.library_version)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_an_engine_has_the_precision_that_was_asked_for(rtx: Any, models: Path, tmp_path: Path, precision: str) -> None:
    info = build(models, tmp_path, precision)
    graph = "fp32" if precision == "tf32" else precision
    facts = info.build
    assert info.path.read_bytes()[:4] == b"vtrt"
    assert info.path.stat().st_size == facts["engine_bytes"]
    assert facts["delivered_precisions"][graph] >= 5  # matmuls alone are that many
    assert (graph == "fp32") == (set(facts["delivered_precisions"]) == {"fp32"})
    assert facts["seconds"] > 0
    assert (info.library, info.opset, info.options.profile) == ("tensorrt_rtx", ATTENTION_OPSETS[graph], (1, 2, 4))
    assert info.library_version == rtx.__version__
    assert (info.gpu_name, info.compute_capabilities) == (None, ADA)
    plan = plan_of(info)
    assert plan.matrix_kernels[graph] >= 5  # of at most 7
    assert not ({"fp16", "bf16"} - {graph}) & set(plan.tensors)
    assert plan.tf32 == (precision == "tf32")
    assert plan.capturable
    # the one attention fuses in half precision, never in fp32 (counts measured with RTX 1.7.1)
    assert plan.fused_attentions == (graph != "fp32")
    assert 8 <= plan.kernels <= 18


def test_facts_fit_the_manifest(rtx: Any, models: Path, tmp_path: Path) -> None:
    model_file = build(models, tmp_path).model_file(name="tensorrt-rtx-fp32")
    again = section_from_json(ModelFile, json.loads(json.dumps(dataclasses.asdict(model_file))), where="model_file")
    assert (again.files, again.max_batch, again.profile) == (("fp32.engine",), 4, (1, 2, 4))


def test_two_builds_have_the_same_plan(rtx: Any, models: Path, tmp_path: Path) -> None:
    """Not the same bytes: one byte of the header was seen to differ between two builds of one process."""
    first, second = (plan_of(build(models, tmp_path)) for _ in range(2))
    assert first == second


def test_portable_and_multiple_targets(rtx: Any, models: Path, tmp_path: Path) -> None:
    portable = build(models, tmp_path, compute_capabilities=())
    assert (portable.compute_capabilities, plan_of(portable).targets) == ((), ("sm80",))
    two = build(models, tmp_path, compute_capabilities=("8.6", "12.0"))
    assert (two.compute_capabilities, plan_of(two).targets) == (("8.6", "12.0"), ("sm86", "sm120"))


def test_a_dynamic_graph_with_a_fixed_profile_gives_the_static_plan(rtx: Any, models: Path, tmp_path: Path) -> None:
    dynamic = plan_of(build(models, tmp_path, profile=(1, 1, 1)))
    static = build(
        models, tmp_path, graph=write_attention_onnx(tmp_path / "static.onnx", "fp32", batch=1), profile=(1, 1, 1)
    )
    assert dynamic == plan_of(static)


def test_an_interrupt_ends_the_build(rtx: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Compiler backend is used during engine build" in record.getMessage():
                signal.raise_signal(signal.SIGINT)

    handler = Interrupt()
    logger = logging.getLogger("runtime.tensorrt")
    caplog.set_level(logging.DEBUG, logger.name)
    logger.addHandler(handler)
    try:
        with pytest.raises(Interrupted):
            build(models, tmp_path)
    finally:
        logger.removeHandler(handler)
    assert "Engine generation completed" not in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not list(tmp_path.iterdir())


def test_external_weights(rtx: Any, models: Path, tmp_path: Path) -> None:
    path = write_attention_onnx(tmp_path / "split.onnx", "fp32", external=True)
    build(models, tmp_path, graph=path)
    (tmp_path / "fp32.engine").unlink()
    weights = tmp_path / "split.onnx.data"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"(?s)can't read this graph.*split\.onnx\.data"):
        build(models, tmp_path, graph=path)
    weights.unlink()
    with pytest.raises(ExportError, match=r"(?s)can't read this graph.*split\.onnx\.data"):
        build(models, tmp_path, graph=path)
    assert not (tmp_path / "fp32.engine").exists()


def test_an_unsupported_operator_is_named_with_its_node(rtx: Any, models: Path, tmp_path: Path) -> None:
    path = write_attention_onnx(tmp_path / "odd.onnx", "fp32", operator="Shrug")
    with pytest.raises(ExportError, match=r"(?s)odd\.onnx: tensorrt_rtx .*Shrug 'Shrug/middle'"):
        build(models, tmp_path, graph=path)


def test_files_that_are_no_onnx(rtx: Any, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    with pytest.raises(ExportError, match="no such ONNX file"):
        build(models, tmp_path, graph=path)
    path.write_bytes((models / "fp32.onnx").read_bytes()[:200])
    with pytest.raises(ExportError, match="not an ONNX model"):
        build(models, tmp_path, graph=path)
    path.write_bytes(b"")
    with pytest.raises(ExportError, match="not an ONNX model"):
        build(models, tmp_path, graph=path)


@pytest.mark.parametrize(("precision", "graph"), [("fp16", "fp32"), ("bf16", "fp16"), ("fp32", "fp16")])
def test_precision_lives_in_the_graph(rtx: Any, models: Path, tmp_path: Path, precision: str, graph: str) -> None:
    with pytest.raises(ExportError, match=f"asked for a {precision} engine of a graph with .*--precision {precision}"):
        build(models, tmp_path, precision, graph=graph)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profile": (2, 1, 4)}, r"profile: got \(2, 1, 4\)"),
        ({"profile": (0, 1, 4)}, r"profile: got \(0, 1, 4\)"),
        ({"compute_capabilities": ("9.0",)}, r"can't build for compute capability 9\.0; it can for: .*8\.9"),
        ({"timing_cache": Path("t.cache")}, r"tensorrt_rtx 1\.7.* does not support a timing cache"),
        ({"optimization_level": 5}, r"tensorrt_rtx 1\.7.* does not support builder optimization levels"),
        ({"hardware_compatible": True}, "does not support hardware compatibility"),
        ({"version_compatible": True}, "does not support version compatibility"),
        ({"optimization_level": 9}, "optimization_level: got 9, expected 0 to 5"),
        ({"workspace_bytes": -1}, "workspace_bytes: got -1"),
        ({"format": "tensorflow"}, "format: got 'tensorflow'"),
        ({"precision": "int8"}, "precision: got 'int8'"),
    ],
)
def test_requests_that_cannot_be_met(
    rtx: Any, models: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    settings = {"format": "tensorrt-rtx", "precision": "fp32", "profile": (1, 1, 1), "compute_capabilities": ADA}
    with pytest.raises(ExportError, match=text):
        build_engine(models / "fp32.onnx", tmp_path / "e.engine", EngineOptions(**(settings | options)))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_static_graph_and_another_profile(rtx: Any, models: Path, tmp_path: Path) -> None:
    path = write_attention_onnx(tmp_path / "static.onnx", "fp32", batch=2)
    with pytest.raises(ExportError, match="fixed batch of 2, the profile asks for"):
        build(models, tmp_path, graph=path, profile=(1, 2, 4))


def test_too_little_memory_is_the_librarys_own_words(rtx: Any, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="built no engine"):
        build(models, tmp_path, workspace_bytes=1000)
    assert not list(tmp_path.iterdir())


def test_full_tensorrt_needs_the_library_and_a_gpu(models: Path, tmp_path: Path) -> None:
    with pytest.raises((MissingDependency, BackendUnavailable)):
        build_engine(models / "fp32.onnx", tmp_path / "e", EngineOptions())


def test_current_gpu_without_one(rtx: Any, models: Path, tmp_path: Path) -> None:
    from runtime.backends.tensorrt import cuda

    try:
        cuda.probe()
    except BackendUnavailable as error:
        with pytest.raises(BackendUnavailable, match=str(error)[:20]):
            build(models, tmp_path, compute_capabilities=("current",))
    else:
        pytest.skip("a GPU is there")


def test_the_current_gpu_may_be_listed_too(
    rtx: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.backends.tensorrt import cuda

    monkeypatch.setattr(cuda, "probe", lambda: Named(name="this GPU", compute_capability="8.9"))
    info = build(models, tmp_path, compute_capabilities=("8.9", "12.0", "current"))
    assert info.compute_capabilities == ("8.9", "12.0")
    info = build(models, tmp_path, compute_capabilities=("12.0", "current"))
    assert info.compute_capabilities == ("12.0", "8.9")


class Named:
    """Attributes by name: enough of a library for `check_supported`."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


TENSORRT_8 = Named(
    __name__="tensorrt",
    __version__="8.6.0",
    DataType=Named(HALF=1),
    BuilderFlag=Named(FP16=1, VERSION_COMPATIBLE=2),
    HardwareCompatibilityLevel=Named(AMPERE_PLUS=1),
)


@pytest.mark.parametrize(
    ("options", "opset", "text"),
    [
        ({}, 18, r"tensorrt 8\.6\.0 reads ONNX up to opset 17 .*this graph has opset 18: export it with --opset 17"),
        ({"precision": "bf16"}, 17, r"tensorrt 8\.6\.0 does not support bfloat16"),
        (
            {"compute_capabilities": ("8.9",)},
            17,
            r"does not support a build for other GPUs \(compute capabilities 8\.9",
        ),
    ],
)
def test_what_tensorrt_8_does_not_do(options: dict[str, Any], opset: int, text: str) -> None:
    settings: dict[str, Any] = {"format": "tensorrt", "precision": "fp16", "profile": (1, 1, 1), **options}
    with pytest.raises(ExportError, match=text):
        EngineOptions(**settings).check_supported(TENSORRT_8, opset)


def test_what_tensorrt_8_does() -> None:
    EngineOptions(
        format="tensorrt", precision="fp16", profile=(1, 4, 8), optimization_level=4, timing_cache=Path("t"),
        hardware_compatible=True, version_compatible=True,
    ).check_supported(TENSORRT_8, 17)  # fmt: skip


def test_opset_is_read_like_onnx_reads_it(models: Path) -> None:
    for precision, opset in ATTENTION_OPSETS.items():
        assert read_opset(models / f"{precision}.onnx") == opset


def test_opset_of_the_default_domain_only(tmp_path: Path) -> None:
    model = onnx.load(str(write_attention_onnx(tmp_path / "m.onnx", "fp32")))
    model.opset_import.insert(0, onnx.helper.make_opsetid("com.example", 99))
    onnx.save(model, str(tmp_path / "m.onnx"))
    assert read_opset(tmp_path / "m.onnx") == ATTENTION_OPSETS["fp32"]


def test_requested_types() -> None:
    check_requested({"fp16": 5, "fp32": 3}, "fp16", "m.onnx")
    check_requested({"fp32": 3}, "tf32", "m.onnx")
    with pytest.raises(ExportError, match="5 layers fp16, 3 layers fp32"):
        check_requested({"fp16": 5, "fp32": 3}, "tf32", "m.onnx")


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
        (["only", "names"], None),
        ([], None),
    ],
)  # fmt: skip
def test_inspector_text_of_old_and_new_releases(layers: list[Any], found: dict[str, int] | None) -> None:
    assert inspected_precisions(json.dumps({"Layers": layers, "Bindings": []})) == found


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


def test_the_small_network_is_what_it_says(models: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from builders import attention_outputs

    draw = np.random.default_rng(0)
    shapes = ATTENTION_SPEC.input_shapes(3)
    visual, audio = (draw.standard_normal(shapes[name], dtype=np.float32) for name in ("visual", "audio"))
    mask = np.arange(ATTENTION_SPEC.length)[None, None] < np.array([ATTENTION_SPEC.length, 20, 1])[:, None, None]
    session = ort.InferenceSession(str(models / "fp32.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(["logits", "offsets"], {"visual": visual, "audio": audio, "mask": mask})
    for got, want in zip(found, attention_outputs(visual, audio, mask), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow  # the export
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_real_network_at_a_tiny_size(rtx: Any, tmp_path: Path, precision: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.networks import benchmark_config, labels, random_network
    from export.fused.network import fused_network
    from export.graph.to_onnx import export_onnx

    config = benchmark_config("tiny")
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    network = fused_network(random_network(config), dtype=types[precision])
    opset = 22 if precision == "bf16" else 17
    path = tmp_path / "model.onnx"
    export_onnx(network, config.spec(labels(config)), path, opset=opset, max_batch=4)
    facts = build(tmp_path, tmp_path, precision, graph=path).build
    assert facts["delivered_precisions"][precision] >= 20
    # statistics, exponentials and the last layers stay in full precision
    assert facts["requested_precisions"]["fp32"] > 0
