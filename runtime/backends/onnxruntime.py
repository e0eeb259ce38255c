"""ONNX Runtime behind the Backend protocol: the CPU provider, and the CUDA provider where it is really there.

Shapes: see `runtime.spec.ModelSpec` (B batch, T steps, P points, C classes).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtime.backends.base import BaseBackend, Float32, Int32, Outputs, check_graph
from runtime.backends.graphs import GraphRunner, check_names
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable, BundleError, EngineError
from runtime.packages import import_package
from runtime.profiling.timing import Rules, measure
from runtime.spec import AUDIO, INPUT_TYPES, LENGTHS, LOGITS, OFFSETS, OUTPUT_NAMES, VISUAL, GraphTensors, ModelSpec

Device = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DEVICES: dict[str, Device] = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
_DISTRIBUTIONS = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}

# What ONNX Runtime says when it keeps some nodes of a CUDA session on the CPU and was told not to.
_CPU_NODES = "assigned to the default CPU EP"

_CUDA_LIBRARIES = "pip install 'ccnet[gpu]' brings the libraries that it needs, 'ccnet doctor' says what is there"

# Fused nodes go to the end of the order in which a CPU session runs. These two fuse parts of every attention and MLP:
# both groups of the largest stage were half computed before either was finished, 90 MB more at full size, no faster.
_MEMORY_HUNGRY_FUSIONS = ["MatmulTransposeFusion", "BiasGeluFusion"]


def check_engine(name: str, model_file: ModelFile, precision: str) -> None:
    """Raise MissingDependency or BackendUnavailable unless the library and its provider are here."""
    load_library(_DEVICES[name])


def open_engine(
    name: str, path: Path, model_file: ModelFile, spec: ModelSpec, precision: str, threads: int | None
) -> OnnxRuntimeBackend:
    """Load an ONNX file of a bundle; see `OnnxRuntimeBackend.open`."""
    return OnnxRuntimeBackend.open(
        path, spec, device=_DEVICES[name], precision=precision, max_batch=model_file.max_batch, threads=threads
    )


def open_graph(
    name: str, path: Path, model_file: ModelFile, tensors: GraphTensors, precision: str, threads: int | None
) -> GraphRunner:
    """Load any ONNX file with the inputs and outputs of `tensors`. Raises as `OnnxRuntimeBackend.open`."""
    device = _DEVICES[name]
    onnxruntime = load_library(device)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if device == "cuda":
        chosen = {"use_tf32": "1" if precision != "fp32" else "0"}
        session, _ = _cuda_session(onnxruntime, path, options, chosen)
    else:
        session = _session(onnxruntime, path, options, [_PROVIDERS["cpu"]])
    found = [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
    check_names(path, *found, tensors)

    def run(inputs: Mapping[str, Float32]) -> dict[str, Float32]:
        return dict(zip(found[1], session.run(found[1], dict(inputs)), strict=True))

    facts = {"library": "onnxruntime", "version": onnxruntime.__version__, "threads": threads or "library default"}
    return GraphRunner(name, precision, tensors, run, facts)


def probe(name: str) -> str:
    """Return the library and the device of a backend. Raises MissingDependency or BackendUnavailable."""
    library = load_library(_DEVICES[name])
    if name == "onnxruntime":
        telemetry = "off" if os.environ["ORT_DISABLE_TELEMETRY"] == "1" else "as ORT_DISABLE_TELEMETRY says"
        return f"onnxruntime {library.__version__}, telemetry {telemetry}"
    from runtime.backends.tensorrt import cuda

    gpu = cuda.probe().name
    return f"onnxruntime {library.__version__} with the CUDA provider, {gpu} (a session may still lack cuDNN)"


class OnnxRuntimeBackend(BaseBackend):
    """An ONNX graph in an ONNX Runtime session. One `infer` at a time."""

    def __init__(
        self, session: Any, spec: ModelSpec, *, device: Device, precision: str, max_batch: int, facts: dict[str, Any]
    ) -> None:
        """Use `open`."""
        super().__init__("onnxruntime" if device == "cpu" else "onnxruntime-cuda", precision, spec, max_batch)
        self._device = device
        self._session: Any = session
        self._described = facts
        self._bindings: dict[int, _CudaBinding] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        spec: ModelSpec,
        *,
        device: Device = "cpu",
        precision: str = "fp32",
        max_batch: int = 32,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> OnnxRuntimeBackend:
        """Load an ONNX file. `threads`: CPU threads of one operator; None leaves it to ONNX Runtime. `cuda_graph`: let
        the CUDA provider capture each batch size.

        `precision` is what the graph was typed with; for `cuda`, `tf32` runs an fp32 graph with TF32 matmuls, as the
        fp32 layers of a half graph, and `fp32` without. Raises MissingDependency; BackendUnavailable when the CUDA
        provider is asked for and not taken with its options (never a silent run on the CPU); EngineError when the file
        can't be loaded; BundleError when its inputs and outputs are not those of `spec`.
        """
        onnxruntime = load_library(device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Planning memory from the first run's shapes takes 20% more of it at full size and saves no time to speak of.
        options.enable_mem_pattern = False
        # The order in the file holds fewer results at a time than the default one.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if threads is not None:
            options.intra_op_num_threads = threads
        if device == "cuda":
            chosen = {"use_tf32": "1" if precision != "fp32" else "0"}
            if cuda_graph:
                chosen["enable_cuda_graph"] = "1"
            session, cpu_nodes = _cuda_session(onnxruntime, Path(path), options, chosen)
        else:
            # Reuse is planned ahead over a symbolic batch and keeps buffers long: without it 160 MB less, as fast.
            options.enable_mem_reuse = False
            providers, left_out = [_PROVIDERS["cpu"]], _MEMORY_HUNGRY_FUSIONS
            session = _session(onnxruntime, Path(path), options, providers, disabled_optimizers=left_out)
            cpu_nodes = False
        fixed = check_graph(
            {tensor.name: tensor.shape for tensor in session.get_inputs()},
            {tensor.name: tensor.shape for tensor in session.get_outputs()},
            spec,
            str(path),
        )
        if fixed not in (None, max_batch):
            raise BundleError(f"{path}: its batch size is fixed at {fixed}, the manifest says up to {max_batch}")
        facts = {
            "library": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": session.get_providers()[0],
            "threads": threads or "library default",
        }
        if cuda_graph:
            facts["cuda_graph"] = True
        if cpu_nodes:
            facts["note"] = "ONNX Runtime keeps some small nodes of this graph on the CPU"
        return cls(session, spec, device=device, precision=precision, max_batch=max_batch, facts=facts)

    def _infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        feeds = {VISUAL: visual, AUDIO: audio, LENGTHS: lengths}
        try:
            if self._device == "cuda":
                return self._infer_cuda(feeds, len(visual))
            logits, offsets = self._session.run(OUTPUT_NAMES, feeds)
        except Exception as error:
            raise EngineError(f"{self.name}: {error}") from error
        return logits, offsets

    def engine_milliseconds(
        self, batch: int, repeats: int = 1000, *, warmup_seconds: float = 0.3
    ) -> npt.NDArray[np.float64]:
        """Return [repeats] times of runs whose inputs and outputs stay on the device, by the clock of the host.

        ONNX Runtime tells no device time: its own work on the host is in these. On a CPU they are those of `infer`.
        """
        shapes = self.spec.input_shapes(batch)
        feeds = {name: np.zeros(shape, INPUT_TYPES[name]) for name, shape in shapes.items()}
        feeds[LENGTHS][:] = self.spec.length
        self.infer(feeds[VISUAL], feeds[AUDIO], feeds[LENGTHS])

        def run() -> None:
            if self._device == "cuda":
                self._bindings[batch].run_on_device(self._session)
            else:
                self._session.run(OUTPUT_NAMES, feeds)

        rules = Rules(warmup_seconds=warmup_seconds, seconds=0, calls=repeats)
        return measure(run, rules).seconds * 1e3

    def _facts(self) -> dict[str, Any]:
        return {"device": self._device, **self._described}

    def _close(self) -> None:
        self._bindings.clear()
        self._session = None

    def _infer_cuda(self, feeds: dict[str, Any], batch: int) -> Outputs:
        if batch not in self._bindings:
            self._bindings[batch] = _CudaBinding(self._session, self.spec, batch)
        return self._bindings[batch].run(self._session, feeds)


class _CudaBinding:
    """Device buffers of one batch size, allocated once, so that a run copies each tensor exactly once."""

    def __init__(self, session: Any, spec: ModelSpec, batch: int) -> None:
        import onnxruntime

        def allocate(shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)

        self._inputs = {name: allocate(shape, INPUT_TYPES[name]) for name, shape in spec.input_shapes(batch).items()}
        self._outputs = {name: allocate(shape, np.float32) for name, shape in spec.output_shapes(batch).items()}
        # of the graph that the session captures, where it does
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(batch))
        self._io = session.io_binding()
        for name, value in self._inputs.items():
            self._io.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._io.bind_ortvalue_output(name, value)

    def run(self, session: Any, feeds: dict[str, Any]) -> Outputs:
        for name, array in feeds.items():
            self._inputs[name].update_inplace(array)
        self._io.synchronize_inputs()
        self.run_on_device(session)
        return self._outputs[LOGITS].numpy(), self._outputs[OFFSETS].numpy()

    def run_on_device(self, session: Any) -> None:
        """Run what is on the device and wait for it."""
        session.run_with_iobinding(self._io, self._options)
        self._io.synchronize_outputs()


def load_library(device: Device) -> Any:
    """Import ONNX Runtime, its telemetry off unless ORT_DISABLE_TELEMETRY is set.

    Raises MissingDependency, or BackendUnavailable when it has no provider for `device`.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import: it calls home and writes into $HOME
    purpose = f"the ONNX Runtime backend ({device})"
    onnxruntime = import_package("onnxruntime", purpose, distribution=_DISTRIBUTIONS[device])
    if _PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise BackendUnavailable(
            f"onnxruntime {onnxruntime.__version__} was built without the CUDA provider: "
            "pip uninstall onnxruntime, then pip install 'ccnet[gpu]'"
        )
    return onnxruntime


