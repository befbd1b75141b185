"""README and docs: every Python block runs, every printed output is what is shown."""

import contextlib
import io
import pathlib

import jax
import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import nmjax as nm

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_evaluate = PythonEvaluator()


def run_python(example: Example) -> None:
    """Run a ``python`` block and keep what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _evaluate(example)
    example.namespace["_printed"] = printed.getvalue()


def check_text(example: Example) -> str | None:
    """Compare a ``text`` block with what the block before it printed."""
    printed = example.namespace.pop("_printed", "")
    shown = str(example.parsed)
    if printed.strip() == shown.strip():
        return None
    return f"the page shows\n{shown}\nbut the block before it printed\n{printed}"


SYBIL = Sybil(
    parsers=[
        CodeBlockParser(language="python", evaluator=run_python),
        CodeBlockParser(language="text", evaluator=check_text),
    ],
    path=str(ROOT),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_page_run(page):
    # Pages show optax as users have it, and its Adam computes float ** int.
    with jax.numpy_dtype_promotion("standard"):
        for example in SYBIL.parse(page).examples():
            example.evaluate()


def test_a_false_output_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(Exception, match="printed\n2"):
        for example in SYBIL.parse(page).examples():
            example.evaluate()


def test_readme_has_blocks_to_run():
    blocks = SYBIL.parse(ROOT / "README.md").examples()
    assert sum(1 for _ in blocks) >= 2


@pytest.mark.parametrize("name", sorted(nm.__all__))
def test_public_name_is_in_the_reference(name):
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    assert any(line.strip().split(" ")[-1] == f"nmjax.{name}" for line in lines)
