"""The subcommands: which verb each is, what else it takes, and what does it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._verbs import Verb, read_verb

__all__ = ["COMMANDS", "Command"]

_STORE = {
    "--zarr": {
        "metavar": "PATH",
        "help": "where a Space Ranger folder is converted to; default: FOLDER.zarr beside it. A store that is there is "
        "taken as it is",
    }
}
_OUTPUT = {"--output": {"metavar": "FILE.csv", "help": "write the scores of all genes there"}}
_ONE = "store or Space Ranger folder"
_MANY = "stores or Space Ranger folders; NAME=PATH names one, else it is called after its file"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes
    ----------
    name
        What it is called.
    rooms
        Modules and functions whose parameters are its options, the verb itself first.
    help
        What it does.
    usage, slides_help, n_slides
        What it takes besides options, and how many.
    examples
        Examples.
    resume
        What is said when it was interrupted.
    again
        What the same command does after that, for the help; empty where there is nothing to say.
    without
        Parameters that are no options.
    own
        Options that are no parameters.
    """

    name: str
    rooms: tuple[tuple[str, str], ...]
    help: str
    usage: str
    examples: str
    slides_help: str = _ONE
    n_slides: tuple[int, int] = (1, 1)
    resume: str = "Nothing was changed."
    again: str = ""
    without: tuple[str, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key for what it takes in a config file."""
        return "slides" if self.n_slides[1] > 1 else "slide"

    @property
    def metavar(self) -> str:
        """What it takes, each once."""
        return " ".join(dict.fromkeys(self.usage.partition(" [")[0].split())) or "SLIDE"

    @property
    def description(self) -> str:
        """First sentence of the verb's docstring."""
        return read_verb(*self.rooms[0]).summary

    def verbs(self) -> Iterator[tuple[Verb, tuple[str, ...]]]:
        """Verbs whose parameters are options, each with those that are not."""
        for room in self.rooms:
            yield read_verb(*room), self.without


_MANY_SLIDES = 10_000
_GOES_ON = "goes on from what is done"

_ALL = (
    Command(
        name="fit",
        rooms=(("tl._fit", "fit"),),
        help="train a model on slides with expression",
        usage="SLIDE [SLIDE ...]",
        slides_help=_MANY,
        n_slides=(1, _MANY_SLIDES),
        own=_STORE,
        resume="The same command goes on after the last finished epoch.",
        again=_GOES_ON,
        examples="""\
  pixnet-sd fit breast.zarr
  pixnet-sd fit outs --zarr breast.zarr --n-genes 500 --checkpoint-dir models/breast
  pixnet-sd fit p1=a.zarr p2=b.zarr p3=c.zarr --validation p3 --max-steps 20000
  pixnet-sd fit breast.zarr --genes @panel.txt --objective poisson
  pixnet-sd fit --config run.toml --lr 1e-3""",
    ),
    Command(
        name="predict",
        rooms=(("tl._predict", "predict"),),
        help="predict a slide: gene map, regions, tables",
        usage="SLIDE",
        own=_STORE,
        resume="The slide is as it was, and the same command goes on from the tiles that are done.",
        again=_GOES_ON,
        examples="""\
  pixnet-sd predict slide.zarr --model models/breast
  pixnet-sd predict slide.zarr --model models/breast --bin-um 8 --genes ERBB2,ESR1,PGR
  pixnet-sd predict he_only.zarr --model models/breast --mpp 0.5 --shapes-key cells
  pixnet-sd predict slide.zarr --radius-um 25 --spacing-um 100 --no-write-map""",
    ),
    Command(
        name="evaluate",
        rooms=(("tl._evaluate", "evaluate"),),
        help="score a prediction against measured expression",
        usage="SLIDE",
        own=_OUTPUT,
        examples="""\
  pixnet-sd predict slide.zarr --model models/breast --shapes-key slide_square_008um
  pixnet-sd evaluate slide.zarr --table-key square_008um --predicted-key pixnet_slide_square_008um \\
    --output genes.csv""",
    ),
    Command(
        name="cross-validate",
        rooms=(("tl._cross_validate", "cross_validate"), ("tl._fit", "fit")),
        help="leave slides out in turn: train, predict, score",
        usage="SLIDE SLIDE [SLIDE ...]",
        slides_help=_MANY,
        n_slides=(1, _MANY_SLIDES),  # one is refused by the verb, which says what to do instead
        without=("record_model",),
        own=_OUTPUT,
        resume="Finished folds are kept; the same command goes on after the last finished epoch of the one it was at.",
        again=_GOES_ON,
        examples="""\
  pixnet-sd cross-validate C2.zarr C3.zarr C4.zarr B4.zarr --checkpoint-dir cv
  pixnet-sd cross-validate *.zarr --groups C2=C,C3=C,C4=C,B4=B --checkpoint-dir cv
  pixnet-sd cross-validate *.zarr --checkpoint-dir cv --folds C2      # one job of an array""",
    ),
    Command(
        name="convert",
        rooms=(("io._convert", "convert_visium_hd"),),
        help="make a store of a Space Ranger folder of Visium HD",
        usage="FOLDER STORE",
        slides_help="Space Ranger's output folder, and the store to make",
        n_slides=(2, 2),
        without=("store",),
        resume="No store was made. The same command starts anew.",
        again="starts anew",
        examples="""\
  pixnet-sd convert sample/outs sample.zarr
  pixnet-sd convert sample/outs sample.zarr --image he.tif --bin-um 2,8""",
    ),
    Command(
        name="info",
        rooms=(("cli._info", "describe"),),
        help="what a store, a checkpoint or a Space Ranger folder holds",
        usage="PATH",
        slides_help="store, checkpoint or Space Ranger folder",
        examples="""\
  pixnet-sd info slide.zarr
  pixnet-sd info slide.zarr --model models/breast --mpp 0.5
  pixnet-sd info models/breast""",
    ),
    Command(
        name="demo",
        rooms=(("cli._demo", "demo"),),
        help="draw a slide, fit, predict and score it",
        usage="",
        slides_help=argparse.SUPPRESS,
        n_slides=(0, 0),
        examples="""\
  pixnet-sd demo
  pixnet-sd demo --seed 1 --epochs 40 --output demo_1""",
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
"""All subcommands by name."""
