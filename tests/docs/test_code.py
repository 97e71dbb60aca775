"""The code of the pages: it compiles, and calls functions of ours by arguments that they have."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
CALL = re.compile(r"pixnet_sd|ps")


def code_of(page: Path) -> ast.Module:
    return ast.parse("\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))))


@functools.cache
def functions() -> dict[str, ast.arguments]:
    """Arguments of every function that a module of ours defines, by its name."""
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    return {node.name: node.args for module in modules for node in module.body if isinstance(node, ast.FunctionDef)}


def fits(room: str, function: str, keywords: list[str]) -> bool:
    """Whether a room exports a function that has these arguments."""
    if f'"{function}"' not in (ROOT / "src" / "pixnet_sd" / room / "__init__.py").read_text(encoding="utf-8"):
        return False
    known = functions()[function]
    return known.kwarg is not None or {*keywords} <= {each.arg for each in (*known.args, *known.kwonlyargs)}


def calls(page: Path) -> list[tuple[str, str, list[str]]]:
    """Room, function and keywords of each call of ours, such as ``ps.tl.fit(sdata, seed=1)``."""
    found = []
    for node in ast.walk(code_of(page)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = ast.unparse(node.func).split(".")
            if len(parts) == 3 and CALL.fullmatch(parts[0]) and parts[1].islower():
                found.append((parts[1], parts[2], [word.arg for word in node.keywords if word.arg]))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if calls(page)], ids=lambda page: page.stem)
def test_calls_fit_the_functions(page: Path) -> None:
    assert [call for call in calls(page) if not fits(*call)] == []


def test_wrong_calls_are_noticed() -> None:
    assert not fits("tl", "fit", ["radius_um"])
    assert not fits("tl", "transform", [])
