"""Entries of tables of contents that end in a question mark: listed where such pages are there, left out otherwise."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx

ENTRY = re.compile(r"^(?P<page>[\w./*-]+)\?\n", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", settle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def settle(app: Sphinx, docname: str, source: list[str]) -> None:
    """Keep an entry if a page of that name, or pattern, exists beside this one."""
    folder = Path(app.srcdir) / PurePosixPath(docname).parent

    def entry(found: re.Match[str]) -> str:
        page = found["page"]
        there = any(True for kind in ("md", "ipynb") for _ in folder.glob(f"{page}.{kind}"))
        return f"{page}\n" if there else ""

    source[0] = ENTRY.sub(entry, source[0])
