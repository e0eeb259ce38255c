"""Settings from files, the presets command, and the configuration that a command gets of both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ccnet.cli.main import main
from ccnet.config import PRESETS, all_keys, preset
from ccnet.settings import PRESET_TEXTS, changed_settings, explained_settings, read_settings, setting_text
from runtime.errors import ConfigError

TOML = """
preset = "demo"
annotations = "mine.json"
train.learning-rate = 1e-3
[model]
num-classes = 12
cmi = "off"
[layout]
visual = ["_a", "_b"]
"""
YAML = """
preset: demo
annotations: mine.json
train.learning_rate: 1e-3   # text to YAML 1.1
model:
  num-classes: 12
  cmi: off
layout: {visual: [_a, _b]}
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "text"), [("s.toml", TOML), ("s.yaml", YAML), ("s.YML", YAML)])
def test_a_file_says_what_the_command_line_says(tmp_path: Path, name: str, text: str) -> None:
    if name != "s.toml":
        pytest.importorskip("yaml")
    settings = read_settings(written(tmp_path, name, text))
    assert settings.run == {"preset": "demo", "annotations": "mine.json"}
    config = settings.config("demo", {"model.heads": "2"})
    assert (config.model.num_classes, config.model.cmi, config.train.learning_rate) == (12, False, 1e-3)
    assert config.layout.visual == ("_a", "_b")
    assert config.model.heads == 2
    assert settings.config("demo", {"model.num_classes": "3"}).model.num_classes == 3  # the command line goes first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.toml", "modle = 3", "unknown key 'modle'; did you mean model"),
        ("s.toml", "epochs = 3", r"unknown key 'epochs'; did you mean train\.epochs"),
        (
            "s.toml",
            "[model]\nnum_class = 3",
            r"s\.toml: unknown configuration key 'model\.num_class'; did you mean model\.num",
        ),
        ("s.toml", "[model]\nlength = 'long'", r"s\.toml: model\.length: got 'long', expected int"),
        ("s.toml", "model.length = 1.5", r"model\.length: got 1\.5, expected int"),
        ("s.toml", "preset = 3", "preset: got 3, expected text"),
        ("s.toml", "[model]\nnum-classes = 3\nnum_classes = 4", r"model\.num_classes is given twice"),
        ("s.toml", "model = ", r"s\.toml: can't be read as TOML"),
        ("s.json", "{}", r"got a file named \*\.json, expected \.toml, \.yaml or \.yml"),
        ("s.yaml", "model: {length: 3, length: 4}", "key 'length' occurs twice"),
        ("s.yaml", "model: &a {length: 32}\ntrain: *a", "aliases are not read"),
        ("s.yaml", "a: [", r"s\.yaml: can't be read as YAML"),
        ("s.yaml", "- 1", r"got \[1\], expected settings"),
        ("s.yaml", "model: !!python/object/apply:os.system [ls]", "can't be read as YAML"),
        ("s.yaml", "[" * 5000, r"line 1: nested deeper than 8"),
        ("s.yaml", "model: {" + "a: 1, " * 20_000, r"more than 65536 bytes"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name == "s.yaml":
        pytest.importorskip("yaml")
    path = written(tmp_path, name, text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path).config("unav100", {})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: can't be read \(No such file"):
        read_settings(tmp_path / "absent.toml")


def test_every_setting_is_explained() -> None:
    settings = explained_settings()
    assert [setting.key for setting in settings] == all_keys()
    assert all(len(setting.text) > 10 for setting in settings)
    by_key = {setting.key: setting for setting in settings}
    assert by_key["model.tcg"].source == "paper, Eq. 5 and 6, Table 3"
    assert by_key["post.sigma"].source == "released program, configuration"
    assert by_key["train.device"].source == "this toolkit"
    assert by_key["model.length"].default == 224
    assert set(PRESET_TEXTS) == set(PRESETS)


def test_the_command_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)
    assert all(key in text for key in all_keys())
    assert main(["presets", "davel_unav100"]) == 0
    assert "model.tcg = off  (changed)" in capsys.readouterr().out
    assert main(["presets", "demo", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {s["key"]: s["default"] for s in record["settings"]}["model.length"] == 96
    assert main(["presets", "unav"]) == 2


def test_what_a_preset_changes_leads_to_it() -> None:
    from ccnet.config import with_overrides

    for name in PRESETS:
        changes = {key: setting_text(value) for key, value in changed_settings(name).items()}
        assert with_overrides(preset("unav100"), changes) == preset(name)


def test_commands_take_what_the_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, "s.toml", TOML))
    assert main(["train", "--config", path]) == 2
    assert f"--features is missing: give it here or as 'features' in {path}" in capsys.readouterr().err
    assert main(["train", "--config", path, "--features", "f", "--out", str(tmp_path / "run")]) == 2
    assert "mine.json: no such annotation file" in capsys.readouterr().err
    assert main(["train", "--config", path, "--preset", "dmo", "--features", "f", "--out", "r"]) == 2
    assert "error: preset: got 'dmo'" in capsys.readouterr().err
    assert main(["train", "--preset", "demo"]) == 2
    assert "--annotations is missing" in capsys.readouterr().err


def test_home_folders_that_no_shell_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written(tmp_path, "s.toml", 'preset = "demo"\nannotations = "~/mine.json"\nfeatures = "f"\n')
    assert read_settings(path).run["annotations"] == f"{tmp_path}/mine.json"
    assert main(["check-data", f"--config={path}", "--annotations=~/absent.json"]) == 2
    assert f"{tmp_path}/absent.json: no such annotation file" in capsys.readouterr().err


def test_options_may_have_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check-data", "--per_class", "--help"])
    assert ended.value.code == 0
    assert "--per-class" in capsys.readouterr().out


def test_importing_the_settings_loads_nothing_heavy() -> None:
    code = "import sys, ccnet.settings; assert not {'torch', 'yaml', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
