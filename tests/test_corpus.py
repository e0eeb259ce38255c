"""`ccnet predict --out FOLDER`: shards that are whole or absent, resumed by the same command, bad videos listed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import edit_manifest, features_with, make_bundle, write_features

from ccnet.cli.main import main
from runtime.corpus.store import LocalStore
from runtime.corpus.worker import error_from_json, error_to_json
from runtime.detections import read_events
from runtime.errors import BundleError, CCNetError, Interrupted, MissingDependency, VideoFailed

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

COUNT = 40
SIZE = 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle")).folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for i in range(COUNT):
        write_features(folder, f"v{i:02d}", features_with(12 + i % 9, [(2, 8, i % 4, 3.0 + i / COUNT)]))
    return folder


@pytest.fixture(scope="module")
def expected(bundle: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The events of all videos, from a run of one piece."""
    out = tmp_path_factory.mktemp("expected") / "events.jsonl"
    assert predict(bundle, features, out) == 0
    return out.read_bytes()


def arguments(bundle: Path, features: Path, out: object, *options: str) -> list[str]:
    return ["predict", str(bundle), "--features", str(features), "--out", str(out), "--quiet", *options]


def predict(bundle: Path, features: Path, out: object, *options: str) -> int:
    return main(arguments(bundle, features, out, *options))


def shards(out: Path) -> bytes:
    """Return the events of all shards, one after the other."""
    return b"".join(path.read_bytes() for path in sorted(out.glob("shards/*.jsonl")))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def receipts(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(out.glob("done/*.json"))]


SIZED = ("--shard-size", str(SIZE))


