"""`ccnet show`: the page in a browser, what the command takes and refuses, and pictures of one video."""

from __future__ import annotations

import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, SPEC, features_with, make_bundle, write_features

from ccnet.cli.main import main
from ccnet.plots import Gates
from ccnet.report.analysis import analyse
from ccnet.report.page import Model, render
from runtime.annotations import Annotations, VideoAnnotation
from runtime.detections import Detections, write_events

CHROMIUM = Path("/usr/bin/chromium")
NAMES = ("dog", "</script><b>cat</b>", "cow & calf")


def synthetic(noise: float, seed: int) -> tuple[Annotations, dict[str, Detections]]:
    """Return six annotated videos, and predictions as far from them as `noise` says."""
    rng = np.random.default_rng(0)
    videos = {}
    for number in range(6):
        start = rng.uniform(0, 30, 3)
        segments = np.stack([start, start + rng.uniform(3, 9, 3)], axis=1)
        videos[f"clip {number}"] = VideoAnnotation(f"clip {number}", 40.0, "test", segments, np.array([0, 1, 2]))
    rng = np.random.default_rng(seed)
    predicted = {}
    for key, annotated in videos.items():
        segments = np.repeat(annotated.segments, 3, axis=0) + rng.normal(0, noise, (9, 2))
        segments[:, 1] = np.maximum(segments[:, 1], segments[:, 0] + 0.2)
        labels = np.repeat(annotated.labels, 3)
        labels[rng.random(9) < 0.2] = 0
        scores = np.sort(rng.uniform(0.05, 1, 9).astype(np.float32))[::-1].copy()
        predicted[key] = Detections(np.clip(segments, 0, 40), scores, labels, NAMES)
    return Annotations(Path("annotations.json"), NAMES, videos), predicted


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two models with gates, and a sound file for one video."""
    folder = tmp_path_factory.mktemp("page")
    models = []
    for seed, noise in enumerate((2.0, 0.3)):
        truth, predicted = synthetic(noise, seed)
        time = np.arange(40.0)
        gates = {key: Gates(time, 0.5 + 0.4 * np.sin(time / 4), np.full(40, 0.7)) for key in predicted}
        models.append(Model(analyse(f"model {seed}", predicted, truth, "test"), f"{seed}.jsonl", gates))
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8000)
        sound.writeframes(b"\x80" * 8000 * 40)
    page = render("A <b>title</b>", models, truth, "test", shown=list(truth.videos), media={"clip 2": "sound.wav"})
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The open page; the test fails where it logged an error or asked for something that is not beside it."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    here = page_file.parent.as_uri()
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda r: problems.append(r.url) if not r.url.startswith((here, "data:")) else None)
    opened.goto(page_file.as_uri())
    yield opened
    opened.close()
    assert problems == []


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.locator(selector).all_text_contents()
    return found


def test_everything_is_on_the_page(page: Any) -> None:
    assert page.title() == "A <b>title</b>"
    assert page.locator("h1").inner_text() == "A <b>title</b>"
    assert texts(page, "#map tbody td:first-child") == ["A: model 0", "B: model 1", "B − A"]
    assert len(texts(page, "#buckets tbody tr")) >= 3
    kinds = page.locator("#costs tbody tr").evaluate_all("rows => rows.map((row) => row.dataset.kind)")
    assert sorted(kinds) == sorted(
        ["duplicate", "bad boundary", "wrong label", "wrong label and boundary", "background", "missed"]
    )
    assert len(texts(page, "#traits figure")) == 3
    assert page.locator("#reliability svg circle").count() > 4
    assert page.locator("#timeline path.gate").count() == 4
    assert page.locator("#videolist button").count() == 6
    assert page.locator("#timeline .event[data-model='-1']").count() == 3
    assert page.evaluate("document.querySelectorAll('b').length") == 0, "names are text"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_classes_are_sorted_and_chosen(page: Any) -> None:
    names = texts(page, "#classtable tbody td:first-child")
    assert sorted(names) == sorted(NAMES)
    page.locator("#classtable th[data-key=class] button").click()
    assert texts(page, "#classtable tbody td:first-child") == sorted(NAMES, key=str.lower)
    page.keyboard.press("Enter")  # the head keeps the focus
    assert page.locator("#classtable th[data-key=class]").get_attribute("aria-sort") == "descending"
    page.locator("#apat").select_option("8")
    page.locator("#classtable button.link", has_text="cow & calf").click()
    assert "cow & calf: 6 events" in page.locator("#curves figcaption").inner_text()
    assert page.locator("#curves path.curve").count() == 2


def test_filters_and_zoom(page: Any) -> None:
    events = page.locator("#timeline .event:not([data-model='-1'])")
    before = events.count()
    page.locator("#minscore").fill("0.05")
    everything = events.count()
    assert everything > before
    page.locator("#onlyerrors").click()
    assert page.locator("#timeline .event[data-kind='right']").count() == 0
    assert 0 < events.count() < everything
    page.locator("#onlyerrors").click()
    page.locator("#classfilter").select_option("2")
    assert len(texts(page, "#timeline .lane")) == 1
    page.locator("#classfilter").select_option("")
    page.locator("input[data-kind='bad boundary']").uncheck()
    assert page.locator("#timeline .event[data-kind='bad boundary']").count() == 0
    page.locator("input[data-kind='bad boundary']").check()
    page.locator("#videosearch").fill("CLIP 3")
    assert texts(page, "#videolist button span:first-child") == ["clip 3"]
    page.locator("#videolist button").click()
    assert page.locator("#videoname").inner_text() == "clip 3, 40.0 s"
    axis = texts(page, "#timeline svg > text.soft")
    assert "30 s" in axis
    page.locator("#timeline svg").scroll_into_view_if_needed()
    box = page.locator("#timeline svg").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 4)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 4)
    page.mouse.up()
    assert "30 s" not in texts(page, "#timeline svg > text.soft"), "dragging shows what was dragged over"
    page.get_by_role("button", name="Show the whole video").click()
    assert texts(page, "#timeline svg > text.soft") == axis


def test_keys(page: Any) -> None:
    detail, name = page.locator("#detail"), page.locator("#videoname")
    page.locator("#timeline svg").focus()
    page.keyboard.press("ArrowRight")
    first = detail.inner_text()
    page.keyboard.press("ArrowRight")
    assert detail.inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert detail.inner_text() == first
    assert page.locator("#timeline .chosen").count() == 1
    axis = texts(page, "#timeline svg > text.soft")
    for key in "++":
        page.keyboard.press(key)
    page.keyboard.press("Shift+ArrowRight")
    assert texts(page, "#timeline svg > text.soft") != axis
    page.keyboard.press("0")
    assert texts(page, "#timeline svg > text.soft") == axis
    before = name.inner_text()
    page.keyboard.press("n")
    assert name.inner_text() != before
    page.keyboard.press("p")
    assert name.inner_text() == before
    page.keyboard.press("Escape")
    assert page.locator("#timeline .chosen").count() == 0


def test_a_click_on_an_event_moves_the_player(page: Any) -> None:
    page.locator("#videolist button[data-id='clip 2']").click()
    page.wait_for_function("document.querySelector('video').readyState >= 1")
    page.locator("#timeline .event[data-model='1']").first.click()
    text = page.locator("#detail").inner_text()
    start = float(text.split(", ")[1].split(" to ")[0])
    assert page.evaluate("document.querySelector('video').currentTime") == pytest.approx(start, abs=0.01)
    assert page.locator("#timeline .playhead").get_attribute("visibility") == "visible"
    page.evaluate("window.former = document.querySelector('video')")
    page.locator("#videolist button[data-id='clip 3']").click()
    page.evaluate(
        "['timeupdate', 'error'].forEach((name) => former.dispatchEvent(new Event(name)))"
    )  # on its way still
    assert page.locator("video").count() == 0
    assert page.locator("p.soft", has_text="can't be played").count() == 0
    assert page.locator("input[type=file]").count() == 1


@pytest.mark.parametrize(("width", "scheme", "media"), [(380, "dark", "screen"), (794, "light", "print")])
def test_narrow_dark_and_printed(browser: Any, page_file: Path, width: int, scheme: str, media: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.emulate_media(media=media, color_scheme=scheme)
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#timeline svg").is_visible()
    assert page.locator("nav").is_visible() == (media == "screen")
    page.close()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with annotations, an events file and features."""
    monkeypatch.chdir(tmp_path)
    database, records = {}, []
    Path("features").mkdir()
    for i in range(4):  # one event a video, at grid steps 2 to 8, that is 2.5 to 8.5 s
        event = {"segment": [2.5, 8.5], "label": LABELS[i], "label_id": i}
        database[f"v{i}"] = {"duration": 12.0, "subset": "test", "annotations": [event]}
        write_features(Path("features"), f"v{i}", features_with(12, [(2, 8, i, 3.0)]))
        one = Detections(np.array([[2.0, 8.0]]), np.array([0.5], np.float32), np.array([i]), LABELS)
        records.append((f"v{i}", 12.0, one))
    Path("annotations.json").write_text(json.dumps({"database": database}))
    write_events("events.jsonl", records)
    return tmp_path


