"""What tests may use: product code by its public names, each other not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("*.py"))
OURS = {"runtime", "ccnet", "export", "benchmarks"}
THEIRS = {"_actions", "_exit", "_forward_hooks"}
"""Names of the standard library and of torch that look private and for which there is no other way."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def offences(tree: ast.AST) -> Iterator[str]:
    """Yield imports of test modules, and private names of product code: imported, reached through a dot, or patched."""
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.stmt | ast.expr)):
        if isinstance(node, ast.Import):
            modules, names = [alias.name for alias in node.names], []
        elif isinstance(node, ast.ImportFrom):
            modules, names = [node.module or ""], [alias.name for alias in node.names]
        else:
            modules, names = [], []
        for module in modules:
            parts = module.split(".")
            if parts[0].startswith("test_") or parts[0] == "conftest":
                yield f"line {node.lineno}: imports {module}"
            if parts[0] in OURS:
                yield from (
                    f"line {node.lineno}: imports {module}.{name}" for name in parts + names if is_private(name)
                )
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in THEIRS:
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own:
                yield f"line {node.lineno}: reaches for {ast.unparse(node)}"
        function = node.func if isinstance(node, ast.Call) else None
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if isinstance(node, ast.Call) and name in ("setattr", "getattr", "delattr"):
            for argument in node.args[:2]:
                text = argument.value if isinstance(argument, ast.Constant) else None
                if isinstance(text, str) and any(map(is_private, text.split("."))):
                    yield f"line {node.lineno}: patches {text}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_test_uses_public_names_and_no_other_test(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from test_model import TINY",
        "import conftest",
        "from runtime.bundle import _read",
        "import runtime._private",
        "localizer._backends",
        "monkeypatch.setattr(module, '_limit', 3)",
        "monkeypatch.setattr('runtime.bundle._limit', 3)",
        "getattr(backend, '_session')",
    ],
)
def test_the_rule_sees_what_it_forbids(line: str) -> None:
    assert len(list(offences(ast.parse(line)))) == 1
