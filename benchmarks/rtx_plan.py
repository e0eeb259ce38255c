"""The kernel plan inside a TensorRT-RTX engine, as numbers: kernels, fused attentions, scratch memory, precisions.

An RTX engine embeds the schedule that its compiler made as readable text. That makes lost fusions visible without a
GPU. The format is undocumented: this parser was written for RTX 1.7 and refuses other versions. No build depends on it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from runtime.backends.tensorrt.rtx import RTX_MAGIC
from runtime.errors import BackendUnavailable, ExportError

KNOWN_VERSION = ("1", "7")

_BLOCK = re.compile(rb"NLYM.{12}header \{", re.S)
_HEADER_BYTES = 16  # tag, checksum, length of the text as a 64-bit number
_ITEM = re.compile(r'^  ([a-z_0-9]+)=\{ name="?([^" ]+)', re.M)
_TENSOR = re.compile(r'^  tensor=\{.*? name="([^"]*)".* region="([^"]*)".* type=(\w+)', re.M)
_OUTPUT = re.compile(r" output(?:_args)?=\{ ?\"([^\"]*)\"")
_NAME = re.compile(r'"([^"]+)"')
_HOST_ITEMS = frozenset({"signal", "wait", "shape_call"})
_MATRIX_KINDS = frozenset({"corrltn", "fully_connected", "runtime_fusion"})
_PRECISIONS = {"float": "fp32", "half": "fp16", "bfloat": "bf16", "bf16": "bf16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class RtxPlan:
    """What the compiler scheduled for one inference."""

    kernels: int
    """Launches: everything in the schedule but events and shape arithmetic on the host."""
    kinds: dict[str, int]
    """Kernels by kind. `corrltn` convolution, `fully_connected` matmul, `runtime_fusion` one of those with a
    fused tail, `function` generated pointwise or reduction kernel, `maxpool`, `copy`, ..."""
    fused_attentions: int
    scratch_bytes: int
    """Device memory for activations."""
    streams: int
    capturable: bool
    """May be captured in a CUDA graph."""
    tf32: bool
    targets: tuple[str, ...]
    """For example `sm89`."""
    tensors: dict[str, int]
    """Floating point tensors in device memory by precision, `fp32`, `fp16`, `bf16`."""
    matrix_kernels: dict[str, int]
    """Convolutions, matmuls and fused attentions by the precision of what they write."""
    fp8_kernels: int
    """Those of them that read fp8."""


def check_version(version: str) -> None:
    """Raise BackendUnavailable for a version of TensorRT for RTX whose plan format is not the known one."""
    if tuple(version.split(".")[:2]) != KNOWN_VERSION:
        raise BackendUnavailable(
            f"the kernel plan of TensorRT-RTX {version} is not known, only that of {'.'.join(KNOWN_VERSION)}"
        )


def read_plan(path: Path, version: str) -> RtxPlan:
    """Parse the plan inside an engine file that RTX `version` built.

    Raises BackendUnavailable as `check_version`, ExportError when the file is not an RTX engine or its plan has another
    format.
    """
    check_version(version)
    view = memoryview(path.read_bytes())
    if view[: len(RTX_MAGIC)] != RTX_MAGIC:
        raise ExportError(f"{path}: starts with {bytes(view[:4])!r}, expected a TensorRT-RTX engine, {RTX_MAGIC!r}")
    texts = [text for text in _blocks(view) if re.search(r"\n  accelerators=\{sm", text)]
    if not texts:
        raise ExportError(f"{path}: holds no kernel plan; build it again")
    kinds: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    fused = scratch = streams = fp8 = 0
    for text in texts:
        types = {name: kind for name, _, kind in _TENSOR.findall(text)}
        tensors.update(_PRECISIONS[kind] for _, region, kind in _TENSOR.findall(text) if kind in _PRECISIONS)
        for kind, name, line in _schedule(text):
            output = _OUTPUT.search(line)
            written = types.get(output.group(1), "") if output else ""
            if written == "int64":  # shape arithmetic on the host
                continue
            kinds[kind] += 1
            attention = "mha" in name
            fused += attention
            if attention or kind in _MATRIX_KINDS:
                matrix[_PRECISIONS.get(written, "other")] += 1
                fp8 += any(types.get(tensor) == "fp8_e4m3" for tensor in _NAME.findall(line))
        regions = re.findall(r"region = \{ name=(\w+) size=(\d+) .*?place=accelerator.*?\}", text)
        scratch += sum(int(size) for name, size in regions if name.startswith("devmem"))
        streams = max(streams, int(_field(text, "n_streams")))
    return RtxPlan(
        kernels=sum(kinds.values()),
        kinds=dict(sorted(kinds.items())),
        fused_attentions=fused,
        scratch_bytes=scratch,
        streams=streams,
        capturable=all(_field(text, "stream_capturable") == "1" for text in texts),
        tf32=any(_field(text, "tf32") == "1" for text in texts),
        targets=tuple(_field(texts[0], "accelerators").strip("{} ").split()),
        tensors=dict(sorted(tensors.items())),
        matrix_kernels=dict(sorted(matrix.items())),
        fp8_kernels=fp8,
    )


def _blocks(view: memoryview) -> list[str]:
    """Return the texts of all compiled graphs; small ones without a fixed target are parts that a larger one calls."""
    texts = []
    for match in _BLOCK.finditer(view):
        start = match.start() + _HEADER_BYTES
        length = int.from_bytes(view[start - 8 : start], "little")
        texts.append(bytes(view[start : start + length]).decode("latin1"))
    return texts


def _schedule(text: str) -> list[tuple[str, str, str]]:
    """Return (kind, name, whole line) of every kernel in the schedule."""
    start = text.find("\nmain {")
    body = text[start : text.find("\n}", start)]
    found = []
    for match in _ITEM.finditer(body):
        if match.group(1) not in _HOST_ITEMS:
            end = body.find("\n", match.start())
            found.append((match.group(1), match.group(2), body[match.start() : end if end >= 0 else None]))
    return found


def _field(text: str, name: str) -> str:
    found = re.search(rf"^  {name}\s*=\s*(.+)$", text, re.M)
    if not found:
        raise ExportError(f"the kernel plan has no '{name}'; this TensorRT-RTX release writes another format")
    return found.group(1)
