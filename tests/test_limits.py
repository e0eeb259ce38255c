"""Limits of the machine: each ends as a message and an exit status; nothing old is lost, nothing new half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import LABELS, SMALLEST, SMALLEST_LABELS, features_with, make_bundle, write_features

from ccnet.cli.main import main
from runtime.errors import CCNetError
from runtime.files import atomic_file, check_output_file, create_file, open_input

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SECONDS = 120
"""For one command, which takes a second or two."""
OLD = "what was there before"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, features of four videos, their annotations and the events found in them."""
    folder = tmp_path_factory.mktemp("data")
    make_bundle(folder / "bundle")
    (folder / "features").mkdir()
    database = {}
    for i in range(4):
        write_features(folder / "features", f"v{i}", features_with(12, [(2, 8, i, 3.0)]))
        event = {"segment": [2.5, 8.5], "label": LABELS[i], "label_id": i}
        database[f"v{i}"] = {"duration": 12.0, "subset": "test", "annotations": [event]}
    (folder / "a.json").write_text(json.dumps({"version": "1", "database": database}))
    arguments = ["--features", str(folder / "features"), "--out", str(folder / "events.jsonl"), "--quiet"]
    assert main(["predict", str(folder / "bundle"), *arguments]) == 0
    return folder


def commands(data: Path, out: Path) -> dict[str, list[str]]:
    """Return a command for every way to write: a run, a JSON file, another tool's format, a folder of many files."""
    events, annotations = str(data / "events.jsonl"), str(data / "a.json")
    preset = ["--preset", "demo", "--model.num_classes", "4", "--workers", "1"]
    features = ["--features", str(data / "features")]
    return {
        "predict": ["predict", str(data / "bundle"), *features, "--out", str(out / "e.jsonl"), "--quiet"],
        "evaluate": ["evaluate", events, "--annotations", annotations, "--json", str(out / "e.json"), "--quiet"],
        "convert": ["convert", events, "--out", str(out / "e.csv")],
        "synthesize": ["synthesize", "--annotations", annotations, "--out", str(out / "synthetic"), *preset],
    }


NAMES = ("predict", "evaluate", "convert", "synthesize")
WRITTEN = {"predict": "e.jsonl", "evaluate": "e.json", "convert": "e.csv"}


