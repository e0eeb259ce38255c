"""Checkpoint folders: written whole or not at all, read strictly."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SMALLEST as CONFIG
from builders import SMALLEST_LABELS as LABELS

import runtime.folders
from ccnet import load_checkpoint, save_checkpoint
from ccnet.checkpoint import MANIFEST, WEIGHTS, read_checkpoint
from ccnet.config import Config, ModelConfig
from ccnet.network.model import CCNet
from runtime.errors import CheckpointError, ConfigError
from runtime.files import sha256_file
from runtime.folders import recover_folder


def make_model(seed: int = 0, config: Config = CONFIG) -> CCNet:
    torch.manual_seed(seed)
    return CCNet(config.model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of `make_model(0)`."""
    save_checkpoint(tmp_path / "best", make_model(), config=CONFIG, labels=LABELS, metrics={"validation_map": 0.25})
    return tmp_path / "best"


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_was_saved_comes_back(folder: Path) -> None:
    model = load_checkpoint(folder)
    assert same_weights(model, make_model())
    assert not same_weights(model, make_model(1))
    assert not any(module.training for module in model.modules())
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.labels == LABELS
    assert checkpoint.spec == CONFIG.spec(LABELS)
    assert checkpoint.metrics == {"validation_map": 0.25}
    assert checkpoint.weights_sha256 == sha256_file(folder / WEIGHTS)


def test_saving_replaces_an_earlier_checkpoint_and_leaves_nothing_else(folder: Path) -> None:
    save_checkpoint(folder, make_model(1), config=CONFIG, labels=LABELS)
    assert same_weights(load_checkpoint(folder), make_model(1))
    assert os.listdir(folder.parent) == ["best"]


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not replaced"):
        save_checkpoint(tmp_path, make_model(), config=CONFIG, labels=LABELS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_labels_and_model_must_fit_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels: got 2, expected model\.num_classes = 3"):
        save_checkpoint(tmp_path / "c", make_model(), config=CONFIG, labels=("dog", "rain"))
    other = Config(model=ModelConfig(**{**CONFIG.model.to_json(), "dim": 16}))
    with pytest.raises(CheckpointError, match="the model was built with"):
        save_checkpoint(tmp_path / "c", make_model(config=other), config=CONFIG, labels=LABELS)
    assert os.listdir(tmp_path) == []


def test_no_checkpoint_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder; 'ccnet train'"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no checkpoint\.json.*it holds .*best"):
        load_checkpoint(folder.parent)
    with pytest.raises(CheckpointError, match="got a file, expected a checkpoint folder; 'ccnet import-weights'"):
        load_checkpoint(folder / "checkpoint.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 100), r"bytes, checkpoint\.json says"),
        (lambda path: os.truncate(path, 0), r"0 bytes, checkpoint\.json says"),
        (lambda path: _flip_byte(path, 5), "SHA-256"),
        (lambda path: _flip_byte(path, -1), "SHA-256"),
    ],
)
def test_damaged_weights(folder: Path, damage: Any, message: str) -> None:
    damage(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def _flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**data, **changes}))


def _accept_weights(folder: Path) -> None:
    """Make the manifest agree with whatever lies in the weights file."""
    path = folder / WEIGHTS
    _edit(folder, weights={"size": path.stat().st_size, "sha256": sha256_file(path)})


def test_weights_of_another_configuration_are_listed(folder: Path) -> None:
    model = {**CONFIG.model.to_json(), "head_dim": 12, "self_layers": 2, "f2c": False}
    _edit(folder, config={**CONFIG.to_json(), "model": model})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "unknown: mtgc." in message  # the F2C blocks
    assert "missing: embed_audio." in message  # the second self-attention layer
    assert "is [8, 16, 3], expected [12, 16, 3]" in message
    assert "Use the configuration it was trained with" in message


def test_a_pickle_in_place_of_the_weights_is_never_executed(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    _accept_weights(folder)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"surprise": 1}, "unknown or missing key.* surprise"),
        ({"labels": ["dog"]}, "labels: got 1, expected"),
        ({"labels": "dog"}, "expected a list of class names"),
        ({"metrics": []}, "metrics"),
        ({"weights": {"size": "big"}}, "weights: got"),
        ({"config": {"model": {"dimension": 8}}}, r"unknown key\(s\) dimension"),
        ({"config": {"model": {"dim": 8.5}}}, r"config\.model\.dim: got 8\.5, expected int"),
    ],
)
def test_a_manifest_that_can_not_be_used(folder: Path, changes: Any, message: str) -> None:
    _edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_a_manifest_that_is_not_json(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_checkpoint(folder)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_a_full_disk_leaves_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, failing_call: int
) -> None:
    """Weights and manifest are synced, the manifest is renamed into the new folder, then two folders are renamed."""
    original, calls = getattr(os, function), 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, function, fail)
    monkeypatch.setattr(runtime.folders, "exchange", lambda *_: False)  # as where a system has none
    if (function, failing_call) == ("fsync", 3):  # there are only two: nothing fails
        save_checkpoint(folder, make_model(1), config=CONFIG, labels=LABELS)
        assert same_weights(load_checkpoint(folder), make_model(1))
    else:
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(folder, make_model(1), config=CONFIG, labels=LABELS)
        assert same_weights(load_checkpoint(folder), make_model())
    assert os.listdir(folder.parent) == ["best"]


@pytest.mark.parametrize(
    ("function", "fatal_call", "before_recovery"),
    [("fsync", 1, "old"), ("fsync", 2, "old"), ("replace", 2, "old"), ("replace", 3, "none")],
)
def test_a_kill_while_writing(folder: Path, function: str, fatal_call: int, before_recovery: str) -> None:
    """Killed inside the n-th call, before it does anything; between the two folder renames there is no folder."""
    original, calls, model = getattr(os, function), 0, make_model(1)

    def fatal(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    child = os.fork()
    if child == 0:
        setattr(os, function, fatal)
        runtime.folders.exchange = lambda *_: False  # as where a system has none
        save_checkpoint(folder, model, config=CONFIG, labels=LABELS)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert folder.exists() == (before_recovery == "old")
    if folder.exists():
        assert same_weights(load_checkpoint(folder), make_model())
    recover_folder(folder)
    assert os.listdir(folder.parent) == ["best"]
    assert same_weights(load_checkpoint(folder), make_model())
