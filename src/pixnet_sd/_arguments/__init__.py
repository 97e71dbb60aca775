"""Type and range of every argument of every public verb, checked before a verb does anything.

Here are the one table of rules, for every name, and for ``verb.name`` where it means something else in a verb, and the
decorator that reads arguments by it: what comes in is what its rule reads, or an error that names the argument. Whether
None is taken follows from the signature. What needs the slide, the model or another argument to be judged is checked by
the verb, before its first slow step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from pixnet_sd._util import shown
from pixnet_sd.errors import CheckpointError, DataError, PixNetError, ResolutionError, StoreError

from . import _rules as r

__all__ = ["check_fields", "checked"]

P = ParamSpec("P")
R = TypeVar("R")

_COARSEST_STRIDE = 32  # that of `geometry.STRIDES`, which would load numpy for a --help
_MOST = 2**63 - 1  # what a tensor and a file of settings can hold
_MOST_AT_ONCE = 2**16


_SDATA = r.instance("spatialdata.SpatialData", "a SpatialData object, as pixnet_sd.io.open_store(path) gives it")
_SLIDES = r.either(
    _SDATA,
    r.mapping("", item=_SDATA, empty=False),
    needed=f"{_SDATA.needed}, or several by name, {{name: sdata}}",
)
_SCORES = r.where(
    r.instance("pandas.DataFrame", "what tl.evaluate returns, or several of these by name"),
    lambda frame: "pcc" in frame.columns and getattr(frame["pcc"].dtype, "kind", "O") in "fiu",
)
_MODEL = r.either(r.instance("pixnet_sd.model.PixNet", "a PixNet"), r.folder("the folder that fit left"))
_MPP = r.number("a positive number of µm per pixel", lambda x: x > 0)
_GENES = r.names("names of genes")
_N_GENES = r.whole(1, 1_000_000)  # more than any genome has
_BIN_UM = r.whole(1, 10_000)
_DRAWN_BIN = r.choice(2, 4, 8, 16)
_DRAWN_BINS = r.each(_DRAWN_BIN, "one or more of 2, 4, 8 and 16, in a list")
_DRAWN_MPP = r.number("a number of µm per pixel from 0.1 to 2", lambda x: 0.1 <= x <= 2)
_BOX_UM = r.where(
    r.each(r.number(), "(x0, y0, x1, y1) in µm, with x0 < x1 and y0 < y1", n=4),
    lambda box: box[0] < box[2] and box[1] < box[3],
)
_SIDE = r.number("", lambda x: 0 < x <= 400)
_DEVICE = r.either(
    r.instance("torch.device", "a torch.device"), r.text("'cpu', 'cuda', 'cuda:1' or 'mps'", empty=False)
)
_PANEL = r.choice("image", "measured", "predicted")
_DRAWING = ("sample", "sample_truth", "sample_truth_bins", "write_visium", "write_visium_hd")

_FIELDS = r.mapping("a dictionary of its fields")  # the group checks them itself
_GROUPS = (("ModelParams", "model_params"), ("TrainParams", "train_params"), ("PredictParams", "predict_params"))
_CARD = ("repo_id", "license", "license_name", "license_link", "datasets", "language")
_ONE_TABLE = "evaluate.table_key evaluation.table_key gene_map.table_key reliability.table_key"
_FLAGS = (
    "allow_any_mpp allow_poor_model anneal at_measured_depth cells compile create_pr force_download freeze_encoder "
    "keep_best library_size local_files_only overwrite private push_to_hub record_model return_fig scalebar "
    "shared_limits show show_progress_bar"
)

_TABLE: list[tuple[r.Rule, str]] = [
    (r.flag(), _FLAGS),
    # the object and what is in it
    (_SDATA, "sdata"),
    (_SLIDES, "sdatas fit.sdata training_regions.sdata"),
    (r.text("the name of an element"), f"image_key shapes_key predicted_key {_ONE_TABLE}"),
    (r.names("names of tables"), "table_key score_table_key"),
    (r.text("the name of a coordinate system"), "coordinate_system"),
    (r.raising(ResolutionError, r.either(_MPP, r.choice("coordinate_system"))), "mpp"),
    (r.raising(DataError, _GENES), "genes"),
    (r.raising(DataError, r.either(_N_GENES, r.choice("all"), _GENES)), "fit.genes"),
    (r.text("the name of a gene"), "gene"),
    # the model and its training
    *((r.either(r.instance(f"pixnet_sd.params.{group}", f"a {group}"), _FIELDS), name) for group, name in _GROUPS),
    (r.raising(CheckpointError, _MODEL), "model"),
    (r.number("a positive number", lambda x: x > 0), "lr target_sum"),
    (r.number("a number from 0 on", lambda x: x >= 0), "pcc_weight weight_decay"),
    (r.number("a number from 0 to 1", lambda x: 0 <= x <= 1), "stain_jitter"),
    (r.text("the name of a timm model", empty=False), "encoder"),
    (r.path("'imagenet' or the path of a file"), "encoder_weights"),
    (r.raising(ResolutionError, _MPP), "working_mpp"),
    (r.choice("nb_pcc", "mse_pcc"), "objective"),
    (r.choice("mean", "sum"), "aggregation"),
    (r.choice("laterals", "paper"), "decoder"),
    (r.choice("adamw", "adam"), "optimizer"),
    (r.whole(1, _MOST), "max_epochs max_steps patience"),
    (r.raising(DataError, _N_GENES), "n_genes"),
    (r.whole(1, _MOST_AT_ONCE), "batch_size decoder_width"),
    (r.whole(2 * _COARSEST_STRIDE, 2**20, multiple=_COARSEST_STRIDE), "tile_px predict_tile_px"),
    (r.either(r.number("a number between 0 and 1", lambda x: 0 < x < 1), r.names("names of slides")), "validation"),
    (_DEVICE, "device"),
    (r.whole(0, _MOST), "seed"),
    (r.raising(CheckpointError, r.new_folder("a folder that can be made or written")), "checkpoint_dir"),
    (r.mapping("a group for each slide, {name: group}", item=r.text()), "groups"),
    (r.names("names of folds"), "folds"),
    (r.mapping("a dictionary with arguments of fit"), "fit_params"),
    # prediction
    (r.number("a positive number of µm", lambda x: x > 0), "radius_um spacing_um bin_um map_um pitch_um"),
    (r.choice(1, 4, 8), "n_symmetries"),
    (r.choice("map", "factors"), "write"),
    (r.choice("mean", "sd"), "what"),
    (r.number("a number from 0.5 to 0.99", lambda x: 0.5 <= x <= 0.99), "interval"),
    (r.raising(StoreError, r.element_name("the first part of names")), "key_added"),
    # plots
    (r.either(_SCORES, r.mapping("", item=_SCORES, keys=object, empty=False), needed=_SCORES.needed), "evaluation"),
    (r.either(_PANEL, r.each(_PANEL, "a list of these")), "panels"),
    (_BOX_UM, "crop_um window_um"),
    (r.text("a level of the map"), "scale"),
    (r.number("a number above 0, at most 1", lambda x: 0 < x <= 1), "alpha"),
    (r.number("a number above 0, at most 10,000", lambda x: 0 < x <= 10_000), "dpi"),
    (r.colour_map(), "cmap"),
    (r.colour_limit(), "vmin vmax"),
    (r.choice("right"), "colorbar_loc"),
    (r.names("names of columns"), "keys"),
    (r.whole(0, _MOST_AT_ONCE), "n_labels"),
    (r.each(_SIDE, "width and height in inches, two positive numbers up to 400", n=2), "figsize"),
    (r.axes(), "ax"),
    (r.figure_file(), "save"),
    # stores, Space Ranger's folders and drawn slides
    (r.path("the path of a folder"), "path folder store directory save_directory cache_dir"),
    (r.folder("the folder that sdata.write(...) made"), "open_store.path"),
    (r.folder("the folder that holds the sections"), "her2st.path"),
    (r.folder("a folder that datasets.write_visium_hd wrote"), "visium_hd_truth.path"),
    (r.path("the path of an image"), "image"),
    (r.raising(StoreError, r.whole(64, 2**14)), "chunk_px"),
    (r.text("a prefix of names"), "convert_visium_hd.dataset_id"),
    (r.either(_BIN_UM, r.each(_BIN_UM, "sizes of bins in whole µm")), "convert_visium_hd.bin_um"),
    (r.number("a number of µm from 100 to 100,000", lambda x: 100 <= x <= 100_000), "size_um"),  # no glass is longer
    (r.element_name("a prefix of names", empty=True), "dataset_id"),
    (r.whole(1, 1024), "n_workers"),
    (r.names("names of sections", one=False), "sections"),
    (r.names("names of genes", one=False), "visium_hd_truth.genes"),
    (_DRAWN_MPP, " ".join(f"{verb}.mpp" for verb in _DRAWING)),
    (_DRAWN_BINS, " ".join(f"{verb}.bin_um" for verb in _DRAWING)),
    (_DRAWN_BIN, "sample_truth_bins.bin_um"),
    # models in folders and on the hub
    (r.folder("the folder that fit left"), "load.directory"),
    (r.hub_name("a folder, or 'owner/name' on the hub"), "pretrained_model_name_or_path"),
    (r.text("a branch, tag or commit", empty=False), "revision branch"),
    (r.either(r.flag(), r.text("a token", empty=False)), "token"),
    (r.text("'owner/name'", empty=False), "repo_id"),
    (r.mapping("a dictionary of fields of the model card", known=_CARD), "model_card_kwargs"),
    (r.text("a licence"), "license license_name license_link"),
    (r.names("names"), "datasets language"),
    (r.text("a message"), "commit_message"),
    (r.names("patterns"), "allow_patterns ignore_patterns delete_patterns"),
]

_RULES = {name: rule for rule, names in _TABLE for name in names.split()}


def checked(
    error: type[PixNetError] = PixNetError, *, options_of: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check what a call gives a verb, raising `error` where the rule names no other; TypeError if one has no rule.

    ``options_of`` is what the verb passes further keyword arguments to; it says itself which ones it does not know.
    """

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(verb), verb.__name__
        rules = _rules(name, _named(signature))
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        passed_on = {} if options_of is None else _named(inspect.signature(options_of))
        further = _rules(name, {key: text for key, text in passed_on.items() if key in _RULES})

        @functools.wraps(verb)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # Python says better what is missing or unknown
                return verb(*args, **kwargs)
            given = bound.arguments
            if rest in given:
                given[rest] = _read_all(further, given[rest], error)
            given |= _read_all(rules, given, error)
            return verb(*bound.args, **bound.kwargs)

        return door

    return decorate


