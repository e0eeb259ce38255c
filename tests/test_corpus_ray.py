"""`ccnet predict --on ray`: actors on a cluster that listens on loopback alone.

Ray binds all interfaces, so every test runs it in a network namespace of its own, where loopback is the only one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import features_with, make_bundle, write_features
from corpus_kills import below

from ccnet.cli.main import main
from runtime.errors import MissingDependency
from runtime.packages import import_package

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HERE = Path(__file__).parent
COUNT = 60
SIZE = 3


def inside() -> list[str]:
    """Return the command that runs another one in its own namespaces; skip where it can't be had."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip, for a network namespace of its own")
    own = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]  # and its processes end with it
    command = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), *own]
    up = [*command, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*up, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine gives no network namespace")
    return up


def test_actors_and_nodes_that_die_cost_their_shards(tmp_path: Path) -> None:
    up = inside()
    bundle, features, out = make_bundle(tmp_path / "bundle").folder, tmp_path / "features", tmp_path / "run"
    features.mkdir()
    for i in range(COUNT):
        write_features(features, f"v{i:02d}", features_with(12 + i % 9, [(2, 8, i % 4, 3.0)]))
    source = ["predict", str(bundle), "--features", str(features), "--quiet", "--out"]
    assert main([*source, str(tmp_path / "whole.jsonl")]) == 0

    # What the current folder holds is not taken for code.
    trap = tmp_path / "trap"
    for name in ("runtime", "numpy", "orjson", "onnxruntime"):
        (trap / name).mkdir(parents=True)
        (trap / name / "__init__.py").write_text(f"open({str(tmp_path / 'taken')!r}, 'a').write({name!r})")

    slow = (  # slow enough for an actor to be caught at work
        f"import sys; sys.path[0] = {str(HERE.parent)!r}\n"
        "import time; import runtime.corpus.ray_pool as pool; from ccnet.cli.main import main\n"
        "class Slow(pool.RayActor):\n"
        "    def process(self, shard, careful):\n"
        "        time.sleep(0.3)\n"
        "        return super().process(shard, careful)\n"
        "Slow.__module__ = '__main__'; pool.RayActor = Slow\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = [str(out), "--on", "ray", "--processes", "2", "--shard-size", str(SIZE)]
    command = [*up, sys.executable, "-c", slow, *source, *options]
    log = tmp_path / "log"

    # Two actors are killed, and then what keeps the only node alive; the next command does what is left.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as stream, subprocess.Popen(command, stderr=stream, env=environment, cwd=trap) as driver:
        try:
            victims = [b"ray::Slow", b"ray::Slow", b"ray::DashboardAgent"]
            deadline = time.monotonic() + 120
            while driver.poll() is None:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
                if victims and len(list(out.glob("done/*.json"))) > 2 * (3 - len(victims)):
                    found = below(driver.pid, victims[0])
                    if found:
                        os.kill(found[0], signal.SIGKILL)
                        victims.pop(0)
        finally:
            driver.kill()
    said = log.read_text()
    assert not victims
    assert said.count("an actor died") >= 2
    assert driver.returncode == 2
    assert "the node of the Ray cluster died; run the same command again" in said
    assert 0 < len(list(out.glob("done/*.json"))) < COUNT / SIZE

    subprocess.run(command, check=True, timeout=120, env=environment, cwd=trap)
    shards = b"".join(path.read_bytes() for path in sorted(out.glob("shards/*")))
    assert shards == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(out.rglob(".*"))
    assert not (tmp_path / "taken").exists()


def test_each_video_exactly_once_after_random_kills(tmp_path: Path) -> None:
    """Actors and drivers; see tests/corpus_kills.py. Each driver starts a cluster, so this is for `make soak` alone."""
    if "CCNET_KILLS" not in os.environ:
        pytest.skip("takes minutes; CCNET_KILLS, the number of kills, asks for it")
    kills, seed = int(os.environ["CCNET_KILLS"]), os.environ.get("CCNET_FUZZ_SEED", "0")
    options = ["--kills", str(kills), "--seed", seed, "--seconds", str(120 + 20 * kills)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [*inside(), sys.executable, str(HERE / "corpus_kills.py"), str(tmp_path), *options]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    killed = json.loads(done.stdout.splitlines()[-1])
    assert killed["driver"] >= kills // 3
    assert killed["worker"] > 0


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"--on ray needs the package 'ray': pip install 'ccnet\[ray\]'"):
        import_package("ray", "--on ray")
