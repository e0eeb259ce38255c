"""Hooks of MkDocs: pages whose text lives elsewhere, and equations as MathML.

`make site` needs no network, and neither do its pages: equations are converted here instead of by a script in the
browser.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "gpu.md": "benchmarks/GPU.md",
}
"""Page of the site -> file of the repository."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    results = ROOT / "benchmarks" / "results"
    elsewhere = {page: ROOT / name for page, name in ELSEWHERE.items() if (ROOT / name).exists()}
    elsewhere |= {f"benchmarks/{path.name}": path for path in sorted(results.glob("*.md"))}
    elsewhere |= {f"benchmarks/{path.name}": path for path in sorted(results.glob("*.png"))}
    for page, path in elsewhere.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def commands() -> str:
    """Return the page of commands: the help that `ccnet COMMAND --help` prints."""
    os.environ["COLUMNS"] = "100"
    from ccnet.cli.main import make_parser

    parser, subcommands = make_parser()
    lines = [
        "# Commands",
        "",
        "What `ccnet COMMAND --help` prints. Every command that reports takes `--json`: then standard output holds the",
        "result as JSON and nothing else. Progress and warnings go to standard error; colours are used on a terminal",
        "alone, and not where `NO_COLOR` is set.",
        "",
        "Exit status: 0 done; 1 some videos failed; 2 a mistake in what was given; 3 an engine failed the parity",
        "check; 130 or 143 interrupted (Ctrl-C, SIGTERM).",
        "",
        "Completion in bash or zsh, with `pip install 'ccnet[completion]'`:",
        "",
        "```bash",
        "# not run in CI: changes the shell it is typed in",
        'eval "$(register-python-argcomplete ccnet)"',
        "```",
        "",
        "```text",
        parser.format_help().strip(),
        "```",
    ]
    for name, subparser in subcommands.items():
        lines += ["", f"## ccnet {name}", "", "```text", subparser.format_help().strip(), "```"]
    return "\n".join(lines) + "\n"


_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace the equations of a page by MathML, and unfold the code that stands beside them."""
    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        return str(convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline"))

    if page.file.src_uri == "concepts.md":
        content = content.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')
    return _EQUATION.sub(mathml, content)
