"""The parser of RTX plans, on a plan small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rtx_plan import RtxPlan, read_plan
from runtime.errors import BackendUnavailable, ExportError


def plan_block(schedule: str, tf32: int = 0, target: str = "sm89 ") -> bytes:
    """Return a compiled graph in the layout of RTX 1.7."""
    text = f"""header {{
  n_streams = 2
  region = {{ name=devmem_topdown_0 size=1000 alignment=128 instance=0 type=user place=accelerator unified=false }}
  region = {{ name=devmem_topdown_1 size=24 alignment=128 instance=0 type=user place=accelerator unified=false }}
  region = {{ name=consts size=9999 alignment=128 instance=0 type=system place=accelerator constant=true }}
  tf32={tf32}
  stream_capturable=1
  accelerators={{{target}}}
}}
descriptors {{
  tensor={{ dims={{ 1 }} name="h" offset=0 region="devmem_topdown_0" strides={{ 1 }} type=half }}
  tensor={{ dims={{ 1 }} name="f" offset=0 region="devmem_topdown_0" strides={{ 1 }} type=float }}
  tensor={{ dims={{ 1 }} name="i" offset=0 region="shape" strides={{ 1 }} type=int64 }}
}}
main {{
 label bb1:
{schedule}}}
""".encode()
    return b"NLYM" + b"????" + len(text).to_bytes(8, "little") + text


SCHEDULE = """  shape_call={ name="shapes" stream=0 }
  corrltn={ name="conv" output={"h" } input={"x" } stream=0 }
  function={ name=_gemm_mha_v2 fqn=x args={ "x" "h" } output_args={ "h" } stream=0 }
  signal={ name="s" stream=0 event=1 }
  wait={ name="w" stream=1 event=1 }
  fully_connected={ name="gemm" output={"f" } input={"h" } stream=1 }
  function={ name=__myl_Add fqn=y args={ "h" "f" } output_args={ "f" } stream=1 }
  cast={ name="size" output={"i" } input={"x" } stream=0 }
"""


def test_plan_counts(tmp_path: Path) -> None:
    path = tmp_path / "e.engine"
    blob = b"vtrt" + bytes(100) + plan_block(SCHEDULE) + bytes(50) + plan_block("", target="*") + b"NLYM weights"
    path.write_bytes(blob)
    assert read_plan(path, "1.7.1.116") == RtxPlan(
        kernels=4, kinds={"corrltn": 1, "fully_connected": 1, "function": 2}, fused_attentions=1, scratch_bytes=1024,
        streams=2, capturable=True, tf32=False, targets=("sm89",), tensors={"fp16": 1, "fp32": 1},
        matrix_kernels={"fp16": 2, "fp32": 1}, fp8_kernels=0,
    )  # fmt: skip
    path.write_bytes(blob + plan_block(SCHEDULE))
    assert read_plan(path, "1.7").kernels == 8  # an engine may hold several graphs


@pytest.mark.parametrize(
    ("blob", "text"),
    [
        (b"ftrt" + bytes(9), "expected a TensorRT-RTX engine"),
        (b"vtrt" + bytes(100), "holds no kernel plan"),
        (b"vtrt" + plan_block(SCHEDULE).replace(b"n_streams", b"n_threads"), "no 'n_streams'"),
    ],
)
def test_plans_that_are_not_understood(tmp_path: Path, blob: bytes, text: str) -> None:
    path = tmp_path / "e.engine"
    path.write_bytes(blob)
    with pytest.raises(ExportError, match=text):
        read_plan(path, "1.7.1")


@pytest.mark.parametrize("version", ["1.8.0", "1.70", "2.7.1"])
def test_other_versions_are_not_guessed_at(tmp_path: Path, version: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"TensorRT-RTX {version} is not known, only that of 1\.7"):
        read_plan(tmp_path / "e.engine", version)
