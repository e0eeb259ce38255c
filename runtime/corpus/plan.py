"""The plan of a run: which videos are in which shard, and all that its results depend on.

A plan follows from the list of videos, the bundle and the settings alone, so every process that is started with the
same command makes the same one. It is written once into the run's folder:

    plan.json            this plan
    videos.jsonl         the videos, in order, as a manifest
    engine.json          the engine that the first process chose; all others take the same one
    shards/000000.jsonl  the events of a shard, in the order of its videos (or .parquet)
    done/000000.json     what became of it; written after its events, so that they are whole
    failed.jsonl         the bad videos, once every shard is done
    claims/              who is at which shard; gone at the end
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.backends.registry import REGISTRY
from runtime.bundle import Bundle
from runtime.corpus.sources import Entry, parse_entries
from runtime.corpus.store import Store
from runtime.errors import ConfigError
from runtime.records import BadRecord, parse_json
from runtime.schema import require, section_from_json, show

SCHEMA = 1
PLAN, VIDEOS, ENGINE, FAILED = "plan.json", "videos.jsonl", "engine.json", "failed.jsonl"
SHARDS, DONE, CLAIMS = "shards", "done", "claims"

Format = Literal["jsonl", "parquet"]

_SHARDS_WANTED = 1024
SMALLEST_SHARD, LARGEST_SHARD = 32, 4096
"""Videos of a shard where nobody says otherwise: few enough that losing one costs little, see docs/scale.md."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the events of a video depend on beside the video and the bundle, and the format that they are written in."""

    format: Format
    backend: str
    """As asked for, so `auto` too."""
    precision: str | None
    long_videos: str
    window_overlap: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Content of `plan.json`."""

    schema: int
    videos: int
    videos_sha256: str
    """Of `videos.jsonl`: ids, durations and folders. The features themselves are not read for it."""
    bundle_sha256: str
    """See `bundle_digest`."""
    settings: Settings
    shard_size: int
    """Videos of every shard but the last."""
    offsets: tuple[int, ...]
    """Byte of `videos.jsonl` where each shard's lines begin, and where the last one's end."""

    @property
    def shards(self) -> int:
        return len(self.offsets) - 1

    def videos_of(self, shard: int) -> int:
        """Return how many videos a shard has."""
        return min(self.shard_size, self.videos - shard * self.shard_size)

    def entries(self, store: Store, shard: int) -> list[Entry]:
        """Read the videos of a shard from the run's folder."""
        lines = store.read(VIDEOS, self.offsets[shard], self.offsets[shard + 1])
        entries = parse_entries(lines)
        if len(entries) != self.videos_of(shard):
            raise ConfigError(
                f"{store.location}/{VIDEOS}: altered since the run began; delete the folder and run again"
            )
        return entries

    def shard_file(self, shard: int) -> str:
        """Return the name of a shard's events in the run's folder."""
        return f"{SHARDS}/{shard:06d}.{self.settings.format}"

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"


def suspect_file(shard: int) -> str:
    """Return the name of the file that says which video of a shard a worker is at, when it is careful."""
    return f"{DONE}/{shard:06d}.suspect.json"


def done_file(shard: int) -> str:
    """Return the name of a shard's receipt in the run's folder."""
    return f"{DONE}/{shard:06d}.json"


