"""The command line's grammar: options made of annotations, their help, and a config file in place of them."""

from __future__ import annotations

import argparse
import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

_USAGE = """\
usage: pixnet-sd COMMAND [options]; pixnet-sd COMMAND --help lists its options

Gene expression at every pixel of H&E slides, from spatial transcriptomics.

Each command does what the Python function of that name does, and has its arguments as options. A SLIDE is a
SpatialData store (a .zarr folder) or a Space Ranger output folder of Visium HD, which is converted to a store first.

commands:"""

_CODES = "Exit codes: 0 done, 1 an error that its message explains, 2 wrong usage, 130 interrupted, 143 terminated."
_METAVARS = {int: "N", float: "NUMBER", str: "NAME"}
_COLUMN = 38  # where the help of an option begins
UNCHANGED = "Nothing was changed."


@dataclass(frozen=True)
class Flag:
    """An option, which stands for the argument of the same name.

    A text is read as the first alternative of the annotation that it fits: ``none``, a literal, a number, a mapping
    (``A=1,B=2``), a sequence (with commas, or ``@file``, one a line), a text.
    """

    name: str
    takes: Any  # annotation of the argument, without classes that no text can be
    help: str
    default: Any = None  # for the help: what is not given is left to the verb; ... if it has to be given
    own: bool = False  # of the command line, and no argument of the verb

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Alternatives of the annotation."""
        is_union = typing.get_origin(self.takes) not in (None, Literal, Sequence, Mapping)
        return typing.get_args(self.takes) if is_union else (self.takes,)

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return bool in self.kinds

    def _within(self, origin: Any) -> list[Any]:
        """Arguments of those alternatives that are a ``Literal``, ``Sequence`` or ``Mapping``."""
        return [each for kind in self.kinds if typing.get_origin(kind) is origin for each in typing.get_args(kind)]

    @property
    def metavar(self) -> str:
        """What it takes, for the help; the word ``none`` where it is not the default."""
        items = self._within(Sequence)
        words = [*map(str, self._within(Literal)), *(_METAVARS[kind] for kind in (int, float) if kind in self.kinds)]
        words += [f"{_METAVARS[item]},..." for item in items]
        words += ["NAME=VALUE,..."] if self._within(Mapping) else []
        words += ["TEXT"] if str in self.kinds and not items else []
        return "|".join([*words, "none"] if type(None) in self.kinds and self.default is not None else words)

    @property
    def line(self) -> str:
        """Line of the help, with the default in brackets unless it is None, which the text explains."""
        usage = f"--[no-]{self.flag[2:]}" if self.is_switch else f"{self.flag} {self.metavar}"
        plain = ("no", "yes")[self.default] if isinstance(self.default, bool) else self.default
        default = "" if plain in (None, ...) else f" [{plain:g}]" if isinstance(plain, float) else f" [{plain}]"
        return f"  {usage:<{_COLUMN - 4}}  {self.help}{default}"

    def read(self, text: str) -> Any:
        """Read a text; ArgumentTypeError if it fits none of the alternatives."""
        literals = {str(value): value for value in self._within(Literal)}
        if type(None) in self.kinds and text.lower() == "none":
            return None
        if text in literals:
            return literals[text]
        for number in (int, float):
            if number in self.kinds:
                with suppress(ValueError):
                    return number(text)
        if self._within(Mapping):
            pairs = [[word.strip() for word in item.partition("=")[::2]] for item in _items(text)]
            if not all(map(all, pairs)):
                raise argparse.ArgumentTypeError(f"{text!r} is not {self.metavar}")
            return dict(pairs)
        if self._within(Sequence) and (str not in self.kinds or "," in text or text.startswith("@")):
            one = replace(self, takes=self._within(Sequence)[0])
            return [one.read(item) for item in _items(text)]
        if str in self.kinds:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {self.metavar}{_nearest(text, literals)}")


def _items(text: str) -> list[str]:
    """Split a list; ``@file`` has one a line, or commas."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"the file {text[1:]!r} cannot be read ({error})") from error
    items = [item.strip() for item in text.replace("\n", ",").split(",") if item.strip()]
    if not items:
        raise argparse.ArgumentTypeError("the list is empty")
    return items


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


_EVERY = tuple(Flag(name, takes, "", own=True) for name, takes in (("config", str), ("verbose", bool), ("quiet", bool)))
_EVERY_HELP = "Every command: --config FILE.toml (options; those given here win), --verbose, --quiet, --help"


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    name: str
    help: str
    does: str  # module and function
    usage: str  # what it takes besides options
    groups: Mapping[str, tuple[Flag, ...]]  # options by title
    examples: tuple[str, ...]
    slides_help: str = "store or Space Ranger folder"
    n_slides: tuple[int, int] = (1, 1)
    resume: str = UNCHANGED  # what becomes of its work when it is stopped

    @property
    def flags(self) -> dict[str, Flag]:
        """All options by name."""
        return {flag.name: flag for group in (*self.groups.values(), _EVERY) for flag in group}

    @property
    def full_help(self) -> str:
        """What ``--help`` prints."""
        metavar = " ".join(dict.fromkeys(self.usage.partition(" [")[0].split()))
        lines = [f"usage: pixnet-sd {self.name} {self.usage} [options]".replace("  ", " ")]
        lines += [f"{self.help[0].upper()}{self.help[1:]}."]
        lines += [f"  {metavar:<{_COLUMN - 4}}  {self.slides_help}"] if metavar else []
        lines += [line for title, group in self.groups.items() for line in (f"{title}:", *(f.line for f in group))]
        lines += [_EVERY_HELP, "Examples:", *(f"  pixnet-sd {example}" for example in self.examples), _CODES]
        return "\n".join([*lines, "" if self.resume == UNCHANGED else f"After the last two: {self.resume}\n"])


