"""Inputs and parameters of tests/data/video_features.npz, made again from seeds. NumPy only.

The file holds outputs of the public programs (v-iashin/video_features with its RAFT, I3D and VGGish) with random
parameters. Random numbers come from `numpy.random.RandomState`, which NumPy has frozen: one stream a call, tensors in
the order in which the file names them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def cases() -> dict[str, Any]:
    """Return the arrays of the file, and its settings under `config`."""
    with np.load(Path(__file__).parent / "data" / "video_features.npz", allow_pickle=False) as file:
        data: dict[str, Any] = {name: file[name] for name in file.files}
    data["config"] = json.loads(str(data["config"]))
    return data


def settings(case: str) -> Any:
    """Return the settings of a case."""
    return cases()["config"]["cases"][case]


def weights(net: str) -> dict[str, np.ndarray]:
    """Return the parameters of `i3d_rgb`, `i3d_flow`, `vggish` or `raft` under their public names."""
    config = cases()["config"]
    draw, out = np.random.RandomState(config["weight_seeds"][net]), {}
    for name, shape in config["names"][net]:
        p: Any
        r = draw.standard_normal(tuple(shape)).astype(np.float32)
        norm = ".batch3d." in name or ".norm" in name or ".downsample.1." in name
        if name.endswith("running_var"):
            p = 0.5 + 0.5 * np.abs(r)
        elif name.endswith(("running_mean", "bias")):
            p = 0.1 * r
        elif norm:
            p = 1 + 0.1 * r
        else:
            gain = 1.0 if net == "raft" else 2.0
            p = r * np.float32(np.sqrt(gain / np.prod(shape[1:])))
        if net == "raft" and name.startswith("update_block.flow_head.conv2"):
            p = p * np.float32(0.2)
        out[name] = np.asarray(p, np.float32)
    if net == "raft":
        for name in list(out):
            if ".norm3." in name:
                out[name.replace(".norm3.", ".downsample.1.")] = out[name]
    return out


def frames(seed: int, count: int, height: int, width: int) -> np.ndarray:
    """Return uint8 [count, H, W, 3]: twelve drifting plane waves in each channel, and noise."""
    draw = np.random.RandomState(seed)
    k = draw.uniform(-0.35, 0.35, (3, 12, 2))
    phase, amplitude = draw.uniform(0, 2 * np.pi, (3, 12)), draw.uniform(4, 22, (3, 12))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    out = np.empty((count, height, width, 3), np.uint8)
    for t in range(count):
        yy, xx = y - 0.7 * t, x + 1.9 * t
        for c in range(3):
            s = sum(amplitude[c, i] * np.sin(k[c, i, 0] * yy + k[c, i, 1] * xx + phase[c, i]) for i in range(12))
            out[t, :, :, c] = np.clip(np.floor(128 + s + draw.uniform(-6, 6, (height, width)) + 0.5), 0, 255)
    return out


def wave(seed: int, seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Return int16 [n] or [n, channels]: a chirp, white noise in the second quarter, silence at the end."""
    draw, n = np.random.RandomState(seed), round(seconds * rate)
    t = np.arange(n) / rate
    top = 0.45 * rate
    out = []
    for c in range(channels):
        s = 0.5 * np.sin(2 * np.pi * (60 * t + (top - 60) * t * t / (2 * seconds)) + c)
        noise = draw.standard_normal(n)
        s[n // 4 : n // 2] += 0.2 * noise[n // 4 : n // 2]
        s += 1e-3 * noise
        s[n - n // 20 :] = 0
        out.append(np.clip(np.floor(s * 32767 + 0.5), -32768, 32767).astype(np.int16))
    return out[0] if channels == 1 else np.stack(out, 1)


def flow_field(seed: int, count: int, height: int, width: int) -> np.ndarray:
    """Return float32 [count, 2, H, W], x then y, with values beyond 20 pixels."""
    draw = np.random.RandomState(seed)
    small = draw.standard_normal((count, 2, height // 8 + 2, width // 8 + 2)) * 9
    return np.kron(small, np.ones((1, 1, 8, 8)))[:, :, :height, :width].astype(np.float32)


def probe(array: Any) -> np.ndarray:
    """Return what the file keeps of a large tensor: mean, mean |x|, rms and 29 evenly spaced values."""
    a = np.asarray(array, np.float64).ravel()
    at = np.linspace(0, a.size - 1, 29).round().astype(np.int64)
    return np.concatenate([[a.mean(), np.abs(a).mean(), np.sqrt((a * a).mean())], a[at]]).astype(np.float32)
