"""The one table of arguments: a rule for every name, and for a name in one verb where it means something else there.

Whether None is taken follows from the signature. What needs the slide, the model or another argument to be judged is
checked by the verb, before its first slow step.

The door of a public verb: what comes in is what its rules read, or an error that names the argument.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pixnet_sd.errors import CheckpointError, DataError, PixNetError, ResolutionError, StoreError
from pixnet_sd.geometry import STRIDES

from ._objects import (
    axes,
    colour_limit,
    colour_map,
    figure_file,
    folder,
    frames,
    hub_name,
    instance,
    keywords,
    mapping,
    path,
    slides,
    texts_by_name,
)
from ._rules import (
    Rule,
    Unfit,
    choice,
    each,
    either,
    element_name,
    flag,
    names,
    number,
    optional,
    raising,
    shown,
    text,
    whole,
)

__all__ = ["check_fields", "checked", "rule_of"]

_MOST = 2**63 - 1  # what a tensor and a file of settings can hold
_MOST_GENES = 1_000_000  # more than any genome has
_MOST_AT_ONCE = 2**16
_LARGEST_SIDE_UM = 100_000  # of a drawn slide: no glass is longer

_FLAG = flag()
_UM = number(above=0, unit="µm")
_KEY = text("the name of an element")
_TILE = whole(2 * STRIDES[-1], 2**20, multiple=STRIDES[-1])
_SHARE = number(above=0, below=1)
_SDATA = instance("spatialdata.SpatialData", "a SpatialData object, as pixnet_sd.io.open_store(path) gives it")
_MODEL = either(
    instance("pixnet_sd.model._checkpoint.PixNet", "a PixNet"), path("the folder that fit left", exists=True)
)
_DRAWN_BIN = choice(2, 4, 8, 16)
_PANEL = choice("image", "measured", "predicted")
_BOX_UM = each(number(), "(x0, y0, x1, y1) in µm, with x0 < x1 and y0 < y1", n=4, ordered=True)
_FOLDER = path("the path of a folder")
_PATTERNS = names("patterns")
_LICENSE = text("a licence")
_CARD = ("repo_id", "license", "license_name", "license_link", "datasets", "language")


def _group(name: str) -> Rule:
    """Parameters in a group, or a mapping of its fields; the group checks them itself."""
    return either(instance(f"pixnet_sd.params.{name}", f"a {name}"), mapping("a dictionary of its fields"))


_RULES: dict[str, Rule] = {
    # the object and what is in it
    "sdata": _SDATA,
    "sdatas": slides(_SDATA),
    "image_key": _KEY,
    "shapes_key": _KEY,
    "table_key": names("names of tables"),
    "score_table_key": names("names of tables"),
    "predicted_key": _KEY,
    "coordinate_system": text("the name of a coordinate system"),
    "mpp": raising(ResolutionError, either(number(above=0, unit="µm per pixel"), choice("coordinate_system"))),
    "allow_any_mpp": _FLAG,
    "allow_poor_model": _FLAG,
    "genes": raising(DataError, names("names of genes")),
    "gene": text("the name of a gene"),
    # the model and its training
    "model": raising(CheckpointError, _MODEL),
    "n_genes": raising(DataError, whole(1, _MOST_GENES)),
    "target_sum": number(above=0),
    "encoder": text("the name of a timm model", empty=False),
    "encoder_weights": path("'imagenet' or the path of a file"),
    "freeze_encoder": _FLAG,
    "decoder_width": whole(1, _MOST_AT_ONCE),
    "working_mpp": raising(ResolutionError, number(above=0, unit="µm per pixel")),
    "objective": choice("mse_pcc", "poisson", "nb"),
    "aggregation": choice("mean", "sum"),
    "pcc_weight": number(low=0),
    "decoder": choice("laterals", "paper"),
    "optimizer": choice("adamw", "adam"),
    "anneal": _FLAG,
    "keep_best": _FLAG,
    "stain_jitter": number(low=0, high=1),
    "model_params": _group("ModelParams"),
    "train_params": _group("TrainParams"),
    "predict_params": _group("PredictParams"),
    "fit.genes": raising(DataError, either(whole(1, _MOST_GENES), choice("all"), names("names of genes"))),
    "max_epochs": whole(1, _MOST),
    "max_steps": whole(1, _MOST),
    "lr": number(above=0),
    "weight_decay": number(low=0),
    "tile_px": _TILE,
    "batch_size": whole(1, _MOST_AT_ONCE),
    "validation": optional(either(_SHARE, names("names of slides"))),
    "patience": whole(1, _MOST),
    "compile": _FLAG,
    "device": either(instance("torch.device", "a torch.device"), text("'cpu', 'cuda', 'cuda:1' or 'mps'", empty=False)),
    "seed": whole(0, _MOST),
    "checkpoint_dir": folder("a folder that can be made or written", CheckpointError),
    "record_model": _FLAG,
    "show_progress_bar": _FLAG,
    # cross-validation
    "groups": texts_by_name("a group for each slide, {name: group}"),
    "folds": names("names of folds"),
    "predict_tile_px": _TILE,
    # prediction
    "radius_um": _UM,
    "spacing_um": _UM,
    "bin_um": _UM,
    "map_um": _UM,
    "n_symmetries": choice(1, 4, 8),
    "key_added": raising(StoreError, element_name("the first part of names")),
    "overwrite": _FLAG,
    "write": choice("map", "factors"),
    # what a table or a plot of one means by it
    "fit.sdata": slides(_SDATA),
    "training_regions.sdata": slides(_SDATA),
    "cross_validate.validation": optional(_SHARE),
    "evaluate.table_key": _KEY,
    "evaluation.table_key": _KEY,
    "gene_map.table_key": _KEY,
    # plots
    "evaluation": frames("pcc", "what tl.evaluate returns, or several of these by name"),
    "panels": either(_PANEL, each(_PANEL, "a list of these")),
    "crop_um": _BOX_UM,
    "scale": text("a level of the map"),
    "alpha": number(above=0, high=1),
    "cmap": colour_map(),
    "vmin": colour_limit(),
    "vmax": colour_limit(),
    "shared_limits": _FLAG,
    "scalebar": _FLAG,
    "colorbar_loc": choice("right"),
    "keys": names("names of columns"),
    "n_labels": whole(0, _MOST_AT_ONCE),
    "figsize": each(number(above=0, high=400), "width and height in inches, two positive numbers up to 400", n=2),
    "dpi": number(above=0, high=10_000),
    "ax": axes(),
    "show": _FLAG,
    "save": figure_file(),
    "return_fig": _FLAG,
    # stores and Space Ranger's folders
    "path": _FOLDER,
    "open_store.path": path("the folder that sdata.write(...) made", exists=True),
    "her2st.path": path("the folder that holds the sections", exists=True),
    "visium_hd_truth.path": path("a folder that datasets.write_visium_hd wrote", exists=True),
    "folder": _FOLDER,
    "store": _FOLDER,
    "image": path("the path of an image"),
    "chunk_px": raising(StoreError, whole(64, 2**14)),
    "convert_visium_hd.dataset_id": text("a prefix of names"),
    "convert_visium_hd.bin_um": either(whole(1, 10_000), each(whole(1, 10_000), "sizes of bins in whole µm")),
    # drawn slides
    "size_um": number(low=100, high=_LARGEST_SIDE_UM, unit="µm"),
    "dataset_id": element_name("a prefix of names", empty=True),
    "cells": _FLAG,
    "library_size": _FLAG,
    "pitch_um": _UM,
    "window_um": _BOX_UM,
    "n_workers": whole(1, 1024),
    "sections": names("names of sections", one=False),
    "visium_hd_truth.genes": names("names of genes", one=False),
    "sample_truth_bins.bin_um": _DRAWN_BIN,
    # models in folders and on the hub
    "directory": _FOLDER,
    "load.directory": path("the folder that fit left", exists=True),
    "save_directory": _FOLDER,
    "pretrained_model_name_or_path": hub_name("a folder, or 'owner/name' on the hub"),
    "cache_dir": _FOLDER,
    "revision": text("a branch, tag or commit", empty=False),
    "token": either(_FLAG, text("a token", empty=False)),
    "force_download": _FLAG,
    "local_files_only": _FLAG,
    "repo_id": text("'owner/name'", empty=False),
    "push_to_hub": _FLAG,
    "model_card_kwargs": keywords(*_CARD),
    "license": _LICENSE,
    "license_name": _LICENSE,
    "license_link": text("a link"),
    "datasets": names("data sets"),
    "language": names("languages"),
    "private": _FLAG,
    "branch": text("a branch", empty=False),
    "create_pr": _FLAG,
    "commit_message": text("a message"),
    "allow_patterns": _PATTERNS,
    "ignore_patterns": _PATTERNS,
    "delete_patterns": _PATTERNS,
}

_DRAWN = {
    "mpp": number(low=0.1, high=2, unit="µm per pixel"),
    "bin_um": each(_DRAWN_BIN, "one or more of 2, 4, 8 and 16, in a list"),
}
for _verb in ("sample", "sample_truth", "sample_truth_bins", "write_visium", "write_visium_hd"):
    _RULES = {f"{_verb}.{_name}": _rule for _name, _rule in _DRAWN.items()} | _RULES


def rule_of(verb: str, argument: str) -> Rule | None:
    """Rule of an argument of a verb; None if there is none."""
    return _RULES.get(f"{verb}.{argument}", _RULES.get(argument))


P = ParamSpec("P")
R = TypeVar("R")


def checked(
    error: type[PixNetError] = PixNetError, *, options_of: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a verb by the table, before it runs.

    Only what a call gives is checked, and handed on as the rule reads it: a NumPy scalar as a number of Python's, an
    index of genes as a list. Signature and docstring stay those of the verb.

    Parameters
    ----------
    error
        What is raised for arguments whose rule names nothing else.
    options_of
        What the verb passes its further keyword arguments to. It says itself which ones it does not know.

    Raises
    ------
    TypeError
        An argument has no rule.
    """

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(verb)
        rules = {p.name: _rule(verb.__name__, p) for p in _own(signature)}
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        further = {} if options_of is None else _further(verb.__name__, options_of)

        @functools.wraps(verb)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # Python says better what is missing or unknown
                return verb(*args, **kwargs)
            given = bound.arguments
            if rest in given:
                given[rest] = _read_all(further, given[rest], error)
            given |= _read_all(rules, {name: value for name, value in given.items() if name in rules}, error)
            return verb(*bound.args, **bound.kwargs)

        return door

    return decorate