def test_a_run_is_in_shards_of_the_same_bytes(bundle: Path, features: Path, tmp_path: Path, expected: bytes) -> None:
    out = tmp_path / "run"
    assert predict(bundle, features, out, *SIZED) == 0
    assert shards(out) == expected
    numbers = range(COUNT // SIZE)
    assert files(out) == sorted(
        ["engine.json", "failed.jsonl", "plan.json", "videos.jsonl"]
        + [f"{folder}/{i:06d}.{kind}" for i in numbers for folder, kind in (("done", "json"), ("shards", "jsonl"))]
    )
    assert [r["videos"] for r in receipts(out)] == [SIZE] * len(numbers)
    assert (out / "failed.jsonl").read_bytes() == b""


def test_the_same_command_does_only_what_is_missing(
    bundle: Path, features: Path, tmp_path: Path, expected: bytes
) -> None:
    out = tmp_path / "run"
    assert predict(bundle, features, out, *SIZED) == 0
    (out / "done" / "000002.json").unlink()  # as if killed before the receipt
    (out / "shards" / "000005.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert predict(bundle, features, out) == 0
    assert shards(out) == expected
    changed = {path.name for path in (out / "shards").iterdir() if before.get(path) != path.stat().st_mtime_ns}
    assert changed == {"000002.jsonl", "000005.jsonl"}


def test_a_run_that_is_done_opens_no_engine(
    bundle: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert predict(bundle, features, tmp_path / "run", *SIZED) == 0
    monkeypatch.setattr("runtime.corpus.worker.Localizer.load", None)
    capsys.readouterr()
    assert predict(bundle, features, tmp_path / "run") == 0
    assert f"{COUNT} videos, {COUNT} events, by onnxruntime-fp32" in capsys.readouterr().out


def test_parts_make_the_whole(bundle: Path, features: Path, tmp_path: Path, expected: bytes, capsys: Any) -> None:
    out = tmp_path / "run"
    for i in (2, 0, 1):
        assert not (out / "failed.jsonl").exists()
        assert predict(bundle, features, out, "--shard", f"{i}/3", *SIZED) == 0
        written = {int(path.stem) for path in out.glob("shards/*.jsonl")}
        assert written >= set(range(i, COUNT // SIZE, 3))
    assert shards(out) == expected
    said = capsys.readouterr().out
    assert "part 2/3: 10 videos, 10 events" in said
    assert said.count("other parts of the run are not done yet") == 2
    assert not (out / "claims").exists()


@pytest.mark.parametrize("text", ["3/3", "1", "-1/3", "a/b", "0/0", "1/2/3"])
def test_a_part_that_is_none(text: str, bundle: Path, features: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        predict(bundle, features, tmp_path / "run", f"--shard={text}")
    assert "expected i/n with 0 <= i < n" in capsys.readouterr().err


def test_another_bundle_or_setting_is_refused(
    bundle: Path, features: Path, tmp_path: Path, expected: bytes, capsys: Any
) -> None:
    out = tmp_path / "run"
    assert predict(bundle, features, out, *SIZED) == 0
    other = make_bundle(tmp_path / "other").folder
    edit_manifest(other, checkpoint_sha256="1" * 64)
    assert predict(other, features, out) == 2
    assert "holds another run, which differs in\n  bundle:" in capsys.readouterr().err
    assert predict(bundle, features, out, "--long-videos", "windows") == 2
    assert "long_videos: 'crop' there, 'windows' now" in capsys.readouterr().err
    assert shards(out) == expected


def test_bad_videos_are_listed_and_the_list_is_a_manifest(
    bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    own = tmp_path / "features"
    own.mkdir()
    for path in features.glob("v0*"):
        shutil.copy(path, own)
    (own / "v03_heard.npy").unlink()
    (own / "v07_seen.npy").unlink()
    np.save(own / "v07_seen.npy", np.full((9, 6), np.nan, np.float32))
    out = tmp_path / "run"
    assert predict(bundle, own, out, *SIZED) == 1
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [(f["video_id"], f["shard"], f["error"], f["features"]) for f in failed] == [
        ("v03", 0, "FeatureError", str(own)),
        ("v07", 1, "FeatureError", str(own)),
    ]
    assert "no such feature file" in failed[0]["message"]
    assert f"bad videos: {out}/failed.jsonl" in capsys.readouterr().out
    assert predict(bundle, own, out) == 1  # also when there is nothing to do
    for name in ("v03", "v07"):
        write_features(own, name, features_with(12, [(2, 8, 1, 3.0)]))
    assert predict(bundle, out / "failed.jsonl", tmp_path / "mended.jsonl") == 0
    assert set(read_events(tmp_path / "mended.jsonl")) == {"v03", "v07"}


def test_a_name_that_is_no_text_is_a_bad_video(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "features"
    own.mkdir()
    write_features(own, "good", features_with(12, [(2, 8, 1, 3.0)]))
    write_features(own, "bad\udcff", features_with(12))
    out = tmp_path / "run"
    assert predict(bundle, own, out) == 1
    assert predict(bundle, own, out) == 1
    (failed,) = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert failed["video_id"] == "bad\udcff"
    assert "expected a name without path separators" in failed["message"]
    assert [json.loads(line)["video_id"] for line in shards(out).splitlines()] == ["good"]


def test_parquet(bundle: Path, features: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert predict(bundle, features, tmp_path / "run", "--format", "parquet", *SIZED) == 0
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "run" / "shards").iterdir())]
    assert [table.num_rows for table in tables] == [SIZE] * (COUNT // SIZE)
    assert predict(bundle, features, tmp_path / "events.parquet", *SIZED) == 0
    whole = parquet.read_table(tmp_path / "events.parquet").to_pylist()
    assert whole == [row for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_complete_run_is_scored_like_the_file_of_its_events(
    kind: str, bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    own = tmp_path / "features"
    shutil.copytree(features, own)
    (own / "v03_heard.npy").unlink()
    annotation = {"duration": 7.0, "subset": "test", "annotations": [{"segment": [1, 3], "label": "dog"}]}
    truth = tmp_path / "annotations.json"
    truth.write_text(json.dumps({"database": {f"v{i:02d}": annotation for i in range(COUNT)}}))
    run, whole = tmp_path / "run", tmp_path / f"whole.{kind}"
    options = ("--format", kind, *SIZED)
    assert predict(bundle, own, run, *options) == predict(bundle, own, whole, *options) == 1
    labels = ("--annotations", str(truth), "--classes", str(bundle))

    def scores(source: Path, status: int) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["evaluate", str(source), *labels, "--json"]) == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        del found["source"]
        return found

    found, expected = scores(run, 1), scores(whole, 0)
    assert list(found.pop("failed")) == ["v03"]  # as with a bundle: known to be bad, and not only absent
    assert expected.pop("failed") == {}
    assert found == expected

    (run / "done" / "000001.json").rename(tmp_path / "receipt")
    assert main(["evaluate", str(run), *labels]) == 2
    assert "1 of 8 shards (000001) with 5 of 40 videos are missing" in capsys.readouterr().err
    (tmp_path / "receipt").rename(run / "done" / "000001.json")
    with (run / "shards" / f"000006.{kind}").open("ab") as stream:
        stream.write(b"\n")
    assert main(["evaluate", str(run), *labels]) == 2
    assert f"000006.{kind}: altered since it was written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["events.jsonl", "events.parquet", "run"])
def test_a_killed_run_goes_on_and_makes_the_same_bytes(
    name: str, bundle: Path, features: Path, tmp_path: Path, expected: bytes
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "killed").mkdir()
    out = tmp_path / "killed" / name
    folder = out if name == "run" else Path(f"{out}.partial")
    killed_after(2, folder, arguments(bundle, features, out, "--shard-size", "1", "--workers", "1"))
    assert name == "run" or not out.exists()
    survivors = {path: path.stat().st_mtime_ns for path in folder.glob("done/*.json")}
    assert 2 <= len(survivors) < COUNT
    assert predict(bundle, features, out, "--shard-size", "1") == 0
    if name == "run":
        assert shards(out) == expected
        assert {path: path.stat().st_mtime_ns for path in survivors} == survivors
    else:
        assert files(tmp_path) == [f"killed/{name}"]
        whole = tmp_path / f"whole{out.suffix}"
        assert predict(bundle, features, whole, "--shard-size", "1") == 0
        assert out.read_bytes() == whole.read_bytes()
    assert not [path for path in files(tmp_path) if path.rpartition("/")[2].startswith(".")]


def killed_after(count: int, folder: Path, command: Sequence[str]) -> None:
    """Run a command in a process that is killed once so many shards are done."""
    code = (
        "import sys, time; from runtime.corpus.store import LocalStore; from ccnet.cli.main import main\n"
        "write = LocalStore.write\n"
        "LocalStore.write = lambda *a: (time.sleep(0.02), write(*a))\n"  # slow enough to be caught
        "sys.exit(main(sys.argv[1:]))"
    )
    with subprocess.Popen([sys.executable, "-c", code, *command]) as process:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("done/*.json"))) < count:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL


class Killed(BaseException):
    """Ends a run where a signal would have."""


def test_a_run_killed_while_its_folder_is_removed_makes_the_same_bytes(
    bundle: Path, features: Path, tmp_path: Path, expected: bytes
) -> None:
    """Before each call that removes a file or a folder, once the events are in place."""
    out, kept = tmp_path / "run" / "events.jsonl", tmp_path / "kept"
    options = ("--shard-size", str(COUNT // 2))
    work = Path(f"{out}.partial")

    def removing(kill_at: int) -> int:
        """Run the command and kill it at a call; return how many calls there were until then."""
        calls = 0

        def counted(call: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: Any, **named: Any) -> None:
                nonlocal calls
                if (out.exists() and (work / "plan.json").exists()) or calls:
                    if calls == kill_at:
                        raise Killed
                    calls += 1
                call(*args, **named)

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            with contextlib.suppress(Killed):
                assert predict(bundle, features, out, *options) == 0
        return calls

    assert removing(0) == 0
    shutil.copytree(work, kept)
    count = removing(1000)
    assert count >= len(files(kept))
    for kill_at in range(count):
        shutil.copytree(kept, work)
        out.unlink()
        assert removing(kill_at) == kill_at
        assert out.read_bytes() == expected
        assert predict(bundle, features, out, *options) == 0
        assert out.read_bytes() == expected
        assert os.listdir(out.parent) == [out.name]


def test_processes_that_share_a_folder_share_the_work(
    bundle: Path, features: Path, tmp_path: Path, expected: bytes
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ccnet", *arguments(bundle, features, out, "--shard-size", "1")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert shards(out) == expected
    assert not (out / "claims").exists()


def test_worker_processes(
    bundle: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    (tmp_path / "here" / "runtime").mkdir(parents=True)
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('code of the current folder')")
    monkeypatch.chdir(tmp_path / "here")
    assert predict(bundle, features, tmp_path / "events.jsonl", "--processes", "2", *SIZED) == 0
    assert (tmp_path / "events.jsonl").read_bytes() == expected
    assert files(tmp_path) == ["events.jsonl", "here/json.py"]


def test_a_mistake_in_a_worker_process_is_told_as_it_is(
    bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    assert predict(bundle, features, tmp_path / "run", "--processes", "2", "--backend", "openvino") == 2
    assert "has no engine" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_workers_too(
    number: signal.Signals, status: int, bundle: Path, features: Path, tmp_path: Path, expected: bytes
) -> None:
    out = tmp_path / "run"
    command = arguments(bundle, features, out, "--processes", "2", "--shard-size", "1")
    with subprocess.Popen([sys.executable, "-m", "ccnet", *command], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("done/*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == status
    assert "run the same command again to go on" in said
    assert os.listdir(out / "claims") == []
    assert not list(out.rglob(".*"))
    assert predict(bundle, features, out) == 0
    assert shards(out) == expected


@pytest.mark.parametrize(("processes", "commands"), [(2, 1), (None, 5)])
def test_a_video_that_kills_its_workers_costs_itself_alone(
    processes: int | None,
    commands: int,
    bundle: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: bytes,
) -> None:
    """Without worker processes the command dies of it, and is started again: twice as ever, twice with care."""
    deadly = ("v13", "v31") if processes else ("v13",)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal; from runtime.batches import Batch\n"
        "read = Batch.read\n"
        "def deadly(self, videos, **options):\n"
        f"    if {{*{deadly}}} & {{video.video_id for video in videos}}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(self, videos, **options)\n"
        "Batch.read = deadly\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    out = tmp_path / "run"
    options = ("--processes", str(processes)) if processes else ("--workers", "1")
    command = [sys.executable, "-m", "ccnet", *arguments(bundle, features, out, *options, *SIZED)]
    statuses = [subprocess.run(command, check=False).returncode for _ in range(commands)]
    assert statuses == [-signal.SIGKILL] * (commands - 1) + [1]
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [(f["video_id"], f["error"]) for f in failed] == [(video_id, "WorkerDied") for video_id in deadly]
    lines = [line for line in expected.splitlines() if json.loads(line)["video_id"] not in deadly]
    assert shards(out).splitlines() == lines
    assert not list(out.glob("done/*.suspect.json"))


def test_a_full_disk_ends_the_run(
    bundle: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write = LocalStore.write

    def full(self: LocalStore, name: str, data: bytes) -> None:
        if name == "shards/000003.jsonl":
            raise OSError(28, "No space left on device", name)
        write(self, name, data)

    monkeypatch.setattr(LocalStore, "write", full)
    assert predict(bundle, features, tmp_path / "run", *SIZED) == 2
    assert "No space left on device (shards/000003.jsonl)" in capsys.readouterr().err
    assert len(receipts(tmp_path / "run")) == 3


def test_errors_travel_between_processes() -> None:
    for error in (BundleError("b"), VideoFailed("v"), MissingDependency("ray", "ray", "x"), Interrupted("i", 15)):
        found = error_from_json(json.loads(json.dumps(error_to_json(error))))
        assert isinstance(found, CCNetError)
        assert (type(found), str(found), found.exit_code) == (type(error), str(error), error.exit_code)
    found = error_from_json(error_to_json(OSError(28, "No space", "f")))
    assert isinstance(found, OSError)
    assert (found.errno, found.strerror, found.filename) == (28, "No space", "f")


@pytest.mark.parametrize(
    "name", ["plan.json", "videos.jsonl", "engine.json", "done/000000.json", "shards/000000.jsonl"]
)
@pytest.mark.parametrize("damage", [b"\xff", b"[1]", b'{"schema": 1}'])
def test_a_damaged_run_is_told_of(
    name: str, damage: bytes, bundle: Path, features: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    assert predict(bundle, features, out, *SIZED) == 0
    (out / name).write_bytes(damage)
    if name in ("videos.jsonl", "engine.json"):
        (out / "done" / "000001.json").unlink()  # only what is left to do reads them
    status = predict(bundle, features, out)
    assert status == (0 if name.startswith("shards") else 2), capsys.readouterr().err  # a shard is read by its user


def test_options_that_need_a_folder(bundle: Path, features: Path, tmp_path: Path, capsys: Any) -> None:
    assert predict(bundle, features, tmp_path / "events.jsonl", "--shard", "0/2") == 2
    assert "the parts of a run share a folder" in capsys.readouterr().err
    assert predict(bundle, features, "-", "--processes", "2") == 2
    assert "--processes: - is a stream" in capsys.readouterr().err


def test_a_damaged_shard_of_a_file_is_done_again(
    bundle: Path, features: Path, tmp_path: Path, expected: bytes, capsys: Any
) -> None:
    out = tmp_path / "events.jsonl"
    killed_after(3, Path(f"{out}.partial"), arguments(bundle, features, out, "--shard-size", "1", "--workers", "1"))
    victim = min(Path(f"{out}.partial").glob("shards/*.jsonl"))
    victim.write_bytes(victim.read_bytes()[:-9])
    assert predict(bundle, features, out) == 2
    assert "altered since it was written; run the command again" in capsys.readouterr().err
    assert predict(bundle, features, out) == 0
    assert out.read_bytes() == expected


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.corpus.pools import visible_devices

    for chosen, devices in (("2,5,7", ["2", "5", "7"]), ("1", None), ("", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_devices() == devices
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("runtime.corpus.pools.gpus", lambda: [{}, {}])
    assert visible_devices() == ["0", "1"]
