"""Frames and sound of video files: the public programs' numbers, and files in every bad state."""

from __future__ import annotations

import functools
import http.server
import io
import os
import resource
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("PIL")

import av
from av.stream import Disposition
from feature_cases import cases, frames, settings, wave
from PIL import Image
from video_files import golden_mp4, simple_extractor, write_video

from runtime.errors import VideoError
from runtime.video.container import ReadOptions, ReadReport, decoded_frames
from runtime.video.files import estimate, find_video_files
from runtime.video.frames import centre_crop, padded, padding, read_frames, resize, shown_frames
from runtime.video.logmel import EXAMPLE_HOP, examples, filterbank, log_mel, stream_examples
from runtime.video.sound import read_sound, resampled

FPS = Fraction(25)


def mono(case: str) -> np.ndarray:
    """Return the wave of a golden case as float64 mono."""
    setting = settings(case)
    samples = wave(setting["wave_seed"], setting["seconds"], setting["rate"], setting["channels"])
    mixed: np.ndarray = samples.reshape(len(samples), -1).mean(1, dtype=np.float64) / 32768
    return mixed


def test_log_mel_is_that_of_the_public_program() -> None:
    spectrogram = log_mel(mono("mel"))
    assert np.abs(spectrogram - cases()["mel/log_mel"]).max() < 1e-6  # equal here; another FFT may differ
    assert np.abs(filterbank().sum(0) - cases()["mel/filterbank_column_sums"]).max() < 1e-5
    cut = examples(spectrogram)
    assert cut.shape == (cases()["mel/examples_at_hop_0.32"][0], 96, 64)
    assert np.array_equal(cut[3], spectrogram[3 * EXAMPLE_HOP :][:96])
    for parts in (1, 7, 400):
        streamed = np.concatenate(list(stream_examples(np.array_split(mono("mel"), parts))))
        assert np.array_equal(streamed, cut)
    assert len(log_mel(np.zeros(399))) == 0
    assert list(stream_examples([np.zeros(15_599)])) == []
    assert np.allclose(np.concatenate(list(stream_examples([np.zeros(15_600)]))), np.log(0.01))


def test_resampling_is_as_close_to_the_public_one_as_its_own_next_version() -> None:
    rate = settings("resample")["rate"]
    found = np.concatenate(list(resampled(np.array_split(mono("resample"), 11), rate)))
    golden = cases()["resample/log_mel_resampy_0.2.2"]
    assert len(found) == len(cases()["resample/wave_resampy_0.2.2"])
    # 0.0176 here, a chirp through the transition band; resampy 0.4.3 itself differs by 0.022
    assert np.abs(log_mel(found) - golden).mean() < 0.02
    whole = np.concatenate(list(resampled([mono("resample")], rate)))
    assert np.array_equal(whole, found)
    assert np.concatenate(list(resampled([np.ones(100)], 16000))).tolist() == [1] * 100


@pytest.mark.parametrize("index", range(8))
def test_frames_are_resized_padded_and_cropped_as_by_the_public_program(index: int) -> None:
    row = cases()["resize/table"][index].tolist()
    picture = frames(settings("resize")["frame_seed"] + index, 1, row[0], row[1])[0]
    small = resize(picture, 256)
    whole, crop = padded(small), centre_crop(small, 224).astype(np.uint8)
    flow_crop = np.ascontiguousarray(centre_crop(whole.transpose(1, 2, 0).astype(np.uint8), 224).astype(np.uint8))
    sides = [*picture.shape[:2], *small.shape[:2], *padding(*small.shape[:2]), *whole.shape[1:]]
    sums = [zlib.crc32(crop.tobytes()), zlib.crc32(flow_crop.tobytes()), int(crop.sum(dtype=np.int64))]
    assert [*sides, *sums] == row


@pytest.mark.parametrize("index", range(11))
def test_frames_are_chosen_by_presentation_time(index: int) -> None:
    case, pts = settings("frame_rate")[index], cases()[f"frame_rate/{index}/pts"].tolist()
    base = Fraction(case["time_base"])
    shown = shown_frames(
        ((p * base, i) for i, p in enumerate(pts)), FPS, pts[0] * base + case["stream_duration"] * base
    )
    found = [one.frame for one in shown for _ in range(one.first, one.end)]
    assert found == cases()[f"frame_rate/{index}/source_of_output"].tolist()


