"""Everything there is to do on a GPU, in one go: `python -m benchmarks.gpu.report --checkpoint C --out DIR`.

Builds and verifies engines of every precision that the installed libraries have, runs the GPU tests, times engines and
their peers beside the roofline measured in the same run, profiles layers. Each stage is a process of its own: a stage
that fails, crashes or runs out of time is recorded with its error, the rest goes on, and the report is written again
after each. The TensorRT side (`benchmarks.gpu.stages`) needs no torch; the torch side (`benchmarks.gpu.torch_stages`)
runs in the interpreter given by `--torch-python`. With `--device cpu` the same stages run as far as a CPU allows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.bounded import Ended, run_bounded
from benchmarks.gpu.clocks import sampled
from benchmarks.gpu.page import measurements, page
from benchmarks.results import write_result
from runtime.files import write_json
from runtime.machine import machine_facts

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
OUTPUT = 3000
"""Characters kept of what a process wrote."""
SPARE_SECONDS = 5.0
"""A stage is not begun with less time left than this."""
MINUTES = 25.0
"""What the limits of the stages are made for; with less time those of the long ones shrink, to `SHORT_SECONDS`."""
SHORT_SECONDS = 120.0


@dataclass(frozen=True)
class Stage:
    """One process. `needs`: stages that must have been done."""

    name: str
    side: str
    """`tensorrt` (this interpreter), `torch` (the other one) or `pytest`."""
    action: str
    limit_seconds: float
    """At most; see `limit`."""
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def limit(self, minutes: float) -> float:
        """Return the seconds that it may take of so many minutes in all."""
        return min(self.limit_seconds, max(SHORT_SECONDS, self.limit_seconds * minutes / MINUTES))


def plan(options: argparse.Namespace) -> list[Stage]:
    """Return all stages, those first on which others build or whose result matters most."""
    stages = [
        Stage("machine", "tensorrt", "machine", 60),
        Stage("copy", "tensorrt", "copy", 60),
        Stage("tests", "pytest", "pytest", 420),
    ]
    torch = options.torch_python is not None
    if torch:
        stages.append(Stage("matmuls", "torch", "matmuls", 120))
    graphs: tuple[str, ...] = ()
    if options.bundle is None:
        stages.append(Stage("export", "torch", "export", 600, {"precisions": list(options.precisions)}))
        graphs = ("export",)
    # an engine is tuned for one batch size: the latency of batch 1 and the throughput of large ones need two
    kinds = {"latency": [1], "throughput": [batch for batch in options.batches if batch > 1]}
    for format in options.formats:
        for precision in options.precisions:
            for kind, batches in kinds.items():
                if not batches:
                    continue
                name = f"{format} {precision} {kind}"
                chosen = {"format": format, "precision": precision, "kind": kind, "batches": batches}
                if kind == "latency":
                    chosen["optimization_level"] = options.optimization_level
                stages.append(Stage(f"{name} build", "tensorrt", "build", 600, chosen, graphs))
                stages.append(Stage(f"{name} parity check", "tensorrt", "status", 120, chosen, (f"{name} build",)))
                stages.append(Stage(f"{name} speed", "tensorrt", "speed", 240, chosen, (f"{name} parity check",)))
                if precision == options.precisions[0]:  # how an engine is run is a matter of the machine
                    few = {"batches": sorted({batches[0], batches[-1]})}
                    checked = (f"{name} parity check",)
                    stages.append(Stage(f"{name} copies", "tensorrt", "copies", 180, chosen | few, checked))
                    stages.append(Stage(f"{name} contexts", "tensorrt", "contexts", 90, chosen, checked))
                stages.append(Stage(f"{name} layers", "tensorrt", "layers", 60, chosen, (f"{name} parity check",)))
    if torch and options.checkpoint is not None:
        for form, precision in (
            ("eager", "fp32"),
            ("eager", "tf32"),
            ("eager", "bf16"),
            ("fused", "bf16"),
            ("compiled", "bf16"),
        ):
            chosen = {"form": form, "precision": precision}
            if form == "compiled":  # which takes minutes for every batch size
                chosen["batches"] = sorted({min(options.batches), max(options.batches)})
            limit = 600 if form == "compiled" else 300
            stages.append(Stage(f"torch {form} {precision}", "torch", "peer", limit, chosen))
    for precision in ("fp32", "fp16"):
        if precision in options.precisions:
            for kind, cuda_graph in (("", False), (" with CUDA graphs", True)):
                if not cuda_graph or options.device == "cuda":
                    chosen = {"precision": precision, "cuda_graph": cuda_graph}
                    name = f"onnxruntime {precision}{kind}"
                    stages.append(Stage(name, "tensorrt", "onnxruntime", 180, chosen, graphs))
    return stages


def run(options: argparse.Namespace) -> Path:
    """Run all stages and return the path of the report's JSON."""
    options.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    common = {
        "device": options.device,
        "batches": list(options.batches),
        "seconds": options.seconds,
        "work": str(options.work),
        "bundle": str(options.bundle or options.work / "bundle"),
        "reference": str(options.reference or options.work / "reference.npz"),
        "checkpoint": str(options.checkpoint) if options.checkpoint else None,
        "opset": options.opset,
    }
    facts = {"machine": machine_facts(), "commit": _commit(), "settings": common, "minutes": options.minutes}
    done: dict[str, dict[str, Any]] = {}
    stages = plan(options)
    path = _write(options.out, facts, done)
    for number, stage in enumerate(stages, 1):
        left = deadline - time.monotonic()
        missing = [name for name in stage.needs if done[name]["status"] != "done"]
        if missing:
            outcome: dict[str, Any] = {"status": "skipped", "error": f"needs '{missing[0]}'"}
        elif left < SPARE_SECONDS:
            outcome = {"status": "skipped", "error": f"the {options.minutes:g} minutes were used up"}
        else:
            print(f"[{number}/{len(stages)}] {stage.name} ({left:.0f} s left)", flush=True)
            outcome = run_stage(stage, options, common, min(stage.limit(options.minutes), left))
        done[stage.name] = outcome
        print(f"    {outcome['status']} {outcome.get('seconds', 0):.1f} s {outcome.get('error', '')[:300]}", flush=True)
        path = _write(options.out, facts, done)
        if outcome.get("interrupted"):
            break
    return path


