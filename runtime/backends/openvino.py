"""OpenVINO on the CPU behind the Backend protocol, in the precision that was asked for or not at all.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Bool, Float32
from runtime.backends.checks import check_graph, check_inputs
from runtime.errors import BackendUnavailable, BundleError, EngineError, FeatureError, MissingDependency
from runtime.spec import AUDIO, INPUT_NAMES, LOGITS, MASK, OFFSETS, VISUAL, ModelSpec

# Precision -> (OpenVINO's name of the arithmetic, capability the processor must have). An int8 graph holds its own
# quantization; what is not quantized in it runs in fp32.
PRECISIONS = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16"), "int8": ("f32", "INT8")}
# Layers of a compiled model whose precision decides what it costs and delivers.
_MATMULS = {"FullyConnected", "MatMul", "Convolution", "Deconvolution", "GroupConvolution"}

# Entries of a row that share a scale when the left side of an int8 product is quantized on the fly. Rows are quantized
# each by itself, so no video sees another one. Without this OpenVINO computes in fp32 from the int8 weights.
_INT8_GROUP = 128

# Precision -> what at least one of those layers must run in.
_EVIDENCE = {"bf16": {"bf16"}, "fp16": {"f16"}, "int8": {"i8", "u8"}}


class OpenVinoBackend:
    """An ONNX graph compiled for this processor by OpenVINO. One `infer` at a time.

    The graph is compiled for one video, and a batch is run video after video: with a free batch axis OpenVINO fuses
    less (fp32 took 12% longer at batch 1, bf16 65% longer per video at batch 8), and one video already fills the
    cores. So what a video gets can't depend on its batch. A file whose batch size is fixed runs at that size.
    """

    name = "openvino"

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
        self.precision = precision
        self.spec = spec
        self.max_batch = max_batch
        self._request = request  # None when closed
        self._compiled_for = compiled_for
        self._facts = facts

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

        `precision`: arithmetic (`fp32`, `bf16`, `fp16`; `int8` for a graph that is quantized already). `threads`:
        None leaves it to OpenVINO. `cache`: folder in which OpenVINO may keep the compiled model for the next start.

        Raises MissingDependency; BackendUnavailable when this processor has no such arithmetic or OpenVINO delivers
        another one; EngineError when the file can't be compiled; BundleError when its inputs and outputs are not
        those of `spec`.
        """
        core = check_available(precision)
        arithmetic = PRECISIONS[precision][0]
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

    def infer(self, visual: Float32, audio: Float32, mask: Bool) -> tuple[Float32, Float32]:
        """See `Backend.infer`. Raises FeatureError too for a batch that a file of fixed batch size can't take."""
        visual, audio, mask = check_inputs(visual, audio, mask, self.spec, self.max_batch)
        batch = len(visual)
        if batch == self._compiled_for:
            return self._run(visual, audio, mask)
        if self._compiled_for > 1:
            raise FeatureError(f"batch: got {batch} video(s), this ONNX file takes exactly {self._compiled_for}")
        parts = [self._run(visual[i : i + 1], audio[i : i + 1], mask[i : i + 1]) for i in range(batch)]
        logits, offsets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return logits, offsets

    def _run(self, visual: Float32, audio: Float32, mask: Bool) -> tuple[Float32, Float32]:
        """As many videos as the graph is compiled for."""
        if self._request is None:
            raise EngineError(f"{self.name}: the backend is closed")
        try:
            # Inputs are only read; outputs are copied out, because the request reuses its own buffers.
            found = self._request.infer({VISUAL: visual, AUDIO: audio, MASK: mask}, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"{self.name}: {error}") from error
        return found[LOGITS], found[OFFSETS]

    def describe(self) -> dict[str, Any]:
        """See `Backend.describe`."""
        shape = {"length": self.spec.length, "max_batch": self.max_batch}
        return {"backend": self.name, "precision": self.precision, **shape, **self._facts}

    def close(self) -> None:
        """See `Backend.close`."""
        self._request = None

    def __enter__(self) -> OpenVinoBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_available(precision: str) -> Any:
    """OpenVINO's `Core`, after checking that this processor computes in `precision` natively.

    OpenVINO emulates bfloat16 on processors without it, at a fraction of the speed of float32, and quietly replaces
    float16 by float32: neither is what was asked for. Raises MissingDependency or BackendUnavailable.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency("openvino", "openvino", "the OpenVINO backend") from error
    if precision not in PRECISIONS:
        raise BackendUnavailable(f"openvino: got precision '{precision}', expected one of {', '.join(PRECISIONS)}")
    core = _core(openvino.Core)
    present = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if PRECISIONS[precision][1] not in present:
        listed = ", ".join(sorted(present))
        raise BackendUnavailable(
            f"openvino: {core.get_property('CPU', 'FULL_DEVICE_NAME')} has no {precision} arithmetic "
            f"(OpenVINO lists {listed}); use another precision"
        )
    return core


@cache
def _core(make: Callable[[], Any]) -> Any:
    """The one `Core` of this process, never let go.

    With its last Core OpenVINO unloads the CPU plugin, which gives back the signal stack that it had set for the
    thread that loaded it. Done from another thread that leaves a dangling one, and the next signal (Ctrl-C, or a child
    process that ends) is a segmentation fault. Seen with OpenVINO 2026.4.1.
    """
    return make()


def _check_delivered(precision: str, hint: str, matmuls: dict[str, int]) -> None:
    """Raises BackendUnavailable unless the compiled model really computes in `precision`."""
    arithmetic = PRECISIONS[precision][0]
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
    """How many matrix matmuls and convolutions of the compiled model run in which precision."""
    counted: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if "layerType" in facts and facts["layerType"].astype(str) in _MATMULS:
            counted[facts["runtimePrecision"].astype(str)] += 1
    return dict(sorted(counted.items()))
