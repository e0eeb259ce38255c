"""Standard streams that are closed, full, narrow or not read to the end: a message and a status, no traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from builders import SPEC, make_bundle

from ccnet.cli.main import main

pytest.importorskip("onnx")


def closed(*command: str, redirect: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `ccnet` in a shell that redirects its streams."""
    line = shlex.join((sys.executable, "-m", "ccnet", *command)) + f" {redirect}"
    root = str(Path(main.__code__.co_filename).parents[2])
    env = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, errors="replace", check=False, env=env)


@pytest.mark.parametrize(
    ("redirect", "status", "message"),
    [
        (">&-", 2, "standard output is closed"),
        ("> /dev/full", 2, "No space left on device"),
        ("2>&-", 0, ""),
        (">&- 2>&-", 2, ""),
        ("<&- >&- 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path: Path, redirect: str, status: int, message: str) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    done = closed("inspect", str(bundle.folder), redirect=redirect)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    bundle.verify()  # nothing was written into a file that got the number of a closed stream


def test_names_do_not_reach_a_terminal_as_control_characters(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, labels=("\x1b[31mred", "caf\u00e9", "\u72d7", "bell"))
    bundle = make_bundle(tmp_path / "bundle", spec=spec)
    event = {"segment": [1.0, 4.0], "label": spec.labels[0], "label_id": 0}
    record = {"duration": 9, "subset": "test", "annotations": [event]}
    (tmp_path / "a.json").write_text(json.dumps({"database": {"v": record}}))
    (tmp_path / "e.jsonl").write_text(json.dumps({"video_id": "v", "duration": 9, "events": [{**event, "score": 0.5}]}))
    arguments = [str(tmp_path / "e.jsonl"), "--annotations", str(tmp_path / "a.json"), "--per-class"]
    for encoding in ("utf-8", "ascii", "cp1252"):
        numbers = tmp_path / f"{encoding}.json"
        command = ("evaluate", *arguments, "--classes", str(bundle.folder), "--json", str(numbers))
        done = closed(*command, redirect="", PYTHONIOENCODING=encoding, LC_ALL="C")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert "\\x1b[31mred" in done.stdout
        assert spec.labels[2] in json.loads(numbers.read_text())["per_class"]


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    script = "import os, sys; os.close(os.pipe()[0]); r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    script += "from ccnet.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "inspect", str(bundle.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""
