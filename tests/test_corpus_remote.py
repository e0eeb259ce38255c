"""Features and runs behind fsspec URLs: its memory and local file systems."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import features_with, make_bundle, write_features

from ccnet.cli.main import main
from runtime.corpus.store import LocalStore, is_url, join_location, local_path, open_store, whole_file
from runtime.errors import ConfigError, MissingDependency

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
fsspec = pytest.importorskip("fsspec")

COUNT = 7


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, which all of a process share, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle").folder


@pytest.fixture
def features(tmp_path: Path) -> Path:
    folder = tmp_path / "features"
    folder.mkdir()
    for i in range(COUNT):
        write_features(folder, f"v{i}", features_with(12 + i, [(2, 8, i % 4, 3.0)]))
    return folder


def upload(memory: Any, folder: Path, target: str) -> None:
    for path in folder.iterdir():
        memory.pipe_file(f"{target}/{path.name}", path.read_bytes())


def predict(bundle: Path, features: object, out: object, *options: str) -> int:
    return main(["predict", str(bundle), "--features", str(features), "--out", str(out), "--quiet", *options])


def test_locations(tmp_path: Path) -> None:
    for url in ("s3://bucket/x", "memory://x", "gs://b", "simplecache::s3://b/x"):
        assert is_url(url)
        assert local_path(url) is None
    for path in ("x", "/x/y", "c:/x", "./s3:/x"):
        assert not is_url(path)
        assert local_path(path) == path
    for text, path in (("file:///a/b%20c", "/a/b c"), ("local:///a", "/a"), ("file://localhost/a", "/a")):
        assert not is_url(text)
        assert local_path(text) == path
    assert join_location("s3://b/x/", "y") == "s3://b/x/y"
    assert join_location("/a", "s3://b") == "s3://b"
    assert join_location("/a", "b") == "/a/b"
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)


def test_features_and_shards_in_an_object_store(
    bundle: Path, features: Path, tmp_path: Path, memory: Any, capsys: Any
) -> None:
    assert predict(bundle, features, tmp_path / "local.jsonl") == 0
    upload(memory, features, "/corpus")
    assert predict(bundle, "memory://corpus", "memory://out/run", "--shard-size", "3") == 0
    names = sorted(memory.find("/out/run"))
    assert names == [
        *(f"/out/run/done/{i:06d}.json" for i in range(3)),
        *("/out/run/engine.json", "/out/run/failed.jsonl", "/out/run/plan.json"),
        *(f"/out/run/shards/{i:06d}.jsonl" for i in range(3)),
        "/out/run/videos.jsonl",
    ]
    shards = b"".join(memory.cat_file(name) for name in names if "/shards/" in name)
    assert shards == (tmp_path / "local.jsonl").read_bytes()

    memory.rm_file("/out/run/done/000001.json")
    before = memory.modified("/out/run/shards/000000.jsonl"), memory.modified("/out/run/shards/000001.jsonl")
    assert predict(bundle, "memory://corpus", "memory://out/run") == 0
    after = memory.modified("/out/run/shards/000000.jsonl"), memory.modified("/out/run/shards/000001.jsonl")
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert predict(bundle, "memory://corpus", "memory://out/run", "--long-videos", "windows") == 2
    assert "memory://out/run: holds another run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["events.jsonl", "events.parquet"])
def test_one_object(name: str, bundle: Path, features: Path, tmp_path: Path, memory: Any) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert predict(bundle, features, tmp_path / name) == 0
    assert predict(bundle, features, f"memory://out/{name}") == 0
    assert memory.find("/out") == [f"/out/{name}"]
    assert memory.cat_file(f"/out/{name}") == (tmp_path / name).read_bytes()


def test_a_local_url_is_a_local_path(bundle: Path, features: Path, tmp_path: Path) -> None:
    assert predict(bundle, f"file://{features}", f"file://{tmp_path}/run", "--shard-size", "3") == 0
    assert len(list((tmp_path / "run" / "shards").iterdir())) == 3


def test_a_manifest_in_an_object_store_with_bad_videos(bundle: Path, features: Path, memory: Any, capsys: Any) -> None:
    upload(memory, features, "/corpus/part")
    memory.rm_file("/corpus/part/v1_heard.npy")
    memory.pipe_file("/corpus/part/v2_seen.npy", b"nonsense")
    lines = [json.dumps({"video_id": f"v{i}", "features": "part"}) for i in (2, 1, 0)]
    memory.pipe_file("/corpus/videos.jsonl", "\n".join(lines).encode())
    assert predict(bundle, "memory://corpus/videos.jsonl", "memory://out/run") == 1
    failed = [json.loads(line) for line in memory.cat_file("/out/run/failed.jsonl").splitlines()]
    assert [f["video_id"] for f in failed] == ["v2", "v1"]
    assert failed[0]["message"].startswith("memory://corpus/part/v2_seen.npy: not a .npy file")
    assert failed[1]["message"] == "memory://corpus/part/v1_heard.npy: no such feature file"
    assert predict(bundle, "memory://out/run/failed.jsonl", "-") == 1
    assert "2 of 2 videos failed" in capsys.readouterr().err


def test_what_can_not_be_reached(bundle: Path, features: Path, memory: Any, capsys: Any) -> None:
    for location, message in (
        ("memory://nothing", "memory://nothing: no such feature folder"),
        ("nosuch://x/y", "nosuch://x/y: can't be opened by fsspec (Protocol not known: nosuch)"),
        ("memory://x/videos.jsonl", "memory://x/videos.jsonl: can't be read"),
    ):
        assert predict(bundle, location, "-") == 2
        assert message in capsys.readouterr().err


def test_what_is_not_finished_is_not_there(memory: Any) -> None:
    def half() -> None:
        with whole_file("memory://x/events.jsonl") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert memory.find("/") == []


def test_a_url_without_fsspec_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise ModuleNotFoundError("no fsspec", name="fsspec")

    monkeypatch.setattr("runtime.packages.importlib.import_module", absent)
    with pytest.raises(MissingDependency, match=r"s3://b/x: a URL needs.*pip install 'ccnet\[remote\]'"):
        open_store("s3://b/x")


def test_an_object_is_created_once(memory: Any) -> None:
    store = open_store("memory://x")
    assert store.create("engine.json", b"1")
    assert not store.create("engine.json", b"2")
    assert store.read("engine.json") == b"1"
    assert store.read("engine.json", 0, 1) == b"1"
    assert store.names("nothing") == []
    store.remove("engine.json")
    store.remove("engine.json")
    assert store.size("engine.json") is None
    with pytest.raises(ConfigError):
        open_store("nosuch://x")
