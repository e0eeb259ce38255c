"""Build backend: setuptools, and the compiled kernels in the wheel.

A machine without a working C compiler gets one from PyPI (`ziglang`) for the time of the build.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

from runtime.kernels.build import build, find_compiler

COMPILER = "ziglang>=0.13,<1"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([] if find_compiler() else [COMPILER])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """See PEP 660."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *([] if find_compiler() else [COMPILER])]


class BuildWithKernels(build_py):
    """`build_py` that compiles the kernels first; they are package data."""

    def run(self) -> None:
        build()
        self.data_files = self._get_data_files()
        super().run()


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every version of Python 3."""

    def finalize_options(self) -> None:
        # Files go to the wheel's root, beside the library that was compiled, as those of an extension module do.
        self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
