"""`ccnet import-extractor` and `ccnet extract`: from weights to an extractor, from video files to features."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("av")
pytest.importorskip("PIL")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import torch
from builders import LABELS, make_bundle
from feature_cases import cases, weights
from video_files import golden_mp4, simple_extractor, write_video

from ccnet.cli.main import main
from export.extractors.bundle import Networks, eager_outputs, graph_module
from export.extractors.check import compare_graph
from export.extractors.graphs import centre_crop as middle
from export.extractors.graphs import flow_levels
from export.extractors.i3d import I3D
from export.extractors.reference import example_inputs, read_reference
from export.extractors.weights import load_i3d, load_raft, load_vggish
from runtime.detections import read_events
from runtime.errors import BundleError, VideoError
from runtime.features import find_videos, read_video
from runtime.localizer import Localizer
from runtime.spec import FeatureLayout, ModelSpec
from runtime.video.check import compare_part
from runtime.video.container import ReadOptions, ReadReport
from runtime.video.engines import load_graph, open_engines
from runtime.video.extractor import GRAPHS, Extractor, ExtractorSpec, read_extractor
from runtime.video.features import FeatureExtractor, Schedule, Timer
from runtime.video.files import VideoPath, find_video_files, is_done, localize_video
from runtime.video.frames import centre_crop, padded, read_frames

LAYOUT = FeatureLayout()


def test_every_graph_is_compared_with_its_network(extractor: Extractor, extractor_networks: Networks) -> None:
    spec = extractor.spec
    assert (spec.rgb_dim, spec.flow_dim, spec.audio_dim) == (64, 64, 16)
    for graph in GRAPHS:
        engines = {engine.backend: engine for engine in extractor.engines(graph)}
        assert engines["onnxruntime"].status == "verified"
        assert engines["onnxruntime-cuda"].status == "unverified"
        assert engines["onnxruntime"].accuracy
    extractor.verify()

    # the check can fail: weights that differ a little
    runner = load_graph(extractor, extractor.engines("i3d_rgb")[0])
    other = dataclasses.replace(extractor_networks, rgb=I3D(3, width=1 / 16).eval())
    other.rgb.load_state_dict(extractor_networks.rgb.state_dict())
    with torch.no_grad():
        other.rgb.conv3d_1a_7x7.conv3d.weight *= 1.001
    inputs, right = example_inputs("i3d_rgb", spec, {}), read_reference(extractor)["i3d_rgb"]
    wrong = eager_outputs("i3d_rgb", graph_module("i3d_rgb", other, spec), spec, {})
    assert compare_graph(runner, "i3d_rgb", inputs, right)["passed"]
    assert not compare_graph(runner, "i3d_rgb", inputs, wrong)["passed"]


def test_graphs_take_frames_of_any_size(extractor: Extractor, extractor_networks: Networks) -> None:
    """One file of each graph serves wide, tall and square videos, one pair or several at a time."""
    spec, draw = extractor.spec, np.random.default_rng(0)
    engines = open_engines(extractor, "onnxruntime", threads=1)
    for height, width, batch in ((128, 128, 1), (128, 232, 2), (176, 128, 1)):
        frames = draw.uniform(0, 255, (batch + 1, 3, height, width)).astype(np.float32)
        features, context = engines.runners["encode"].run(frames)
        inputs = features[:-1], features[1:], context[:-1]
        (levels,) = engines.runners["flow"].run(*inputs)
        with torch.no_grad():
            expected = graph_module("flow", extractor_networks, spec)(*map(torch.from_numpy, inputs))
        assert np.abs(levels - expected.numpy()).max() <= 1
        assert levels.std() > 1
    engines.close()


def every_window_alone(
    path: Path, extractor: Extractor, networks: Networks
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rgb, the flow's levels before they are rounded, and the flow features, of each step, all in PyTorch."""
    spec = extractor.spec
    frames = list(read_frames(str(path), spec.side, Fraction(25), ReadOptions(threads=1), ReadReport()))
    modules = {graph: graph_module(graph, networks, spec) for graph in GRAPHS}
    for start in range(0, len(frames) - spec.window, spec.stride):
        window = frames[start : start + spec.window + 1]
        with torch.no_grad():
            crops = torch.stack([torch.from_numpy(centre_crop(frame, spec.crop)) for frame in window[:-1]])
            features, context = networks.raft.encode(torch.stack([torch.from_numpy(padded(one)) for one in window]))
            flow = networks.raft.flow(features[:-1], features[1:], context[:-1], spec.iterations)
            pixels = middle(flow, spec.crop).clamp(-20, 20)
            seen = modules["i3d_flow"](flow_levels(pixels)[None])
            yield modules["i3d_rgb"](crops[None])[0].numpy(), (128 + 6.375 * pixels).numpy(), seen[0].numpy()