@dataclass(frozen=True)
class Call:
    """What is to be done: a command, slides as given, arguments of its verb, and options of the command line itself."""

    command: Command
    slides: list[str]
    options: dict[str, Any]
    own: dict[str, Any]


class _Parser(argparse.ArgumentParser):
    """Parser of a command. What is not given is not among the values."""

    def __init__(self, command: Command) -> None:
        super().__init__(prog=f"pixnet-sd {command.name}", allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.command = command
        self.add_argument("slides", nargs="*")
        for flag in command.flags.values():
            if flag.is_switch:
                self.add_argument(flag.flag, action=argparse.BooleanOptionalAction)
            else:
                self.add_argument(flag.flag, type=flag.read, required=flag.default is ...)

    def format_help(self) -> str:
        return self.command.full_help

    def error(self, message: str) -> Any:
        """Exit without the usage of forty options."""
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help.\n")


def parse(arguments: Sequence[str], commands: Mapping[str, Command]) -> Call:
    """Read a command line; exits with status 2 if it cannot be understood, and 0 after ``--help``."""
    if not arguments or arguments[0] not in commands:
        _exit_without_command(arguments, commands)
    command = commands[arguments[0]]
    parser, given = _Parser(command), list(arguments[1:])
    configured, slides = _configured(parser, given, commands)
    namespace, unknown = parser.parse_known_intermixed_args([*configured, *given])
    if unknown:
        option = next((text for text in unknown if text.startswith("-")), unknown[0])
        flags = [flag.flag for flag in command.flags.values()]
        parser.error(f"unknown option {option}{_nearest(option.partition('=')[0], flags)}")
    values = vars(namespace)
    slides = values.pop("slides", None) or slides
    least, most = command.n_slides
    if len(slides) < least:
        parser.error(f"{command.usage} is needed: {len(slides)} given")
    if len(slides) > most:
        parser.error(f"{command.name} takes {command.usage or 'no path'}, and not {' '.join(slides[most:])}")
    own = {name: values.pop(name) for name in list(values) if command.flags[name].own}
    return Call(command, slides, values, own)


def _exit_without_command(arguments: Sequence[str], commands: Mapping[str, Command]) -> typing.NoReturn:
    """Print the help or the version, or say what is wrong."""
    from pixnet_sd import __version__

    parser = argparse.ArgumentParser("pixnet-sd", allow_abbrev=False, add_help=False)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "--version"):
        lines = [f"  {command.name:<16}{command.help}" for command in commands.values()]
        print(f"pixnet-sd {__version__}" if first == "--version" else "\n".join([_USAGE, *lines, "", _CODES]))
        parser.exit(0)
    if first.startswith("-"):
        parser.exit(2, "pixnet-sd: error: give a command first, and options after it\n")
    near = _nearest(first, commands) or f"; there are {', '.join(commands)}"
    parser.exit(2, f"pixnet-sd: error: there is no command {first!r}{near}\n")


def _configured(parser: _Parser, given: Sequence[str], commands: Mapping[str, Command]) -> tuple[list[str], list[str]]:
    """Turn a config file into options, so that it can do what they can and no more, and slides.

    A table named as a command, ``[fit]``, is for that command alone, so that one file can serve several.
    """
    scan = argparse.ArgumentParser(parser.prog, add_help=False, allow_abbrev=False)
    scan.add_argument("--config", type=Path)
    path: Path | None = scan.parse_known_args(given)[0].config
    if path is None:
        return [], []
    file, command = f"the config file {str(path)!r}", parser.command
    try:
        content = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        parser.error(f"{file} is no TOML: {error}")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{file} cannot be read ({error})")
    tables = {key: content.pop(key) for key in commands if isinstance(content.get(key), dict)}
    entries = {key.replace("-", "_"): value for key, value in {**content, **tables.get(command.name, {})}.items()}
    slides_key = "slides" if command.n_slides[1] > 1 else "slide"
    slides = entries.pop(slides_key, [])
    flags = {name: flag for name, flag in command.flags.items() if name != "config"}
    tokens = []
    for name, value in entries.items():
        if name not in flags:
            known = [slides_key, *flags, *commands]
            parser.error(f"{name!r} in {file} is no option of {command.name}, nor a command{_nearest(name, known)}")
        if flags[name].is_switch != isinstance(value, bool):
            wanted = "true or false" if flags[name].is_switch else "a text, a number or a list"
            parser.error(f"{name!r} in {file} is {value!r}, and {wanted} is needed")
        tokens.append(_token(flags[name].flag, value))
    return tokens, [str(slide) for slide in (slides if isinstance(slides, list) else [slides])]


def _token(flag: str, value: Any) -> str:
    """Write a value of a config file as an option."""
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    return f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"