def picture(path: Path | str, *, side: int = 64, **options: Any) -> tuple[list[Any], ReadReport]:
    report = ReadReport()
    return list(read_frames(str(path), side, FPS, ReadOptions(threads=2, **options), report)), report


def heard(path: Path | str, **options: Any) -> tuple[np.ndarray, ReadReport]:
    report = ReadReport()
    return np.concatenate(list(read_sound(str(path), ReadOptions(threads=1, **options), report))), report


def test_the_golden_file(tmp_path: Path) -> None:
    path = golden_mp4(tmp_path)
    found, report = picture(path, side=96)  # its own size: nothing is resized
    assert [zlib.crc32(frame.tobytes()) for frame in found] == cases()["video/frame_crc32"].tolist()
    sound, _ = heard(path)
    assert len(sound) == 58212 * 16000 // 44100
    assert report.warnings == []


def test_a_rotated_file_is_turned_upright(tmp_path: Path) -> None:
    upright, _ = picture(write_video(tmp_path / "a.mp4", sound=None, count=2), side=96)
    turned, report = picture(write_video(tmp_path / "b.mp4", sound=None, count=2, rotation=90), side=96)
    assert np.array_equal(turned[0], np.rot90(upright[0]))
    assert report.facts["rotation"] == 90


def test_a_late_picture_shows_its_first_frame_from_time_zero_on(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mkv", count=10, pts=[12_500 + 1000 * i for i in range(10)])
    found, _ = picture(path)
    assert len(found) == 13 + 10 - 0
    assert all(np.array_equal(found[0], frame) for frame in found[:13])
    assert found[0] is found[1]  # what is shown again is the same array


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("5.1.mp4", {"layout": "5.1", "rate": 48000}, (64, 85)),
        ("mono of 8 kHz.mkv", {"layout": "mono", "rate": 8000, "sound_codec": "pcm_s16le"}, (64, 85)),
        ("mp3.mp4", {"sound_codec": "mp3"}, (64, 85)),
        ("opus.mkv", {"sound_codec": "libopus", "rate": 48000}, (64, 85)),
        ("10 bit.mp4", {"pixels": "yuv420p10le"}, (64, 85)),
        ("odd.mkv", {"size": (95, 127), "codec": "ffv1", "pixels": "yuv444p"}, (64, 85)),
        ("tiny.mkv", {"size": (16, 16)}, (64, 64)),
        ("tall.mp4", {"size": (128, 96)}, (85, 64)),
        ("äöü – 日本.mp4", {}, (64, 85)),
    ],
)
def test_files_of_any_kind(name: str, arguments: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    path = write_video(tmp_path / name, **arguments)
    found, report = picture(path)
    sound, sound_report = heard(path)
    assert len(found) == 40
    assert found[0].shape == (*size, 3)
    assert abs(len(sound) / 16000 - 2) < 0.03  # matroska states no end of an AAC stream's last packet
    assert report.warnings + sound_report.warnings == []
    # the mix is as loud as that of what was written, and its silent end is there
    rate, channels = sound_report.facts["rate"], sound_report.facts["channels"]
    written = wave(1, 2.0, rate, channels).reshape(-1, channels).mean(1) / 32768
    loudness, expected = (np.sqrt((part**2).mean()) for part in (sound[:8_000], written[: rate // 2]))
    if channels < 6:  # the phases of six cancel almost all, and the sixth channel is for low tones alone
        assert abs(loudness / expected - 1) < 0.15
    assert loudness > 0.02
    assert np.abs(sound[31_000:32_000]).max() < 0.05


def test_a_4k_frame(tmp_path: Path) -> None:
    found, _ = picture(write_video(tmp_path / "4k.mp4", size=(2160, 3840), count=2, sound=None), side=256)
    assert [frame.shape for frame in found] == [(256, 455, 3)] * 2


def test_a_variable_rate(tmp_path: Path) -> None:
    pts = np.cumsum([0] + [1000, 250, 2750] * 12).tolist()
    path = write_video(tmp_path / "variable.mp4", count=len(pts), pts=pts)
    found, _ = picture(path)
    expected = shown_frames(((Fraction(p, 25_000), i) for i, p in enumerate(pts)), FPS, Fraction(pts[-1], 25_000))
    times = [(one.first, one.end) for one in expected]
    assert len(found) == times[-1][1]  # the writer gives the last frame no duration
    repeated = [all(found[i] is found[first] for i in range(first, end)) for first, end in times]
    assert all(repeated)


def test_sound_keeps_its_place(tmp_path: Path) -> None:
    late, _ = heard(write_video(tmp_path / "late.mp4", sound_start=0.5))
    assert abs(len(late) / 16000 - 2.5) < 0.002
    assert np.abs(late[:7000]).max() < 1e-3
    early, report = heard(write_video(tmp_path / "early.mp4", sound=0.8))
    assert len(early) == 12_800
    assert report.warnings == []


def damaged(path: Path) -> Path:
    content = bytearray(write_video(path, count=100, sound=4.0).read_bytes())
    draw = np.random.default_rng(0)
    for position in draw.integers(len(content) // 4, len(content) * 3 // 4, 50):
        content[position] ^= 255
    path.write_bytes(bytes(content))
    return path


def test_damaged_packets_are_left_out_and_the_rest_keeps_its_time(tmp_path: Path) -> None:
    path = damaged(tmp_path / "damaged.mp4")
    found, report = picture(path)
    sound, sound_report = heard(path)
    assert len(found) == 100
    assert any("damaged" in text for text in report.warnings)
    assert len(sound) == 64_000
    assert sound_report.damaged_packets > 0
    assert any("silent" in text for text in sound_report.warnings)


def test_a_cut_off_file_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", count=150, sound=6.0, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    found, report = picture(path)
    sound, sound_report = heard(path)
    assert 25 < len(found) < 130
    assert 16_000 < len(sound) < 90_000
    for warnings in (report.warnings, sound_report.warnings):
        assert any("states 6.00 s" in text and "cut off" in text for text in warnings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\n" * 99, "not a video file"),
        (b"", "is empty"),
        (b"#EXTM3U\n#EXTINF:1,\nother.mp4\n", "not a video file"),
    ],
)
def test_what_is_called_mp4_and_is_not(content: bytes, message: str, tmp_path: Path) -> None:
    write_video(tmp_path / "other.mp4", count=2)
    path = tmp_path / "file.mp4"
    path.write_bytes(content)
    for read in (picture, heard):
        with pytest.raises(VideoError, match=f"file.mp4: .*{message}"):
            read(path)


def test_a_playlist_in_disguise_opens_no_other_file(tmp_path: Path) -> None:
    write_video(tmp_path / "other.ts", count=2)
    for text in (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile other.ts\n",
    ):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(VideoError, match="not a video file"):
            picture(tmp_path / "list.mp4")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, message in (
        (tmp_path / "absent.mp4", "No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe.mp4", "not a regular file"),
        ("http://127.0.0.1:9/a.mp4", "--remote"),
        ("rtsp://127.0.0.1/a", "--remote"),
        ("a\0b.mp4", "can't be read"),
    ):
        with pytest.raises(VideoError, match=message):
            picture(path)
    with pytest.raises(VideoError, match="not a video file"):
        picture("http://127.0.0.1:9/a.mp4", remote=True)  # asked for, and nobody listens there


def test_streams_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="has no picture .it holds audio"):
        picture(write_video(tmp_path / "sound.mp4", picture=False))
    with pytest.raises(VideoError, match="has no sound; '--missing-audio silence'"):
        heard(write_video(tmp_path / "silent.mp4", sound=None))


def test_times_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", count=30, sound=None)

    def stamped(change: Any) -> Any:
        def decoded(*arguments: Any) -> Iterator[Any]:
            for index, frame in enumerate(decoded_frames(*arguments)):
                frame.pts, frame.dts = change(index, frame.pts), None  # those of decoding would help
                yield frame

        return decoded

    for change, message in (
        (lambda index, pts: None, "frame 0 has no time stamp"),
        (lambda index, pts: 0, "all 30 frames have the same time stamp"),
        (lambda index, pts: pts if index % 2 else 0, "go backwards"),
        (lambda index, pts: pts * 10**9, "longest video"),
    ):
        monkeypatch.setattr("runtime.video.frames.decoded_frames", stamped(change))
        with pytest.raises(VideoError, match=message):
            picture(path)
        counted, _ = picture(path, timestamps="count")
        assert len(counted) == 30


def test_a_hostile_file_is_bounded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "huge.mkv", count=2, size=(64, 64), sound=None, pts=[0, 10**9])
    with pytest.raises(VideoError, match="longest video"):
        picture(path)
    with av.open(str(tmp_path / "wide.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16384, 8192, "gray"
        frame = av.VideoFrame(16384, 8192, "gray")
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(
        VideoError, match="ffv1 video could be decoded; pictures of more than 37748736 pixels are not read"
    ):
        picture(tmp_path / "wide.mkv")


def attach(container: Any, codec: str, pixels: str, size: tuple[int, int], packets: list[bytes]) -> None:
    """Write packets into a new stream as they are, whatever the container says of it."""
    stream = container.add_stream(codec, rate=25)
    stream.width, stream.height, stream.pix_fmt = *size, pixels
    for index, content in enumerate(packets):
        packet = av.Packet(content)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 25)
        packet.is_keyframe = True
        container.mux(packet)


def encoded(kind: str, size: tuple[int, int]) -> bytes:
    """Return a black picture as a file of its kind."""
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(8192, 1), (1, 8192), (2000, 200)])
def test_a_picture_like_a_line_is_refused_before_it_is_resized(size: tuple[int, int], tmp_path: Path) -> None:
    """Resized to a side of 256, 8192 x 1 would be two million columns."""
    path = tmp_path / "line.nut"
    with av.open(str(path), "w") as container:
        attach(container, "png", "rgb24", size, [encoded("PNG", size)] * 3)
    with pytest.raises(VideoError, match="times as long as the other"):
        picture(path, side=256)
    # the container tells another size
    with av.open(str(path), "w") as container:
        attach(container, "png", "rgb24", (64, 64), [encoded("PNG", size)] * 3)
    with pytest.raises(VideoError, match="times as long as the other"):
        picture(path, side=256)


def test_a_picture_that_unpacks_to_gigabytes_is_given_no_memory(tmp_path: Path) -> None:
    bomb = bytearray(encoded("JPEG", (64, 64)))
    sides = bomb.index(b"\xff\xc0") + 5
    bomb[sides : sides + 4] = (16_000).to_bytes(2, "big") * 2
    for name, codec, pixels, content in (
        ("bomb.mkv", "mjpeg", "yuvj420p", bytes(bomb)),
        ("bomb.nut", "png", "rgb24", encoded("PNG", (9000, 9000))),
    ):
        with av.open(str(tmp_path / name), "w") as container:
            attach(container, codec, pixels, (64, 64), [content] * 3)
        before = peak_memory()
        with pytest.raises(VideoError, match=r"no frame of its .* could be decoded|pictures of 9000 x 9000"):
            picture(tmp_path / name)
        assert peak_memory() - before < 64e6


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def atom(name: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + name + content


def test_what_a_container_claims_costs_nothing(tmp_path: Path) -> None:
    """Atoms in atoms, tables of two thousand million entries, packets of nothing."""
    deep = b""
    for index in range(20_000):
        deep = atom(b"trak" if index % 2 else b"moov", deep)
    (tmp_path / "deep.mp4").write_bytes(atom(b"ftyp", b"isom\0\0\0\0isom") + deep)
    whole = write_video(tmp_path / "whole.mp4", size=(32, 32)).read_bytes()
    for table, place in ((b"stsz", 8), (b"stts", 4), (b"stsc", 4), (b"ctts", 4)):
        content = bytearray(whole)
        at = content.index(table) + 4 + place
        content[at : at + 4] = (0x7FFFFFFF).to_bytes(4, "big")
        (tmp_path / f"{table.decode()}.mp4").write_bytes(bytes(content))
    with av.open(str(tmp_path / "tiny.mkv"), "w") as container:
        attach(container, "mpeg4", "yuv420p", (32, 32), [b"\0"] * 5000)
    before, begin = peak_memory(), time.process_time()
    for name in ("deep.mp4", "stsz.mp4", "stts.mp4", "stsc.mp4", "ctts.mp4", "tiny.mkv"):
        with pytest.raises(VideoError):
            picture(tmp_path / name)
    assert peak_memory() - before < 64e6
    assert time.process_time() - begin < 20  # two seconds here


def wav(path: Path, rate: int) -> Path:
    """Write 4000 samples that are said to be `rate` a second."""
    content = b"\1\0" * 4000
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2 % 2**32, 2, 16)
    data = b"WAVEfmt " + form + b"data" + struct.pack("<I", len(content)) + content
    path.write_bytes(b"RIFF" + struct.pack("<I", len(data)) + data)
    return path


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_of_sound_that_no_file_has_is_refused(rate: int, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=f"states {rate} samples a second, expected 1000 to 768000"):
        heard(wav(tmp_path / "a.wav", rate))
    assert len(heard(wav(tmp_path / "a.wav", 1000))[0]) == 64_000


def test_sound_that_changes_on_the_way_keeps_its_time(tmp_path: Path) -> None:
    """Transport streams may be joined like files of text."""
    parts: list[dict[str, Any]] = [
        {"rate": 44_100, "layout": "stereo"},
        {"rate": 48_000, "layout": "mono"},
        {"rate": 44_100, "layout": "5.1"},
    ]
    content = b""
    for index, part in enumerate(parts):
        path = write_video(tmp_path / f"{index}.ts", size=(32, 32), count=50, sound=2.0, **part)
        content += path.read_bytes()
    (tmp_path / "joined.ts").write_bytes(content)
    found, report = heard(tmp_path / "joined.ts")
    assert any("the rate or the channels of the sound change" in text for text in report.warnings)
    assert np.isfinite(found).all()
    assert len(found) >= 32_000


def test_the_stream_that_a_player_would_show_is_read(tmp_path: Path) -> None:
    """Of a cover, a small and two large pictures, and two tracks of sound: the default ones, else the largest."""
    path = tmp_path / "many.mkv"
    sizes = {"cover": (16, 16), "small": (32, 32), "large": (64, 48), "larger": (80, 48)}

    def write(chosen: str | None) -> Path:
        with av.open(str(path), "w") as container:
            pictures = []
            for name, (width, height) in sizes.items():
                stream: Any = container.add_stream("mjpeg" if name == "cover" else "ffv1", rate=25)
                stream.width, stream.height = width, height
                stream.pix_fmt = "yuvj420p" if name == "cover" else "yuv420p"
                stream.disposition = {"cover": Disposition.attached_pic, chosen: Disposition.default}.get(
                    name, Disposition(0)
                )
                pictures.append((stream, 1 if name == "cover" else 3))
            for stream, count in pictures:
                for index in range(count):
                    frame = av.VideoFrame(stream.width, stream.height, "yuv420p")
                    frame.pts = index
                    container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
                container.mux(stream.encode(None))
        return path

    for chosen, expected in (("small", "small"), (None, "larger")):
        _, report = picture(write(chosen))
        assert (report.facts["width"], report.facts["height"]) == sizes[expected]


def test_how_long_videos_will_take_is_measured_on_the_first_good_one(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, count=50, sound=None)
    with simple_extractor() as extractor:
        run = extractor.engines.runners["i3d_rgb"].run

        def slow(*inputs: Any) -> Any:
            time.sleep(0.08)  # ten milliseconds a frame
            return run(*inputs)

        extractor.engines.runners["i3d_rgb"].run = slow  # type: ignore[method-assign]
        found = estimate(find_video_files([tmp_path]), extractor)
        none = estimate(find_video_files([tmp_path / "bad.mp4"]), extractor)
    assert (found.videos, found.video_seconds) == (3, 4.0)
    assert 1.0 < found.work_seconds < 60  # 100 frames
    assert (none.videos, none.video_seconds, none.work_seconds) == (1, 0, 0)


def test_a_url_is_read_when_that_is_asked_for(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a b.mp4", count=10, sound=0.4)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            found, _ = picture(f"{url}/a%20b.mp4", remote=True)
            assert all(np.array_equal(*pair) for pair in zip(found, picture(path)[0], strict=True))
            assert np.array_equal(heard(f"{url}/a%20b.mp4", remote=True)[0], heard(path)[0])
            with pytest.raises(VideoError, match="404"):
                picture(f"{url}/absent.mp4", remote=True)
            with pytest.raises(VideoError, match="--remote"):
                picture(f"{url}/a%20b.mp4")
        finally:
            server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: object) -> None:
        pass


def test_reading_can_be_given_up_at_any_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", count=60)
    report = ReadReport()
    reading = read_frames(str(path), 64, FPS, ReadOptions(threads=2), report)
    next(reading)
    reading.close()
    path.unlink()
