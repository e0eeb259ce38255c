"""The page of the server in a real browser: files in, a timeline and a download out, by mouse and by keyboard."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, OracleBackend, features_with, write_features
from running_server import Running, running

from runtime.localizer import Localizer
from runtime.serving.options import ExtractorOptions
from runtime.spec import ModelSpec

CHROMIUM = Path("/usr/bin/chromium")
for package in ("starlette", "uvicorn", "httptools", "prometheus_client", "python_multipart"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
if not CHROMIUM.exists():
    pytest.skip(f"{CHROMIUM} is not installed", allow_module_level=True)

FEATURES = features_with(20, [(3, 8, 1, 3.0), (11, 14, 2, -1.0)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose every error and every request to another place fails the test."""
    opened = browser.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    opened.on(
        "request",
        lambda request: None if "127.0.0.1" in request.url or "blob:" in request.url else problems.append(request.url),
    )
    yield opened
    opened.close()
    assert [problem for problem in problems if not problem.startswith("data:")] == []


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as server:
        yield server


def url(server: Running) -> str:
    return f"http://{server.host}:{server.port}/"


def test_files_become_a_timeline_and_a_download(page: Any, served: Running, tmp_path: Path) -> None:
    write_features(tmp_path, "one", FEATURES)
    np.savez(tmp_path / "two.npz", visual=FEATURES.visual, audio=FEATURES.audio)
    page.goto(url(served))
    page.get_by_text("ready").wait_for()
    assert "fake" in page.locator("#status").inner_text()
    assert "_seen.npy" in page.locator("#expected").inner_text()
    names = ("one_seen.npy", "one_heard.npy", "two.npz")
    page.get_by_label("Duration").fill("20")
    page.locator("#files").set_input_files([tmp_path / name for name in names])
    page.locator("svg").nth(1).wait_for()
    assert page.locator("h2").all_inner_texts() == ["two", "one"]
    first = page.locator("section").first
    assert first.locator("rect title").all_text_contents()[-1].startswith("dog: 3.50 to 8.50 s, score 0.95")
    assert first.get_by_role("img").get_attribute("aria-label") == "Events of two over time"

    shown = first.locator("rect").count()
    page.locator("#least").fill("0.5")
    assert first.locator("rect").count() == 1 < shown
    first.get_by_text("As a table").click()
    assert first.locator("td").all_inner_texts()[:3] == ["3.50", "8.50", "dog"]

    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    lines = Path(download.value.path()).read_text().splitlines()
    expected = Localizer([OracleBackend()], SPEC)(FEATURES.visual, FEATURES.audio, 20.0).to_json()
    assert [json.loads(line) for line in lines] == [
        {"video_id": name, "duration": 20, "events": expected} for name in ("one", "two")
    ]
    page.get_by_text(re.compile(r"[\d.]+ ms \(99 %")).wait_for()


def test_bad_files_say_what_is_wrong(page: Any, served: Running, tmp_path: Path) -> None:
    (tmp_path / "<b>bad</b>_seen.npy".replace("/", "")).write_bytes(b"nonsense")
    page.goto(url(served))
    page.get_by_text("ready").wait_for()
    page.locator("#files").set_input_files(list(tmp_path.iterdir()))
    alert = page.locator("section [role=alert]")
    alert.wait_for()
    assert "has no file *_heard.npy" in alert.inner_text()
    assert page.locator("section b").count() == 0  # names are text, not markup


def test_the_keyboard_reaches_everything(page: Any, served: Running) -> None:
    page.goto(url(served))
    page.get_by_text("ready").wait_for()
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["files", "duration", "least"]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.evaluate("document.getElementById('files').onclick = (event) => { window.pressed = true; return false; }")
    page.locator("#files").press("Enter")
    page.wait_for_function("window.pressed")


def test_a_video_shows_its_progress_and_becomes_a_timeline(
    page: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    for package in ("torch", "av", "PIL", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from video_files import write_video

    extractor = request.getfixturevalue("extractor")
    spec = ModelSpec(length=32, levels=4, visual_dim=128, audio_dim=16, labels=LABELS)
    backend = OracleBackend(spec)
    options = ExtractorOptions(folder=str(extractor.folder), threads=1)
    write_video(tmp_path / "clip.mp4", count=41, sound=1.7)
    write_video(tmp_path / "long.mp4", count=1500, size=(48, 64), sound=60.0)
    (tmp_path / "text.mp4").write_text("no video")
    with running([backend], localizer=Localizer([backend], spec), extractor=options) as server:
        page.goto(url(server))
        page.get_by_text("Drop videos or feature files here").wait_for()
        assert "mkv" in page.locator("#files").get_attribute("accept")
        page.locator("#files").set_input_files(tmp_path / "clip.mp4")
        page.get_by_role("img", name="Events of clip over time").wait_for()
        assert "events in 1.64 s" in page.locator("section").first.inner_text()
        page.locator("#files").set_input_files(tmp_path / "long.mp4")
        page.get_by_text(re.compile(r"Extracting features: [\d.]+ s of 60")).wait_for()
        assert 0 < page.get_by_role("progressbar").evaluate("bar => bar.value") < 1
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("cancelled").wait_for()
        page.locator("#files").set_input_files(tmp_path / "text.mp4")
        page.get_by_text("video: not a video file").wait_for()


def test_without_an_extractor_the_page_asks_for_features_alone(page: Any, served: Running) -> None:
    page.goto(url(served))
    page.get_by_text("ready").wait_for()
    assert page.get_by_text("Drop feature files here").is_visible()
    assert page.locator("#files").get_attribute("accept") == ".npy,.npz"


def test_a_server_with_a_token_asks_for_it(page: Any) -> None:
    with running(token="a-token-of-enough-letters") as server:
        page.goto(url(server))
        page.locator("#token").fill("a-token-of-enough-letters")
        page.keyboard.press("Enter")
        page.get_by_text("Parity check").wait_for()
        assert page.locator("#login").is_hidden()
