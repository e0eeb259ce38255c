"""OpenVINO on the CPU behind the Backend protocol, in the precision that was asked for or not at all.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import BaseBackend, Float32, Int32, Outputs, check_graph
from runtime.backends.graphs import GraphRunner, check_names
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, BundleError, EngineError, FeatureError
from runtime.packages import import_package
from runtime.spec import AUDIO, INPUT_NAMES, LENGTHS, LOGITS, OFFSETS, VISUAL, GraphTensors, ModelSpec

# Precision -> (OpenVINO's name of the arithmetic, capability the processor must have). An int8 graph holds its own
# quantization; what is not quantized in it runs in fp32.
ARITHMETIC = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "int8": ("f32", "INT8")}
# Layers of a compiled model whose precision decides what it costs and delivers.
_MATMULS = {"FullyConnected", "MatMul", "Convolution", "Deconvolution", "GroupConvolution"}

# Entries of a row that share a scale when the left side of an int8 product is quantized on the fly. Rows are quantized
# each by itself, so no video sees another one. Without this OpenVINO computes in fp32 from the int8 weights.
_INT8_GROUP = 128

# Sets of input shapes that a graph stays compiled for, each with its own copy of the weights.
_COMPILED_SHAPES = 4

# Precision -> what at least one of those layers must run in.
_EVIDENCE = {"bf16": {"bf16"}, "int8": {"i8", "u8"}}


def check_engine(name: str, model_file: ModelFile, precision: str) -> None:
    """Raise MissingDependency or BackendUnavailable unless this processor computes in `precision`."""
    check_available(precision)


def open_engine(
    name: str, path: Path, model_file: ModelFile, spec: ModelSpec, precision: str, threads: int | None
) -> OpenVinoBackend:
    """Compile an ONNX file of a bundle; see `OpenVinoBackend.open`."""
    return OpenVinoBackend.open(path, spec, precision=precision, max_batch=model_file.max_batch, threads=threads)


def open_graph(
    name: str, path: Path, model_file: ModelFile, tensors: GraphTensors, precision: str, threads: int | None
) -> GraphRunner:
    """Load any ONNX file with the inputs and outputs of `tensors`, compiled for each set of shapes when it comes.

    Raises as `OpenVinoBackend.open`.
    """
    core = check_available(precision)
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": ARITHMETIC[precision][0], "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if not path.is_file():
        raise EngineError(f"{path}: no such ONNX file")
    try:
        model = core.read_model(str(path))
    except RuntimeError as error:
        raise EngineError(f"{path}: OpenVINO can't read it: {error}") from error
    check_names(path, [p.get_any_name() for p in model.inputs], [p.get_any_name() for p in model.outputs], tensors)
    requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(inputs: Mapping[str, Float32]) -> dict[str, Float32]:
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in requests:
            if len(requests) >= _COMPILED_SHAPES:
                requests.pop(next(iter(requests)))
            model.reshape({tensor: list(array.shape) for tensor, array in inputs.items()})
            compiled = core.compile_model(model, "CPU", settings)
            delivered = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            _check_delivered(precision, delivered, _matmul_precisions(compiled))
            requests[shapes] = compiled.create_infer_request()
        found = requests[shapes].infer(dict(inputs), share_inputs=True)
        return {tensor: found[tensor] for tensor in tensors.outputs}

    version = str(core.get_versions("CPU")["CPU"].build_number).split("-")[0]
    facts = {"library": "openvino", "version": version, "device": core.get_property("CPU", "FULL_DEVICE_NAME")}
    return GraphRunner(name, precision, tensors, run, facts)


def probe(name: str) -> str:
    """Return version, processor and the precisions that it computes in. Raises MissingDependency."""
    core = check_available("fp32")
    present = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    native = [precision for precision, (_, capability) in ARITHMETIC.items() if capability in present]
    version = core.get_versions("CPU")["CPU"].build_number.split("-")[0]
    return f"openvino {version}, {core.get_property('CPU', 'FULL_DEVICE_NAME')}: {', '.join(native)}"


class OpenVinoBackend(BaseBackend):
    """An ONNX graph compiled for this processor by OpenVINO. One `infer` at a time.

    The graph is compiled for one video, and a batch is run video after video: with a free batch axis OpenVINO fuses
    less (fp32 took 12% longer at batch 1, bf16 65% longer per video at batch 8), and one video already fills the
    cores. So what a video gets can't depend on its batch. A file whose batch size is fixed runs at that size.
    """

    def __init__(
        self,
        request: Any,
        spec: ModelSpec,
        *,
        precision: str,
        compiled_for: int,
        max_batch: int,
        facts: dict[str, Any],
    ) -> None:
        """Use `open`."""
        super().__init__("openvino", precision, spec, max_batch)
        self._request = request  # None when closed
        self._compiled_for = compiled_for
        self._described = facts

    @classmethod
    def open(
        cls,
        path: str | Path,
        spec: ModelSpec,
        *,
        precision: str = "fp32",
        max_batch: int = 32,
        threads: int | None = None,
        cache: str | Path | None = None,
    ) -> OpenVinoBackend:
        """Compile an ONNX file for this processor.

        `precision`: arithmetic (`fp32`, `bf16`; `int8` for a graph that is quantized already). `threads`:
        None leaves it to OpenVINO. `cache`: folder in which OpenVINO may keep the compiled model for the next start.

        Raises MissingDependency; BackendUnavailable when this processor has no such arithmetic or OpenVINO delivers
        another one; EngineError when the file can't be compiled; BundleError when its inputs and outputs are not
        those of `spec`.
        """
        core = check_available(precision)
        arithmetic = ARITHMETIC[precision][0]
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": "LATENCY"}
        if precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _INT8_GROUP
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if cache is not None:
            settings["CACHE_DIR"] = str(cache)
        if not Path(path).is_file():
            raise EngineError(f"{path}: no such ONNX file")
        try:
            model = core.read_model(str(path))
        except RuntimeError as error:
            raise EngineError(f"{path}: OpenVINO can't read it: {error}") from error
        fixed = check_graph(_dimensions(model.inputs), _dimensions(model.outputs), spec, str(path))
        if fixed not in (None, max_batch):
            raise BundleError(f"{path}: its batch size is fixed at {fixed}, the manifest says up to {max_batch}")
        compiled_for = fixed or 1
        try:
            shapes = spec.input_shapes(compiled_for)
            model.reshape({name: list(shapes[name]) for name in INPUT_NAMES})
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise EngineError(f"{path}: OpenVINO can't compile it: {error}") from error

        matmuls = _matmul_precisions(compiled)
        _check_delivered(precision, compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), matmuls)
        facts = {
            "library": "openvino",
            "version": str(core.get_versions("CPU")["CPU"].build_number).split("-")[0],
            "device": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
            "matmul_precisions": matmuls,
        }
        request = compiled.create_infer_request()
        return cls(request, spec, precision=precision, compiled_for=compiled_for, max_batch=max_batch, facts=facts)

    def _infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        batch = len(visual)
        if batch == self._compiled_for:
            return self._run(visual, audio, lengths)
        if self._compiled_for > 1:
            raise FeatureError(f"batch: got {batch} video(s), this ONNX file takes exactly {self._compiled_for}")
        parts = [self._run(visual[i : i + 1], audio[i : i + 1], lengths[i : i + 1]) for i in range(batch)]
        logits, offsets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return logits, offsets

    def _run(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        """Run as many videos as the graph is compiled for."""
        try:
            # Inputs are only read; outputs are copied out, because the request reuses its own buffers.
            found = self._request.infer({VISUAL: visual, AUDIO: audio, LENGTHS: lengths}, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"{self.name}: {error}") from error
        return found[LOGITS], found[OFFSETS]

    def _facts(self) -> dict[str, Any]:
        return self._described

    def _close(self) -> None:
        self._request = None


def check_available(precision: str) -> Any:
    """Return OpenVINO's `Core`, after checking that this processor computes in `precision` natively.

    OpenVINO emulates bfloat16 on processors without it, at a fraction of the speed of float32, and quietly replaces
    float16 by float32: neither is what was asked for. Raises MissingDependency or BackendUnavailable.
    """
    openvino = import_package("openvino", "the OpenVINO backend")
    if precision not in ARITHMETIC:
        raise BackendUnavailable(f"openvino: got precision '{precision}', expected one of {', '.join(ARITHMETIC)}")
    core = _core(openvino.Core)
    present = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if ARITHMETIC[precision][1] not in present:
        listed = ", ".join(sorted(present))
        raise BackendUnavailable(
            f"openvino: {core.get_property('CPU', 'FULL_DEVICE_NAME')} has no {precision} arithmetic "
            f"(OpenVINO lists {listed}); use another precision"
        )
    return core


@cache
def _core(make: Callable[[], Any]) -> Any:
    """Return the one `Core` of this process, never let go.

    With its last Core OpenVINO unloads the CPU plugin, which gives back the signal stack that it had set for the
    thread that loaded it. Done from another thread that leaves a dangling one, and the next signal (Ctrl-C, or a child
    process that ends) is a segmentation fault. Seen with OpenVINO 2026.4.1.
    """
    return make()


def _check_delivered(precision: str, hint: str, matmuls: dict[str, int]) -> None:
    """Raise BackendUnavailable unless the compiled model really computes in `precision`."""
    arithmetic = ARITHMETIC[precision][0]
    if hint != arithmetic:
        raise BackendUnavailable(f"openvino: asked for {precision}, OpenVINO delivers {hint} on this processor")
    if precision in _EVIDENCE and not _EVIDENCE[precision] & matmuls.keys():
        raise BackendUnavailable(f"openvino: asked for {precision}, but no product of this graph runs in it: {matmuls}")
    if precision == "fp32" and matmuls.keys() - {"f32"}:
        raise BackendUnavailable(f"openvino: asked for fp32, but this graph is typed in another precision: {matmuls}")


def _dimensions(ports: Any) -> dict[str, list[Any]]:
    return {
        port.get_any_name(): [d.get_length() if d.is_static else None for d in port.partial_shape] for port in ports
    }


def _matmul_precisions(compiled: Any) -> dict[str, int]:
    """Count the matmuls and convolutions of the compiled model by the precision they run in."""
    counted: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if "layerType" in facts and facts["layerType"].astype(str) in _MATMULS:
            counted[facts["runtimePrecision"].astype(str)] += 1
    return dict(sorted(counted.items()))