def test_nothing_computed_twice_gives_what_every_window_by_itself_gives(
    extractor: Extractor, extractor_networks: Networks, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", count=60, sound=2.4)
    stacks: list[np.ndarray] = []
    with FeatureExtractor.load(extractor.folder, "onnxruntime", threads=1) as extract:
        runner = extract.engines.runners["i3d_flow"]
        real = runner.run

        def kept(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
            stacks.append(inputs[0].copy())
            return real(*inputs)

        runner.run = kept  # type: ignore[method-assign]
        found = extract(path)
    rgb, exact, flow = map(np.stack, zip(*every_window_alone(path, extractor, extractor_networks), strict=True))
    assert len(found.rgb) == (60 - 25) // 8 + 1 == len(found.sound)
    assert found.visual.shape == (5, 128)
    assert np.abs(found.rgb - rgb).max() < 1e-4 * rgb.max()
    # Every level is that of a flow within 0.001 pixels of PyTorch's: where it lies so near to the middle between two
    # levels, rounding may go the other way. That, and nothing else, is the difference of the features:
    levels = np.concatenate(stacks)
    assert np.abs(levels - exact).max() < 0.5 + 6.375e-3
    assert (levels != np.round(exact)).mean() < 1e-3
    with torch.no_grad():
        of_levels = graph_module("i3d_flow", extractor_networks, extractor.spec)(torch.from_numpy(levels)).numpy()
    assert np.abs(found.flow - of_levels).max() < 1e-4 * flow.max()
    assert np.abs(found.flow[1:] - flow[:-1]).max() > 8e-2 * flow.max()  # another step is another thing


def test_the_schedule_computes_each_pair_once(extractor: Extractor) -> None:
    """Of 60 frames, 57 end in a step; what is shown again is encoded once, and a pair of it has one flow."""
    engines = open_engines(extractor, "onnxruntime", threads=1)
    calls: dict[str, int] = {}
    for graph, runner in engines.runners.items():
        real = runner.run

        def counted(*inputs: Any, graph: str = graph, real: Any = real) -> Any:
            calls[graph] = calls.get(graph, 0) + len(inputs[0])
            return real(*inputs)

        runner.run = counted  # type: ignore[method-assign]
    frames = list(np.random.default_rng(0).integers(0, 255, (60, 128, 170, 3), np.uint8))

    def shown(pictures: list[np.ndarray]) -> Schedule:
        calls.clear()
        schedule = Schedule(engines, extractor.spec, Timer())
        for picture in pictures:
            schedule.push(picture)
        return schedule

    shown([*frames[:1] * 3, *frames[3:]])
    assert calls == {"encode": 55, "flow": 55, "i3d_rgb": 5, "i3d_flow": 5}
    still = shown(frames[:1] * 60)
    assert calls == {"encode": 1, "flow": 1, "i3d_rgb": 1, "i3d_flow": 1}
    copies = shown([frames[0].copy() for _ in range(60)])  # other arrays: nothing is taken for the same
    assert calls == {"encode": 57, "flow": 56, "i3d_rgb": 5, "i3d_flow": 5}
    for one, other in ((still.rgb, copies.rgb), (still.flow, copies.flow)):
        assert np.allclose(one, other, atol=1e-5)
    later = shown([*frames[:1] * 33, *frames[1:2] * 40])  # of 7 steps, the first and the last two see one picture each
    assert calls == {"encode": 2, "flow": 3, "i3d_rgb": 5, "i3d_flow": 5}
    assert np.allclose(later.rgb[:2], still.rgb[:2], atol=1e-5)
    assert all(np.abs(later.rgb[k + 1] - later.rgb[k]).max() > 1e-3 for k in (1, 2, 3, 4))
    assert np.array_equal(later.rgb[5], later.rgb[6])
    engines.close()


def extract(*words: object) -> int:
    return main(["extract", *map(str, words), "--backend", "onnxruntime", "--threads", "1", "--quiet"])


def test_features_are_written_as_unav_names_them(
    extractor: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "features"
    videos.mkdir()
    write_video(videos / "a b.mp4", count=33, sound=1.4)
    write_video(videos / "silent.mkv", count=33, sound=None)
    write_video(videos / "short.mp4", count=20, sound=0.8)
    (videos / "text.mp4").write_text("not a video")
    (videos / "notes.doc").write_text("ignored")
    (tmp_path / "list.txt").write_text("# mine\nvideos/a b.mp4\n")

    assert extract(tmp_path / "list.txt", "--extractor", extractor.folder, "--out", out) == 0
    captured = capsys.readouterr()
    assert "no GPU engine is used" in captured.err
    assert "1 videos extracted, 0 done before" in captured.out
    assert sorted(p.name for p in out.iterdir()) == ["a b.json", "a b_flow.npy", "a b_rgb.npy", "a b_vggish.npy"]
    features = read_video(out, "a b", LAYOUT, 128, 16)
    assert features.steps == 2
    record = json.loads((out / "a b.json").read_text())
    assert record["steps"] == record["visual_steps"] == 2
    assert record["picture"]["frames"] == 33
    assert set(record["seconds"]) >= {"decode", "encode", "flow", "i3d", "log_mel", "vggish", "total"}

    before = (out / "a b_rgb.npy").stat().st_mtime_ns
    assert extract(videos, "--extractor", extractor.folder, "--out", out) == 1
    captured = capsys.readouterr()
    assert "0 videos extracted, 1 done before" in captured.out
    for part in ("silent: ", "has no sound", "short: ", "lasts 0.80 s", "text: ", "not a video file"):
        assert part in captured.err
    assert find_videos(out, LAYOUT) == ["a b"]
    assert (out / "a b_rgb.npy").stat().st_mtime_ns == before
    video, exact = VideoPath("a b", str(videos / "a b.mp4")), dict.fromkeys(GRAPHS, "fp32")
    assert is_done(video, out, extractor, ReadOptions(), exact)
    assert not is_done(video, out, extractor, ReadOptions(), {**exact, "flow": "fp16"})

    words = [videos / "silent.mkv", "--extractor", extractor.folder, "--out", out]
    assert extract(*words, "--on-error", "stop") == 1
    assert extract(*words, "--missing-audio", "silence") == 0
    assert read_video(out, "silent", LAYOUT, 128, 16).steps == 2
    # a file that has changed is done again
    os.utime(videos / "a b.mp4", (1, 1))
    assert extract(videos / "a b.mp4", "--extractor", extractor.folder, "--out", out, "--check", out) == 0
    printed = capsys.readouterr().out
    assert "1 videos extracted" in printed
    assert "_flow: cosine 1.0000" in printed


def test_sound_that_ends_early_cuts_the_picture_unless_silence_is_asked_for(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", count=75, sound=1.5)
    with simple_extractor() as extract:
        found = extract(path)
        assert found.facts["visual_steps"] == 7
        assert len(found.rgb) == len(found.sound) == 2
        assert "--missing-audio silence" in found.warnings[0]
    with simple_extractor(ReadOptions(missing_audio="silence")) as extract:
        silent = extract(path)
    assert len(silent.rgb) == len(silent.sound) == 7
    assert np.allclose(silent.sound[:2], found.sound)
    assert np.allclose(silent.sound[5:], np.log(0.01))  # averages of the log-mel of nothing


def test_mistakes_are_told_before_any_work(
    extractor: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for place in ("one/a.mp4", "two/a.mkv"):
        (tmp_path / place).write_bytes(b"x")
    with pytest.raises(VideoError, match=r"one/a.mp4 and .*two/a.mkv would both be called 'a'"):
        find_video_files([tmp_path / "one", tmp_path / "two"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="no video files"):
        find_video_files([tmp_path / "empty"])
    with pytest.raises(VideoError, match="can't be read"):
        find_video_files([tmp_path / "absent.txt"])
    (tmp_path / "long.txt").write_text("x" * 5000)
    with pytest.raises(VideoError, match="got a path of 5000 characters, 'xxx"):
        find_video_files([tmp_path / "long.txt"])
    (tmp_path / "one" / "b[1].mp4").write_bytes(b"x")
    for pattern, found in (("one/*.mp4", ["a", "b[1]"]), ("*/a.*v", ["a"]), ("one/b[[]1].mp4", ["b[1]"])):
        assert [video.video_id for video in find_video_files([tmp_path / pattern])] == found
    assert [video.video_id for video in find_video_files([tmp_path / "one/b[1].mp4"])] == ["b[1]"]
    with pytest.raises(VideoError, match="no video files"):
        find_video_files([tmp_path / "*.mkv"])
    out = tmp_path / "out"
    assert extract(tmp_path / "one", "--extractor", tmp_path / "one", "--out", out) == 2
    assert "is not an extractor" in capsys.readouterr().err
    assert extract("http://127.0.0.1:9/a.mp4", "--extractor", extractor.folder, "--out", out) == 1
    assert "--remote" in capsys.readouterr().err
    assert not any(out.iterdir())


@contextlib.contextmanager
def no_administrator() -> Iterator[None]:
    """Give up an administrator's right to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_unreadable_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        closed = Path(name) / "closed"
        closed.mkdir(mode=0)
        file = write_video(Path(name) / "a.mp4", count=2)
        file.chmod(0)
        assert (
            extract(f"{name}/absent.txt", "--extractor", "absent", "--out", f"{name}/out") == 2
        )  # imports what it needs
        with no_administrator():
            assert extract(closed, "--extractor", "absent", "--out", f"{name}/out") == 2
            with pytest.raises(VideoError, match="a.mp4: can't be read .Permission denied"):
                list(read_frames(str(file), 64, Fraction(25), ReadOptions(), ReadReport()))
    assert "closed: can't be read (Permission denied)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_ends_the_command(
    extractor: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_video(tmp_path / "a.mp4", count=33, sound=1.4)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        extract(path, "--extractor", extractor.folder, "--out", tmp_path / "file")
    assert "got a file, expected the name of a folder" in capsys.readouterr().err
    if Path("/dev/full").exists():  # a full disk: what was there is not done, and nothing half is left
        out = tmp_path / "full"
        out.mkdir()
        (out / "a_flow.npy").symlink_to("/dev/full")
        assert extract(path, "--extractor", extractor.folder, "--out", out) == 2
        assert "No space left" in capsys.readouterr().err
        assert not (out / "a.json").exists()


def features_of(folder: Path) -> dict[str, bytes]:
    """Read every feature file, after checking that each one is whole and that every record is of what is there."""
    for path in folder.glob("*.json"):
        for name, digest in json.loads(path.read_text())["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    found = {path.name: path.read_bytes() for path in folder.glob("[!.]*.npy")}
    assert all(len(np.load(io.BytesIO(content))) == 2 for content in found.values())
    return found


def test_killed_at_any_moment_the_same_command_goes_on(extractor: Extractor, tmp_path: Path) -> None:
    videos, whole, out = tmp_path / "videos", tmp_path / "whole", tmp_path / "out"
    videos.mkdir()
    for name in "ab":
        write_video(videos / f"{name}.mp4", count=33, sound=1.4, seed=ord(name))
    words = ["extract", str(videos), "--extractor", str(extractor.folder), "--backend", "onnxruntime", "--threads", "1"]
    words += ["--quiet", "--out"]
    assert main([*words, str(whole)]) == 0
    seconds = sum(json.loads(path.read_text())["seconds"]["total"] for path in whole.glob("*.json"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    kills = 0
    for moment in (0.1 * seconds, 0.5 * seconds):
        process = subprocess.Popen(
            [sys.executable, "-m", "ccnet", *[word for word in words if word != "--quiet"], str(out)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        assert process.stderr is not None
        next((line for line in process.stderr if b"videos to do" in line), None)  # from here on it is at work
        time.sleep(moment)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
        assert features_of(out).items() <= features_of(whole).items()
    assert kills >= 1
    assert main([*words, str(out)]) == 0
    assert features_of(out) == features_of(whole)
    assert len(list(out.iterdir())) == 8  # no temporary files


def test_events_of_video_files_in_one_command_and_in_python(
    extractor: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec(length=32, levels=4, visual_dim=128, audio_dim=16, labels=LABELS)
    make_bundle(tmp_path / "bundle", spec=spec)
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", count=41, sound=1.7)
    write_video(videos / "mute.mp4", count=41, sound=None)
    out = tmp_path / "events.jsonl"
    command = ["predict", str(tmp_path / "bundle"), "--videos", str(videos), "--out", str(out), "--quiet"]
    assert main([*command, "--extractor", str(extractor.folder)]) == 1
    assert "mute: " in capsys.readouterr().err
    found = read_events(out, LABELS)
    assert list(found) == ["a"]
    assert find_videos(tmp_path / "events.jsonl.features", LAYOUT) == ["a"]

    cache = tmp_path / "cache"
    with (
        Localizer.load(tmp_path / "bundle") as localizer,
        FeatureExtractor.load(extractor.folder, threads=1) as extract,
    ):
        fresh, first, again = (
            localize_video(localizer, extract, videos / "a.mp4", cache=place) for place in (None, cache, cache)
        )
        for one in (fresh, first, again):
            assert len(one) == len(found["a"])
            assert np.allclose(one.segments, found["a"].segments, atol=1e-2)
    assert sorted(path.name for path in cache.iterdir()) == ["a.json", "a_flow.npy", "a_rgb.npy", "a_vggish.npy"]

    make_bundle(tmp_path / "other", spec=dataclasses.replace(spec, visual_dim=130))
    for words, message in (
        (["--extractor", str(extractor.folder)], "visual width: got 128, the network was trained on 130"),
        ([], "--videos needs --extractor"),
    ):
        assert main(["predict", str(tmp_path / "other"), *command[2:], *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "bundle"), "--out", str(out)]) == 2
    assert "--videos VIDEO..." in capsys.readouterr().err


def test_an_altered_extractor_is_refused(extractor: Extractor, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(extractor.folder, copy)
    with (copy / "vggish.onnx").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"!")
    with pytest.raises(BundleError, match=r"vggish.onnx: SHA-256"):
        open_engines(read_extractor(copy))
    manifest = json.loads((copy / "extractor.json").read_text())
    for change, message in (({"schema": 99}, "schema"), ({"kind": 1}, "unknown key"), ({"spec": {"side": 3}}, "side")):
        (copy / "extractor.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(BundleError, match=message):
            read_extractor(copy)


def test_weight_files_are_checked_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt").write_text("Not Found")
    words = [f"--{name}={tmp_path / 'text.pt'}" for name in ("i3d-rgb", "i3d-flow", "raft", "vggish")]
    assert main(["import-extractor", *words, "--out", str(tmp_path / "e")]) == 2
    assert "text.pt: not a file of plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    assert main(["import-extractor", *words, "--out", str(tmp_path / "thesis")]) == 2


def test_the_benchmark_of_extraction_writes_its_page(extractor: Extractor, tmp_path: Path) -> None:
    from benchmarks.extraction import main as measure

    assert measure(["--extractor", str(extractor.folder), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "extraction.md").read_text(encoding="utf-8")
    assert "| encode |" in page
    assert "public schedule" in page


def test_published_features_that_differ_get_a_likely_cause() -> None:
    draw = np.random.default_rng(0)
    own = draw.uniform(0, 1, (60, 32)).astype(np.float32)
    same = compare_part("v", "_rgb", own, own)
    assert (round(same.cosine, 6), same.lag, same.likely) == (1, 0, "")
    later = compare_part("v", "_vggish", own[:-2], own[1:])
    assert later.lag == -1
    assert "1 steps earlier" in later.likely
    assert "hop of 0.96 s" in compare_part("v", "_vggish", own, own[::3]).likely
    assert "PCA" in compare_part("v", "_vggish", own, np.round(own * 255)).likely
    assert "PWC" in compare_part("v", "_flow", own, draw.uniform(0, 1, own.shape).astype(np.float32)).likely
    assert "another network" in compare_part("v", "_flow", own, own[:, :5]).likely


@pytest.mark.slow
def test_the_golden_file_from_pixels_and_sound_to_features_at_full_size(tmp_path: Path) -> None:
    """The public programs' features of a whole mp4, from weights saved as files, through PyTorch.

    Measured: rgb 2e-5 of 31, flow 7e-4 of 25 (levels flip), sound 0.075 of 23 (the resampler).
    """
    for net in ("i3d_rgb", "i3d_flow", "raft", "vggish"):
        torch.save({name: torch.from_numpy(array) for name, array in weights(net).items()}, tmp_path / f"{net}.pt")
    networks = Networks(
        rgb=load_i3d(tmp_path / "i3d_rgb.pt", 3),
        flow=load_i3d(tmp_path / "i3d_flow.pt", 2),
        raft=load_raft(tmp_path / "raft.pt"),
        vggish=load_vggish(tmp_path / "vggish.pt"),
    )
    spec = networks.spec()
    assert spec == ExtractorSpec()
    from runtime.backends.graphs import GraphRunner
    from runtime.bundle import Engine
    from runtime.video.engines import Engines

    def eager(graph: Any) -> GraphRunner:
        module, tensors = graph_module(graph, networks, spec), spec.tensors(graph)

        def run(inputs: Any) -> dict[str, Any]:
            with torch.no_grad():
                found = module(*(torch.from_numpy(array.copy()) for array in inputs.values()))
            arrays = found if isinstance(found, tuple) else (found,)
            return {name: array.numpy() for name, array in zip(tensors.outputs, arrays, strict=True)}

        return GraphRunner("torch", "fp32", tensors, run, {})

    engine = Engine(name="flow-torch", backend="torch", precision="fp32", model_file="", status="unverified")
    engines = Engines({graph: eager(graph) for graph in GRAPHS}, dict.fromkeys(GRAPHS, engine))

    class Folder:
        """What an extraction needs of an extractor's folder."""

        spec = networks.spec()

    found = FeatureExtractor(Folder(), engines)(golden_mp4(tmp_path))  # type: ignore[arg-type]
    golden = cases()
    assert np.abs(found.rgb - golden["video/rgb"]).max() < 1e-3
    assert np.abs(found.flow - golden["video/flow"]).max() < 1e-2
    assert np.abs(found.sound - golden["video/vggish_without_priming"]).max() < 0.5
