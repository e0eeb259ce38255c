"""Presets and `--section.field value` overrides."""

from __future__ import annotations

import pytest

from ccnet.config import PRESETS, Config, ModelConfig, parse_overrides, preset, with_overrides
from runtime.errors import ConfigError


def test_presets_are_those_of_the_paper() -> None:
    model = preset("unav100").model
    assert (model.visual_dim, model.audio_dim, model.length, model.num_classes) == (2048, 128, 224, 100)
    onepeace = preset("unav100_onepeace")
    assert (onepeace.model.visual_dim, onepeace.model.audio_dim, onepeace.model.length) == (1536, 1536, 256)
    assert (onepeace.time_base.fps, onepeace.time_base.stride_frames) == (16.0, 4.0)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    assert Config.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected one of unav100"):
        preset("unav")


def test_overrides_of_every_kind() -> None:
    arguments = ["--model.length", "96", "--post.method=hard", "--model.cmi", "off", "--train.learning_rate", "1e-3"]
    config = with_overrides(preset("unav100"), parse_overrides([*arguments, "--layout.visual", "_a,_b"]))
    assert config.model.length == 96
    assert config.post.method == "hard"
    assert config.model.cmi is False
    assert config.train.learning_rate == 1e-3
    assert config.layout.visual == ("_a", "_b")
    assert config.model.dim == preset("unav100").model.dim


@pytest.mark.parametrize(("text", "value"), [(".001", 1e-3), ("1.", 1.0), ("+2", 2.0), ("1E-5", 1e-5)])
def test_floats_are_written_as_in_python(text: str, value: float) -> None:
    assert with_overrides(preset("demo"), {"loss.offset_weight": text}).loss.offset_weight == value


def test_hyphens_and_underscores_are_the_same() -> None:
    arguments = ["--model.num-classes", "7", "--model.num_classes=8", "--time-base.stride-frames", "4"]
    config = with_overrides(preset("unav100"), parse_overrides(arguments))
    assert config.model.num_classes == 8  # the last one
    assert config.time_base.stride_frames == 4
    assert with_overrides(config, {"model.num-classes": 9}).model.num_classes == 9


def test_a_negative_value_is_a_value() -> None:
    assert parse_overrides(["--loss.offset_weight", "-1"]) == {"loss.offset_weight": "-1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.lenght", "96"],
            "unknown configuration key 'model.lenght'; did you mean model.length\\? known keys: model",
        ),
        (
            ["--modle.length", "96"],
            "unknown configuration key 'modle.length'; did you mean model.length\\? known sections",
        ),
        (["--epochs", "3"], "unknown argument '--epochs'; did you mean --train.epochs"),
        (["--model.class-number", "3"], "did you mean model.num_classes"),
        (["--model.length", "long"], "model.length: got 'long', expected int"),
        (["--model.length", "1.5"], "model.length: got 1.5, expected int"),
        (["--model.length", "100"], "expected a multiple of 32"),
        (["--model.dim", "30"], r"expected a multiple of model.heads \(4\)"),
        (["--loss.iou", "ciou"], "loss.iou: got 'ciou', expected one of"),
        (["--model.length"], "a value is missing"),
        (["--model.length", "--model.dim"], "a value is missing"),
        (["stray"], "unknown argument 'stray'"),
        (["--train.ema", "1"], "train.ema"),
        (["--train.crop_min", "0"], "crop_min"),
        *((["--train.clip_norm", text], "clip_norm: got .*, expected a number above 0") for text in ("0", "-1", "-.5")),
        *((["--train.seed", text], "train.seed: got") for text in ("-1", "1e22", "9" * 30, "1.")),
        (["--train.weight_decay", "-1"], "weight_decay: got -1.0, expected a number from 0 to 1"),
        (["--train.min_learning_rate", "1"], r"min_learning_rate: got 1.0, expected .* train.learning_rate \(0.0001\)"),
        (["--train.workers", "100000"], "train.workers: got 100000"),
        (["--loss.focal_gamma", "-1"], "loss.focal_gamma"),
        (["--loss.offset_weight", "-1"], "loss.offset_weight"),
        *((["--train.learning_rate", text], "learning_rate: got") for text in ("nan", "inf", "1e999", "fast", "")),
    ],
)
def test_override_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(preset("unav100"), parse_overrides(arguments))


def test_spec_needs_a_label_per_class() -> None:
    config = Config(model=ModelConfig(num_classes=3))
    assert config.spec(("a", "b", "c")).num_classes == 3
    with pytest.raises(ConfigError, match="labels: got 2, expected model.num_classes = 3; --model.num_classes 2"):
        config.spec(("a", "b"))
