"""How Sphinx makes the documentation: `make docs`, then open docs/_build/index.html."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from generated import write_settings
from pygments.lexers.data import JsonLexer
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import prefect_flux_kontext

project = "prefect-flux-kontext"
author = "The prefect-flux-kontext authors"
release = prefect_flux_kontext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = project

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Name the languages of data that Pygments has no name for."""
    app.add_lexer("csv", TextLexer)
    app.add_lexer("jsonl", JsonLexer)


write_settings(Path(__file__).parent / "_generated" / "settings.md")
