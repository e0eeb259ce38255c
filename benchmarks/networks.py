"""What the benchmarks run: a random checkpoint, its graphs (reference, fused, typed, int8, fp8), and engines for them.

Files are made once per preset in a work folder and used again by the other benchmarks of the same run.

Shapes:  B batch   T steps (see `runtime.spec.ModelSpec`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccnet.config import Config, ModelConfig, preset, with_overrides
from runtime.backends.base import BaseBackend
from runtime.backends.registry import REGISTRY
from runtime.batches import pack
from runtime.bundle import ModelFile
from runtime.errors import BackendUnavailable
from runtime.files import write_json
from runtime.profiling.workload import sample_videos
from runtime.spec import INPUT_NAMES, ModelSpec, TimeBase

if TYPE_CHECKING:
    from torch import nn

    from ccnet.network.model import CCNet

TINY = {
    "model.length": "16",
    "model.levels": "2",
    "model.dim": "16",
    "model.heads": "2",
    "model.visual_dim": "24",
    "model.audio_dim": "8",
    "model.num_classes": "5",
    "model.head_dim": "16",
    "model.tdm_dim": "8",
    "model.self_layers": "0",
}
"""Overrides of the demo preset under the name `tiny`: seconds from end to end, for tests of the benchmarks."""

SMALL = Config(
    model=ModelConfig(
        length=64,
        levels=4,
        visual_dim=48,
        audio_dim=16,
        dim=32,
        heads=4,
        self_layers=1,
        num_classes=4,
        head_dim=32,
        tdm_dim=8,
    ),
    time_base=TimeBase(fps=25.0, stride_frames=24.0, window_frames=24.0),
)
"""A network that a CPU trains in a minute; its steps are 0.96 s."""

CALIBRATION_VIDEOS = 4
"""Of the fp8 graph, whose accuracy no benchmark looks at."""
BRANCH_SCALE = 0.3
"""Spread of the residual branches' learned scales. They start at 1e-4, where every error inside a branch would hide."""
AFFINE_NOISE = 0.1
"""Added to biases and norm parameters, which start at exactly 0 and 1."""


def benchmark_config(name: str) -> Config:
    """Return a preset by name; `tiny` is for tests. Raises ConfigError for an unknown one."""
    return with_overrides(preset("demo"), TINY) if name == "tiny" else preset(name)


def random_network(config: Config, *, seed: int = 0) -> CCNet:
    """Make an untrained network in eval mode whose every parameter is random, so that no part of it hides."""
    import torch
    from torch import nn

    from ccnet.network.layers import ScaledDropPath
    from ccnet.network.model import CCNet

    torch.manual_seed(seed)
    model = CCNet(config.model).eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, ScaledDropPath):
                    parameter.normal_(0.0, BRANCH_SCALE)
                elif name == "bias" or isinstance(module, nn.LayerNorm):
                    parameter.add_(torch.empty_like(parameter).normal_(0.0, AFFINE_NOISE))
    return model


def labels(config: Config) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(config.model.num_classes))


