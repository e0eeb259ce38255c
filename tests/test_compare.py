"""Comparing benchmark results: ratios on one machine, refusal across machines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import Incomparable, compare, main
from benchmarks.results import Measurement, write_result

MACHINE: dict[str, Any] = {
    "cpu": "X 2.8 GHz",
    "cores": 2,
    "cpu_flags": ["avx2"],
    "gpus": None,
    "python": "3.11.7",
    "libraries": {"ccnet": "0.1.0", "openvino": "2026.4.1"},
    "load_average": [0.1, 0.1, 0.1],
}


def result(**values: float) -> dict[str, Any]:
    better = {"rate": "higher"}
    rows = [{"name": n, "value": v, "unit": "ms", "better": better.get(n, "lower")} for n, v in values.items()]
    return {"kind": "latency", "machine": copy.deepcopy(MACHINE), "measurements": rows, "created": "now"}


def test_ratios_and_verdicts() -> None:
    rows = compare(
        result(fast=10.0, slow=10.0, rate=100.0, same=10.0, gone=1.0),
        result(fast=5.0, slow=12.0, rate=80.0, same=10.4, fresh=1.0),
    )
    verdicts = {row[0]: (row[3], row[4]) for row in rows}
    assert verdicts == {
        "fast": ("0.500", "better"),
        "slow": ("1.200", "WORSE"),
        "rate": ("0.800", "WORSE"),
        "same": ("1.040", "same"),
        "gone": ("", "gone"),
        "fresh": ("", "new"),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cpu", "Y"),
        ("cores", 4),
        ("cpu_flags", ["avx2", "amx_bf16"]),
        ("gpus", [{"name": "H200"}]),
        ("python", "3.12.1"),
        ("libraries", {"openvino": "2027.0.0"}),
        ("libraries", {"openvino": "2026.4.1", "torch": "2.13.0"}),
    ],
)
def test_another_machine_is_refused(key: str, value: Any) -> None:
    other = result(a=1.0)
    other["machine"][key] = value
    with pytest.raises(Incomparable, match="refused to compare results of different machines"):
        compare(result(a=1.0), other)


def test_load_toolkit_version_and_patch_releases_do_not_matter() -> None:
    other = result(a=1.0)
    other["machine"]["load_average"] = [9.0, 9.0, 9.0]
    other["machine"]["libraries"] = {"ccnet": "0.2.0", "openvino": "2026.4.2"}
    other["machine"]["python"] = "3.11.9"
    assert len(compare(result(a=1.0), other)) == 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("old", 10.0), ("new", 5.0)):
        measurement = Measurement(name="engine p50", value=value, unit="ms")
        write_result(tmp_path / name, "latency", measurements=[measurement], page="# Latency", machine=MACHINE)
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "0.500" in capsys.readouterr().out
    assert "X 2.8 GHz, 2 cores" in (tmp_path / "new" / "latency.md").read_text()

    measurement = Measurement(name="engine p50", value=5.0, unit="ms")
    write_result(tmp_path / "far", "latency", measurements=[measurement], page="x", machine={**MACHINE, "cores": 64})
    assert main([str(tmp_path / "old" / "latency.json"), str(tmp_path / "far" / "latency.json")]) == 2
    assert "cores: 2 against 64" in capsys.readouterr().err


def test_what_is_no_result_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    assert main([str(tmp_path / "broken.json"), str(tmp_path / "broken.json")]) == 2
    assert "broken.json" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty), str(empty)]) == 2
    assert "no benchmark results" in capsys.readouterr().err


def test_measurement_names_are_unique(tmp_path: Path) -> None:
    twice = [Measurement(name="a", value=1.0, unit="ms")] * 2
    with pytest.raises(ValueError, match="not unique"):
        write_result(tmp_path, "latency", measurements=twice, page="", machine=MACHINE)