def run_stage(stage: Stage, options: argparse.Namespace, common: dict[str, Any], limit: float) -> dict[str, Any]:
    slug = stage.name.replace(" ", "-")
    settings = options.work / f"{slug}.settings.json"
    result = options.work / (f"{slug}.xml" if stage.side == "pytest" else f"{slug}.result.json")
    partial = options.work / f"{slug}.partial.json"
    for stale in (result, partial):
        stale.unlink(missing_ok=True)
    write_json(settings, common | stage.settings | {"partial": str(partial)})
    command, environment = _command(stage, options, settings, result)
    begin = time.perf_counter()
    with sampled() as gpu:
        ended = run_bounded(command, limit, cwd=ROOT, environment=environment)
    seconds = time.perf_counter() - begin
    if ended.why_killed:
        outcome: dict[str, Any] = {"status": "failed", "error": ended.why_killed, "output": ended.output[-OUTPUT:]}
        if ended.interrupted:
            outcome["interrupted"] = True
    else:
        outcome = _outcome(stage, ended, result)
    if "result" not in outcome and partial.is_file():  # what was done before it failed
        outcome["result"] = json.loads(partial.read_text(encoding="utf-8"))
        if stage.action == "build":  # an engine that a better one was to replace
            outcome["status"] = "done"
    return outcome | {"seconds": seconds} | ({"gpu": gpu} if gpu else {})


