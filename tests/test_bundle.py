"""A bundle is whole or it is refused, with the file, what was found, and what to do."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import SPEC, edit_manifest, engine, features_with, make_bundle, onnx_model_file

from runtime.backends.select import open_engine
from runtime.bundle import MANIFEST, Bundle, FileRecord, read_bundle
from runtime.errors import BundleError
from runtime.files import sha256_file
from runtime.localizer import Localizer
from runtime.onnx_file import external_files

pytest.importorskip("onnx")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def test_a_whole_bundle_reads_back_and_verifies(bundle: Bundle) -> None:
    assert read_bundle(bundle.folder).manifest == bundle.manifest
    assert bundle.spec == SPEC
    bundle.verify()
    assert bundle.path(bundle.model_file("onnx-fp32")) == bundle.folder / "model.onnx"


def test_a_bundle_can_be_copied_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "copy")
    read_bundle(tmp_path / "copy").verify()


def test_a_folder_that_is_no_bundle(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"has no bundle\.json.*; it holds {re.escape(str(bundle.folder))}"):
        read_bundle(bundle.folder.parent)
    with pytest.raises(BundleError, match=r"absent: no such bundle folder; 'ccnet export"):
        read_bundle(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="has no bundle.json"):
        read_bundle(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(
        BundleError, match=r"file: got a file, expected the folder of a bundle, which has a bundle\.json"
    ):
        read_bundle(tmp_path / "file")


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    (bundle.folder / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: missing; copy the bundle again"):
        bundle.verify()


def test_a_half_written_file_is_named_with_both_sizes(bundle: Bundle) -> None:
    path = bundle.folder / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=rf"model\.onnx: {len(content) // 2} bytes, the manifest says {len(content)}"):
        bundle.verify()


def test_an_altered_file_of_the_same_size_is_found(bundle: Bundle) -> None:
    path = bundle.folder / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"model\.onnx: SHA-256 [0-9a-f]{16}\.\.\., the manifest says"):
        bundle.verify()


def test_nothing_damaged_reaches_an_engine_library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("the damaged file was loaded"))
    path = bundle.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx"):
        open_engine(bundle, "onnxruntime")


def manifest(bundle: Bundle) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle.folder / MANIFEST).read_text())
    return data


def write(bundle: Bundle, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (bundle.folder / MANIFEST).write_text(text)


def test_a_manifest_that_is_not_whole_json(bundle: Bundle) -> None:
    text = (bundle.folder / MANIFEST).read_text()
    write(bundle, text[: len(text) // 2])
    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(bundle.folder)
    (bundle.folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(bundle.folder)
    write(bundle, "[1, 2]")
    with pytest.raises(BundleError, match="got schema None"):
        read_bundle(bundle.folder)


def test_a_manifest_of_another_version(bundle: Bundle) -> None:
    write(bundle, {**manifest(bundle), "schema": 1})
    with pytest.raises(BundleError, match=r"got schema 1, this version reads 2; export the bundle again"):
        read_bundle(bundle.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("files"), r"missing key\(s\) files"),
        (lambda m: m.update(extra=1), r"unknown key\(s\) extra"),
        (lambda m: m["spec"].update(length=33), "length: got 33, expected a multiple of 8"),
        (lambda m: m["spec"].pop("labels"), r"spec: missing key\(s\) labels"),
        (lambda m: m["spec"]["time_base"].update(fps=0.0), "fps: got 0.0"),
        (lambda m: m["spec"]["post"].update(method="best"), "'best'"),
        (lambda m: m["engines"][0].update(model_file="gone"), "names an unknown model file 'gone'"),
        (lambda m: m["engines"][0].update(status="fine"), "status"),
        (lambda m: m["files"][0].update(size="12"), r"size: got '12', expected int"),
        (lambda m: m["files"][0].update(name="../other/model.onnx"), "leaves the bundle folder"),
        (lambda m: m["model_files"][0].update(files=["/etc/passwd"]), "leaves the bundle folder"),
        (lambda m: m["files"][0].update(name="é" * 128), "'é+... has 128 characters, no file has such a name"),
        (lambda m: m["model_files"][0].update(files=[]), "lists no files"),
    ],
)
def test_a_bad_manifest_says_which_key(bundle: Bundle, change: Any, message: str) -> None:
    data = manifest(bundle)
    change(data)
    write(bundle, data)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle.folder)


def test_a_model_file_whose_file_has_no_record_is_refused(bundle: Bundle) -> None:
    stray = dataclasses.replace(onnx_model_file(), files=("stray.onnx",))
    with pytest.raises(BundleError, match=r"'stray\.onnx' has no file record"):
        bundle.verify(stray)
    with pytest.raises(BundleError, match="no model file 'other'; it has: onnx-fp32"):
        bundle.model_file("other")


def test_engines_keep_what_was_measured(tmp_path: Path) -> None:
    measured = engine("openvino", accuracy={"logits_max": 1e-6}, speed={"ms_per_video": 12.5, "machine": "x"})
    assert make_bundle(tmp_path / "b", [measured]).manifest.engines == (measured,)


def test_names_are_unique(bundle: Bundle) -> None:
    content = manifest(bundle)
    content["engines"] += content["engines"]
    write(bundle, content)
    with pytest.raises(BundleError, match="lists engine '.*' more than once"):
        read_bundle(bundle.folder)


def bundle_with_weights(folder: Path, location: str | None = None) -> Bundle:
    """Make the oracle's bundle with its constants in a file beside the graph, or wherever the graph says."""
    import onnx
    from onnx.external_data_helper import set_external_data

    bundle = make_bundle(folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=100)
    if location is not None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        tensor = model.graph.initializer[0]
        old = {entry.key: entry.value for entry in tensor.external_data}
        tensor.raw_data = b"x"
        set_external_data(tensor, location, int(old["offset"]), int(old["length"]))
        tensor.ClearField("raw_data")
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    names = ("model.onnx", "model.onnx.data")
    records = (FileRecord(name=n, size=(folder / n).stat().st_size, sha256=sha256_file(folder / n)) for n in names)
    graph = dataclasses.replace(bundle.manifest.model_files[0], files=names)
    edit_manifest(folder, files=tuple(records), model_files=(graph,))
    return read_bundle(folder)


