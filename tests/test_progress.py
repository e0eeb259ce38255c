"""Progress: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import sys

import pytest

from runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("runtime.progress.time.monotonic", lambda: self.now)


def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with Progress("predict", total=60, initial=10) as progress:
        for _ in range(50):
            clock.now += 0.5
            progress.advance()
    assert capsys.readouterr().err == "predict: 30/60, 2.0 videos/s\npredict: 50/60, 2.0 videos/s\n"


def test_numbers_stand_behind_the_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with Progress("epoch 1/3", total=40, unit="step") as progress:
        progress.show(loss=0.123456, rate=1e-4)
        clock.now += 20
        progress.advance(4)
    assert capsys.readouterr().err == "epoch 1/3: 4/40, 0.2 steps/s, loss 0.1235, rate 0.0001\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("predict", total=8, initial=3) as progress:
        progress.show(loss=2.0)
        progress.advance(5)
    assert "3/8" in terminal.getvalue()


def test_a_terminal_without_tqdm_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress("predict", total=8) as progress:
        clock.now += 20
        progress.advance(2)
    assert terminal.getvalue() == "predict: 2/8, 0.1 videos/s\n"


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()])
def test_quiet(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("predict", total=8, quiet=True) as progress:
        clock.now += 100
        progress.advance()
        progress.show(loss=1.0)
    assert terminal.getvalue() == ""