def check_fields(group: Any) -> dict[str, Any]:
    """Read the fields of a dataclass by the table, as :func:`checked` reads arguments."""
    owner = type(group).__name__
    rules = {}
    for field in dataclasses.fields(group):
        rule = rule_of(owner, field.name)
        if rule is None:
            raise TypeError(f"{owner}: the field {field.name!r} has no rule in pixnet_sd._arguments.")
        rules[field.name] = optional(rule) if "None" in str(field.type) else rule
    return _read_all(rules, {name: getattr(group, name) for name in rules}, PixNetError)


def _own(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Parameters that are named."""
    return [p for p in signature.parameters.values() if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]


def _further(verb: str, passed_to: Callable[..., Any]) -> dict[str, Rule]:
    """Rules of what is passed on; of another package's function those that there are."""
    own = _own(inspect.signature(passed_to))
    return {p.name: _rule(verb, p) for p in own if rule_of(verb, p.name) is not None}


def _rule(verb: str, parameter: inspect.Parameter) -> Rule:
    rule = rule_of(verb, parameter.name)
    if rule is None:
        raise TypeError(f"{verb}: the argument {parameter.name!r} has no rule in pixnet_sd._arguments.")
    takes_none = parameter.default is None or re.search(r"\bNone\b", str(parameter.annotation))
    return optional(rule) if takes_none else rule


def _read_all(rules: dict[str, Rule], given: dict[str, Any], error: type[PixNetError]) -> dict[str, Any]:
    return {k: _read(rules[k], k, value, error) if k in rules else value for k, value in given.items()}


def _read(rule: Rule, name: str, value: Any, error: type[PixNetError]) -> Any:
    try:
        return rule.read(value)
    except Unfit as unfit:
        why = f" ({unfit})" if str(unfit) else ""
        raise (rule.error or error)(f"{name}={shown(value)}: give {rule.needed}{why}.") from None
