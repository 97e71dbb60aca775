"""A TOML file that stands for options: it is turned into them, so that it can do what they can and no more."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ._options import flag_of

__all__ = ["ConfigError", "read_config"]


class ConfigError(ValueError):
    """A config file that cannot be used."""


def read_config(
    path: Path, command: str, commands: Collection[str], actions: Mapping[str, argparse.Action], positional: str
) -> tuple[list[str], list[str]]:
    """Options and slides that a config file gives for a command.

    Keys are names of options, with ``_`` or ``-``. A table named as a command, ``[fit]``, is for that command alone,
    so that one file can serve several.

    Parameters
    ----------
    path
        The file.
    command, commands
        The command that is run, and all there are.
    actions
        Options of that command by name.
    positional
        Key under which slides are given.

    Returns
    -------
    Options as on the command line, and slides.

    Raises
    ------
    ConfigError
        The file cannot be read, a table is for no command, or a key is none of the command's.
    """
    content = _content(path)
    for name, value in content.items():
        if isinstance(value, dict) and name not in commands and name.replace("-", "_") not in actions:
            raise ConfigError(_unknown_table(path, name, command, commands))
    entries = _entries(content, command, commands)
    slides = entries.pop(positional, [])
    tokens: list[str] = []
    for name, value in entries.items():
        if name not in actions:
            raise ConfigError(_unknown(path, name, command, [positional, *actions]))
        tokens.append(_token(path, name, value, actions[name]))
    return tokens, [str(slide) for slide in (slides if isinstance(slides, list) else [slides])]


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {str(path)!r} cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config file {str(path)!r} is no TOML: {error}") from error


def _entries(content: dict[str, Any], command: str, commands: Collection[str]) -> dict[str, Any]:
    sections = {key: content.pop(key) for key in commands if isinstance(content.get(key), dict)}
    entries = {**content, **sections.get(command, {})}
    return {key.replace("-", "_"): value for key, value in entries.items()}


def _unknown_table(path: Path, name: str, command: str, commands: Collection[str]) -> str:
    near = difflib.get_close_matches(name, commands, n=1)
    hint = f"Did you mean [{near[0]}]?" if near else f"The commands are {', '.join(commands)}."
    return (
        f"the config file {str(path)!r} has a table [{name}]. There is no command {name!r}, and no such option of "
        f"{command}. {hint}"
    )


def _unknown(path: Path, name: str, command: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {near[0]!r}?" if near else f". It has {', '.join(known)}"
    return f"{name!r} in the config file {str(path)!r} is no option of {command}{hint}"


def _token(path: Path, name: str, value: Any, action: argparse.Action) -> str:
    flag = flag_of(name)
    if (action.nargs == 0) != isinstance(value, bool):
        wanted = "true or false" if action.nargs == 0 else "a text, a number or a list"
        raise ConfigError(f"{name!r} in the config file {str(path)!r} is {value!r}, and {wanted} is needed")
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    return f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"