def run(
    *command: str, limits: dict[int, int] | None = None, environment: dict[str, str | None] | None = None
) -> tuple[int, str]:
    """Run `ccnet` under resource limits. Return its status and what it said."""
    script = "import json, resource, sys\n"
    script += "for number, most in json.loads(sys.argv.pop(1)): resource.setrlimit(number, (most, most))\n"
    script += "from ccnet.cli.main import main; sys.exit(main())"
    variables = {**os.environ, "PYTHONPATH": str(Path(main.__code__.co_filename).parents[2]), **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list((limits or {}).items())), *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=SECONDS,
        env={name: value for name, value in variables.items() if value is not None},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def assert_tidy(out: Path) -> None:
    """Check that no temporary file or folder is left."""
    assert [str(path) for path in out.rglob(".*")] == []


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory; skip where only an administrator may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a file system of its own here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Put old results into a small file system, and fill the rest of it."""
    for name in WRITTEN.values():
        (folder / name).write_text(OLD)
    with contextlib.suppress(OSError), (folder / "rest").open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 512)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "full", "size=128k") as out:
        fill(out)
        assert main(commands(data, out)[name]) == 2
        said = capsys.readouterr().err
        assert f"ccnet {name}: error: No space left on device ({out}" in said
        assert_tidy(out)
        assert all((out / old).read_text() == OLD for old in WRITTEN.values())
        (out / "rest").unlink()
        if name in WRITTEN:
            assert main(commands(data, out)[name]) == 0  # with room, the same command does it
            assert (out / WRITTEN[name]).read_text() != OLD


def test_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ccnet.checkpoint import save_checkpoint
    from ccnet.network.model import CCNet

    with mounted(tmp_path / "full", "size=32k") as out:
        fill(out)
        with pytest.raises((OSError, CCNetError), match=r"[Nn]o space left"):
            save_checkpoint(out / "best", CCNet(SMALLEST.model), config=SMALLEST, labels=SMALLEST_LABELS)
        assert_tidy(out)
        assert not (out / "best").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_files_is_limited(name: str, data: Path, tmp_path: Path) -> None:
    status, said = run(*commands(data, tmp_path)[name], limits={resource.RLIMIT_FSIZE: 64})
    assert status == 2
    assert f"File too large ({tmp_path}" in said
    assert_tidy(tmp_path)
    assert not any((tmp_path / written).exists() for written in WRITTEN.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_can_only_be_read(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "fixed", "ro") as out:
        try:
            status = main(commands(data, out)[name])
        except SystemExit as error:  # of the parser: refused before the work
            status = int(error.code or 0)
        said = capsys.readouterr().err
        assert status == 2
        assert "Read-only file system" in said or "can't be written to" in said
        assert str(out) in said
        assert ".partial" not in said


@pytest.mark.parametrize("name", NAMES)
def test_32_file_descriptors_are_enough(name: str, data: Path, tmp_path: Path) -> None:
    status, said = run(*commands(data, tmp_path)[name], limits={resource.RLIMIT_NOFILE: 32})
    assert status == 0, said
    assert_tidy(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_gigabyte_of_addresses(name: str, data: Path, tmp_path: Path) -> None:
    """Enough, or a message: how much an engine library reserves is its own affair."""
    status, said = run(*commands(data, tmp_path)[name], limits={resource.RLIMIT_AS: 10**9})
    assert status == 0 or (status == 2 and "error:" in said), said
    assert_tidy(tmp_path)


def test_memory_that_is_not_there(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ccnet.cli.inspect.run", fails)
    assert main(["inspect", str(data / "bundle")]) == 2
    assert "ccnet inspect: error: not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": None, "TMPDIR": None, "XDG_CACHE_HOME": None},
        {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": "/dev/null/x"},
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["no home", "a home that is not there", "locale C"],
)
def test_environments(environment: dict[str, str | None], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "caf\u00e9 \u72d7"
    out.mkdir()
    for name in ("predict", "convert"):
        status, said = run(*commands(data, out)[name], environment=environment)
        assert status == 0, said
        assert (out / WRITTEN[name]).stat().st_size > 0
    assert_tidy(out)


def what_is_no_file(folder: Path) -> dict[str, Path]:
    """Make a named pipe without a writer, a folder, a device and a circle of links."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "circle").symlink_to(folder / "circle")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["pipe", "folder", "zero", "circle"])
