"""Leave slides out in turn: train without them, predict, score; a fold's scores are kept beside its model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._files import read_regular, replace_file
from pixnet_sd._fingerprint import fingerprint
from pixnet_sd._schemas import ScoresSchema, parse_json, what_is_wrong
from pixnet_sd._util import logger
from pixnet_sd.errors import CheckpointError, DataError, ElementError, PixNetError
from pixnet_sd.model import PixNet, dispersion_of
from pixnet_sd.params import PredictParams, TrainParams
from pixnet_sd.slide import Slide, open_slide
from pixnet_sd.slide.elements import tables_of
from pixnet_sd.slide.tables import Measured, checked_totals, measured, measured_regions, select_tables

from ._checks import model_parts, models_folder, pixels_of, slide_parts
from ._evaluate import METRICS, Matched, Noise, pooled, summary
from ._fit import fit
from ._predict import predict_regions
from ._regions import region_parts

FoldScores: TypeAlias = dict[tuple[str, str], pd.DataFrame]  # `Matched.moments`, by slide and table

_FOLDER_NAME = re.compile(r"[\w.-]+")
_MOST_ROWS = 500_000
_FILE, _MOST_BYTES = "scores.json", 1 << 29


@dataclass(frozen=True)
class CrossValidation:
    """What :func:`cross_validate` found.

    Attributes
    ----------
    per_gene
        One row a gene, table and left-out slide: ``fold``, ``slide``, ``table``, ``gene``, ``n_regions``, ``pcc``,
        ``mse``, ``mae``, ``coverage``, as of :func:`evaluate`.
    per_slide
        One row a table and left-out slide: ``MSE``, ``MAE``, ``PCC@F``, ``PCC@S``, ``PCC@M`` (first quartile, median
        and mean over genes), of a model of counts ``coverage``, ``n_regions``, ``n_genes``.
    summary
        Two rows a table, ``how`` they came about: ``"mean per slide"``, the mean of the rows of `per_slide`, and
        ``"pooled"``, the regions of all slides scored together over the genes that every fold has.
    folders
        Checkpoint folder of each fold's model, by fold.
    """

    per_gene: pd.DataFrame
    per_slide: pd.DataFrame
    summary: pd.DataFrame
    folders: dict[str, Path]


@checked()
def cross_validate(  # noqa: PLR0913
    sdatas: Mapping[str, SpatialData],
    *,
    groups: Mapping[str, str] | None = None,
    folds: Sequence[str] | None = None,
    score_table_key: str | Sequence[str] | None = None,
    n_symmetries: Literal[1, 4, 8] = 1,
    predict_tile_px: int | None = None,
    fit_params: Mapping[str, Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> CrossValidation:
    """Train without each slide in turn, and score the predictions for it.

    Genes, and the number of epochs where `validation` decides it, are chosen on the training slides of a fold alone;
    `fit` never sees what is left out. The same call goes on where it was cut off, and takes finished folds as they
    are. Slides and their stores are not changed.

    Parameters
    ----------
    sdatas
        Slides by name, two or more, each with image and counts.
    groups
        Group of each slide, such as the patient: the slides of a group are left out together. Default: every slide is
        its own group. A fold is called after the group that it leaves out.
    folds
        Folds to run, for instance one in each job of an array; default: all. The call for all of them takes those that
        jobs have finished as they are.
    score_table_key
        Tables to score; default: those that are trained on and have at most 500,000 rows.
    n_symmetries
        As in :class:`~pixnet_sd.PredictParams`.
    predict_tile_px
        Side of a tile at prediction, as `tile_px` of :class:`~pixnet_sd.PredictParams`.
    fit_params
        Arguments of :func:`fit` by name, such as ``{"genes": 500, "validation": None}``, but for the slides,
        `checkpoint_dir`, `record_model` and `show_progress_bar`. `validation` has to be a share of each training slide,
        or None.
    checkpoint_dir
        Folder with a folder per fold, which holds the fold's model and scores; when all folds are done also
        ``per_gene.csv``, ``per_slide.csv`` and ``summary.csv``. Default:
        ``pixnet_sd_models/cross_validation_<hash of the options>`` beside the (first) backed store, else in the working
        directory.
    show_progress_bar
        Show a bar over epochs and tiles; where nobody watches, lines in the log.

    Returns
    -------
    Scores by gene, by slide, and over all slides.

    Raises
    ------
    PixNetError
        One slide or one group only, or `fit_params` that cannot be.
    CheckpointError
        A fold's folder holds a model of other options or data.
    ElementError, ResolutionError, DataError, StoreError
        As :func:`fit` and :func:`predict`.
    """
    if isinstance(sdatas, SpatialData) or len(sdatas) == 1:
        raise PixNetError(
            "cross_validate leaves whole slides out, and sdatas= has one. Give it two or more, {name: sdata, ...}; "
            "with one slide, fit(sdata, validation=0.2) holds out blocks of it and reports their PCC."
        )
    slides, options = dict(sdatas), dict(fit_params or {})
    members = _folds(slides, groups)
    chosen = list(members) if folds is None else [folds] if isinstance(folds, str) else list(dict.fromkeys(folds))
    if any(fold not in members for fold in chosen):
        raise PixNetError(f"folds={chosen}: folds are called after what they leave out, {list(members)}.")
    params = PredictParams(n_symmetries=n_symmetries, tile_px=predict_tile_px)
    where, table_key, device = _shared_with_fit(**options)
    key, is_named = (table_key, False) if score_table_key is None else (score_table_key, True)
    tables = [key] if isinstance(key, str) else key if key is None else list(key)
    prediction = {"params": params, "device": device, "show_progress_bar": show_progress_bar}
    scoring = _Scoring(where, tables, is_named, prediction)
    scoring.check(slides)
    text = json.dumps([members, dict(sorted(options.items()))], default=str)
    own = models_folder(slides.values()) / f"cross_validation_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    directory = own if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
    scores = {}
    for k, fold in enumerate(chosen, start=1):
        training = {name: sdata for name, sdata in slides.items() if name not in members[fold]}
        left_out = {name: slides[name] for name in members[fold]}
        logger.info("fold %d of %d, %s left out: training on %s", k, len(chosen), [*left_out], [*training])
        options |= {"checkpoint_dir": directory / fold, "record_model": False, "show_progress_bar": show_progress_bar}
        model = fit(training, **options)
        scores[fold] = _fold_scores(model, left_out, scoring, directory / fold)
    result = _result(scores, {fold: directory / fold for fold in chosen})
    if set(chosen) == set(members):
        for name in ("per_gene", "per_slide", "summary"):
            with _written(directory / f"{name}.csv") as aside:
                getattr(result, name).to_csv(aside, index=False)
        logger.info("scores of %d folds in %s", len(result.folders), directory)
    return result


@checked()
def _shared_with_fit(
    *,
    image_key: str | None = None,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    device: str | torch.device | None = None,
    validation: float | Sequence[str] | None = 0.1,
    train_params: TrainParams | Mapping[str, Any] | None = None,
    **others: Any,
) -> tuple[dict[str, Any], str | Sequence[str] | None, str | torch.device | None]:
    """Pick the arguments of `fit` by which left-out slides are opened and predicted, and refuse those set here."""
    refused = [name for name in ("sdata", "checkpoint_dir", "record_model", "show_progress_bar") if name in others]
    if refused:
        raise PixNetError(f"fit_params={refused}: cross_validate sets these for each fold. Leave them out.")
    if not (validation is None or isinstance(validation, int | float)):
        raise PixNetError(f"fit_params: validation={validation!r}: give a share of each training slide, or None.")
    allow_any_mpp = TrainParams.read(train_params).allow_any_mpp
    where = {"image_key": image_key, "coordinate_system": coordinate_system, "mpp": mpp, "allow_any_mpp": allow_any_mpp}
    return where, table_key, device


def _folds(slides: Mapping[str, SpatialData], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    """List the slides that each fold leaves out."""
    group_of = {name: name for name in slides} if groups is None else groups
    missing, unknown = set(slides) - set(group_of), set(group_of) - set(slides)
    if missing or unknown:
        raise PixNetError(f"groups= lacks slides {sorted(missing)} and names {sorted(unknown)}, which are none.")
    members: dict[str, list[str]] = {}
    for name in slides:
        members.setdefault(group_of[name], []).append(name)
    if len(members) == 1:
        only = next(iter(members))
        raise PixNetError(f"groups=: all slides are in group {only!r}, and none would be left to train on.")
    bad = [fold for fold in members if not _FOLDER_NAME.fullmatch(fold) or fold.strip(".") == ""]
    if bad:
        raise PixNetError(f"Folds become folders, and {bad} cannot: use letters, digits, '_', '-' and '.' in names.")
    return members


@dataclass(frozen=True)
class _Scoring:
    """How left-out slides are opened, predicted and scored."""

    where: dict[str, Any]  # arguments of `fit` by which image and resolution are found
    tables: list[str] | None  # to score; None: found on each slide
    is_named: bool  # by `score_table_key`; else they are those that are trained on
    prediction: dict[str, Any]  # options of `predict_regions`

    def check(self, slides: Mapping[str, SpatialData]) -> None:
        """Find out before hours of training whether every slide can be scored."""
        for name, sdata in slides.items():
            missing = [key for key in self.tables or [] if key not in tables_of(sdata)]
            if missing and self.is_named:
                raise ElementError(f"score_table_key={missing}: slide {name!r} has only {list(tables_of(sdata))}.")
            self.open(sdata, 1.0)  # any resolution: nothing is read

    def open(self, sdata: SpatialData, working_mpp: float) -> tuple[Slide, list[str]]:
        """Find the image of a slide, and the tables to score."""
        regions = measured_regions(sdata, self.tables)
        slide = open_slide(sdata, working_mpp=working_mpp, region_keys=regions, **self.where)
        place = {"coordinate_system": slide.coordinate_system, "image_key": slide.image_key}
        keys = select_tables(sdata, table_key=self.tables, **place)
        if self.is_named:
            return slide, keys
        n_rows = {key: tables_of(sdata)[key].n_obs for key in keys}
        few = [key for key in keys if n_rows[key] <= _MOST_ROWS] or [min(keys, key=lambda key: n_rows[key])]
        if len(few) < len(keys):
            many = ", ".join(key for key in keys if key not in few)
            logger.info("not scored for their many rows, unless named in score_table_key=: %s", many)
        return slide, few

    def moments(self, model: PixNet, slide: Slide, table: Measured) -> pd.DataFrame:
        """Predict the regions of a table, and compute what their scores are made of; a poor model's scores say it."""
        predicted = predict_regions(model, slide, table.regions, **self.prediction)
        total = checked_totals(table.counts, table.var_names, table.what)
        genes = pd.Index(model.genes)
        shared = genes[genes.isin(table.var_names)]
        keep = (total > 0) & ~np.isnan(predicted).all(axis=1)  # NaN: no tissue
        if not len(shared) or not keep.any():
            raise DataError(f"{table.what} has {int(keep.sum())} regions with counts and {len(shared)} genes to score.")
        rows, counts = np.flatnonzero(keep), table.counts.take(keep)
        columns, positions = genes.get_indexer(shared), table.var_names.get_indexer(shared)
        target_sum = model.record.target_sum
        noise, dispersion = None, dispersion_of(model)
        if dispersion is not None:
            areas = table.regions.subset(rows).area * model.record.working_mpp**2
            noise = Noise(areas, dispersion.of(columns))
        return Matched(shared, predicted, rows, columns, counts, positions, total[keep], target_sum, noise).moments()


