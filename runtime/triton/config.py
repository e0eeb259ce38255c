"""What a `config.pbtxt` says, typed, and its text (protobuf text format of Triton's ModelConfig)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

DataType = Literal["TYPE_FP32", "TYPE_FP64", "TYPE_INT32", "TYPE_INT64"]
Kind = Literal["KIND_AUTO", "KIND_GPU", "KIND_CPU"]


@dataclass(frozen=True, kw_only=True)
class TensorConfig:
    """An input or output, without its batch axis."""

    name: str
    data_type: DataType
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    """Shape that the model itself has: `()` where it takes [batch] alone, which `dims` can't say."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model of an ensemble, and which tensors of the ensemble its own ones are."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One folder of a repository: a model with a backend, or an ensemble of `steps`."""

    name: str
    max_batch: int
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    backend: str = ""
    """Empty for an ensemble."""
    file: str = ""
    kind: Kind = "KIND_AUTO"
    instances: int = 1
    queue_delay_us: int | None = None
    """Longest wait for company in a batch, in microseconds; None: no dynamic batching."""
    warm_up: tuple[int, ...] = ()
    """Batch sizes that are run before the model is ready, on zeros."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    def text(self) -> str:
        """Return the content of its `config.pbtxt`."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"name: {_quoted(self.name)}"
        yield f"backend: {_quoted(self.backend)}" if self.backend else 'platform: "ensemble"'
        if self.file:
            yield f"default_model_filename: {_quoted(self.file)}"
        yield f"max_batch_size: {self.max_batch}"
        for key, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                yield f"{key} {{ {_tensor(tensor)} }}"
        yield "version_policy { latest { num_versions: 1 } }"
        if self.backend:
            yield f"instance_group {{ count: {self.instances} kind: {self.kind} }}"
        if self.queue_delay_us is not None:
            yield f"dynamic_batching {{ max_queue_delay_microseconds: {self.queue_delay_us} }}"
        for batch in self.warm_up:
            inputs = " ".join(_zeros(tensor) for tensor in self.inputs)
            yield f'model_warmup {{ name: "zeros_{batch}" batch_size: {batch} {inputs} }}'
        for key, value in self.parameters.items():
            yield f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        if self.steps:
            yield "ensemble_scheduling {"
            for step in self.steps:
                maps = [_map("input_map", step.inputs), _map("output_map", step.outputs)]
                yield f"  step {{ model_name: {_quoted(step.model)} model_version: -1 {' '.join(maps)} }}"
            yield "}"


def _tensor(tensor: TensorConfig) -> str:
    shape = "" if tensor.reshape is None else f" reshape {{ shape: {_list(tensor.reshape)} }}"
    return f"name: {_quoted(tensor.name)} data_type: {tensor.data_type} dims: {_list(tensor.dims)}{shape}"


def _zeros(tensor: TensorConfig) -> str:
    value = f"data_type: {tensor.data_type} dims: {_list(tensor.dims)} zero_data: true"
    return f"inputs {{ key: {_quoted(tensor.name)} value {{ {value} }} }}"


def _map(name: str, pairs: Mapping[str, str]) -> str:
    return " ".join(f"{name} {{ key: {_quoted(key)} value: {_quoted(value)} }}" for key, value in pairs.items())


def _list(values: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)  # the escapes that both formats share: names are printable
