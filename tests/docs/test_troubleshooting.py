"""The messages that the troubleshooting page quotes are those that the source has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"^(?P<ticks>`+) ?(?P<message>.+?) ?(?P=ticks)\n: ", re.MULTILINE)
"""A term that is nothing but a message; what follows one of another package says whose it is."""

LEFT_OPEN = re.compile(r"%[\d.]*[sdrfg]|\{\w*\}")
"""What logging and `str.format` fill in."""

LONGEST = 1000


def quoted() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [found["message"] for found in QUOTED.finditer(page)]


@pytest.fixture(scope="module")
def templates() -> list[str]:
    """Every text of the source, with … for what differs."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(LEFT_OPEN.sub("…", node.value))
    return [text for text in found if len(text) < LONGEST]  # the others are docstrings


def is_in(message: str, templates: list[str]) -> bool:
    """Whether the fixed parts follow one another in one text."""
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in templates)


@pytest.mark.parametrize("message", quoted())
def test_message_is_in_the_source(message: str, templates: list[str]) -> None:
    assert len(message.replace("…", "")) > 20, "too short to tell one message from another"
    assert is_in(message, templates)


def test_each_is_listed_once() -> None:
    assert len(quoted()) > 50
    assert len(set(quoted())) == len(quoted())


def test_reworded_message_is_noticed(templates: list[str]) -> None:
    assert is_in("There is no store at …. Give the folder", templates)
    assert not is_in("There is no store at …. Give a folder", templates)