def test_what_is_no_file(kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = what_is_no_file(tmp_path)[kind]
    events, annotations, out = str(data / "events.jsonl"), str(data / "a.json"), str(tmp_path / "out.jsonl")
    shutil.copytree(data / "bundle", tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").unlink()
    (tmp_path / "broken" / "model.onnx").symlink_to(bad)
    source, new = ["--features", str(data / "features"), "--out", out, "--quiet"], ["--out", str(tmp_path / "new")]
    for command in (
        ["evaluate", events, "--annotations", str(bad)],
        ["evaluate", str(bad), "--annotations", annotations],
        ["evaluate", events, "--annotations", annotations, "--classes", str(bad)],
        ["convert", str(bad), "--out", out],
        ["inspect", str(bad)],
        ["predict", str(bad), *source],
        ["predict", str(tmp_path / "broken"), *source],
        ["predict", str(data / "bundle"), "--features", str(bad), "--out", out],
        ["show", str(bad), "--annotations", annotations, "--out", out],
        ["compare", f"a={bad}", events, "--annotations", annotations],
        ["convert", events, "--out", out, "--durations", str(bad)],
        ["verify", str(data / "bundle"), "--reference", str(bad), "--backend", "onnxruntime"],
        ["rebuild", str(bad)],
        ["triton", str(bad), *new],
        ["serve", str(data / "bundle"), "--port", "0", "--token-file", str(bad)],
        [
            "train",
            "--preset",
            "demo",
            "--annotations",
            str(bad),
            "--features",
            str(bad),
            "--out",
            str(tmp_path / "new"),
        ],
        ["import-weights", str(bad), "--preset", "demo", "--out", str(tmp_path / "new")],
        ["export", str(bad), "--out", str(tmp_path / "new")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "error: " in said, command
        assert not Path(out).exists()
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["device", "pipe", "file", "under a file", "nothing", "mount point"])
@pytest.mark.parametrize(
    "command",
    [
        ["export", "absent"],
        ["triton", "bundle"],
        ["train", "--preset", "demo", "--annotations", "a.json", "--features", "features"],
        ["synthesize", "--annotations", "a.json"],
        ["import-weights", "absent", "--preset", "demo"],
        ["extract", "absent.mp4", "--extractor", "absent"],
        ["demo"],
        ["convert", "events.jsonl", "--to", "webvtt"],
    ],
    ids=lambda command: command[0],
)
def test_a_folder_that_can_be_none_is_refused_before_the_work(
    command: list[str],
    kind: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, message = tmp_path / "out", "got a file, expected the name of a folder"
    if kind == "device":
        out.symlink_to(os.devnull)
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "file":
        out.write_text(OLD)
    elif kind == "under a file":
        (tmp_path / "file").write_text(OLD)
        out, message = tmp_path / "file" / "out", "not a folder"
    elif kind == "mount point":
        if command[0] not in ("export", "import-weights"):
            pytest.skip("filled from within")
        out, message = Path("/proc"), "a mount point can't be replaced"
    monkeypatch.chdir(data)
    name = "" if kind == "nothing" else str(out)
    if command[0] == "convert" and kind in ("device", "pipe"):
        pytest.skip("a stream takes one video")
    if command[0] in ("convert", "triton"):  # whose --out may be something else, too
        assert main([*command, "--out", name]) == 2
    else:
        with pytest.raises(SystemExit, match="2"):
            main([*command, f"--out={name}"])
    assert ("got nothing" if kind == "nothing" else message) in capsys.readouterr().err
    if kind == "file":
        assert out.read_text() == OLD


def test_a_feature_file_that_is_none(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "features", tmp_path / "features")
    for number, bad in enumerate(what_is_no_file(tmp_path).values()):
        if bad.name != "features":
            (tmp_path / "features" / f"v{number % 4}_seen.npy").unlink(missing_ok=True)
            (tmp_path / "features" / f"v{number % 4}_seen.npy").symlink_to(bad)
    command = ["predict", str(data / "bundle"), "--features", str(tmp_path / "features"), "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out.jsonl")]) in (1, 2)
    assert "can't be read" in capsys.readouterr().err


def test_a_pipe_that_this_process_was_given_is_an_input(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"text")
    os.close(writing)
    with open_input(f"/dev/fd/{reading}") as stream:
        assert stream.read() == b"text"
    os.close(reading)


def test_a_circle_of_links_is_no_place_for_an_output(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        check_output_file(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="symbolic links"), atomic_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "b").is_symlink()


def test_two_runs_into_one_output(data: Path, tmp_path: Path) -> None:
    """They share the work, or the later one does it again, or says that the other one was faster; the file is whole."""
    script = "import sys; from ccnet.cli.main import main; sys.exit(main())"
    variables = {**os.environ, "PYTHONPATH": str(Path(main.__code__.co_filename).parents[2])}
    command = [sys.executable, "-c", script, *commands(data, tmp_path)["predict"]]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) for _ in range(2)]
    said = [process.communicate(timeout=SECONDS)[1] for process in runs]
    for process, text in zip(runs, said, strict=True):
        assert process.returncode == 0 or "another process of the same command finished it" in text, said
    assert (tmp_path / "e.jsonl").read_bytes() == (data / "events.jsonl").read_bytes()
    assert os.listdir(tmp_path) == ["e.jsonl"]


def test_an_error_of_writing_names_the_file_and_not_its_temporary_one(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro") as out:
        for write in (lambda: create_file(out / "x", b""), lambda: atomic_file(out / "x").__enter__()):
            with pytest.raises(OSError, match="Read-only") as caught:
                write()
            assert caught.value.filename == str(out / "x")


def test_messages_that_nobody_can_read_do_not_end_the_work(data: Path, tmp_path: Path) -> None:
    script = "import sys; sys.stderr = open('/dev/full', 'w'); from ccnet.cli.main import main; sys.exit(main())"
    variables = {**os.environ, "PYTHONPATH": str(Path(main.__code__.co_filename).parents[2])}
    command = ["convert", str(data / "events.jsonl"), "--to", "srt", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, check=False, env=variables)
    assert done.returncode == 0
    assert len(os.listdir(tmp_path / "out")) == 4
