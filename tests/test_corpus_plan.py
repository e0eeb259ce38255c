"""Plans and manifests: every video is in one shard, the same command makes the same plan, another one is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import SPEC, edit_manifest, engine, features_with, make_bundle, write_features

from runtime.bundle import Bundle, read_bundle
from runtime.corpus.plan import (
    LARGEST_SHARD,
    SMALLEST_SHARD,
    Plan,
    Settings,
    bundle_digest,
    make_plan,
    pin_engine,
    pinned_engine,
    read_plan,
    settle_plan,
)
from runtime.corpus.sources import Entry, FeatureSource, find_entries, read_manifest
from runtime.corpus.store import LocalStore
from runtime.errors import ConfigError, FeatureError
from runtime.features import FeatureFiles

pytest.importorskip("onnx")

SETTINGS = Settings(format="jsonl", backend="auto", precision=None, long_videos="crop", window_overlap=0.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def videos(count: int) -> list[Entry]:
    return [Entry(f"v{i:04d}", duration=float(i + 1)) for i in range(count)]


def settled(store: LocalStore, entries: Sequence[Entry], bundle: Bundle, size: int = 4, **changes: Any) -> Plan:
    plan, lines = make_plan(entries, bundle, dataclasses.replace(SETTINGS, **changes), size)
    return settle_plan(store, plan, lines, any_shard_size=False)[0]


def test_every_video_is_in_one_shard(bundle: Bundle, tmp_path: Path) -> None:
    store, entries = LocalStore(tmp_path), videos(11)
    plan = settled(store, entries, bundle)
    assert [plan.videos_of(shard) for shard in range(plan.shards)] == [4, 4, 3]
    assert [entry for shard in range(plan.shards) for entry in plan.entries(store, shard)] == entries
    assert read_plan(store) == plan


@pytest.mark.parametrize(
    ("count", "size"), [(1, SMALLEST_SHARD), (2000, SMALLEST_SHARD), (102_400, 100), (9_000_000, LARGEST_SHARD)]
)
def test_shards_grow_with_the_corpus(bundle: Bundle, count: int, size: int) -> None:
    class Many(Sequence[Entry]):
        """As many entries, without the memory for them."""

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: object) -> list[Entry]:  # type: ignore[override]
            return []

    assert make_plan(Many(), bundle, SETTINGS)[0].shard_size == size


def test_the_same_command_makes_the_same_plan_and_finds_it(bundle: Bundle, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plan, lines = make_plan(videos(100), bundle, SETTINGS, 7)
    assert settle_plan(store, plan, lines, any_shard_size=False) == (plan, False)
    assert settle_plan(store, plan, lines, any_shard_size=False) == (plan, True)
    unsaid, _ = make_plan(videos(100), bundle, SETTINGS)
    assert settle_plan(store, unsaid, lines, any_shard_size=True) == (plan, True)


def test_what_verify_and_rebuild_change_leaves_a_bundle_what_it_is(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    before = bundle_digest(bundle)
    edit_manifest(bundle.folder, engines=(engine("onnxruntime", status="unverified"), engine("openvino", "bf16")))
    assert bundle_digest(read_bundle(bundle.folder)) == before
    edit_manifest(bundle.folder, checkpoint_sha256="1" * 64)
    assert bundle_digest(read_bundle(bundle.folder)) != before


def test_another_run_is_refused_and_told_what_differs(bundle: Bundle, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "out")
    settled(store, videos(3), bundle)
    settled(store, videos(10), bundle)  # nothing was done of the one before
    store.write("done/000000.json", b"{}")
    other = make_bundle(tmp_path / "other", spec=dataclasses.replace(SPEC, labels=("a", "b", "c", "d")))
    for message, entries, network, size, changes in (
        ("bundle: [0-9a-f]{16}... there, ", videos(10), other, 4, {}),
        (r"videos: 10 there, 12 now; 2 not there \(first: 'v0010'\)", videos(12), bundle, 4, {}),
        (r"videos: 10 there, 9 now; 1 there alone \(first: 'v0009'\)", videos(9), bundle, 4, {}),
        ("1 with another duration or folder", [Entry("v0000"), *videos(10)[1:]], bundle, 4, {}),
        ("videos: 10 there, 10 now; in another order", videos(10)[::-1], bundle, 4, {}),
        ("shard size: 4 there, 5 now", videos(10), bundle, 5, {}),
        ("long_videos: 'crop' there, 'windows' now", videos(10), bundle, 4, {"long_videos": "windows"}),
        ("format: 'jsonl' there, 'parquet' now", videos(10), bundle, 4, {"format": "parquet"}),
    ):
        with pytest.raises(ConfigError, match=f"(?s)holds another run.*{message}.*name another folder"):
            settled(store, entries, network, size, **changes)


def test_a_folder_of_other_things_and_a_damaged_plan_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds other files, such as 'thesis.tex'; name a new folder"):
        settled(store, videos(3), bundle)
    for damage in ('{"schema": 2}', "{", '{"schema": 1}'):
        (tmp_path / "plan.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"plan\.json"):
            settled(store, videos(3), bundle)


def test_the_first_engine_is_that_of_the_run(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert pinned_engine(store) is None
    pin_engine(store, "onnxruntime-fp32", "onnxruntime", "fp32")
    pin_engine(store, "onnxruntime-fp32", "onnxruntime", "fp32")
    assert pinned_engine(store) == ("onnxruntime", "fp32")
    with pytest.raises(ConfigError, match="begun with the engine onnxruntime-fp32, this process opened openvino-bf16"):
        pin_engine(store, "openvino-bf16", "openvino", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]


def manifest(path: Path, *lines: object) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_a_manifest_says_where_features_are_and_how_long_videos_last(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for folder, name in ((tmp_path, "a"), (tmp_path / "part", "b"), (tmp_path / "part", "c")):
        write_features(folder, name, features_with(12))
    path = manifest(
        tmp_path / "videos.jsonl",
        {"video_id": "b", "features": "part", "duration": 7},
        {"video_id": "a", "shard": 0, "error": "FeatureError", "message": "a list of failed videos is a manifest"},
        {"video_id": "c", "features": str(tmp_path / "part")},
    )
    root, entries = find_entries(path, SPEC)
    assert [(entry.video_id, entry.duration) for entry in entries] == [("b", 7.0), ("a", None), ("c", None)]
    for entry, where in zip(entries, ("part", ".", "part"), strict=True):
        video_id, source, duration = FeatureSource(root, SPEC).item(entry)  # type: ignore[misc]
        assert (video_id, duration) == (entry.video_id, entry.duration)
        assert isinstance(source, FeatureFiles)
        assert Path(source.folder) == (tmp_path / where).resolve()
        assert source.read(SPEC).steps == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", r"line 2: got \[\], expected an object with video_id"),
        ({"video_id": "../a"}, "line 2: video id: got '../a'"),
        ({"video_id": "a"}, "line 2: video 'a' occurs a second time"),
        ({"video_id": "b", "duration": -1}, "line 2: duration: got -1, expected seconds above 0"),
        ({"video_id": "b", "features": 3}, "line 2: features: got 3, expected the name of a folder"),
        ({"video_id": "b", "folder": "x"}, "line 2: unknown key 'folder'; known keys: video_id, features, duration"),
    ],
)
def test_a_bad_line_of_a_manifest_is_named(line: object, message: str, tmp_path: Path) -> None:
    path = manifest(tmp_path / "videos.jsonl", {"video_id": "a"}, line)
    with pytest.raises(FeatureError, match=message):
        read_manifest(path)


def test_a_manifest_without_videos_and_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="lists no videos"):
        read_manifest(manifest(tmp_path / "videos.jsonl"))
    with pytest.raises(FeatureError, match="No such file"):
        read_manifest(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigError, match="is a manifest, which has its own ids"):
        find_entries(manifest(tmp_path / "videos.jsonl"), SPEC, annotations="a.json")


def test_results_without_their_plan_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("done/000000.json", b"{}")
    with pytest.raises(ConfigError, match=r"holds results, but not the plan\.json of their run; delete the folder"):
        settled(store, videos(4), bundle)
    assert os.listdir(tmp_path) == ["done"]