@dataclass(frozen=True)
class Networks:
    """The files of one preset, made on first use, and the engines that run them."""

    folder: Path
    config: Config

    @property
    def least_int8_weights(self) -> int:
        """Weights of the smallest matmul that is quantized: the exporter's limit, or less for a tiny network."""
        from export.graph.quantize import LEAST_WEIGHTS

        return min(LEAST_WEIGHTS, self.config.model.dim**2)

    @property
    def least_fp8_weights(self) -> int:
        """The same for fp8, of a feed-forward layer."""
        from export.graph.fp8 import LEAST_WEIGHTS

        return min(LEAST_WEIGHTS, self.config.model.dim**2)

    @property
    def spec(self) -> ModelSpec:
        return self.config.spec(labels(self.config))

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        path = self.folder / "checkpoint"
        if not path.exists():
            from ccnet.checkpoint import save_checkpoint

            save_checkpoint(path, random_network(self.config), config=self.config, labels=labels(self.config))
        return path

    def eager(self) -> CCNet:
        from ccnet.checkpoint import load_checkpoint

        return load_checkpoint(self.checkpoint)

    def graph(self, form: str) -> Path:
        """Return the ONNX file of a form.

        `reference` is the reference graph, `fused` the fused network, `int8` that with int8 weights, `fp16` and `bf16`
        that in those types, `fp8` that of `fp16` with fp8 matmuls.
        """
        path = self.folder / form / "model.onnx"
        if not path.with_suffix(".json").exists():
            facts = self._write(form, path)
            write_json(path.with_suffix(".json"), facts)
        return path

    def graph_facts(self, form: str) -> dict[str, Any]:
        """Return nodes, operators, weight bytes and export seconds of a graph."""
        text = self.graph(form).with_suffix(".json").read_text(encoding="utf-8")
        facts: dict[str, Any] = json.loads(text)
        return facts

    def engines(self, form: str, *, max_batch: int = 32) -> dict[str, Callable[[], BaseBackend]]:
        """Return how to open a graph in each engine of the registry that runs it on a CPU, by the engine's name.

        What is returned raises BackendUnavailable where the library or the arithmetic is absent.
        """
        typed = "fp32" if form in ("reference", "fused") else form
        return {
            f"{backend}-{precision}": partial(self._open, form, typed, backend, precision, max_batch)
            for backend, entry in REGISTRY.items()
            if entry.format == "onnx" and not entry.gpu
            for precision, graph in entry.precisions.items()
            if graph == typed
        }

    def open_engines(self, form: str, stack: contextlib.ExitStack) -> tuple[dict[str, BaseBackend], dict[str, str]]:
        """Open those engines that can run here, until `stack` closes; return them, and why not of the others."""
        opened: dict[str, BaseBackend] = {}
        absent: dict[str, str] = {}
        for name, open_it in self.engines(form).items():
            try:
                opened[name] = stack.enter_context(open_it())
            except BackendUnavailable as error:  # noqa: PERF203 - three engines
                absent[name] = str(error)
        if not opened:
            raise BackendUnavailable(f"no engine runs the {form} graph here: {'; '.join(absent.values())}")
        return opened, absent

    def _open(self, form: str, typed: str, backend: str, precision: str, max_batch: int) -> BaseBackend:
        path, module = self.graph(form), REGISTRY[backend].load()
        model_file = ModelFile(name=form, format="onnx", files=(path.name,), precision=typed, max_batch=max_batch)
        module.check_engine(backend, model_file, precision)
        opened: BaseBackend = module.open_engine(backend, path, model_file, self.spec, precision, None)
        return opened

    def _write(self, form: str, path: Path) -> dict[str, Any]:
        if form == "int8":
            from export.graph.quantize import quantize_weights

            begin = time.perf_counter()
            source = self.graph("fused")
            quantized = quantize_weights(source, path, least_weights=self.least_int8_weights)
            seconds = time.perf_counter() - begin
            return {**dataclasses.asdict(quantized), "path": path.name, "seconds": seconds}
        if form == "fp8":
            from export.graph.fp8 import quantize_fp8

            begin = time.perf_counter()
            inputs = pack(sample_videos(self.spec, CALIBRATION_VIDEOS), self.spec)
            feeds = [
                dict(zip(INPUT_NAMES, (rows[i : i + 1] for rows in inputs), strict=True)) for i in range(len(inputs[0]))
            ]
            quantized = quantize_fp8(self.graph("fp16"), path, feeds, least_weights=self.least_fp8_weights)
            seconds = time.perf_counter() - begin
            return {**dataclasses.asdict(quantized), "path": path.name, "seconds": seconds}
        from export.graph.to_onnx import export_onnx

        info = export_onnx(self.module(form), self.spec, path, max_batch=32)
        return {**dataclasses.asdict(info), "path": path.name}

    def module(self, form: str) -> nn.Module:
        """Return the module of a form, which takes the inputs of an engine."""
        if form == "reference":
            from export.graph.reference import ReferenceGraph

            return ReferenceGraph(self.eager())
        from export.fused.network import fused_network
        from export.parity.tolerances import graph_precision, torch_dtype

        dtype = torch_dtype(graph_precision("fp32" if form == "fused" else form))
        return fused_network(self.eager(), dtype=dtype)
