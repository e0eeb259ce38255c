"""Eager PyTorch behind the runtime's `Backend` protocol.

Training validation, the parity check and the benchmarks run the network through the same interface as an engine.

Shapes:  B batch   T steps   Cv, Ca visual / audio feature width   P points of all levels   C classes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ccnet.network.model import released_inputs
from runtime.backends.base import BaseBackend, Float32, Int32, Outputs
from runtime.errors import BackendUnavailable, ConfigError, EngineError
from runtime.spec import ModelSpec

TorchPrecision = Literal["fp32", "tf32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend(BaseBackend):
    """Any module with the forward contract of `CCNet`, as a backend. Not thread-safe.

    `precision` says how it computes: `fp32` keeps the TensorFloat-32 units of a GPU out of it, `tf32` lets matmuls
    and convolutions use them (GPU only), `bf16` and `fp16` are PyTorch's autocast. Outputs are float32.
    The module is moved to `device`; during a call it is in evaluation mode, afterwards in the mode it was found in.

    Raises ConfigError for an unknown precision or one the device lacks, BackendUnavailable for an absent device.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        device: str | torch.device = "cpu",
        precision: TorchPrecision = "fp32",
        max_batch: int = 32,
    ) -> None:
        if precision not in get_args(TorchPrecision):
            raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(get_args(TorchPrecision))}")
        self.device = _available(torch.device(device))
        if precision == "tf32" and self.device.type != "cuda":
            raise ConfigError(f"precision: got 'tf32' on {self.device}, which only a GPU has; use fp32")
        super().__init__("torch", precision, spec, max_batch)
        self._model: nn.Module | None = model.to(self.device)

    def forward(self, model: nn.Module, visual: Tensor, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on a batch on its device: the inputs of an engine -> logits [B, P, C], offsets [B, P, C, 2]."""
        logits, offsets = model(*released_inputs(visual, audio, lengths))
        return logits, offsets

    @contextlib.contextmanager
    def computing(self) -> Iterator[nn.Module]:
        """Yield the model in evaluation mode while PyTorch computes in this backend's precision, without gradients."""
        if self._model is None:
            raise EngineError("torch: the backend is closed")
        with torch.inference_mode(), _evaluating(self._model), self._arithmetic():
            yield self._model

    def _infer(self, visual: Float32, audio: Float32, lengths: Int32) -> Outputs:
        tensors = [torch.tensor(array, device=self.device) for array in (visual, audio, lengths)]
        try:
            with self.computing() as model:
                logits, offsets = self.forward(model, *tensors)
        except RuntimeError as error:  # out of memory, or what torch.compile could not compile
            raise EngineError(f"torch: {error}") from error
        return logits.float().cpu().numpy(), offsets.float().cpu().numpy()

    def _facts(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "library": "torch",
            "version": torch.__version__,
            "device": device,
            "threads": torch.get_num_threads(),
        }

    def _close(self) -> None:
        self._model = None

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self.precision in _AUTOCAST:
            with torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision]):
                yield
        else:
            with _float32_matmuls("tf32" if self.precision == "tf32" else "ieee"):
                yield


@contextlib.contextmanager
def _float32_matmuls(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set how a GPU multiplies float32 matrices inside the block; the process-wide switches are put back afterwards."""
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = kind
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode (no stochastic depth); every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _available(device: torch.device) -> torch.device:
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise BackendUnavailable(
            f"torch: device '{device}' was asked for, PyTorch sees {torch.cuda.device_count()} GPUs"
        )
    return device
