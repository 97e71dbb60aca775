"""The package stays small enough to be held in one's head, and two keys of users' objects are touched in one place."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pixnet_sd"
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted({path.parent for path in FILES})
MOST_FILES, MOST_FLOORS, MOST_LINES = 8, 4, 80
NOTES = {"_notes.py", "store/_notes.py"}


@cache
def neighbours(path: Path) -> frozenset[Path]:
    """Files of the same room that a file imports."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.level == 1]
    names = {name for node in nodes for name in ([node.module] if node.module else [a.name for a in node.names])}
    return frozenset(path.with_name(f"{name}.py") for name in names if path.with_name(f"{name}.py").exists())


@cache
def floor(path: Path) -> int:
    return 1 + max(map(floor, neighbours(path)), default=0)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(SOURCE.parent).as_posix())
def test_a_room_has_few_files_on_few_floors(room: Path) -> None:
    files = sorted(room.glob("*.py"))
    assert len(files) <= MOST_FILES
    assert max(floor(path) for path in files if path.name != "__init__.py" or len(files) == 1) <= MOST_FLOORS


def test_no_function_is_long() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                head = node.body[0].lineno - node.lineno
                if head + node.end_lineno - first.lineno + 1 > MOST_LINES:
                    long.append(f"{path.relative_to(SOURCE)}: {node.name}")
    assert long == []


def touches_notes(code: str) -> bool:
    """Whether code reads, writes or looks for the key of the notes in a mapping; what ``...`` quotes is no code."""
    pattern = r'[\[{]"pixnet_sd"[\]:]|\b(get|pop|setdefault)\("pixnet_sd"|"pixnet_sd" (not )?in |\bATTRS_KEY\b'
    return re.search(pattern, re.sub("``.*?``", "", code)) is not None


def test_notes_are_touched_in_one_place() -> None:
    assert {path.relative_to(SOURCE).as_posix() for path in FILES if touches_notes(path.read_text())} == NOTES
    for code in ('a["pixnet_sd"]', '{"pixnet_sd": 1}', 'a.get("pixnet_sd")', '"pixnet_sd" in a', "ATTRS_KEY"):
        assert touches_notes(code)
