"""PyTorch as a peer of the engines: as a backend that tells the time of the device alone.

Shapes:  B batch   T steps   Cv, Ca visual / audio feature width
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ccnet.torch_backend import TorchBackend
from runtime.profiling.timing import Rules, measure
from runtime.spec import AUDIO, LENGTHS, VISUAL


class TimedBackend(TorchBackend):
    """The eager network, or what `torch.compile` made of it."""

    def engine_milliseconds(
        self, batch: int, repeats: int = 1000, *, warmup_seconds: float = 0.3
    ) -> npt.NDArray[np.float64]:
        """Return [repeats] times of the network alone, its inputs on the device, from each CUDA event to the next.

        All is queued before the first wait, as for an engine. On a CPU by the clock.
        """
        shapes = self.spec.input_shapes(batch)
        visual, audio = (torch.zeros(shapes[name], device=self.device) for name in (VISUAL, AUDIO))
        lengths = torch.full(shapes[LENGTHS], self.spec.length, dtype=torch.int32, device=self.device)
        with self.computing() as model:

            def run() -> Any:
                return self.forward(model, visual, audio, lengths)

            calls = repeats if self.device.type == "cpu" else 1
            seconds = measure(run, Rules(warmup_seconds=warmup_seconds, seconds=0, calls=calls)).seconds
            if self.device.type == "cpu":
                return seconds * 1e3
            event: Any = torch.cuda.Event  # untyped
            events = [event(enable_timing=True) for _ in range(repeats + 1)]
            torch.cuda.synchronize()
            events[0].record()
            for mark in events[1:]:
                run()
                mark.record()
            events[-1].synchronize()
            return np.array([begin.elapsed_time(end) for begin, end in itertools.pairwise(events)])


class FusedBackend(TimedBackend):
    """The fused network, which takes the inputs of an engine as they are."""

    def forward(self, model: Any, visual: Any, audio: Any, lengths: Any) -> Any:
        """See `TorchBackend.forward`."""
        return model(visual, audio, lengths)
