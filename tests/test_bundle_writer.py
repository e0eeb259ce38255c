"""A bundle is whole or not there: whatever happens while it is written or changed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import SPEC, engine, fill_draft, onnx_model_file, tensorrt_model_file

from export.bundle_writer import Draft, changed_bundle, new_bundle
from runtime.bundle import PARITY, Bundle, ModelFile, read_bundle
from runtime.errors import BundleError

FACTS: dict[str, Any] = {
    "spec": SPEC,
    "model": {"length": 32},
    "checkpoint_sha256": "ab" * 32,
    "versions": {"ccnet": "0"},
}


def make(path: Path) -> Bundle:
    with new_bundle(path, **FACTS) as draft:
        fill_draft(draft)
    return read_bundle(path)


def fail_in(context: AbstractContextManager[Draft]) -> None:
    """Fail as a parity check would, when everything has been written."""
    with context as draft:
        fill_draft(draft)
        draft.bundle()
        raise RuntimeError("status")


def fill_until(context: AbstractContextManager[Draft], last: ModelFile | Callable[[], None]) -> None:
    """Fill the draft, then add one more model file, or let something happen."""
    with context as draft:
        fill_draft(draft)
        if isinstance(last, ModelFile):
            draft.add_model_file(last)
        else:
            last()


def test_a_new_bundle_is_what_the_runtime_reads(tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle")
    bundle.verify()
    assert bundle.spec == SPEC
    assert bundle.manifest.checkpoint_sha256 == "ab" * 32
    assert {record.name for record in bundle.manifest.files} == {"model.onnx", PARITY}
    assert [r.name for r in bundle.manifest.engines] == ["onnxruntime-fp32"]
    assert '"onnxruntime-fp32"' in (bundle.folder / PARITY).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_an_error_while_writing_leaves_nothing_or_the_old_bundle(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with pytest.raises(RuntimeError, match="status"):
        fail_in(new_bundle(path, **FACTS))
    assert not list(tmp_path.iterdir())
    before = make(path).manifest
    for change in (partial(new_bundle, path, **FACTS), partial(changed_bundle, path)):
        with pytest.raises(RuntimeError, match="status"):
            fail_in(change())
        assert read_bundle(path).manifest == before
        read_bundle(path).verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle"
    before = make(path).manifest

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for change in (partial(new_bundle, path, **FACTS), partial(changed_bundle, path)):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            fill_until(change(), partial(patched.setattr, os, "fsync", full))
        assert read_bundle(path).manifest == before
        read_bundle(path).verify()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_leaves_the_old_bundle(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    before = make(path).manifest
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from builders import fill_draft, tensorrt_model_file
from export.bundle_writer import changed_bundle
with changed_bundle({str(path)!r}) as draft:
    fill_draft(draft)
    (draft.folder / "tensorrt-fp16.engine").write_bytes(b"half an engine")
    draft.add_model_file(tensorrt_model_file())
    draft.bundle()
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        child.send_signal(signal.SIGKILL)
    time.sleep(0.01)
    assert read_bundle(path).manifest == before
    read_bundle(path).verify()


def test_an_engine_is_added_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    old = make(path)
    (path / "notes.txt").write_text("mine")
    graph = (path / "model.onnx").stat().st_ino
    with changed_bundle(path) as draft:
        (draft.folder / "tensorrt-fp16.engine").write_bytes(b"an engine")
        draft.add_model_file(tensorrt_model_file())
        draft.set_engine(engine("tensorrt", "fp16", model_file="tensorrt-fp16", status="unverified"))
        assert [a.name for a in read_bundle(path).manifest.model_files] == ["onnx-fp32"]
    bundle = read_bundle(path)
    bundle.verify()
    assert [a.name for a in bundle.manifest.model_files] == ["onnx-fp32", "tensorrt-fp16"]
    assert [r.status for r in bundle.manifest.engines] == ["verified", "unverified"]
    assert bundle.manifest.created == old.manifest.created
    assert (path / "model.onnx").stat().st_ino == graph  # linked, not copied
    assert (path / "notes.txt").read_text() == "mine"


def test_replacing_a_model_file_leaves_no_record_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    make(path)
    for content in (b"first", b"second, longer"):
        with changed_bundle(path) as draft:
            (draft.folder / "tensorrt-fp16.engine").unlink(missing_ok=True)
            (draft.folder / "tensorrt-fp16.engine").write_bytes(content)
            draft.add_model_file(tensorrt_model_file())
    bundle = read_bundle(path)
    bundle.verify()
    assert [r.size for r in bundle.manifest.files if r.name.endswith(".engine")] == [14]
    assert len(bundle.manifest.model_files) == 2


def test_an_engine_that_fails_is_kept_and_can_recover(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    make(path)
    with changed_bundle(path) as draft:
        draft.set_engine(engine("onnxruntime", status="failed"), {"passed": False})
    bundle = read_bundle(path)
    assert [r.status for r in bundle.manifest.engines] == ["failed"]
    with changed_bundle(path) as draft:
        draft.set_engine(engine("onnxruntime"), {"passed": True, "checks": []})
    bundle = read_bundle(path)
    assert [r.status for r in bundle.manifest.engines] == ["verified"]


def test_the_fastest_measured_engine_comes_first(tmp_path: Path) -> None:
    with new_bundle(tmp_path / "bundle", **FACTS) as draft:
        fill_draft(draft)
        draft.set_engine(engine("openvino", speed={"ms_per_video": 2.0, "machine": "x"}))
        draft.set_engine(engine("openvino", "bf16", speed={"ms_per_video": 1.0, "machine": "x"}))
    names = [r.name for r in read_bundle(tmp_path / "bundle").manifest.engines]
    assert names == ["openvino-bf16", "openvino-fp32", "onnxruntime-fp32"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name in ("photos", "file"):
        with pytest.raises(BundleError, match="no bundle"), new_bundle(tmp_path / name, **FACTS) as draft:
            fill_draft(draft)
        with pytest.raises(BundleError), changed_bundle(tmp_path / name):
            pass
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"x"
    make(tmp_path / "empty").verify()


def test_model_files_must_have_files_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="missing"), new_bundle(tmp_path / "bundle", **FACTS) as draft:
        draft.add_model_file(onnx_model_file())
    with pytest.raises(BundleError, match="belongs to 'onnx-fp32'"):
        fill_until(new_bundle(tmp_path / "b", **FACTS), onnx_model_file("onnx-fp16"))
    with pytest.raises(BundleError, match="model_file"), new_bundle(tmp_path / "b", **FACTS):
        pass
    assert not list(tmp_path.iterdir())


def test_damaged_reports_are_an_error(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    (tmp_path / "bundle" / PARITY).write_text("[]")
    with pytest.raises(BundleError, match="parity"), changed_bundle(tmp_path / "bundle"):
        pass
