"""What importing the package does and does not do."""

import doctest
import inspect
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


@pytest.mark.parametrize("name", nm.__all__)
def test_public_name_is_documented(name):
    doc = inspect.getdoc(getattr(nm, name)) or ""
    first, _, rest = doc.partition("\n\n")
    assert first.endswith(".") and "\n" not in first
    assert rest


# A plan is made by nm.plan, which has the example.
@pytest.mark.parametrize("name", sorted(set(nm.__all__) - {"Plan", "LeafPlan"}))
def test_public_name_has_an_example(name):
    doc = inspect.getdoc(getattr(nm, name)) or ""
    assert doctest.DocTestParser().get_examples(doc)


def test_public_names_are_there_once():
    assert len(nm.__all__) == len(set(nm.__all__))
    assert all(hasattr(nm, name) for name in nm.__all__)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        nm.no_such_name  # noqa: B018