def _fold_scores(model: PixNet, left_out: Mapping[str, SpatialData], scoring: _Scoring, folder: Path) -> FoldScores:
    """Take the scores in a fold's folder, if they are of this model and these slides, or make them."""
    tables: dict[tuple[str, str], tuple[Slide, Measured]] = {}
    parts: dict[str, Any] = {}
    for name, sdata in left_out.items():
        slide, keys = scoring.open(sdata, model.record.working_mpp)
        parts[name] = slide_parts(slide, pixels_of(sdata, slide))
        for table in measured(sdata, slide, table_key=keys):
            counts = {"counts": table.content_key(table.var_names)}
            parts[name][table.table_key] = region_parts(table.regions, table.instances) | counts
            tables[name, table.table_key] = slide, table
    how = {"tables": scoring.tables, "named": scoring.is_named, **asdict(scoring.prediction["params"])}
    identity = {"fingerprint": fingerprint({"model": model_parts(model), "slides": parts, "how": how})}
    scores = read_scores(folder, identity)
    if scores is None:
        scores = {key: scoring.moments(model, *of_table) for key, of_table in tables.items()}
        write_scores(folder, identity, scores)
    else:
        logger.info("scores taken from %s", folder)
    return scores


def write_scores(folder: Path, identity: Mapping[str, Any], scores: FoldScores) -> None:
    """Write the scores of a fold, whole or not at all, with what they depend on."""
    tables = [
        {"slide": slide, "table": table, "genes": list(frame.index), "moments": frame.to_dict(orient="list")}
        for (slide, table), frame in scores.items()
    ]
    content = {"identity": identity, "scores": tables}
    with _written(folder / _FILE) as aside:
        aside.write_text(json.dumps(content | {"sha256": _hash(content)}), encoding="utf-8")


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Replace a file of scores whole, or say that it cannot be."""
    try:
        with replace_file(path) as aside:
            yield aside
    except OSError as error:
        raise CheckpointError(
            f"Scores cannot be written to {str(path.parent)!r} ({error.strerror or error}). Free some disk and make "
            "the same call again: what was trained and scored is there."
        ) from error


def read_scores(folder: Path, identity: Mapping[str, Any]) -> FoldScores | None:
    """Read the scores of a fold; None where there are none, or they are damaged or of another identity."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        content = parse_json(read_regular(path, most_bytes=_MOST_BYTES), allow_nan=True)
        noted = ScoresSchema.model_validate(content).sha256
        if noted != _hash({name: content[name] for name in ("identity", "scores")}):
            raise ValueError("it is not as it was written")
    except ValueError as error:  # CheckpointError is one
        logger.warning("%s cannot be used, and is made anew: %s", path, what_is_wrong(error))
        return None
    if content["identity"] != identity:
        return None
    return {
        (table["slide"], table["table"]): pd.DataFrame(table["moments"], index=pd.Index(table["genes"], name="gene"))
        for table in content["scores"]
    }


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _result(scores: Mapping[str, FoldScores], folders: dict[str, Path]) -> CrossValidation:
    keys = [key for of_fold in scores.values() for key in of_fold]
    names = dict.fromkeys(table for _, table in keys)
    one_each = len(keys) == len({slide for slide, _ in keys})  # then all are scored together, else those of one name
    genes, slides = [], []
    parts: dict[str, list[tuple[pd.DataFrame, dict[str, Any]]]] = {}
    for fold, of_fold in scores.items():
        for (slide, table), of_regions in of_fold.items():
            of_genes, place = pooled([of_regions]), {"fold": fold, "slide": slide, "table": table}
            genes.append(of_genes.reset_index().assign(**place, n_regions=of_regions["n"].to_numpy()))
            n = {"n_regions": int(of_regions["n"].max()), "n_genes": len(of_regions)}
            slides.append(place | summary(of_genes) | n)
            parts.setdefault(", ".join(names) if one_each else table, []).append((of_regions, slides[-1]))
    rows = [row for group, of_group in parts.items() for row in _summary_rows(group, of_group)]
    columns = ["fold", "slide", "table", "gene", "n_regions", "pcc", "mse", "mae", "coverage"]
    per_gene = pd.concat(genes, ignore_index=True)[columns]
    return CrossValidation(per_gene, pd.DataFrame(slides), pd.DataFrame(rows), folders)


def _summary_rows(group: str, parts: Sequence[tuple[pd.DataFrame, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Average the scores of slides, and score their regions together."""
    each, together = pd.DataFrame([of_slide for _, of_slide in parts]), pooled([of_regions for of_regions, _ in parts])
    n = {"n_slides": len(each), "n_regions": int(each["n_regions"].sum())}
    # a slide without a score makes the mean unknown: leaving it out would flatter
    known = [*METRICS, *(["coverage"] if "coverage" in each else [])]
    mean = {name: float(each[name].mean(skipna=False)) for name in known}
    return [
        {"table": group, "how": "mean per slide", **mean, **n, "n_genes": float(each["n_genes"].mean())},
        {"table": group, "how": "pooled", **summary(together), **n, "n_genes": float(len(together))},
    ]