def shown(path: str) -> dict[str, Any]:
    text = Path(path).read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text.split('id="data">')[1].split("</script>")[0])
    return data


def test_events_beside_a_bundle(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make_bundle(corpus / "bundle", spec=SPEC)
    Path("media").mkdir()
    for name in ("v1.mp4", "v3.mkv", "v9.mp4"):
        Path("media", name).write_text("")
    command = ["show", "events.jsonl", "bundle", "--features", "features", "--annotations", "annotations.json"]
    options = ["--names", "before", "after", "--media", "media", "--videos", "3", "--out", "pages/x y.html", "--json"]
    assert main([*command, *options]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["videos"] == 3
    data = shown("pages/x y.html")
    assert [model["name"] for model in data["models"]] == ["before", "after"]
    assert data["models"][1]["average"] == 1.0
    assert [video["media"] for video in data["videos"]] == [None, "../media/v1.mp4", None]
    assert "has no file of 2 of the 3 videos" in captured.err
    assert "no gate curves: its graph has no gates" in captured.err

    (corpus / "features" / "v3_seen.npy").write_bytes(b"")
    assert main([*command, "--out", "page.html"]) == 1
    assert "bundle: 1 videos failed" in capsys.readouterr().err


def test_a_picture_of_one_video(corpus: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ["show", "events.jsonl", "--annotations", "annotations.json", "--video", "v1"]
    assert main([*command, "--out", "v1.svg"]) == 0
    assert main([*command, "--out", "again.svg"]) == 0
    assert "<svg" in Path("v1.svg").read_text()
    assert Path("v1.svg").read_bytes() == Path("again.svg").read_bytes()
    assert main([*command, "--out", "v1.png"]) == 0
    assert Path("v1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["events.jsonl", "--out", "x.png"], "a picture shows one source and one video; name it with --video"),
        (["events.jsonl", "events.jsonl", "events.jsonl", "--out", "x.html"], "got 3 sources, expected one or two"),
        (["events.jsonl", "--video", "v1", "--title", "x", "--out", "x.png"], "--title: only for a page; x.png is a"),
        (["events.jsonl", "--video", "v1", "--videos", "3", "--out", "x.html"], "give one of the two"),
        (["events.jsonl", "--names", "a", "b", "--out", "x.html"], "--names: got 2 for 1 sources"),
        (["events.jsonl", "--video", "zz", "--out", "x.html"], "annotations.json does not have the video 'zz'"),
        (["events.jsonl", "--features", "features", "--out", "x.html"], "--features: there is no bundle"),
        (["events.jsonl", "--media", "absent", "--out", "x.html"], "--media: absent is not a folder"),
        (["absent.jsonl", "--out", "x.html"], "absent.jsonl: no such events file"),
        (["features", "--out", "x.html"], "has no bundle.json"),
    ],
)
def test_mistakes(arguments: list[str], message: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *arguments, "--annotations", "annotations.json"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("x.html").exists()
    assert not Path("x.png").exists()
