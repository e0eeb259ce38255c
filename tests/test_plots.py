"""The timeline: the gates are those of the network, and what is drawn is what was given."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from ccnet.config import Config, ModelConfig
from ccnet.network.cmcc import CrossModalLayer
from ccnet.network.model import CCNet
from ccnet.plots import Shown, draw_timeline, read_gates
from runtime.annotations import VideoAnnotation
from runtime.detections import Detections
from runtime.errors import ConfigError
from runtime.features import VideoFeatures

pytest.importorskip("matplotlib")
MODEL = ModelConfig(length=64, visual_dim=6, audio_dim=4, dim=8, heads=2, num_classes=3, head_dim=8, tdm_dim=4)
CONFIG = Config(model=MODEL)
SPEC = CONFIG.spec(("dog", "car", "rain"))


def network(config: ModelConfig = MODEL) -> CCNet:
    torch.manual_seed(0)
    model = CCNet(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def features(steps: int) -> VideoFeatures:
    rng = np.random.default_rng(0)
    return VideoFeatures(rng.random((steps, 6), np.float32), rng.random((steps, 4), np.float32))


def test_the_gates_are_what_the_first_layer_multiplies_by() -> None:
    model, video = network(), features(40)
    gates = read_gates(model, SPEC, video)
    assert gates.seconds[:2].tolist() == pytest.approx([0.48, 0.80])  # (0.5 * 24) / 25, then 8 / 25 later
    visual = torch.zeros(1, 6, 64)
    audio = torch.zeros(1, 4, 64)
    visual[0, :, :40], audio[0, :, :40] = torch.from_numpy(video.visual).T, torch.from_numpy(video.audio).T
    mask = (torch.arange(64) < 40)[None, :, None]
    layer = cast(CrossModalLayer, model.cmcc.layers[0])
    with torch.no_grad():
        embedded_visual = model.embed_visual(visual.transpose(1, 2), mask)
        embedded_audio = model.embed_audio(audio.transpose(1, 2), mask)
        expected_audio = layer.audio_gate(embedded_audio, mask)[0, :40, 0]
        expected_visual = layer.visual_gate(embedded_visual, mask)[0, :40, 0]
    np.testing.assert_allclose(gates.audio, expected_audio.numpy(), atol=1e-6)
    np.testing.assert_allclose(gates.visual, expected_visual.numpy(), atol=1e-6)
    assert not np.allclose(gates.audio, gates.visual)


def test_reading_gates_leaves_no_hook_behind() -> None:
    model = network()
    read_gates(model, SPEC, features(10))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_longer_video_has_gates_for_the_steps_that_the_network_sees() -> None:
    assert len(read_gates(network(), SPEC, features(100)).audio) == 64


def test_a_network_without_gates_is_said_to_have_none() -> None:
    config = ModelConfig(**{**MODEL.to_json(), "tcg": False})
    with pytest.raises(ConfigError, match=r"model\.tcg"):
        read_gates(network(config), SPEC, features(10))


@pytest.mark.parametrize("synthetic", [False, True])
def test_a_picture_is_drawn(tmp_path: Path, synthetic: bool) -> None:
    truth = VideoAnnotation("clip", 20.0, "test", np.array([[2.0, 9.0], [5.0, 19.0]]), np.array([0, 2]))
    predictions = Detections(
        np.array([[2.1, 8.8], [5.0, 12.0], [1.0, 3.0]]),
        np.array([0.9, 0.4, 0.01], np.float32),
        np.array([0, 2, 1]),
        SPEC.labels,
    )
    gates = read_gates(network(), SPEC, features(60))
    seen, heard = np.zeros((2, 3, 500), np.float32)
    seen[0, 50:300] = heard[1, 10:90] = 1
    path = tmp_path / "timeline.png"
    draw_timeline(
        path, truth=truth, predictions=predictions, gates=gates, shown=Shown(25.0, seen, heard) if synthetic else None
    )
    from matplotlib.image import imread

    image = imread(path)[..., :3]

    def drawn(color: str) -> bool:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return int((np.abs(image - rgb).max(axis=-1) < 0.01).sum()) > 300  # more than the legend's patch

    assert drawn("#2e7d32")
    assert drawn("#7fb3d9") == synthetic
    assert drawn("#f4b183") == synthetic


def test_a_video_without_events_and_predictions_is_drawn_too(tmp_path: Path) -> None:
    empty = VideoAnnotation("nothing", 10.0, "test", np.zeros((0, 2)), np.zeros(0, np.int64))
    predictions = Detections(np.zeros((0, 2)), np.zeros(0, np.float32), np.zeros(0, np.int64), SPEC.labels)
    draw_timeline(
        tmp_path / "a.png", truth=empty, predictions=predictions, gates=read_gates(network(), SPEC, features(20))
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_without_gates_the_events_alone_are_drawn(tmp_path: Path) -> None:
    truth = VideoAnnotation("clip", 20.0, "test", np.array([[2.0, 9.0]]), np.array([0]))
    predictions = Detections(np.array([[2.1, 8.8]]), np.array([0.9], np.float32), np.array([0]), SPEC.labels)
    draw_timeline(tmp_path / "a.svg", truth=truth, predictions=predictions)
    text = (tmp_path / "a.svg").read_text()
    assert "#2e7d32" in text
    assert "#c8641b" not in text
