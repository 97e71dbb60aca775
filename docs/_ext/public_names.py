"""Cross-references by the names that people use: short ones of this package, public ones of others.

Docstrings say ``DataError`` and ``:func:`sample```, which read well in a terminal, and annotations evaluate to where a
class is defined, which is not where its documentation is.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

PUBLIC = {
    "AnnData": "anndata.AnnData",
    "Axes": "matplotlib.axes.Axes",
    "DataArray": "xarray.DataArray",
    "DataFrame": "pandas.DataFrame",
    "DataTree": "xarray.DataTree",
    "Figure": "matplotlib.figure.Figure",
    "Path": "pathlib.Path",
    "SpatialData": "spatialdata.SpatialData",
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "spatialdata._core.spatialdata.SpatialData": "spatialdata.SpatialData",
    "xarray.core.dataarray.DataArray": "xarray.DataArray",
}
"""Where others document what annotations name."""


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve, priority=400)  # before intersphinx, which has 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.reference | None:
    """Link to the one documented name of ours that ends like this, or leave the public name for intersphinx."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target in PUBLIC:
        node["reftarget"] = PUBLIC[target]
        return None
    objects = env.domains.python_domain.objects
    found = [name for name in objects if name.startswith("pixnet_sd.") and name.endswith(f".{target}")]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, found[0])
