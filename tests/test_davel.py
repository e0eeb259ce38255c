"""DAVEL, the baseline: CCNet with four parts off computes what its authors' program computes, from their weights on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import DAVEL_OPTIONS, davel_parameters, golden
from torch import Tensor

from ccnet.checkpoint import read_checkpoint
from ccnet.cli.main import main
from ccnet.config import PRESETS, preset
from ccnet.network.model import CCNet
from ccnet.network.released import Release, explain_misfit, load_released, read_released, released_name
from ccnet.torch_backend import TorchBackend
from runtime.errors import CheckpointError
from runtime.localizer import Localizer


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    return golden("davel")


@pytest.fixture(scope="module")
def parameters(file: dict[str, Any]) -> dict[str, Tensor]:
    return davel_parameters(file)


@pytest.fixture(scope="module")
def released(parameters: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the authors' training program saves it."""
    path = tmp_path_factory.mktemp("released") / "davel.pth.tar"
    state = {f"module.{name}": value for name, value in parameters.items()}
    torch.save({"epoch": 39, "state_dict": state, "state_dict_ema": state}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(released: Path) -> Path:
    out = released.parent / "checkpoint"
    assert main(["import-weights", str(released), "--preset", "davel_unav100", "--out", str(out), *DAVEL_OPTIONS]) == 0
    return out


def test_presets_are_the_networks_of_the_paper_without_four_parts() -> None:
    for davel, ccnet in (("davel_unav100", "unav100"), ("davel_unav100_onepeace", "unav100_onepeace")):
        absent = dataclasses.replace(preset(ccnet).model, tcg=False, c2f=False, f2c=False, tdm_channel_branch=False)
        assert preset(davel).model == absent
        for section in ("train", "time_base", "layout", "post"):
            assert getattr(preset(davel), section) == getattr(preset(ccnet), section)
        assert preset(davel).loss.iou == "diou"
    assert preset("davel_unav100_onepeace").layout.visual == ("_one_peace_video_finetune",)
    assert preset("davel_unav100_onepeace").layout.audio == ("_one_peace_audio",)


def test_the_full_size_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = CCNet(preset("davel_unav100").model)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 139.5


def assert_events_of_the_authors(localizer: Localizer, file: dict[str, Any]) -> None:
    lengths = file["lengths"].tolist()
    videos = [
        (file["visual"][i, :, :n].T, file["audio"][i, :, :n].T, float(file["dur"][i])) for i, n in enumerate(lengths)
    ]
    for i, found in enumerate(localizer.batch(videos)):
        assert found.labels.tolist() == file[f"det{i}_labels"].tolist()
        np.testing.assert_allclose(found.segments, file[f"det{i}_segments"], atol=1e-4)  # measured: 1.1e-5 s
        np.testing.assert_allclose(found.scores, file[f"det{i}_scores"], atol=1e-5)  # measured: 7e-7


def test_imported_weights_give_the_outputs_and_events_of_the_authors(checkpoint: Path, file: dict[str, Any]) -> None:
    made = read_checkpoint(checkpoint)
    model = made.load_model()
    mask = torch.arange(64) < torch.from_numpy(file["lengths"])[:, None, None]
    with torch.inference_mode():
        outputs = model(torch.from_numpy(file["visual"]), torch.from_numpy(file["audio"]), mask)
    for got, name in zip(outputs, ("cls", "reg"), strict=True):
        assert np.abs(got.numpy() - file[name])[file["mask"]].max() < 2e-5  # measured: 4e-6
    with Localizer([TorchBackend(model, made.spec, max_batch=4)], made.spec) as localizer:
        assert_events_of_the_authors(localizer, file)


def test_the_import_says_whose_release_it_was(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["import-weights", str(released), "--preset", "davel_unav100", "--out", str(tmp_path / "c"), *DAVEL_OPTIONS]
        )
        == 0
    )
    assert "DAVEL's release, 558 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--preset", "unav100", *DAVEL_OPTIONS], "Use --preset davel_unav100, other settings as they are"),
        (["--preset", "davel_unav100"], "Use --preset davel_unav100 --model.visual_dim 48 --model.audio_dim 16"),
        (["--preset", "demo"], "DAVEL's release for visual features of 48 and audio features of 16 channels"),
    ],
)
def test_another_preset_is_answered_with_the_one_that_fits(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert main(["import-weights", str(released), "--out", str(tmp_path / "c"), *options]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("fits", ["unav100", "unav100_onepeace", "davel_unav100", "davel_unav100_onepeace"])
def test_released_files_of_full_size_are_told_apart(fits: str) -> None:
    """With shapes alone: which of the four releases a file is, whatever preset it was given with."""
    config = preset(fits).model
    with torch.device("meta"):
        state = CCNet(config).state_dict()
    release: Release = "DAVEL" if fits.startswith("davel") else "CCNet"
    names = {released_name(name, config, release): value for name, value in state.items()}
    presets = {name: known.model for name, known in PRESETS.items()}
    for given in presets:
        message = explain_misfit(names, given, presets)
        if given == fits:
            assert message is None
        else:
            assert message is not None
            assert message.startswith(f"{release}'s release")
            assert message.endswith(f"Use --preset {fits}, other settings as they are")


def test_a_file_with_a_tensor_too_few_is_still_listed(parameters: dict[str, Tensor], tmp_path: Path) -> None:
    rest = {name: value for name, value in parameters.items() if name != "dependency_block.cooccur_branch.ln2.bias"}
    torch.save(rest, tmp_path / "file.pth.tar")
    settings = {key: int(value) for key, value in (o.removeprefix("--model.").split("=") for o in DAVEL_OPTIONS)}
    config: Any = dataclasses.replace(preset("davel_unav100").model, **settings)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"missing: dependency_block\.cooccur_branch\.ln2\.bias \[1, 128, 1\]"):
        load_released(CCNet(config), read_released(tmp_path / "file.pth.tar"))
    assert json.loads(str(golden("davel")["config"]))["C"] == config.num_classes