def _outcome(stage: Stage, ended: Ended, result: Path) -> dict[str, Any]:
    output = ended.output[-OUTPUT:]
    if stage.side == "pytest":
        return _tests_outcome(ended.status, result, output)
    if not result.is_file():
        return {"status": "failed", "error": f"ended with {ended.status}", "output": output}
    outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    status = outcome.get("result", {}).get("passed") if stage.action == "status" else None
    if status is False:  # an engine that fails its parity check gets no speed
        outcome |= {"status": "failed", "error": "the parity check failed"}
    return outcome


def _command(
    stage: Stage, options: argparse.Namespace, settings: Path, result: Path
) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if stage.side == "pytest":
        # without CCNET_GPU_BUNDLE: what the tests do with the real network, the stages do
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-rs", f"--junitxml={result}"]
        return [*pytest, *options.tests], environment
    python = options.torch_python if stage.side == "torch" else sys.executable
    module = "benchmarks.gpu.torch_stages" if stage.side == "torch" else "benchmarks.gpu.stages"
    return [str(python), "-m", module, stage.action, str(settings), str(result)], environment


def _tests_outcome(status: int, junit: Path, output: str) -> dict[str, Any]:
    """Return `done` only if tests passed and none failed: all skipped proves nothing."""
    if not junit.is_file():
        return {"status": "failed", "error": f"pytest ended with {status}", "output": output}
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    summary = f"{passed} passed, {failed} failed, {counts['skipped']} skipped"
    if status == 0:
        return {"status": "done" if passed else "skipped", "result": {"summary": summary, "output": output}}
    return {"status": "failed", "error": f"pytest ended with {status}: {summary}", "output": output}


def _write(out: Path, facts: dict[str, Any], done: dict[str, dict[str, Any]]) -> Path:
    machine = facts["machine"] | done.get("machine", {}).get("result", {})
    return write_result(
        out,
        "gpu",
        measurements=measurements(done),
        page=page(facts, done),
        machine=machine,
        commit=facts["commit"],
        settings=facts["settings"],
        stages=done,
    )


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="network to export and to compare with (torch side)")
    parser.add_argument("--bundle", type=Path, help="bundle with ONNX graphs, in place of exporting the checkpoint")
    parser.add_argument("--reference", type=Path, help="eager outputs of 'ccnet reference' that belong to the bundle")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder of engines and graphs")
    parser.add_argument("--torch-python", type=Path, help="interpreter with torch (default: none, no torch stages)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--formats", nargs="+", default=["tensorrt", "tensorrt-rtx"], choices=("tensorrt", "tensorrt-rtx")
    )
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=(*PRECISIONS, "fp8"))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--opset", type=int, default=17, help="of the exported graphs; 17 is what TensorRT 8.6 reads")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="time budget; stages beyond it are skipped, the long ones shorter",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        default=5,
        choices=range(6),
        help="of the engines of lowest latency (full TensorRT)",
    )
    parser.add_argument("--tests", nargs="*", default=["tests/test_gpu.py"], help="files given to pytest")
    parser.add_argument("--dry-run", action="store_true", help="print the stages with their limits and stop")
    options = parser.parse_args(argv)
    if options.bundle is None and (options.checkpoint is None or options.torch_python is None):
        parser.error("give --bundle (and --reference), or --checkpoint with --torch-python")
    if options.bundle is not None and options.reference is None:
        parser.error("--bundle needs --reference, the eager outputs that its engines are held against")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every stage that could run was done, 130 when the report was interrupted."""
    options = parse(argv)
    if options.dry_run:
        for stage in plan(options):
            print(f"{stage.name:<40} {stage.side:<9} at most {stage.limit(options.minutes):4.0f} s")
        return 0
    path = run(options)
    print(path)
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    if any(outcome.get("interrupted") for outcome in stages.values()):
        return 130
    return 1 if any(outcome["status"] == "failed" for outcome in stages.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
