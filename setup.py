"""Build the native CPU kernels where there is a compiler. All else: pyproject.toml."""

import pathlib
from typing import Any

import jax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "nmjax/kernels/cpu"


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
            [f"{SOURCES}/library.cc"],
            depends=[str(path) for path in pathlib.Path(SOURCES).glob("*.[hi]*")],
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
