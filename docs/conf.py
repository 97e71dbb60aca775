"""Sphinx configuration.  `make docs` builds with warnings as errors, and every reference has to lead somewhere."""

from __future__ import annotations

import inspect
import os
import re
import sys
from importlib.metadata import metadata
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.napoleon import NumpyDocstring

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
from public_names import PUBLIC

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
    "copied_notebooks",
    "optional_pages",
    "public_names",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

nitpicky = True
nitpick_ignore_regex = [
    # What other projects document. Their inventories come over the network, see below.
    (r"py:.*", r"(anndata|collections|huggingface_hub|matplotlib|numpy|pandas|pathlib|spatialdata|torch|xarray)\..*"),
    *[(r"py:.*", re.escape(name)) for name in PUBLIC],
    # of plots; where one annotation needs torch, none is evaluated
    (r"py:class", r"AxesLike|Drawn|ObjectiveName"),
    (r"py:class", r"(pixnet_sd\.model\.)?(_network\.)?Network"),  # PixNet holds one; nobody makes one by hand
]

# Link to other projects where the pages are published only, so that a build without a network has no warnings.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable/", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
        "xarray": ("https://docs.xarray.dev/en/stable/", None),
    }

autosummary_generate = True
autosummary_imported_members = True
# Types come from the annotations, once, beside each parameter. autodoc does that itself; of sphinx-autodoc-typehints
# only the defaults would be new, and the signature shows them.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = False

nb_execution_mode = "off"  # notebooks are kept with their outputs
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["pixnet_sd.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has the search already
    "show_toc_level": 2,
    "use_fullscreen_button": False,
}


def returns_as_prose(docstring: NumpyDocstring, _section: str) -> list[str]:
    """Keep "Returns" as it is written: the type comes from the annotation, not from the section's first line."""
    return [*docstring._format_block(":returns: ", docstring._dedent(docstring._consume_to_next_section())), ""]


NumpyDocstring._parse_returns_section = returns_as_prose


def signature_of_init(
    _app: Sphinx, what: str, _name: str, documented: type, _options: object, signature: str | None, _result: str | None
) -> tuple[str, str] | None:
    """Of classes whose base takes any arguments, as that of PixNet does in ``__new__``."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    names = list(inspect.signature(documented.__init__).parameters)[1:]
    return f"({', '.join(names)})", ""


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", signature_of_init)
