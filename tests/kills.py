"""Kills at system calls that change a file: what is left is the old or the new result, and the next run tidies up.

`python tests/kills.py [--kills N] [CASE ...]` runs every case in child processes that strace ends at one call each, N
of all the calls of all cases, evenly chosen, and prints a table; exit status 1 where something was lost. For each: the
result is whole, the same command then succeeds and makes the same bytes, and nothing hidden is left beside the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import (
    DAVEL_OPTIONS,
    SPEC,
    OracleBackend,
    copying_exporter,
    davel_parameters,
    engine,
    features_with,
    fill_draft,
    golden,
    make_bundle,
    random_network,
    write_features,
)

import export.graph.to_onnx
import export.parity.check
from ccnet.checkpoint import read_checkpoint, save_checkpoint
from ccnet.cli.main import main as ccnet
from ccnet.config import Config, ModelConfig, TrainConfig
from ccnet.synthetic.annotations import demo_annotations
from ccnet.synthetic.features import SynthesisSettings
from ccnet.synthetic.folder import synthesize_folder
from ccnet.training.loop import train
from ccnet.training.state import read_state
from export.bundle_writer import new_bundle
from export.parity.inputs import stress_inputs, synthetic_inputs
from export.parity.reference import Reference, load_reference, record, save_reference
from runtime.annotations import read_annotations
from runtime.bundle import read_bundle
from runtime.detections import read_events
from runtime.profiling.timing import Rules
from runtime.spec import TimeBase

CALLS = (
    *(
        "open",
        "openat",
        "creat",
        "write",
        "pwrite64",
        "writev",
        "rename",
        "renameat",
        "renameat2",
        "unlink",
        "unlinkat",
    ),
    *("mkdir", "mkdirat", "rmdir", "ftruncate", "truncate", "fsync", "chmod", "fchmod", "link", "symlink"),
)
TIMEOUT = 120
CONFIG = Config(
    model=ModelConfig(
        length=16,
        levels=2,
        visual_dim=4,
        audio_dim=3,
        dim=8,
        heads=2,
        self_layers=0,
        num_classes=2,
        head_dim=8,
        tdm_dim=4,
    ),
    train=TrainConfig(batch_size=4, epochs=2, warmup_epochs=0, workers=0, device="cpu"),
    time_base=TimeBase(fps=25.0, stride_frames=96.0, window_frames=96.0),
)


@dataclass(frozen=True)
class Case:
    """Something that writes, and what must be true at any moment."""

    name: str
    prepare: Callable[[Path], None]
    """Make the folder as it is before, with an earlier result in it."""
    act: Callable[[Path], object]
    check: Callable[[Path], object]
    """Raise where the result is neither the old nor the new one."""
    same: tuple[str, ...] = ()
    """Patterns of files that the next run must leave as a run that nobody killed does, to the byte."""


def _command(*words: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        os.chdir(folder)
        status = ccnet([*words])
        if status:
            raise RuntimeError(f"exit status {status}")

    return act


def _prepare_bundle(folder: Path) -> None:
    make_bundle(folder / "bundle", [engine("onnxruntime", status="unverified")])
    videos = stress_inputs(SPEC)[:3] + synthetic_inputs(SPEC, count=4)
    save_reference(folder / "ref.npz", Reference(SPEC, "0" * 64, videos, record(OracleBackend(), videos)))


def _check_bundle(folder: Path) -> None:
    read_bundle(folder / "bundle").verify()


def _prepare_videos(folder: Path) -> None:
    make_bundle(folder / "bundle")
    (folder / "features").mkdir()
    database: dict[str, Any] = {}
    for i in range(4):
        write_features(folder / "features", f"v{i}", features_with(20, [(3, 8, i, 2.0)]))
        event = {"segment": [3.0, 8.0], "label": SPEC.labels[i], "label_id": i}
        database[f"v{i}"] = {"duration": 20.0, "subset": "test", "annotations": [event]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    _predict(folder)
    shutil.copy(folder / "events.jsonl", folder / "old.jsonl")


_predict = _command("predict", "bundle", "--features", "features", "--out", "events.jsonl", "--quiet")


def _check_events(folder: Path) -> None:
    if len(read_events(folder / "events.jsonl", SPEC.labels)) != 4:
        raise RuntimeError("videos are missing")


def _evaluate(folder: Path) -> None:
    _command("evaluate", "old.jsonl", "--annotations", "annotations.json", "--json", "scores.json")(folder)


def _prepare_scores(folder: Path) -> None:
    _prepare_videos(folder)
    _evaluate(folder)


def _prepare_only_videos(folder: Path) -> None:
    _prepare_videos(folder)
    (folder / "events.jsonl").unlink()


def _check_shards(folder: Path) -> None:
    for path in folder.glob("run/shards/[!.]*"):
        if len(read_events(path, SPEC.labels)) != 2:
            raise RuntimeError("videos are missing")


def _check_page(folder: Path) -> None:
    if not (folder / "page.html").read_text().rstrip().endswith("</html>"):
        raise RuntimeError("the page is not whole")


def _prepare_page(folder: Path) -> None:
    _prepare_videos(folder)
    _SHOW(folder)


def _prepare_comparison(folder: Path) -> None:
    _prepare_videos(folder)
    _COMPARE(folder)


def _prepare_repository(folder: Path) -> None:
    make_bundle(folder / "bundle")
    _TRITON(folder)


def _check_repository(folder: Path) -> None:
    if run_child(_command("triton", "--out", "repository", "--check"), folder):
        raise RuntimeError("Triton would refuse the repository")


def _new_bundle(folder: Path) -> None:
    with new_bundle(folder / "bundle", spec=SPEC, model={}, checkpoint_sha256="0" * 64, versions={}) as draft:
        fill_draft(draft)


def _prepare_export(folder: Path) -> None:
    save_checkpoint(folder / "checkpoint", random_network(CONFIG.model), config=CONFIG, labels=("a", "b"))
    _EXPORT(folder)
    shutil.copy(folder / "bundle" / "model.onnx", folder / "graph.onnx")


def _export(folder: Path) -> None:
    """Export as the command does, but for the graph, which takes long to make and is there."""
    export.graph.to_onnx.export_onnx = copying_exporter(folder / "graph.onnx")  # type: ignore[assignment]
    export.parity.check.SPEED_RULES = Rules(seconds=0, calls=3)
    _EXPORT(folder)


def _prepare_released(folder: Path) -> None:
    torch.save(davel_parameters(golden("davel")), folder / "released.pt")
    _import_weights(folder)


def _check_checkpoint(folder: Path) -> None:
    read_checkpoint(folder / "checkpoint").load_model()


def _prepare_training(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(demo_annotations({"train": 6, "validation": 5}, 2, seed=1)))
    _synthesize(folder)
    one = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=1))
    train(one, folder / "annotations.json", folder / "features", folder / "old", quiet=True)


def _train(folder: Path) -> None:
    resume = (folder / "run" / "last").is_dir()
    train(CONFIG, folder / "annotations.json", folder / "features", folder / "run", resume=resume, quiet=True)


def _check_training(folder: Path) -> None:
    for name in ("best", "last"):
        if (folder / "run" / name).is_dir():
            read_checkpoint(folder / "run" / name).load_model()
    if (folder / "run" / "last").is_dir():
        done = read_state(folder / "run" / "last").position.epoch
        table = folder / "run" / "metrics.csv"
        if table.exists() and len(table.read_text().splitlines()) - 1 > done:
            raise RuntimeError("the table reports an epoch whose state is lost")


def _synthesize(folder: Path) -> None:
    annotations = read_annotations(folder / "annotations.json")
    videos = list(annotations.videos.values())
    synthesize_folder(annotations, videos, folder / "features", CONFIG, SynthesisSettings(), quiet=True)


def _check_features(folder: Path) -> None:
    for path in (folder / "features").glob("[!.]*.npy"):
        np.load(path, allow_pickle=False)


def _prepare_annotations(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(demo_annotations({"train": 4}, 2, seed=1)))


def _save_reference(folder: Path) -> None:
    videos = synthetic_inputs(SPEC, count=2)
    save_reference(folder / "ref.npz", Reference(SPEC, "0" * 64, videos, record(OracleBackend(), videos)))


_EXPORT = _command("export", "checkpoint", "--out", "bundle", "--videos", "2", "--max-batch", "2")
_import_weights = _command(
    "import-weights", "released.pt", "--preset", "davel_unav100", "--out", "checkpoint", *DAVEL_OPTIONS
)
_VERIFY = _command("verify", "bundle", "--reference", "ref.npz", "--backend", "onnxruntime")
_SHARDS = _command("predict", "bundle", "--features", "features", "--out", "run", "--shard-size", "2", "--quiet")
_SHOW = _command("show", "old.jsonl", "--annotations", "annotations.json", "--out", "page.html", "--quiet")
_COMPARE = _command(
    *("compare", "old.jsonl", "events.jsonl", "--annotations", "annotations.json"),
    *("--json", "comparison.json", "--draws", "10", "--quiet"),
)
_TRITON = _command("triton", "bundle", "--out", "repository", "--device", "cpu")
_CONVERT = _command("convert", "old.jsonl", "--out", "events.csv")
CASES = (
    Case("verify", _prepare_bundle, _VERIFY, _check_bundle, ("bundle/model.onnx",)),
    Case("export", _prepare_export, _export, _check_bundle, ("bundle/model.onnx",)),
    Case("export (its writer)", _new_bundle, _new_bundle, _check_bundle, ("bundle/*.onnx",)),
    Case("import-weights", _prepare_released, _import_weights, _check_checkpoint, ("checkpoint/*.safetensors",)),
    Case("train", _prepare_training, _train, _check_training, ("run/*/*.safetensors",)),
    Case("synthesize", _prepare_annotations, _synthesize, _check_features, ("features/*",)),
    Case("predict", _prepare_videos, _predict, _check_events, ("*.jsonl*",)),
    Case("predict (shards)", _prepare_only_videos, _SHARDS, _check_shards, ("run/shards/*", "run/*.json*")),
    Case(
        "evaluate --json",
        _prepare_scores,
        _evaluate,
        lambda f: json.loads((f / "scores.json").read_text()),
        ("scores.json",),
    ),
    Case("reference", _save_reference, _save_reference, lambda f: load_reference(f / "ref.npz"), ("ref.npz",)),
    Case("convert", _prepare_videos, _CONVERT, _check_events, ("events.csv",)),
    Case("show", _prepare_page, _SHOW, _check_page),
    Case(
        "compare --json",
        _prepare_comparison,
        _COMPARE,
        lambda f: json.loads((f / "comparison.json").read_text()),
        ("comparison.json",),
    ),
    Case(
        "triton",
        _prepare_repository,
        _TRITON,
        _check_repository,
        ("repository/**/*",),
    ),
)


def run_child(act: Callable[[Path], object], folder: Path, trace: Sequence[str] = ()) -> int:
    """Run in a child process, under strace with these options; return how it ended as `os.waitpid` codes it."""
    waiting, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        quiet = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.read(waiting, 1)
        try:
            signal.alarm(TIMEOUT)
            act(folder)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(waiting)
    tracer = None
    if trace:
        tracer = subprocess.Popen(["strace", *trace, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        if "attached" not in (line := tracer.stderr.readline()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise OSError(f"strace: {line.strip()}")
    os.close(go)
    _, status = os.waitpid(pid, 0)
    if tracer is not None:
        tracer.communicate()
    return status


def changing_calls(log: str) -> list[tuple[str, int]]:
    """Return (call, how many of its kind it is) of the calls in a log of strace that change a file."""
    seen: Counter[str] = Counter()
    points = []
    for line in log.splitlines():
        match = re.match(r"(\w+)\(", line)
        if match is None:
            continue
        seen[match[1]] += 1
        if match[1] not in ("open", "openat") or "O_WRONLY" in line or "O_RDWR" in line:
            points.append((match[1], seen[match[1]]))
    return points


def prepare(case: Case, folder: Path) -> None:
    """Prepare in a child: the process that forks has no threads of a library."""
    if status := run_child(case.prepare, folder):
        raise RuntimeError(f"{case.name}: preparing ends with {status}: {Path(f'{folder}.log').read_text()[-500:]}")


def find_points(case: Case, folder: Path) -> list[tuple[str, int]]:
    """Run a case to its end, and return the calls at which it can be killed."""
    log = folder.parent / "calls"
    trace = ["-e", f"trace={','.join(f'?{call}' for call in CALLS)}", "-o", str(log)]
    if status := run_child(case.act, folder, trace):
        raise RuntimeError(f"{case.name}: ends with {status} when it is left alone")
    return changing_calls(log.read_text(errors="replace"))


def result(case: Case, folder: Path) -> dict[str, bytes]:
    """Return the files of a result that are the same after every run, by their names."""
    found = (path for pattern in case.same for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def kill_at(case: Case, before: Path, whole: Path, folder: Path, point: tuple[str, int]) -> str | None:
    """Kill a case at one call; return what is wrong afterwards, or None. `whole`: where nobody killed it."""
    shutil.copytree(before, folder, symlinks=True)
    call, number = point
    status = run_child(case.act, folder, ["-o", os.devnull, "-e", f"inject={call}:signal=KILL:when={number}"])
    if not os.WIFSIGNALED(status):
        return "not killed" if status else None  # this time there were fewer calls
    try:
        case.check(folder)
    except Exception as error:  # noqa: BLE001
        return f"after the kill: {error!r}"
    if run_child(case.act, folder):
        return f"the next run fails: {(folder.parent / f'{folder.name}.log').read_text()[-300:]}"
    try:
        case.check(folder)
    except Exception as error:  # noqa: BLE001
        return f"after the next run: {error!r}"
    there, wanted = result(case, folder), result(case, whole)
    if other := sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)):
        return f"not the bytes of a run left alone: {', '.join(other)}"
    orphans = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]
    return f"left behind: {', '.join(orphans)}" if orphans else None


def run_case(case: Case, kills: int | None) -> dict[str, Any]:
    """Kill a case at `kills` of its calls, evenly chosen; None: at all. Return the row of the table."""
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        root = Path(name)
        (root / "before").mkdir()
        prepare(case, root / "before")
        shutil.copytree(root / "before", root / "whole", symlinks=True)
        points = find_points(case, root / "whole")
        count = len(points) if kills is None else min(kills, len(points))
        chosen = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))]
        wrong = {}
        for number, point in enumerate(chosen):
            if problem := kill_at(case, root / "before", root / "whole", root / f"killed{number}", point):
                wrong["{}:{}".format(*point)] = problem
            shutil.rmtree(root / f"killed{number}")
        return {"case": case.name, "calls": len(points), "kills": len(chosen), "wrong": wrong}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--kills", type=int, metavar="N", help="of each case; default: at every call")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    rows = []
    for case in CASES:
        if arguments.cases and not {case.name, case.name.split()[0]} & {*arguments.cases}:
            continue
        rows.append(run_case(case, arguments.kills))
        if not arguments.json:
            row = rows[-1]
            print(
                f"{row['case']:<28} {row['calls']:5} calls {row['kills']:5} kills {len(row['wrong']):3} wrong",
                flush=True,
            )
            for point, problem in row["wrong"].items():
                print(f"    {point}: {problem}")
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(f"{sum(row['kills'] for row in rows)} kills")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
