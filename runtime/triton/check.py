"""Finds in a model repository what Triton itself would say only when it loads it, or never.

The container is stated by the versions that are in it. Configurations are read with Triton's own schema, from the
package tritonclient.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtime.errors import ConfigError
from runtime.packages import import_package
from runtime.schema import quote, show
from runtime.triton.repository import TENSORRT_VERSION

BACKENDS = ("onnxruntime", "python", "tensorrt")
"""Backends that a container of Triton is taken to have where nothing else is said."""

_ORT_READS = {15: (19, 9), 16: (19, 9), 17: (20, 9), 18: (21, 10), 19: (21, 10), 20: (21, 10), 21: (22, 10)}
"""Minor version of ONNX Runtime 1 -> newest operator set and IR version that it reads."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """What is stated about the container that is to load a repository; None: nothing."""

    onnxruntime: tuple[int, ...] | None = None
    tensorrt: tuple[int, ...] | None = None
    backends: tuple[str, ...] = BACKENDS


def check_repository(folder: str | Path, container: Container) -> list[str]:
    """Return what is wrong, one line each; empty where Triton can load all of it.

    Raises ConfigError for a folder that holds no model, MissingDependency without tritonclient.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model repository; 'ccnet triton BUNDLE --out {folder}' writes one")
    problems: list[str] = []
    models: dict[str, Any] = {}
    for path in sorted(folder.glob("*/config.pbtxt")):
        config = _read_config(path)
        if isinstance(config, str):
            problems.append(f"{path.parent.name}: {config}")
            continue
        models[path.parent.name] = config
        if config.name not in ("", path.parent.name):
            problems.append(
                f"{path.parent.name}: its configuration is named {show(config.name)}; both have to be the same"
            )
    if not models and not problems:
        raise ConfigError(f"{folder}: holds no model (a folder with config.pbtxt)")
    for name, config in models.items():
        found = _ensemble(config, models) if config.platform == "ensemble" else _model(folder / name, config, container)
        problems += [f"{name}: {problem}" for problem in found]
    return problems


def _read_config(path: Path) -> Any:
    """Return a ModelConfig, or what is wrong with the text."""
    schema = import_package("tritonclient.grpc.model_config_pb2", "checking a repository", distribution="tritonclient")
    text_format = import_package("google.protobuf.text_format", "checking a repository", distribution="tritonclient")
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), schema.ModelConfig())
    except (text_format.ParseError, ValueError) as error:  # ValueError: of a number, of UTF-8
        return f"config.pbtxt: {quote(error)}"


def _model(folder: Path, config: Any, container: Container) -> Iterator[str]:
    """Yield what is wrong with a model that has a backend."""
    if config.backend not in container.backends:
        yield (
            f"backend {show(config.backend)} is not in the container, which has {', '.join(container.backends)}; use a "
            "full image (not -min), or state its backends with --backends"
        )
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit() and path.name != "0"]
    if not versions:
        yield "has no version folder, such as 1/"
        return
    newest = max(versions, key=lambda path: int(path.name))
    path = newest / config.default_model_filename
    if not config.default_model_filename or not os.path.isfile(path):  # of a name that is too long, too
        yield f"{newest.name}/{config.default_model_filename or '(default_model_filename)'}: no such file"
        return
    if config.backend == "onnxruntime":
        yield from _graph(path, container)
    if config.backend == "tensorrt":
        yield from _plan(config, container)
    if config.max_batch_size < 1 and config.HasField("dynamic_batching"):
        yield "dynamic batching needs max_batch_size of 1 or more"


def _graph(path: Path, container: Container) -> Iterator[str]:
    if container.onnxruntime is None:
        return
    version = ".".join(map(str, container.onnxruntime))
    reads = _ORT_READS.get(container.onnxruntime[1]) if container.onnxruntime[0] == 1 else None
    if reads is None:
        newest = max(_ORT_READS)
        if container.onnxruntime < (1, newest):
            yield f"ONNX Runtime {version} is older than any that was looked at (1.{min(_ORT_READS)})"
        return
    try:
        with open(path, "rb") as stream:
            ir_version, opset = onnx_versions(stream)
    except ValueError as error:
        yield f"{path.name}: {error}"
        return
    if opset > reads[0]:
        yield (
            f"{path.name}: operator set {opset}, ONNX Runtime {version} reads {reads[0]} at most; export with "
            f"--opset {reads[0]}"
        )
    if ir_version > reads[1]:
        yield (
            f"{path.name}: IR version {ir_version}, ONNX Runtime {version} reads {reads[1]} at most; export with "
            "--opset 17"
        )


def _plan(config: Any, container: Container) -> Iterator[str]:
    built = config.parameters[TENSORRT_VERSION].string_value if TENSORRT_VERSION in config.parameters else ""
    if container.tensorrt is None:
        return
    stated = ".".join(map(str, container.tensorrt))
    if not built:
        yield f"parameter {TENSORRT_VERSION} is missing: whether TensorRT {stated} loads the plan can't be said"
    elif parse_version(built)[: len(container.tensorrt)] != container.tensorrt:
        yield (
            f"the plan was built by TensorRT {built}, the container has {stated}, which does not load it; build it "
            "with that version (ccnet rebuild), or use --format onnx"
        )


