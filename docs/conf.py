"""How Sphinx makes the pages; `make docs` runs it.

The root of the repository is the source folder, so that links between pages, notebooks and results
are the same here and where the repository is read.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

from pyroflow import __version__

CODE = re.compile(r"(``.*?``|`[^`]*`)")
SHAPE = re.compile(r"(?<=[\s(])\*(?=[\w,])(?![^*]*\w\*(?:\W|$))")

project = "pyroflow"
author = "The pyroflow developers"
copyright = "the pyroflow developers, Apache-2.0"
version = release = __version__

root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "notebooks/*.ipynb",
    "notebooks/results/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "docs/_build", "tests", "pyroflow"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

nb_execution_mode = "off"  # what the notebooks show was stored by `make notebooks`
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"pyroflow {version}"
templates_path = ["templates"]
html_additional_pages = {"index": "redirect.html"}  # the pages lie in docs/, as in the repository


def _escape(line: str) -> str:
    """A line of a docstring where shapes such as (*B, C), and |x|, are no markup."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = CODE.split(line)  # every second one is code, mathematics or a reference
    parts[::2] = [re.sub(r"(?<!\\)\|", r"\\|", SHAPE.sub(r"\\*", part)) for part in parts[::2]]
    return "".join(parts)


def _escape_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    lines[:] = [_escape(line) for line in lines]


def setup(app: Sphinx) -> None:
    """Have docstrings read as they are meant."""
    app.connect("autodoc-process-docstring", _escape_shapes, priority=900)  # after napoleon
