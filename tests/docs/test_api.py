"""Every public name is on the API page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pixnet_sd

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"^    ([\w.]+)$", re.MULTILINE)


def public_names(source: Path) -> list[str]:
    """``__all__`` of a module, without importing it."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{source} has no __all__")


def listed() -> list[str]:
    """Public names as the page has them: ``tl.fit``, ``PixNet``."""
    names = []
    for name in pixnet_sd.__all__:
        package = ROOT / "src" / "pixnet_sd" / name
        sources = [path for path in (package / "__init__.py", package.with_suffix(".py")) if path.is_file()]
        names += [f"{name}.{each}" for each in public_names(sources[0])] if sources else [name]
    return [name for name in names if name != "__version__"]


@pytest.mark.parametrize("name", listed())
def test_name_is_on_the_page(name: str) -> None:
    assert name in ENTRY.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
