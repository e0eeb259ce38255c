"""Stand-ins for the shared libraries behind Python bindings, compiled from nothing but the symbols that these want."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REFUSING = "void *{name}(void) {{ return 0; }}\n"
AGREEING = """\
/* An object whose every virtual function gives it again. Its words after the table are where the classes of TensorRT
   keep their implementation: it is that too. Not on a round address, whose lowest byte would be a false bool. */
static void *table[1024];
static void *memory[64] __attribute__((aligned(256)));
static void *const object = memory + 1;
static void *given(void) {{ return object; }}
__attribute__((constructor)) static void fill(void) {{
    for (int i = 0; i < 1024; i++) table[i] = given;
    for (int i = 2; i < 64; i++) memory[i] = object;
    memory[1] = table;
}}
"""
AGREEING_SYMBOL = "void *{name}(void) {{ return object; }}\n"


def stand_in(bindings: Path, folder: Path, *, agrees: bool = False) -> list[Path]:
    """Build the libraries that a binding names, and return them.

    Their functions return null; if one `agrees`, an object with every method there is, which returns such an object.
    """
    if not all(map(shutil.which, ("cc", "nm", "objdump"))):
        pytest.skip("no C compiler and binutils to build a stand-in library with")
    listed = subprocess.run(["nm", "-D", "--undefined-only", bindings], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    wanted = [n for n in names if "@" not in n and not n.startswith(("Py", "_Py", "_ITM", "_ZGT", "__"))]
    symbol = AGREEING_SYMBOL if agrees else REFUSING
    source = folder / "stand_in.c"
    source.write_text((AGREEING.format() if agrees else "") + "".join(symbol.format(name=name) for name in wanted))
    needed = subprocess.run(["objdump", "-p", bindings], capture_output=True, text=True, check=True).stdout
    libraries = [folder / library for library in re.findall(r"NEEDED\s+(lib(?:nv|tensorrt)\S+)", needed)]
    for library in libraries:
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", library, source]
        subprocess.run(command, check=True)
    return libraries
