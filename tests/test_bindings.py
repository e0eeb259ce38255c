"""Names and signatures that are used of TensorRT and CUDA, against the real Python bindings of many releases.

The bindings are small wheels without the library behind them: they load over a stand-in that has its symbols and
nothing else, in a process of their own. What can't be downloaded is skipped. The source says what is looked for.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pytest
from native_stand_ins import stand_in

from runtime.backends.tensorrt.cuda import probe
from runtime.backends.tensorrt.library import start
from runtime.backends.tensorrt.rtx import REFUSALS
from runtime.errors import BackendUnavailable

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("runtime/backends/tensorrt", "export/tensorrt")

BINDINGS = {
    "8.6.1": "tensorrt_bindings",
    "10.0.1": "tensorrt_cu12_bindings",
    "10.9.0.34": "tensorrt_cu12_bindings",
    "10.16.1.11": "tensorrt_cu12_bindings",
    "11.0.0.114": "tensorrt_cu13_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}
"""Release -> wheel."""
PYTHON = {"8.6.1": (3, 10)}
"""The only Python that a wheel of the release is taken for here; of the others there is one for every Python."""

RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics",
    "EngineValidity.INVALID",
}
OF_8 = {
    "BuilderFlag.FP16",
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
    "BuilderFlag.PREFER_PRECISION_CONSTRAINTS",
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "TacticSource",
}
"""Asked for by the branches of TensorRT 8.6 alone; later releases drop them one by one."""
SINCE_10 = {"ExecutionContextAllocationStrategy.USER_MANAGED", "IProgressMonitor"}
GUARDED = {"TilingOptimizationLevel", "nptype"}
"""Named in a comment, or asked for with `hasattr`."""

METHODS: dict[str, dict[str, int]] = {
    "Runtime": {"deserialize_cuda_engine": 1},
    "ICudaEngine": {
        "get_tensor_name": 1, "get_tensor_mode": 1, "get_tensor_shape": 1, "get_tensor_dtype": 1,
        "create_engine_inspector": 0,
    },
    "IExecutionContext": {
        "set_input_shape": 2, "infer_shapes": 0, "get_tensor_shape": 1, "set_tensor_address": 2, "execute_async_v3": 1,
        "report_to_profiler": 0,
    },
    "EngineInspector": {"get_engine_information": 1},
    "Builder": {
        "create_network": 1, "create_builder_config": 0, "create_optimization_profile": 0,
        "build_serialized_network": 2,
    },
    "OnnxParser": {"parse_from_file": 1, "get_error": 1},
    "ParserError": {"node": 0, "desc": 0, "code": 0},
    "INetworkDefinition": {"get_input": 1, "get_layer": 1},
    "ILayer": {"get_output": 1},
    "IOptimizationProfile": {"set_shape": 4},
    "IBuilderConfig": {
        "set_flag": 1, "clear_flag": 1, "set_memory_pool_limit": 2, "add_optimization_profile": 1,
        "create_timing_cache": 1, "set_timing_cache": 2, "get_timing_cache": 0,
    },
    "ITimingCache": {"serialize": 0},
}  # fmt: skip
"""Class -> method -> arguments that it is called with."""
PROPERTIES: dict[str, tuple[str, ...]] = {
    "Runtime": ("engine_host_code_allowed",),
    "ICudaEngine": ("num_io_tensors", "num_layers"),
    "IExecutionContext": ("profiler", "enqueue_emits_profile"),
    "OnnxParser": ("num_errors",),
    "INetworkDefinition": ("num_inputs", "num_layers"),
    "IBuilderConfig": (
        "profiling_verbosity",
        "builder_optimization_level",
        "hardware_compatibility_level",
        "avg_timing_iterations",
    ),
    "IHostMemory": ("nbytes",),
}
SINCE_10_METHODS: dict[str, dict[str, int]] = {"ICudaEngine": {"create_execution_context": 1}}
NEWER: dict[str, dict[str, int]] = {
    "IExecutionContext": {"set_device_memory": 2, "update_device_memory_size_for_shapes": 0},
    "ParserError": {"node_name": 0, "node_operator": 0},
}
"""From 10.9 on; before, `legacy` does without, or the branch of 8.6."""
OF_8_METHODS: dict[str, dict[str, int]] = {
    "ICudaEngine": {"create_execution_context_without_device_memory": 0},
    "IBuilderConfig": {"get_tactic_sources": 0, "set_tactic_sources": 1},
    "ILayer": {"set_output_type": 2, "get_input": 1},
}
RTX_METHODS: dict[str, dict[str, int]] = {
    "Runtime": {"get_engine_validity": 1},
    "ICudaEngine": {"create_runtime_config": 0},
    "IBuilderConfig": {"set_compute_capability": 2},
    "IRuntimeConfig": {
        "set_execution_context_allocation_strategy": 1, "create_runtime_cache": 0, "set_runtime_cache": 1,
    },
    "IRuntimeCache": {"serialize": 0, "deserialize": 1},
}  # fmt: skip

STREAM, EVENT, GRAPH, EXECUTABLE = (
    f"runtime.{name}(0)" for name in ("cudaStream_t", "cudaEvent_t", "cudaGraph_t", "cudaGraphExec_t")
)
COPY = "runtime.cudaMemcpyKind.cudaMemcpyHostToDevice"
FLAGS = "runtime.cudaStreamNonBlocking"
CALLS_OF_CUDA: dict[str, list[str]] = {
    "cudaDeviceGetStreamPriorityRange": [],
    "cudaDriverGetVersion": [],
    "cudaEventCreateWithFlags": ["0"],
    "cudaEventDestroy": [EVENT],
    "cudaEventElapsedTime": [EVENT, EVENT],
    "cudaEventRecord": [EVENT, STREAM],
    "cudaEventSynchronize": [EVENT],
    "cudaFree": ["0"],
    "cudaFreeHost": ["0"],
    "cudaGetDeviceProperties": ["0"],
    "cudaGraphDestroy": [GRAPH],
    "cudaGraphExecDestroy": [EXECUTABLE],
    "cudaGraphInstantiate": [GRAPH, "0"],
    "cudaGraphLaunch": [EXECUTABLE, STREAM],
    "cudaGraphUpload": [EXECUTABLE, STREAM],
    "cudaHostAlloc": ["1", "0"],
    "cudaHostRegister": ["0", "0", "runtime.cudaHostRegisterPortable"],
    "cudaHostUnregister": ["0"],
    "cudaMalloc": ["1"],
    "cudaMemGetInfo": [],
    "cudaMemcpyAsync": ["0", "0", "0", COPY, STREAM],
    "cudaMemset2DAsync": ["0", "4", "1", "1", "0", STREAM],
    "cudaMemsetAsync": ["0", "0", "0", STREAM],
    "cudaSetDevice": ["0"],
    "cudaStreamBeginCapture": [STREAM, "runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal"],
    "cudaStreamCreateWithFlags": [FLAGS],
    "cudaStreamCreateWithPriority": [FLAGS, "-1"],
    "cudaStreamDestroy": [STREAM],
    "cudaStreamEndCapture": [STREAM],
    "cudaStreamSynchronize": [STREAM],
}
"""Call -> arguments of the types that the source gives, of nothing: null pointers and handles."""

INSPECT = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for name in json.loads(sys.argv[2]):
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    found[name] = None if value is None else str(getattr(value, "__doc__", "") or "")
print(json.dumps(found))
"""


