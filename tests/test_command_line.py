"""What all commands share: the version, completion by the shell, results as JSON, colours on a terminal alone."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import LABELS, engine, features_with, make_bundle, write_features

import ccnet
from ccnet.cli.logs import reporting
from ccnet.cli.main import COMMANDS, main, make_parser
from ccnet.cli.start import start
from runtime.files import write_json

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ccnet {ccnet.__version__}\n"


def completions(line: str, tmp_path: Path) -> list[str]:
    """Return what the shell would offer at the end of a line, asked as bash asks."""
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "ccnet"], env=environment, check=True, timeout=60)
    return [word.strip() for word in answer.read_text().split("\n")]


def test_the_shell_completes_commands_options_and_choices(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    assert completions("ccnet ins", tmp_path) == ["inspect"]
    assert "--long-videos" in completions("ccnet predict --l", tmp_path)
    assert completions("ccnet predict --backend openv", tmp_path) == ["openvino"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_its_default(name: str) -> None:
    parser = make_parser()[1][name.replace("_", "-")]
    assert parser.description
    for action in parser._actions:
        words = action.help or ""
        assert words, action.option_strings or action.dest
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default" in words, action.option_strings


def test_ctrl_c_while_the_command_line_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        """A finder of modules at which Ctrl-C comes."""

        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "ccnet.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ccnet.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert start() == 130
    assert capsys.readouterr().err == "ccnet: interrupted\n"


def test_completion_does_not_cost_a_command_that_nobody_completes() -> None:
    code = (
        "import sys\nfrom ccnet.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    assert 'argcomplete' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_results_as_json_are_all_that_standard_output_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle", [engine("onnxruntime")]).folder
    (tmp_path / "features").mkdir()
    write_features(tmp_path / "features", "v", features_with(30, [(3, 8, 1, 3.0)]))
    training = [{"segment": [1.0, 2.0], "label": label, "label_id": index} for index, label in enumerate(LABELS)]
    found = [{"segment": [3.5, 8.5], "label": LABELS[1], "label_id": 1}]
    database = {
        "v": {"duration": 30.0, "subset": "test", "annotations": found},
        "w": {"duration": 30.0, "subset": "train", "annotations": training},
    }
    write_json(tmp_path / "annotations.json", {"version": "1", "database": database})
    where = ["--features", str(tmp_path / "features"), "--annotations", str(tmp_path / "annotations.json")]

    def result(*command: str) -> dict[str, object]:
        capsys.readouterr()
        assert main([*command, "--json"]) == 0
        record: dict[str, object] = json.loads(capsys.readouterr().out)
        return record

    assert result("evaluate", str(bundle), *where)["average_map"] == 1.0
    out = str(tmp_path / "events.jsonl")
    predicted = result("predict", str(bundle), *where, "--subset", "test", "--out", out)
    assert (predicted["videos"], predicted["events"], predicted["complete"], predicted["failed"]) == (1, 1, True, {})
    assert result("rebuild", str(bundle)) == {"bundle": str(bundle), "rebuilt": {}}
    assert "candidates" in result("bench", str(bundle), "--batches", "1", "--seconds", "0", "--calls", "1")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "pipe"],
)
def test_colours_on_a_terminal_alone(
    stream: io.StringIO, environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    with reporting():
        logging.getLogger("runtime").warning("one video is long")
        logging.getLogger("runtime").error("no room")
        logging.getLogger("runtime").info("half way")
    text = stream.getvalue()
    assert ("\x1b[" in text) == coloured
    if not coloured:
        assert text == "warning: one video is long\nno room\nhalf way\n"
    assert text.endswith("half way\n")