def _session(onnxruntime: Any, path: Path, options: Any, providers: list[Any], **settings: Any) -> Any:
    if not path.is_file():
        raise EngineError(f"{path}: no such ONNX file")
    try:
        # without its own fallback, which tries again with the CPU and without the options of the provider
        return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0, **settings)
    except Exception as error:
        raise EngineError(f"{path}: ONNX Runtime {onnxruntime.__version__} can't load it: {error}") from error


def _cuda_session(onnxruntime: Any, path: Path, options: Any, chosen: dict[str, str]) -> tuple[Any, bool]:
    """Open a session on the CUDA provider; say whether some nodes stay on the CPU.

    ONNX Runtime falls back to the CPU with nothing but a log line when a CUDA library or the GPU is missing, so
    first the fallback is switched off, and in the end the session is asked what it took.
    """
    cuda = _PROVIDERS["cuda"]
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            onnxruntime.preload_dlls()
    provider = (cuda, chosen)
    cpu_nodes = False
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _session(onnxruntime, path, options, [provider])
    except EngineError as error:
        # A working CUDA session may still keep shape arithmetic on the CPU; anything else is a real failure.
        if _CPU_NODES not in str(error):
            raise BackendUnavailable(
                f"the CUDA provider of ONNX Runtime did not start: {error}; {_CUDA_LIBRARIES}"
            ) from error
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        session = _session(onnxruntime, path, options, [provider])
        cpu_nodes = True
    if session.get_providers()[0] != cuda:
        raise BackendUnavailable(
            f"ONNX Runtime took {session.get_providers()} instead of {cuda}: no GPU, no driver, or a CUDA library is "
            f"missing; {_CUDA_LIBRARIES}"
        )
    taken = session.get_provider_options().get(cuda, {})
    if any(taken.get(name) != value for name, value in chosen.items()):
        raise BackendUnavailable(f"ONNX Runtime started {cuda} with the options {taken}, expected {chosen}")
    return session, cpu_nodes