def sources() -> Iterator[ast.AST]:
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def names_of_the_library() -> set[str]:
    """Return what the source takes from `trt`, dotted as far as it goes in one expression."""
    found = set()
    for node in sources():
        parts: list[str] = []
        while isinstance(node, ast.Attribute) and node.attr != "trt":
            parts.insert(0, node.attr)
            node = node.value
        rooted = "trt" in (getattr(node, "id", ""), getattr(node, "attr", ""))
        if rooted and parts and not parts[-1].startswith("__"):
            found.add(".".join(part for part in parts if part not in ("__members__", "items", "__init__")))
    found |= {"Builder", "Runtime"}  # by `library.start`
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)} - GUARDED


def calls_of_cuda() -> dict[str, set[int]]:
    """Return the CUDA calls of the source, each with the numbers of arguments that it is given."""
    found: dict[str, set[int]] = defaultdict(set)
    for node in sources():
        if isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called == "call" and isinstance(first, ast.Constant) and str(first.value).startswith("cuda"):
                found[str(first.value)].add(len(node.args) - 1)
    return found


def wheel(package: str, version: str, folder: Path, python: tuple[int, ...] = sys.version_info[:2]) -> Path:
    """Return the unpacked wheel; skip where it can't be had."""
    target = folder / f"{package}-{version}-{'.'.join(map(str, python))}"
    if (folder / "offline").exists() and not target.is_dir():
        pytest.skip("wheels can't be downloaded here")
    if not target.is_dir():
        download = folder / "download" / target.name
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--retries=0",
        ]
        command += ["--timeout=10", "--python-version", ".".join(map(str, python)), "--dest", str(download)]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True, check=False)
        files = list(download.glob("*.whl"))
        if not files:
            if "No matching distribution" not in done.stderr:
                (folder / "offline").touch()  # asks once in a run
            pytest.skip(f"{package} {version} can't be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        partial = target.with_name(f"{target.name}.partial.{os.getpid()}")
        zipfile.ZipFile(files[0]).extractall(partial)
        partial.rename(target)
    return target


@pytest.fixture(scope="session")
def wheels(pytestconfig: pytest.Config) -> Path:
    """A folder that later runs find again; only that nothing could be downloaded is forgotten."""
    cache = pytestconfig.cache
    assert cache is not None
    folder = cache.mkdir("wheels")
    (folder / "offline").unlink(missing_ok=True)
    return folder


def inspect(module: str, names: set[str], python: str = sys.executable, **environment: str) -> dict[str, str | None]:
    """Return the docstring of each name in a module, None where it is missing."""
    command = [python, "-c", INSPECT, module, json.dumps(sorted(names))]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def takes(documented: str, count: int) -> bool:
    """Return whether one of the signatures in a docstring takes so many positional arguments."""
    for arguments in re.findall(r"\w+\((.*?)\)(?: ->|$|\n)", documented):
        depth, parts = 0, [""]
        for character in arguments:
            depth += (character in "[({") - (character in "])}")
            if character == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += character
        parts = [p.strip() for p in parts if p.strip() and not p.strip().startswith("self")]
        required = [p for p in parts if "=" not in p and not p.startswith("*")]
        if len(required) <= count <= len(parts) or any(p.startswith("*") for p in parts):
            return True
    return False


def check(found: dict[str, str | None], names: set[str], tables: list[dict[str, dict[str, int]]]) -> None:
    missing = {name for name in names if found[name] is None}
    wrong = []
    for table in tables:
        for owner, methods in table.items():
            for method, count in methods.items():
                documented = found[f"{owner}.{method}"]
                if documented is None:
                    missing.add(f"{owner}.{method}")
                elif not takes(documented, count):
                    wrong.append(f"{owner}.{method} with {count}: {documented[:200]}")
    assert not missing
    assert not wrong


def methods(tables: list[dict[str, dict[str, int]]]) -> set[str]:
    return {f"{owner}.{method}" for table in tables for owner, of in table.items() for method in of}


def properties() -> set[str]:
    return {f"{owner}.{name}" for owner, names in PROPERTIES.items() for name in names}


def test_what_is_looked_for() -> None:
    assert {"Runtime", "BuilderFlag.TF32", "TensorIOMode.INPUT", *RTX_ONLY, *OF_8, *SINCE_10} <= names_of_the_library()
    calls = calls_of_cuda()
    assert calls["cudaMemcpyAsync"] == {5}
    assert len(calls) >= 24
    assert takes("f(self: C, name: str, shape: Tuple[int, int] = (1, 2)) -> bool", 1)
    assert not takes("f(self: C, name: str) -> bool", 2)
    assert takes("f(ptr, size_t size, unsigned int flags)", 3)


@pytest.mark.parametrize("version", list(BINDINGS))
def test_bindings_of_tensorrt(wheels: Path, version: str, tmp_path: Path) -> None:
    wanted = PYTHON.get(version, sys.version_info[:2])
    python: str | None = sys.executable
    if wanted != sys.version_info[:2]:
        python = shutil.which("python{}.{}".format(*wanted))
        if python is None or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
            pytest.skip(f"there are bindings of {version} for Python {'.'.join(map(str, wanted))}, which is not here")
    folder = wheel(BINDINGS[version], version, wheels, wanted)
    (package,) = (path.parent for path in folder.glob("*/tensorrt.so"))
    stand_in(package / "tensorrt.so", tmp_path)
    release = tuple(map(int, version.split(".")))
    names = names_of_the_library() - RTX_ONLY
    tables = [METHODS]
    if release[0] == 8:
        names -= SINCE_10
        tables += [OF_8_METHODS]
        names -= {"NetworkDefinitionCreationFlag.STRONGLY_TYPED"}
    else:
        names -= OF_8
        if release >= (10, 9):
            names |= {"TilingOptimizationLevel.MODERATE", "IBuilderConfig.tiling_optimization_level"}
        tables += [SINCE_10_METHODS, NEWER] if release >= (10, 9) else [SINCE_10_METHODS]
    found = inspect(
        package.name,
        names | properties() | methods(tables),
        python or sys.executable,
        LD_LIBRARY_PATH=str(tmp_path),
        PYTHONPATH=str(folder),
    )
    check(found, names | properties(), tables)


def test_bindings_of_tensorrt_for_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    names = names_of_the_library() - OF_8
    tables: list[dict[str, dict[str, int]]] = [METHODS, SINCE_10_METHODS, NEWER, RTX_METHODS]
    more = {"IRuntimeConfig.cuda_graph_strategy", "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy"}
    more |= {"Runtime.engine_header_size", "IBuilderConfig.num_compute_capabilities"}
    names |= {name for name in more | properties() if "optimization_level" not in name}
    found = inspect("tensorrt_rtx", names | methods(tables))
    check(found, names, tables)


def test_calls_of_the_runtime_of_tensorrt_for_rtx(tmp_path: Path) -> None:
    """What only a loaded engine, and so a GPU, gives: made by the source itself, of a library that agrees to all."""
    bindings = importlib.util.find_spec("tensorrt_rtx_bindings")
    if bindings is None or bindings.origin is None:
        pytest.skip("tensorrt_rtx is not installed")
    libraries = stand_in(Path(bindings.origin).with_name("tensorrt_rtx.so"), tmp_path, agrees=True)
    (tmp_path / "kernels.cache").write_bytes(b"kernels of an earlier start")
    code = f"""
        import ctypes, sys, types
        from pathlib import Path
        for library in {[str(library) for library in libraries]}:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        sys.modules["tensorrt_rtx_libs"] = types.ModuleType("tensorrt_rtx_libs")  # not the real ones
        import tensorrt_rtx_bindings as trt
        from runtime.backends.tensorrt.library import library_logger
        from runtime.backends.tensorrt.rtx import RuntimeCache, runtime_config
        runtime = trt.Runtime(library_logger(trt)[0])
        engine = runtime.deserialize_cuda_engine(b"vtrt")
        config = runtime_config(trt, engine, RuntimeCache(Path({str(tmp_path)!r}), ["kernels"]))
        context = engine.create_execution_context(config)
        serialized = config.create_runtime_cache().serialize()
        try:
            config.cuda_graph_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        except TypeError:
            print(*(type(each).__name__ for each in (engine, config, context, serialized)), flush=True)
        import os
        os._exit(0)  # nothing of such a library is freed
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ICudaEngine", "IRuntimeConfig", "IExecutionContext", "IHostMemory"]


def test_what_the_real_tensorrt_for_rtx_says_of_a_file() -> None:
    """Of an engine alone it needs a GPU to say more."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    runtime = start(rtx, "Runtime")
    validity, diagnostics = runtime.get_engine_validity(b"vtrt" + bytes(runtime.engine_header_size))
    assert validity == rtx.EngineValidity.INVALID
    assert int(diagnostics) >= 0
    bits = [int(getattr(rtx.EngineInvalidityDiagnostics, name)) for name in REFUSALS]
    assert sorted(bits) == sorted({1 << (bit.bit_length() - 1) for bit in bits})  # one bit each
    assert {f"SM{capability}" for capability in (75, 80, 86, 89, 120)} <= set(rtx.ComputeCapability.__members__)


@pytest.mark.slow  # a download of 46 MB
@pytest.mark.parametrize(("cuda", "version"), [("cu12", "10.16.1.11"), ("cu13", "11.4.0.106")])
def test_the_real_library_without_a_driver(wheels: Path, cuda: str, version: str) -> None:
    """In a process of its own, which must live: of 10.16 and 11.4 a failed Runtime was a segmentation fault."""
    folders = [wheel(f"tensorrt_lean_{cuda}_{part}", version, wheels) for part in ("bindings", "libs")]
    code = """
        import sys, tensorrt_lean_bindings
        from runtime.backends.tensorrt.library import start
        from runtime.errors import BackendUnavailable
        try:
            start(tensorrt_lean_bindings, "Runtime")
        except BackendUnavailable as error:
            print("refused:", error)
        else:
            print("started")
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders)))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("refused:", "started"))


def cuda_bindings(wheels: Path, version: str) -> dict[str, str]:
    """Return the environment in which `cuda.bindings` has a version."""
    with contextlib.suppress(ModuleNotFoundError):
        if installed("cuda-bindings") == version:
            return {}
    folders = wheel("cuda-bindings", version, wheels), wheel("cuda-pathfinder", "1.9.0", wheels)
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


@pytest.mark.parametrize("version", ["12.9.10", "13.4.4"])
def test_bindings_of_cuda(wheels: Path, version: str) -> None:
    """Both majors: `cuda.bindings.runtime` loads without a driver."""
    calls = calls_of_cuda()
    constants = {"cudaStreamNonBlocking", "cudaHostRegisterPortable", "cudaMemcpyKind.cudaMemcpyHostToDevice"}
    constants |= {"cudaMemcpyKind.cudaMemcpyDeviceToHost"}
    constants |= {"cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal"}
    found = inspect("cuda.bindings.runtime", constants | set(calls), **cuda_bindings(wheels, version))
    assert not {name for name, documented in found.items() if documented is None}
    wrong = [
        f"{name} with {count}: {(found[name] or '').splitlines()[:1]}"
        for name, counts in calls.items()
        for count in counts
        if not takes((found[name] or "").splitlines()[0] + "\n", count)
    ]
    assert not wrong


@pytest.mark.parametrize("version", ["12.9.10", "13.4.4"])
def test_calls_of_cuda(wheels: Path, version: str) -> None:
    """Each call with the types that it is given: what they refuse is a TypeError, also without a driver."""
    with contextlib.suppress(BackendUnavailable):
        probe()
        pytest.skip("there is a GPU: tests/test_gpu.py makes these calls of it")
    code = f"""
        from cuda.bindings import runtime
        wrong = []
        for name, arguments in {CALLS_OF_CUDA}.items():
            given = [eval(argument, {{"runtime": runtime}}) for argument in arguments]
            try:
                status, *results = getattr(runtime, name)(*given)
                int(status)
            except TypeError as error:
                wrong.append(f"{{name}}: {{error}}")
        print(*wrong, sep="\\n")
    """
    assert {name: {len(arguments)} for name, arguments in CALLS_OF_CUDA.items()} == calls_of_cuda()
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | cuda_bindings(wheels, version)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_table_names_what_is_used() -> None:
    """A method that the source does not name any more leaves the tables, too."""
    text = "".join(path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).glob("*.py"))
    tables: list[Any] = [METHODS, SINCE_10_METHODS, NEWER, OF_8_METHODS, RTX_METHODS]
    unused = [m for m in methods(tables) | properties() if not re.search(rf"\b{m.split('.')[1]}\b", text)]
    assert unused == []