def _ensemble(config: Any, models: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the tensors between the models of an ensemble."""
    inputs, outputs = {t.name: t for t in config.input}, {t.name: t for t in config.output}
    made: dict[str, list[str]] = defaultdict(list)
    taken: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    kinds: dict[str, Any] = dict(inputs)
    for step in config.ensemble_scheduling.step:
        model = models.get(step.model_name)
        if model is None:
            yield f"step {show(step.model_name)}: there is no such model in the repository"
            continue
        theirs, gives = {t.name: t for t in model.input}, {t.name: t for t in model.output}
        for name in theirs.keys() - step.input_map.keys():
            if not theirs[name].optional:
                yield f"input {show(name)} of {step.model_name} is not connected"
        for kind, mapped, known in (("input", step.input_map, theirs), ("output", step.output_map, gives)):
            for name in mapped.keys() - known.keys():
                yield f"step {step.model_name}: it has no {kind} {show(name)}; it has {', '.join(sorted(known))}"
        for name, tensor in step.input_map.items():
            if name in theirs:
                taken[tensor].append((step.model_name, theirs[name]))
        for name, tensor in step.output_map.items():
            if name in gives:
                made[tensor].append(step.model_name)
                kinds.setdefault(tensor, gives[name])
        if 0 < model.max_batch_size < config.max_batch_size:
            yield (f"takes batches of {config.max_batch_size}, {step.model_name} of {model.max_batch_size} at most")
    for tensor in taken.keys() - made.keys() - inputs.keys():
        yield f"tensor {show(tensor)} is taken by {taken[tensor][0][0]}, and nothing makes it"
    for tensor in inputs.keys() - taken.keys():
        yield f"its input {show(tensor)} goes nowhere"
    for tensor, wanted in outputs.items():
        if tensor not in made:
            yield f"its output {show(tensor)} is made by no step"
        else:
            yield from _fits(f"output {tensor}", kinds[tensor], wanted)
    for tensor, steps in made.items():
        if len(steps) > 1 or tensor in inputs:
            makers = [*steps, *(["the client"] if tensor in inputs else [])]
            yield f"tensor {show(tensor)} is made more than once: by {', '.join(makers)}"
    for tensor, takers in taken.items():
        for name, wanted in takers:
            if tensor in kinds:
                yield from _fits(f"tensor {tensor} for {name}", kinds[tensor], wanted)


def _fits(what: str, given: Any, wanted: Any) -> Iterator[str]:
    if given.data_type != wanted.data_type:
        yield f"{what} has another data type than it is declared with where it comes from"
    pairs = zip(given.dims, wanted.dims, strict=False)
    if len(given.dims) != len(wanted.dims) or any(a != b and -1 not in (a, b) for a, b in pairs):
        yield f"{what} is {list(wanted.dims)}, where it comes from it is {list(given.dims)}"


def parse_version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 10.9.0.34. Raises ConfigError for anything else."""
    parts = text.split(".")
    if not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise ConfigError(f"version: got {show(text)}, expected numbers with dots, such as 10.9.0")
    return tuple(map(int, parts))


def onnx_versions(stream: IO[bytes]) -> tuple[int, int]:
    """Return IR version and newest operator set of the standard domain of an ONNX file, without reading its graph.

    Raises ValueError for a file that is not one. An ONNX file is a protobuf message: field 1 is the IR version, each
    field 8 an operator set (1: domain, 2: version).
    """
    ir_version = opset = 0
    while (key := _varint(stream)) is not None:
        number, wire = key >> 3, key & 7
        if wire == 0:
            value = _varint(stream)
            ir_version = (value or 0) if number == 1 else ir_version
        elif wire == 2:
            size = _varint(stream) or 0
            if number == 8 and size < 1000:
                domain, version = _operator_set(stream.read(size))
                opset = max(opset, version) if domain in (b"", b"ai.onnx") else opset
            else:
                stream.seek(size, 1)
        else:
            raise ValueError("not an ONNX file")
    if not ir_version or not opset:
        raise ValueError("not an ONNX file: it states no IR version or no operator set")
    return ir_version, opset


def _operator_set(content: bytes) -> tuple[bytes, int]:
    import io

    stream = io.BytesIO(content)
    domain, version = b"", 0
    while (key := _varint(stream)) is not None:
        if key == 0x0A:
            domain = stream.read(_varint(stream) or 0)
        elif key == 0x10:
            version = _varint(stream) or 0
        else:
            raise ValueError("not an ONNX file: an operator set with unknown fields")
    return domain, version


def _varint(stream: IO[bytes]) -> int | None:
    """Return the next number; None at the end of the file."""
    value = shift = 0
    while byte := stream.read(1):
        number = byte[0]
        value |= (number & 0x7F) << shift
        if number < 0x80:
            return value
        shift += 7
        if shift > 63:
            raise ValueError("not an ONNX file")
    if shift:
        raise ValueError("not an ONNX file, or one that was cut off")
    return None
