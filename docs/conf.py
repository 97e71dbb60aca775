"""Sphinx configuration.  `make docs` builds with warnings as errors."""

from __future__ import annotations

import os
from importlib.metadata import metadata

from sphinx.ext.napoleon import NumpyDocstring

info = metadata("pixnet_sd")
project = info["Name"]
author = info["Author"]
copyright = f"2026, {author}"
version = release = info["Version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
bibtex_bibfiles = ["references.bib"]

# The inventories of other projects come over the network: link to them where the pages are published only, so that a
# build without a network has no warnings.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable/", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable/", None),
    }

autosummary_generate = True
autosummary_imported_members = True
autodoc_typehints = "description"  # types come from the annotations, once
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = False

nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = project


def returns_as_prose(docstring: NumpyDocstring, _section: str) -> list[str]:
    """Keep "Returns" as it is written: the type comes from the annotation, not from the section's first line."""
    return [*docstring._format_block(":returns: ", docstring._dedent(docstring._consume_to_next_section())), ""]


NumpyDocstring._parse_returns_section = returns_as_prose