def make_plan(
    entries: Sequence[Entry], bundle: Bundle, settings: Settings, shard_size: int | None = None
) -> tuple[Plan, bytes]:
    """Return the plan of a run, and the content of its `videos.jsonl`.

    `shard_size`: None makes about a thousand shards, of `SMALLEST_SHARD` to `LARGEST_SHARD` videos.
    """
    require(len(entries) > 0, "videos", 0, "at least one")
    overlap = settings.window_overlap
    require(0 <= overlap < 1, "window_overlap", overlap, "a number in [0, 1)")
    size = shard_size or min(max(-(-len(entries) // _SHARDS_WANTED), SMALLEST_SHARD), LARGEST_SHARD)
    starts = range(0, len(entries), size)
    # Joined a shard at a time: a million lines of their own would take gigabytes.
    chunks = [b"".join([entry.to_line() for entry in entries[start : start + size]]) for start in starts]
    content = b"".join(chunks)
    plan = Plan(
        schema=SCHEMA,
        videos=len(entries),
        videos_sha256=hashlib.sha256(content).hexdigest(),
        bundle_sha256=bundle_digest(bundle),
        settings=settings,
        shard_size=size,
        offsets=tuple(itertools.accumulate(map(len, chunks), initial=0)),
    )
    return plan, content


def bundle_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of what a bundle computes: its contract, its weights and its ONNX graphs.

    Engines built from them, statuses and speeds are left out: `ccnet rebuild` and `ccnet verify` on one of several
    machines leave a bundle what it is.
    """
    manifest = bundle.manifest
    graphs = {name for file in manifest.model_files if file.format == "onnx" for name in file.files}
    facts = {
        "spec": dataclasses.asdict(manifest.spec),
        "checkpoint": manifest.checkpoint_sha256,
        "graphs": sorted([record.name, record.sha256] for record in manifest.files if record.name in graphs),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_plan(store: Store) -> Plan | None:
    """Return the plan of a run's folder; None where there is none. Raises ConfigError for a file that is no plan."""
    where = f"{store.location}/{PLAN}"
    try:
        data = parse_json(store.read(PLAN))
    except FileNotFoundError:
        return None
    except BadRecord as error:
        raise ConfigError(f"{where}: {error}; delete the folder and run again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    require(schema == SCHEMA, f"{where}: schema", schema, f"{SCHEMA}; delete the folder and run again")
    plan = section_from_json(Plan, data, where=where)
    offsets, size = plan.offsets, plan.shard_size
    whole = (
        size >= 1
        and plan.videos >= 1
        and plan.shards == -(-plan.videos // size)
        and list(offsets) == sorted({*offsets})
        and (offsets[0], offsets[-1]) == (0, store.size(VIDEOS))
    )
    require(whole, f"{where}: offsets", offsets, f"those of {VIDEOS}; delete the folder and run again")
    return plan


def settle_plan(store: Store, plan: Plan, videos: bytes, *, any_shard_size: bool) -> tuple[Plan, bool]:
    """Write a plan into the run's folder, or check that the one there is of the same run.

    Returns the run's plan and whether it was begun before. `any_shard_size`: nobody asked for a size, so that of the
    plan there stays. A plan of which nothing was done yet is replaced. Raises ConfigError, which says what differs, for
    another plan, for a folder that holds other files and for results without a plan.
    """
    there = read_plan(store)
    if there is None and store.names(DONE):
        there = read_plan(store)  # a process that began at the same time wrote it before the first receipt
        if there is None:
            raise ConfigError(f"{store.location}: holds results, but not the {PLAN} of their run; delete the folder")
    if there is not None:
        if any_shard_size and there.shard_size != plan.shard_size:
            plan = dataclasses.replace(plan, shard_size=there.shard_size, offsets=there.offsets)
        if there == plan:
            return there, True
        if store.names(DONE) or store.names(CLAIMS):
            differences = "\n".join(f"  {line}" for line in _differences(store, there, plan, videos))
            raise ConfigError(
                f"{store.location}: holds another run, which differs in\n{differences}\n"
                "Repeat the command that began it, name another folder, or delete this one"
            )
        for name in (PLAN, ENGINE):  # of a run in which nothing was done, such as one of a mistaken command
            store.remove(name)
    ours = {VIDEOS, ENGINE, SHARDS, DONE, CLAIMS}
    foreign = [name for name in store.names() if name not in ours and not name.startswith(".")]
    if foreign:
        raise ConfigError(f"{store.location}: holds other files, such as {show(foreign[0])}; name a new folder")
    store.write(VIDEOS, videos)
    store.write(PLAN, plan.to_json())  # last: with it the run has begun
    return plan, False


def remove_run(store: Store) -> None:
    """Remove a run of which nothing is needed any more.

    Killed at any moment, what is left is a run of which less is done, or no run: receipts go before their events, all
    that is done before the plan, the plan before the videos that it counts.
    """
    for name in (DONE, SHARDS, CLAIMS, ENGINE, FAILED, PLAN, VIDEOS, ""):
        store.remove(name)


def _differences(store: Store, there: Plan, plan: Plan, videos: bytes) -> list[str]:
    found = []
    if there.bundle_sha256 != plan.bundle_sha256:
        found.append(f"bundle: {there.bundle_sha256[:16]}... there, {plan.bundle_sha256[:16]}... now (SHA-256)")
    if there.videos_sha256 != plan.videos_sha256:
        before, now = (parse_entries(lines) for lines in (store.read(VIDEOS), videos))
        found.append(_different_videos(before, now))
    for field in dataclasses.fields(Settings):
        was, asked = getattr(there.settings, field.name), getattr(plan.settings, field.name)
        if was != asked:
            found.append(f"{field.name}: {show(was)} there, {show(asked)} now")
    if there.shard_size != plan.shard_size:
        found.append(f"shard size: {there.shard_size} there, {plan.shard_size} now")
    return found or ["the bytes at which shards begin"]


def _different_videos(before: Sequence[Entry], now: Sequence[Entry]) -> str:
    old, new = ({entry.video_id: entry for entry in entries} for entries in (before, now))
    parts = []
    for names, text in (
        ([name for name in new if name not in old], "not there"),
        ([name for name in old if name not in new], "there alone"),
        ([name for name in new if name in old and new[name] != old[name]], "with another duration or folder"),
    ):
        if names:
            parts.append(f"{len(names)} {text} (first: {show(names[0])})")
    return f"videos: {len(old)} there, {len(new)} now; {', '.join(parts) or 'in another order'}"


def pinned_engine(store: Store) -> tuple[str, str] | None:
    """Return backend and precision of the engine that the run's first process chose; None before that."""
    try:
        data = parse_json(store.read(ENGINE))
        return str(data["backend"]), str(data["precision"])
    except FileNotFoundError:
        return None
    except (BadRecord, KeyError, TypeError):
        raise ConfigError(f"{store.location}/{ENGINE}: damaged; delete the folder and run again") from None


def pin_engine(store: Store, name: str, backend: str, precision: str) -> None:
    """Make an engine the one of the run, unless it has one. Raises ConfigError where that is another one."""
    if (backend, precision) == pinned_engine(store):
        return
    data = {"engine": name, "backend": backend, "precision": precision}
    if store.create(ENGINE, json.dumps(data).encode() + b"\n"):
        return
    there = pinned_engine(store)
    if there != (backend, precision):
        had = "-".join(there or ("none",))
        known = ", ".join(REGISTRY)
        raise ConfigError(
            f"{store.location}: the run was begun with the engine {had}, this process opened {name}; events of two "
            f"engines differ. Begin a new run with a --backend that all machines have, of {known}"
        )
