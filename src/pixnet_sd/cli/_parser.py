"""The command line's grammar: subcommands, their options, and a config file in place of them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._commands import COMMANDS, Command
from ._config import ConfigError, read_config
from ._options import add_options

__all__ = ["Call", "parse"]

_DESCRIPTION = """\
Gene expression at every pixel of H&E slides, from spatial transcriptomics.

Each command does what the Python function of that name does, and has its arguments as options. A SLIDE is a
SpatialData store (a .zarr folder) or a Space Ranger output folder of Visium HD, which is converted to a store first."""

_CODES = "exit codes: 0 done, 1 an error that its message explains, 2 wrong usage, 130 interrupted, 143 terminated."


@dataclass(frozen=True)
class Call:
    """What is to be done.

    Attributes
    ----------
    command
        Which command.
    slides
        Slides as given.
    options
        Arguments of the verb.
    own
        Options of the command line itself: ``output``, ``zarr``, ``verbose`` ...
    """

    command: Command
    slides: list[str]
    options: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)


class _Parser(argparse.ArgumentParser):
    """Errors without the usage of forty options."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help.\n")


def parse(arguments: Sequence[str]) -> Call:
    """Read a command line; exits with status 2 if it cannot be understood, and 0 after ``--help``."""
    main = _main_parser()
    if not arguments or arguments[0] not in COMMANDS:
        _not_a_command(main, arguments)
    command = COMMANDS[arguments[0]]
    parser, names = _command_parser(command)
    rest, slides = _with_config(parser, command, list(arguments[1:]))
    found, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        parser.error(_unknown(next((u for u in unknown if u.startswith("-")), unknown[0]), parser))
    values = vars(found)
    given = values.pop("slides") or slides
    _check_number(parser, command, given)
    options = {name: values.pop(name) for name in names}
    return Call(command, given, options, values)


def _not_a_command(main: _Parser, arguments: Sequence[str]) -> None:
    """Help, version, or an error."""
    if arguments and not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(COMMANDS)}"
        main.error(f"there is no command {arguments[0]!r}{hint}")
    main.parse_args(arguments or ["--help"])
    main.error("give a command first, and options after it")


def _main_parser() -> _Parser:
    parser = _Parser(
        prog="pixnet-sd",
        description=_DESCRIPTION,
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pixnet-sd {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS.values():
        commands.add_parser(command.name, help=command.help)
    return parser


def _version() -> str:
    from pixnet_sd import __version__

    return __version__


def _command_parser(command: Command) -> tuple[_Parser, list[str]]:
    """Parser of a command, and the names of its verb's arguments."""
    again = f"\nAfter the last two the same command {command.again}." if command.again else ""
    parser = _Parser(
        prog=f"pixnet-sd {command.name}",
        usage=f"pixnet-sd {command.name} {command.usage} [options]".replace("  ", " "),
        description=command.description,
        epilog=f"examples:\n{command.examples}\n\n{_CODES}{again}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("slides", nargs="*", metavar=command.metavar, help=command.slides_help)
    names: list[str] = []
    for verb, without in command.verbs():
        names += add_options(parser, verb, without=(*without, *names))
    own = parser.add_argument_group("command line")
    for flag, settings in command.own.items():
        own.add_argument(flag, **settings)
    own.add_argument("--config", type=Path, metavar="FILE.toml", help="take options from a file; those given here win")
    own.add_argument("--verbose", action="store_true", help="show tracebacks, and what other libraries say")
    own.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    return parser, names


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options by name."""
    return {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}


def _with_config(parser: _Parser, command: Command, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The command line with what a config file says put before it, where it is overruled; and the file's slides."""
    scan = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    scan.add_argument("--config", type=Path)
    path = scan.parse_known_args(arguments)[0].config
    if path is None:
        return arguments, []
    actions = {name: action for name, action in _actions(parser).items() if name != "config"}
    try:
        tokens, slides = read_config(path, command.name, COMMANDS, actions, command.key)
    except ConfigError as error:
        parser.error(str(error))
    return [*tokens, *arguments], slides


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    flags = [flag for action in _actions(parser).values() for flag in action.option_strings]
    near = difflib.get_close_matches(argument.partition("=")[0], flags, n=1)
    return f"unknown option {argument}" + (f"; did you mean {near[0]}?" if near else "")


def _check_number(parser: _Parser, command: Command, slides: list[str]) -> None:
    least, most = command.n_slides
    if len(slides) < least:
        parser.error(f"{command.usage} is needed: {len(slides)} given")
    if len(slides) > most:
        parser.error(f"{command.name} takes {command.usage or 'no path'}, and not {' '.join(slides[most:])}")
