"""The pages agree with the code: public names are listed, calls fit, quoted messages are in the source."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pixnet_sd

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
QUOTED = re.compile(r"^(?P<ticks>`+) ?(?P<message>.+?) ?(?P=ticks)\n: ", re.MULTILINE)
LEFT_OPEN = re.compile(r"%[\d.]*[sdrfg]|\{\w*\}")  # what logging and `str.format` fill in


def test_public_names_are_on_the_page() -> None:
    lines = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    names = {name: getattr(getattr(pixnet_sd, name), "__all__", None) for name in pixnet_sd.__all__}
    listed = [f"{room}.{name}" if name else room for room, inside in names.items() for name in inside or [""]]
    assert [name for name in listed if f"    {name}" not in lines] == ["__version__"]


def fits(room: str, function: str, keywords: list[str]) -> bool:
    """Whether a room exports a function that has these arguments."""
    exported = getattr(pixnet_sd, room)
    if function not in exported.__all__:
        return False
    parameters = inspect.signature(getattr(exported, function)).parameters.values()
    return {*keywords} <= {p.name for p in parameters} or any(p.kind is p.VAR_KEYWORD for p in parameters)


def calls(page: Path) -> list[tuple[str, str, list[str]]]:
    """Room, function and keywords of each call of ours, such as ``ps.tl.fit(sdata, seed=1)``."""
    code = ast.parse("\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))))
    found = []
    for node in ast.walk(code):
        parts = ast.unparse(node.func).split(".") if isinstance(node, ast.Call) else []
        if len(parts) == 3 and parts[0] in ("pixnet_sd", "ps") and parts[1].islower():
            found.append((parts[1], parts[2], [word.arg for word in node.keywords if word.arg]))
    return found


def test_calls_fit_the_functions() -> None:
    assert [(page.name, *call) for page in PAGES for call in calls(page) if not fits(*call)] == []
    assert not any(fits("tl", *call) for call in (("fit", ["radius_um"]), ("transform", [])))


def texts(path: Path) -> list[str]:
    """Every text of a module, with … for what differs."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(LEFT_OPEN.sub("…", node.value))
    return [text for text in found if len(text) < 1000]  # longer ones are docstrings


TEMPLATES = [text for path in (ROOT / "src").rglob("*.py") for text in texts(path)]
MESSAGES = [m["message"] for m in QUOTED.finditer((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))]


def is_in_source(message: str) -> bool:
    """Whether the fixed parts follow one another in one text."""
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in TEMPLATES)


def test_quoted_messages_are_in_the_source_and_rewording_is_noticed() -> None:
    assert [message for message in MESSAGES if not is_in_source(message)] == []
    assert min(len(message.replace("…", "")) for message in MESSAGES) > 20  # to tell one from another
    assert len(MESSAGES) == len(set(MESSAGES)) > 50
    assert is_in_source("There is no store at …. Give the folder")
    assert not is_in_source("There is no store at …. Give a folder")
