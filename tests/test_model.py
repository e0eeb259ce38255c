"""The network: golden parity at every stage, masks, batches, ablation switches, size, gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from builders import SWITCHES, TINY, golden, random_batch, random_network, shared_path
from torch import nn

from ccnet.config import ModelConfig
from ccnet.network.layers import Block, sinusoidal_positions
from ccnet.network.model import CCNet
from ccnet.network.released import load_released, released_name
from runtime.errors import FeatureError
from runtime.spec import point_grid

REFERENCE = ModelConfig(length=64, visual_dim=48, audio_dim=16, dim=32, num_classes=7, head_dim=24)
"""Of the network in the golden files of the released program."""


def load_part(model: CCNet, prefix: str, data: dict[str, Any]) -> nn.Module:
    """Return one module of the network with its released parameters."""
    module = model.get_submodule(prefix)
    released = {n: data[f"param/{released_name(f'{prefix}.{n}', model.config)}"] for n in module.state_dict()}
    own = module.state_dict()
    module.load_state_dict({n: torch.from_numpy(value).reshape(own[n].shape) for n, value in released.items()})
    return module.eval()


def test_a_collaboration_layer_equals_the_released_program() -> None:
    """Blocks and gates of a strided layer, from inputs that are partly padding."""
    data = golden("network")
    layer = load_part(CCNet(REFERENCE), "cmcc.layers.3", data)
    mask = torch.arange(0, 64, 4) < torch.from_numpy(data["lengths"])[:, None]
    visual, audio = (torch.from_numpy(data[f"cmcc_{m}/2"]).transpose(1, 2) for m in ("visual", "audio"))
    with torch.inference_mode():
        found = layer(visual, audio, mask[..., None])
    for modality, got in zip(("visual", "audio"), found, strict=True):
        expected = torch.from_numpy(data[f"cmcc_{modality}/3"]).transpose(1, 2)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()  # measured: 2e-7


@pytest.mark.parametrize(("head", "output"), [("class_head", "cls_logits"), ("offset_head", "offsets")])
def test_heads_equal_the_released_program(head: str, output: str) -> None:
    data = golden("network")
    module = load_part(CCNet(REFERENCE), head, data)
    levels = [torch.from_numpy(data[f"mtgc/{level}"]).transpose(1, 2) for level in range(6)]
    mask = (torch.arange(64) < int(data["lengths"][1]))[None, :, None]
    with torch.inference_mode():
        got = module(levels, [mask[:, :: 2**level] for level in range(6)])
    valid = torch.from_numpy(data["point_mask"][1:2])
    assert (got - torch.from_numpy(data[output][1:2]))[valid].abs().max() < 1e-5  # measured: 2e-6


@pytest.fixture(scope="module")
def released() -> dict[str, np.ndarray]:
    with np.load(shared_path("reference/authors_tiny.npz"), allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def released_stages(released: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    model = CCNet(REFERENCE).eval()
    load_released(model, {k[6:]: torch.from_numpy(v) for k, v in released.items() if k.startswith("param/")})
    mask = torch.arange(64) < torch.from_numpy(released["lengths"])[:, None, None]
    stages: dict[str, torch.Tensor] = {}

    def keep_cmcc(_module: Any, _inputs: Any, output: Any) -> None:
        for name, levels in zip(("cmcc_visual", "cmcc_audio"), output, strict=True):
            stages.update({f"{name}/{level}": x.transpose(1, 2) for level, x in enumerate(levels)})

    def keep_mtgc(_module: Any, _inputs: Any, output: Any) -> None:
        stages.update({f"mtgc/{level}": x.transpose(1, 2) for level, x in enumerate(output)})

    model.cmcc.register_forward_hook(keep_cmcc)
    model.mtgc.register_forward_hook(keep_mtgc)
    with torch.inference_mode():
        visual, audio = torch.from_numpy(released["visual"]), torch.from_numpy(released["audio"])
        stages["cls_logits"], stages["offsets"] = model(visual, audio, mask)
    return stages


@pytest.mark.parametrize("stage", ["cmcc_visual", "cmcc_audio", "mtgc"])
@pytest.mark.parametrize("level", range(6))
def test_inner_stages_equal_the_released_program(
    released: dict[str, np.ndarray], released_stages: dict[str, torch.Tensor], stage: str, level: int
) -> None:
    expected = torch.from_numpy(released[f"{stage}/{level}"])
    difference = (released_stages[f"{stage}/{level}"] - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max()  # measured: 6e-7


@pytest.mark.parametrize("output", ["cls_logits", "offsets"])
def test_outputs_equal_the_released_program(
    released: dict[str, np.ndarray], released_stages: dict[str, torch.Tensor], output: str
) -> None:
    valid = torch.from_numpy(released["point_mask"])
    difference = released_stages[output] - torch.from_numpy(released[output])
    assert difference[valid].abs().max() < 2e-5  # measured: 4e-6


def test_full_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = CCNet(ModelConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 235.5


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_video_gets_the_same_alone_and_in_a_batch(switch: str) -> None:
    config = dataclasses.replace(TINY, **SWITCHES[switch])
    model = random_network(config)
    visual, audio, mask = random_batch(config, [32, 17, 1, 8])
    with torch.inference_mode():
        together = model(visual, audio, mask)
        for i in range(4):
            alone = model(visual[i : i + 1], audio[i : i + 1], mask[i : i + 1])
            for ours, expected in zip(together, alone, strict=True):
                # Values reach 50 here; another order of summation moves them by 1e-5, a wrong mask by 1e-1.
                torch.testing.assert_close(ours[i : i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_is_used_and_learns(switch: str) -> None:
    config = dataclasses.replace(TINY, **SWITCHES[switch])
    model = random_network(config).train()
    logits, offsets = model(*random_batch(config, [32, 19]))
    (logits.square().mean() + offsets.mean()).backward()
    # A key bias adds the same to all scores of a query and so has no gradient, but where constant keys stand beside.
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


def test_outputs_have_the_shapes_of_the_contract() -> None:
    model = CCNet(TINY).eval()
    logits, offsets = model(*random_batch(TINY, [32, 5]))
    points = point_grid(TINY.length, TINY.levels).num_points
    assert logits.shape == (2, points, 3)
    assert offsets.shape == (2, points, 3, 2)
    assert (offsets >= 0).all()


def test_a_video_without_any_valid_step_gives_finite_numbers() -> None:
    model = random_network(TINY)
    with torch.inference_mode():
        logits, offsets = model(*random_batch(TINY, [0, 1]))
    assert logits.isfinite().all()
    assert offsets.isfinite().all()


def test_padding_content_is_not_seen_outside_the_first_convolution() -> None:
    """Garbage well behind the end does not reach valid points: masks act in every layer."""
    model = random_network(TINY)
    visual, audio, mask = random_batch(TINY, [9])
    dirty = visual.clone()
    dirty[:, :, 12:] = 7.0
    with torch.inference_mode():
        clean_logits, _ = model(visual, audio, mask)
        dirty_logits, _ = model(dirty, audio, mask)
    valid = torch.from_numpy(point_grid(32, 4).valid_points(9))
    torch.testing.assert_close(dirty_logits[:, valid], clean_logits[:, valid], rtol=0, atol=0)


def test_a_wrong_shape_names_the_tensor() -> None:
    model = CCNet(TINY)
    visual, audio, mask = random_batch(TINY, [32])
    with pytest.raises(FeatureError, match=r"audio: got shape \[1, 6, 31\], expected \[batch, 6, 32\]"):
        model(visual, audio[..., :-1], mask)
    with pytest.raises(FeatureError, match=r"mask: got torch\.float32, expected torch\.bool"):
        model(visual, audio, mask.float())


def test_initial_scores_are_the_prior() -> None:
    torch.manual_seed(0)
    model = CCNet(TINY).eval()
    with torch.inference_mode():
        logits, _ = model(*random_batch(TINY, [32]))
    assert 0.002 < logits.sigmoid().median() < 0.05


def test_positions_interleave_sine_and_cosine() -> None:
    table = sinusoidal_positions(10, 6)
    expected = [np.sin(3), np.cos(3), np.sin(3 / 10000 ** (2 / 6)), np.cos(3 / 10000 ** (2 / 6))]
    np.testing.assert_allclose(table[3, :4].numpy(), expected, rtol=1e-6)


def test_stochastic_depth_drops_whole_samples_in_training_only() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=0.5)
    for scale in (block.attention_scale, block.mlp_scale):
        torch.nn.init.ones_(scale.scale)
    x, mask = torch.randn(64, 4, 8), torch.ones(64, 4, 1, dtype=torch.bool)
    changed = (block.train()(x, x, mask) - x).abs().amax((1, 2)) > 0
    assert 32 < changed.sum() < 64  # both branches drop with probability 1/4: 48 of 64 change on average
    with torch.inference_mode():
        torch.testing.assert_close(block.eval()(x, x, mask), block(x, x, mask))