VIDEO = features_with(20, [(3, 8, 1, 2.0)])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_beside_the_graph_are_loaded_through_links_too(tmp_path: Path, backend: str) -> None:
    """As a hub keeps snapshots: names that link to files which are called by their hash, or only one of them does."""
    pytest.importorskip(backend)
    whole = bundle_with_weights(tmp_path / "bundle")
    edit_manifest(whole.folder, engines=(engine(backend),))
    for linked in (("model.onnx", "model.onnx.data"), ("model.onnx.data",)):
        snapshot = tmp_path / f"snapshot{len(linked)}"
        shutil.copytree(whole.folder, snapshot)
        (tmp_path / "blobs").mkdir(exist_ok=True)
        for name in linked:
            shutil.copyfile(snapshot / name, tmp_path / "blobs" / f"{name}-hash")
            (snapshot / name).unlink()
            (snapshot / name).symlink_to(Path("..", "blobs", f"{name}-hash"))
        for folder in (whole.folder, snapshot):
            with Localizer.load(folder, backend) as localizer:
                assert len(localizer(*VIDEO)) == 1


@pytest.mark.parametrize(
    "location", ["{outside}", "../outside.data", "sub/w.data", "other.data", "./model.onnx.data", ""]
)
def test_weights_from_elsewhere_are_refused_before_a_library_sees_the_graph(
    tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("the graph was loaded"))
    outside = tmp_path / "outside.data"
    bundle = bundle_with_weights(tmp_path / "bundle", location.format(outside=outside))
    for path in (outside, bundle.folder / "other.data"):
        shutil.copyfile(bundle.folder / "model.onnx.data", path)
    with pytest.raises(BundleError, match=r"model\.onnx: takes weights from .* expected a file of the bundle"):
        open_engine(bundle, "onnxruntime")
    with pytest.raises(BundleError, match="takes weights from"):
        bundle.verify()


def test_what_changes_between_check_and_load_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime

    bundle = bundle_with_weights(tmp_path / "bundle")
    load, data = onnxruntime.InferenceSession, bundle.folder / "model.onnx.data"

    def swap_and_load(*arguments: Any, **options: Any) -> Any:
        content = data.read_bytes()
        data.write_bytes(bytes(len(content)))
        session = load(*arguments, **options)
        data.write_bytes(content)
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", swap_and_load)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: changed while it was being loaded"):
        open_engine(bundle, "onnxruntime")


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x3a\xff\xff\xff\xff\x7f", b"\xff" * 40, b"\x07\x07", b"\x3a\x02" * 70]
)
def test_what_is_no_graph_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="not an ONNX model"):
        external_files(path)
