"""Released checkpoints: strict names and shapes, safe reading, the import command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ccnet.checkpoint import load_checkpoint, read_checkpoint
from ccnet.cli.main import main
from ccnet.config import ModelConfig
from ccnet.network.model import CCNet
from ccnet.network.released import load_released, read_released, released_name
from runtime.errors import CheckpointError

TINY = ModelConfig(
    length=32, levels=4, visual_dim=12, audio_dim=6, dim=16, heads=4, num_classes=3, head_dim=10, tdm_dim=8
)
TINY_OPTIONS = [
    f"--model.{name}={getattr(TINY, name)}"
    for name in ("length", "levels", "visual_dim", "audio_dim", "dim", "heads", "num_classes", "head_dim", "tdm_dim")
]


def released_parameters(model: CCNet) -> dict[str, Tensor]:
    """Return the parameters of a model in the layout of a released file."""
    released = {}
    for ours, value in model.state_dict().items():
        name = released_name(ours, model.config)
        is_time_linear = "C2F_linear" in name or "feature_tem_block" in name
        is_norm = "norm" in name or ".ln" in name or name.endswith("drop_path_attn.scale")
        if value.ndim == 2 and not is_time_linear:
            value = value[..., None]
        elif value.ndim == 1 and (is_norm or name.endswith("drop_path_mlp.scale")):
            value = value[None, :, None]
        released[name] = value
    return released


@pytest.fixture
def model() -> CCNet:
    torch.manual_seed(0)
    return CCNet(TINY).eval()


@pytest.fixture
def released_file(model: CCNet, tmp_path: Path) -> Path:
    parameters = {f"module.{name}": value for name, value in released_parameters(model).items()}
    raw = {name: value + 1 for name, value in parameters.items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save({"epoch": 40, "state_dict": raw, "state_dict_ema": parameters, "optimizer": {"state": {}}}, path)
    return path


def test_names_are_those_of_the_released_weights(model: CCNet) -> None:
    names = set(released_parameters(model))
    assert {
        "backbone.embd_V.0.conv.weight",
        "backbone.embd_norm_A.1.bias",
        "backbone.self_att_V.1.drop_path_mlp.scale",
        "backbone.ori_CMI_Visual.ln12.weight",
        "backbone.CMI_Audio.2.attn.key_conv.conv.weight",
        "backbone.audio_TCG.3.query_norm.bias",
        "backbone.visual_TCG.0.gate_linear.conv.bias",
        "MTGC_block.C2F_linear.2.weight",
        "MTGC_block.C2F_attention.mlp.3.weight",
        "MTGC_block.feature_expand.conv.weight",
        "MTGC_block.feature_tem_press.conv.weight",
        "MTGC_block.channel_att.3.attn.proj.bias",
        "MTGC_block.feature_tem_block.0.bias",
        "MTGC_block.F2C_attention_block.2.ln2.bias",
        "cls_head.cls_head.conv.bias",
        "reg_head.scale.3.scale",
        "reg_head.offset_head.conv.weight",
    } <= names
    assert len(names) == len(model.state_dict())


def test_import_writes_a_checkpoint_with_the_averaged_weights(
    model: CCNet, released_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    arguments = ["import-weights", str(released_file), "--preset", "demo", "--out", str(out), *TINY_OPTIONS]
    assert main([*arguments, "--model.self_layers", "2"]) == 0
    state = load_checkpoint(out).state_dict()
    assert read_checkpoint(out).labels == ("class_0", "class_1", "class_2")
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    assert "ccnet export" in capsys.readouterr().out


def test_import_takes_a_bare_state_dict(model: CCNet, tmp_path: Path) -> None:
    torch.save(released_parameters(model), tmp_path / "bare.pt")
    fresh = CCNet(TINY)
    load_released(fresh, read_released(tmp_path / "bare.pt"))
    state = fresh.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)


def test_every_misfit_is_listed(model: CCNet) -> None:
    parameters = released_parameters(model)
    del parameters["cls_head.cls_head.conv.bias"]
    parameters["backbone.extra"] = torch.zeros(3)
    parameters["MTGC_block.C2F_linear.0.weight"] = torch.zeros(16, 32)
    parameters["backbone.ori_CMI_Audio.ln2.bias"] = torch.zeros(16)
    parameters["backbone.ori_CMI_Audio.attn.key.bias"] = torch.zeros(16, dtype=torch.int64)
    fresh = CCNet(TINY)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_released(fresh, parameters, source="weights.pth.tar")
    message = str(caught.value)
    assert "weights.pth.tar: 5 of its names" in message
    assert "missing: cls_head.cls_head.conv.bias [3]" in message
    assert "unknown: backbone.extra [3]" in message
    assert "misshapen: MTGC_block.C2F_linear.0.weight is float32 [16, 32], expected float [32, 16]" in message
    assert "misshapen: backbone.ori_CMI_Audio.ln2.bias is float32 [16], expected float [1, 16, 1]" in message
    assert "misshapen: backbone.ori_CMI_Audio.attn.key.bias is int64 [16]" in message
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


class Unsafe:
    """Stands for any object that a pickle could run code through."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "model": Unsafe()}, "refused"),
        ({"epoch": 3, "weights": [1]}, "expected 'state_dict_ema', 'state_dict' or a dict of tensors"),
        ([1, 2], "got a list"),
        ({}, "expected 'state_dict_ema'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "file.pth.tar")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_released(tmp_path / "file.pth.tar")
    assert "weights_only" not in str(caught.value)  # PyTorch advises to load it unsafely


def test_damaged_and_missing_files_are_refused(released_file: Path, tmp_path: Path) -> None:
    released_file.write_bytes(released_file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="model_best"):
        read_released(released_file)
    (tmp_path / "text.pth.tar").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.pth\.tar"):
        read_released(tmp_path / "text.pth.tar")
    with pytest.raises(CheckpointError, match="no such file"):
        read_released(tmp_path / "absent.pth.tar")


def test_the_command_reports_another_configuration(
    released_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    assert main(["import-weights", str(released_file), "--preset", "demo", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "CCNet's release for visual features of 12 and audio features of 6 channels" in message
    settings = [option.replace("=", " ") for option in TINY_OPTIONS if "heads" not in option]
    used = message.partition("Use --preset demo ")[2]
    assert all(setting in used for setting in settings)
    assert not out.exists()


def test_a_file_that_is_no_release_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    command = ["import-weights", str(tmp_path / "other.pt"), "--preset", "demo", "--out", str(tmp_path / "c")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "unknown: weight [3]" in message
    assert message.count("\n") == 11  # a headline, 8 missing ones and how many more, the unknown one
