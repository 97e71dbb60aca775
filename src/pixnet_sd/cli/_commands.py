"""The subcommands and their options, as data: importing the verbs would load torch for a ``--help``.

A test compares the table with the signatures of the verbs. Fields of parameter groups are options by themselves.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Literal

from pixnet_sd.params import ModelParams, ObjectiveName, PredictParams, TrainParams

from ._parser import Command, Flag


def _fields(group: type, *without: str) -> tuple[Flag, ...]:
    """Make an option of each field of a group of parameters, in order."""
    hints = typing.get_type_hints(group)
    return tuple(
        Flag(f.name, hints[f.name], f.metadata["help"], f.default) for f in fields(group) if f.name not in without
    )


Names = Sequence[str] | None

_IMAGE = (
    Flag("image_key", str | None, "slide image; found when only one reading is possible"),
    Flag("coordinate_system", str | None, "where image and regions meet; found when only one reading is possible"),
    Flag("mpp", float | Literal["coordinate_system"] | None, "µm per pixel of the image; default: by bins or spots"),
    Flag("allow_any_mpp", bool, "accept a resolution outside 0.1-2 µm per pixel", False),
)
_DEVICE = Flag("device", str | None, "cpu, cuda, ...; default: a GPU if there is one")
_BATCH_SIZE = Flag("batch_size", int | None, "tiles at a time; default: by the device")
_BAR = Flag("show_progress_bar", bool, "show a bar, or lines in a log", True)
_ZARR = Flag("zarr", str | None, "store that a Space Ranger folder is converted to; default: FOLDER.zarr", own=True)
_PAPER = Flag("paper", bool, "network and training of the paper, but for what is given", False, own=True)
_CSV = Flag("output", str | None, "write the scores of all genes to this CSV file", own=True)
_PREDICT_TILE, _SYMMETRIES = _fields(PredictParams, "allow_any_mpp", "allow_poor_model")

_TRAINING = {
    "Genes": (
        Flag("genes", Sequence[str] | int | Literal["all"], "names (or @file), how many of the highest, or all", 250),
    ),
    "Model": (
        _PAPER,
        Flag("objective", ObjectiveName, "loss, on counts or on log-normalised expression", "nb_pcc"),
        *_fields(ModelParams),
    ),
    "Training": (
        Flag("validation", float | Names, "share of each slide to hold out, or names of slides", 0.1),
        Flag("max_epochs", int, "most passes over the tiles", 500),
        _BATCH_SIZE,
        *_fields(TrainParams, "allow_any_mpp"),
        _DEVICE,
        Flag("seed", int, "random seed", 0),
    ),
}
_TRAINING_SLIDE = (
    *_IMAGE,
    Flag("table_key", str | Names, "tables with raw counts; default: all bins, or the only one"),
)
_SEVERAL = "stores or Space Ranger folders; NAME=PATH names one"
_MOST_SLIDES = 10_000

_ALL = (
    Command(
        "fit",
        "train a model on slides with expression",
        "_run.fit",
        "SLIDE [SLIDE ...]",
        {
            "Slide": (*_TRAINING_SLIDE, _ZARR),
            **_TRAINING,
            "Output": (
                Flag("checkpoint_dir", str | None, "folder of the model; default: in pixnet_sd_models by the slide"),
                Flag("record_model", bool, "note the folder in every slide, where predict finds it", True),
                _BAR,
            ),
        },
        examples=(
            "fit outs --zarr breast.zarr --genes 500 --checkpoint-dir models/breast",
            "fit p1=a.zarr p2=b.zarr p3=c.zarr --validation p3 --max-steps 20000",
        ),
        slides_help=_SEVERAL,
        n_slides=(1, _MOST_SLIDES),
        resume="The same command goes on after the last finished epoch.",
    ),
    Command(
        "predict",
        "predict a slide: gene map, regions, tables",
        "_run.predict",
        "SLIDE",
        {
            "Slide": (*_IMAGE, _ZARR),
            "Regions": (
                Flag("shapes_key", str | None, "the regions of this shapes or labels element"),
                Flag("radius_um", float | None, "circles of this radius, on a grid or at centres of --shapes-key"),
                Flag("spacing_um", float | None, "pitch of the grid of circles; default: touching"),
                Flag("bin_um", float | None, "square bins of this side over the tissue"),
            ),
            "Model": (
                Flag("model", str | None, "folder of a model; default: the one that fit noted in the slide"),
                Flag("genes", Names, "names (or @file); default: all of the model's"),
                _BATCH_SIZE,
                *_fields(PredictParams, "allow_any_mpp"),
                _DEVICE,
            ),
            "Output": (
                Flag("write", Literal["map", "factors"] | None, "map of all genes, or factors that make them", "map"),
                Flag("map_um", float | None, "pixel size of the map, a multiple of its own"),
                Flag("interval", float | None, "share of what is measured between lower and upper end", 0.9),
                Flag("key_added", str, "first part of all names", "pixnet"),
                Flag("overwrite", bool, "replace results of the same names", False),
                _BAR,
            ),
        },
        examples=(
            "predict slide.zarr --model models/breast --bin-um 8 --genes ERBB2,ESR1,PGR",
            "predict he_only.zarr --model models/breast --mpp 0.5 --shapes-key cells",
            "predict slide.zarr --radius-um 25 --spacing-um 100 --write none",
        ),
        resume="The slide is as it was, and the same command goes on from the tiles that are done.",
    ),
    Command(
        "evaluate",
        "score a prediction against measured expression",
        "_run.evaluate",
        "SLIDE",
        {
            "Tables": (
                Flag("table_key", str, "table with raw counts", ...),
                Flag("predicted_key", str, "table that predict wrote for the same shapes or labels", ...),
                Flag("at_measured_depth", bool, "score counts by what is expected at each region's depth", True),
                _CSV,
            )
        },
        examples=("evaluate slide.zarr --table-key square_008um --predicted-key pixnet_slide_square_008um",),
    ),
    Command(
        "cross-validate",
        "leave slides out in turn: train, predict, score",
        "_run.cross_validate",
        "SLIDE SLIDE [SLIDE ...]",
        {
            "Folds": (
                Flag(
                    "groups", Mapping[str, str] | None, "group of each slide, left out at once; default: each its own"
                ),
                Flag("folds", Names, "groups to leave out now, as in one job of an array; default: all"),
                Flag("score_table_key", str | Names, "tables to score; default: those of up to 500,000 rows"),
                _SYMMETRIES,
                replace(_PREDICT_TILE, name="predict_tile_px", help="side of a tile at prediction, working pixels"),
            ),
            "Slide": _TRAINING_SLIDE,
            **_TRAINING,
            "Output": (
                Flag("checkpoint_dir", str | None, "folder with a folder per fold, and the scores"),
                _CSV,
                _BAR,
            ),
        },
        examples=(
            "cross-validate *.zarr --groups C2=C,C3=C,C4=C,B4=B --checkpoint-dir cv",
            "cross-validate *.zarr --checkpoint-dir cv --folds C2      # one job of an array",
        ),
        slides_help=_SEVERAL,
        n_slides=(1, _MOST_SLIDES),  # one is refused by the verb, which says what to do instead
        resume="The same command goes on from the finished folds, and after the last finished epoch of the next.",
    ),
    Command(
        "convert",
        "make a store of a Space Ranger folder of Visium HD",
        "_run.convert",
        "FOLDER STORE",
        {
            "Output": (
                Flag("image", str | None, "full-resolution image; default: the one in microscope_image"),
                Flag("bin_um", int | Sequence[int] | None, "sizes of bins to convert, µm; default: all"),
                Flag("dataset_id", str | None, "prefix of element names; default: that of the folder's files"),
                Flag("chunk_px", int, "side of the image's chunks, pixels", 1024),
                _BAR,
            )
        },
        examples=("convert sample/outs sample.zarr", "convert sample/outs sample.zarr --image he.tif --bin-um 2,8"),
        slides_help="Space Ranger's output folder, and the store to make",
        n_slides=(2, 2),
        resume="No store was made. The same command starts anew.",
    ),
    Command(
        "info",
        "say what a store, a checkpoint or a Space Ranger folder holds",
        "_info.info",
        "PATH",
        {"Prediction": (Flag("model", str | None, "model to estimate a gene map for; default: the slide's"), *_IMAGE)},
        examples=("info slide.zarr --model models/breast --mpp 0.5", "info models/breast"),
        slides_help="store, checkpoint or Space Ranger folder",
    ),
    Command(
        "demo",
        "draw a slide, fit, predict and score it against the known truth",
        "_demo.demo",
        "",
        {
            "Demo": (
                Flag("size_um", float, "side of the slide, µm", 1000.0),
                Flag("epochs", int, "training epochs", 24),
                Flag("seed", int, "another seed draws other tissue", 0),
                Flag("min_pcc", float, "mean correlation with the truth below which the demo fails", 0.6),
                Flag("output", str, "folder of slide, model and picture, which it replaces", "demo_output"),
            )
        },
        examples=("demo --seed 1 --epochs 40 --output demo_1",),
        n_slides=(0, 0),
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
"""All subcommands by name."""