def check_fields(group: Any) -> dict[str, Any]:
    """Read the fields of a dataclass by the table, as :func:`checked` reads arguments."""
    rules = _rules(type(group).__name__, {f.name: str(f.type) for f in dataclasses.fields(group)})
    return _read_all(rules, {name: getattr(group, name) for name in rules}, PixNetError)


def _named(signature: inspect.Signature) -> dict[str, str]:
    """Annotations of the parameters that have a name, ``None`` added where it is the default."""
    every = [p for p in signature.parameters.values() if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]
    return {p.name: f"{p.annotation} {p.default if p.default is None else ''}" for p in every}


def _rules(owner: str, annotations: Mapping[str, str]) -> dict[str, r.Rule]:
    rules = {}
    for name, annotation in annotations.items():
        rule = _RULES.get(f"{owner}.{name}", _RULES.get(name))
        if rule is None:
            raise TypeError(f"{owner}: the argument {name!r} has no rule in pixnet_sd._arguments.")
        rules[name] = r.optional(rule) if re.search(r"\bNone\b", annotation) else rule
    return rules


def _read_all(rules: Mapping[str, r.Rule], given: Mapping[str, Any], error: type[PixNetError]) -> dict[str, Any]:
    plain = dict(given)
    for name, rule in ((name, rules[name]) for name in given if name in rules):
        try:
            plain[name] = rule.read(given[name])
        except r.Unfit as unfit:
            why = f" ({unfit})" if str(unfit) else ""
            message = f"{name}={shown(given[name])}: give {rule.needed}{why}."
            raise (rule.error or error)(message, argument=name) from None
    return plain
