"""The package stays small enough to be held in one's head, and two keys of users' objects are touched in one place."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pixnet_sd"
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted({path.parent for path in FILES})
MOST_FILES, MOST_FLOORS, MOST_LINES = 8, 4, 80
NOTES = {"_notes.py", "store/_notes.py"}

each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(SOURCE.parent).as_posix())


@cache
def neighbours(path: Path) -> frozenset[Path]:
    """Files of the same room that a file imports."""
    imports = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.level == 1
    ]
    names = {name for node in imports for name in ([node.module] if node.module else [a.name for a in node.names])}
    return frozenset(path.with_name(f"{name}.py") for name in names if path.with_name(f"{name}.py").exists())


@cache
def floor(path: Path) -> int:
    return 1 + max(map(floor, neighbours(path)), default=0)


@each_room
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


def touches_notes(node: ast.AST) -> bool:
    """Whether an expression reads, writes or looks for the key of the notes in a mapping."""
    keys: list[ast.expr | None] = []
    if isinstance(node, ast.Subscript):
        keys = [node.slice]
    elif isinstance(node, ast.Dict):
        keys = node.keys
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop", "setdefault"):
        keys = list(node.args[:1])
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        keys = [node.left]
    is_named = getattr(node, "id", getattr(node, "name", "")) == "ATTRS_KEY"
    return is_named or any(isinstance(key, ast.Constant) and key.value == "pixnet_sd" for key in keys)


def test_notes_are_touched_in_one_place() -> None:
    trees = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in FILES}
    assert {name for name, tree in trees.items() if any(map(touches_notes, ast.walk(tree)))} == NOTES
    for code in ('a["pixnet_sd"]', '{"pixnet_sd": 1}', 'a.get("pixnet_sd")', '"pixnet_sd" in a', "ATTRS_KEY"):
        assert any(map(touches_notes, ast.walk(ast.parse(code))))
