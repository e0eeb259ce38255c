"""What commands report: one line a message on standard error, results alone on standard output."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from ccnet.cli.logs import reporting, video_list
from ccnet.cli.main import main


def test_messages_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting():
        logging.getLogger("ccnet.training.loop").info("epoch 1 done")
        logging.getLogger("runtime.localizer").warning("one video is long")
        logging.getLogger("export.bundle").error("no room")
    printed = capsys.readouterr()
    assert printed.err == "epoch 1 done\nwarning: one video is long\nno room\n"
    assert printed.out == ""


def test_quiet_leaves_the_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=True):
        logging.getLogger("ccnet.training.loop").info("epoch 1 done")
        logging.getLogger("ccnet.training.loop").warning("the disk is slow")
    assert capsys.readouterr().err == "warning: the disk is slow\n"


@pytest.mark.filterwarnings("always:never verified")
def test_python_warnings_are_one_line_and_keep_their_way_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with reporting(), reporting():  # a command that runs a command
        warnings.warn("never verified", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: never verified\n"
    assert warnings.showwarning is before


def test_lines_stand_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm")
    with reporting(), tqdm.tqdm(total=3, file=sys.stderr, desc="predict") as bar:
        bar.update()
        logging.getLogger("ccnet").info("half way")
    assert "half way" in capsys.readouterr().err.replace("\r", "\n").splitlines()


def test_long_lists_are_cut() -> None:
    videos = {f"v{i}": f"problem {i}" for i in range(5)}
    assert video_list(videos, limit=2).splitlines() == ["  v0: problem 0", "  v1: problem 1", "  ... and 3 more"]
    assert len(video_list(videos).splitlines()) == 5


def test_a_mistake_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/bundle"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ccnet inspect: error: /no/such/bundle")
    assert len(printed.err.splitlines()) == 1
