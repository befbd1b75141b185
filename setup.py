"""Build the native CPU kernels where there is a compiler. All else: pyproject.toml."""

from typing import Any

import jax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Build a plain shared library: it is loaded by ctypes and knows no Python."""

    def get_export_symbols(self, ext: Any) -> list[str]:
        """Export what the sources export, and no function that makes a module."""
        return ext.export_symbols


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "nmjax.kernels.native_library",
            ["nmjax/kernels/cpu/library.cc"],
            depends=[
                f"nmjax/kernels/cpu/{name}"
                for name in ("common.h", "lanes.inc", "fan_in.inc", "grouped.inc")
            ],
            include_dirs=[jax.ffi.include_dir()],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-ffp-contract=fast",
            ],
            language="c++",
            optional=True,  # without a compiler the XLA forms do all the work
        )
    ],
)
