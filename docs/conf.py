"""Sphinx settings; `make docs` builds the pages and fails on any warning."""

import nmjax

project = "nmjax"
author = "The nmjax authors"
project_copyright = author
version = release = nmjax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"nmjax {release}"

# A single backtick in a docstring names code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Reference", "References")]
