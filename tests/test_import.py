"""What importing the package does and does not do."""

import subprocess
import sys

import pytest

import nmjax as nm


@pytest.mark.parametrize("heavy", ["flax", "orbax", "matplotlib", "sklearn"])
def test_import_does_not_load(heavy):
    code = f"import nmjax, sys; print({heavy!r} in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def test_import_starts_no_backend():
    code = (
        "import nmjax\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def test_version_is_that_of_the_package():
    assert nm.__version__.count(".") >= 2
