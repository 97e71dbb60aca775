"""Scores of a fold, kept beside its model for calls that go on, and for the call that puts all folds together.

A left-out slide: predicted beside the user's object, which stays as it is, and scored.

Leave slides out in turn: train without them, predict them, score.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel

from pixnet_sd._arguments import checked
from pixnet_sd._files import read_regular, replace_file
from pixnet_sd._fingerprint import fingerprint
from pixnet_sd._schemas import ScoresSchema, parse_json, validated, what_is_wrong
from pixnet_sd._util import logger
from pixnet_sd.errors import CheckpointError, ElementError, PixNetError
from pixnet_sd.model import PixNet
from pixnet_sd.params import TrainParams
from pixnet_sd.slide import Slide, open_slide
from pixnet_sd.slide.elements import StoredShapes, TableLink, obs_column, obs_names, shapes_of, table_link, tables_of
from pixnet_sd.slide.tables import content_key, measured, measured_regions, select_tables

from ._checks import model_parts, pixels_of, slide_parts
from ._evaluate import METRICS, matched_values, merged, moments, pooled, summary
from ._fit import fit
from ._predict import predict
from ._regions import region_parts

__all__ = ["CrossValidation", "FoldScores", "LeftOut", "Scoring", "cross_validate", "read_scores", "write_scores"]

FoldScores: TypeAlias = dict[tuple[str, str], pd.DataFrame]
"""`moments` by slide and table."""

_FILE = "scores.json"
_MOST_BYTES = 1 << 29


def write_scores(folder: Path, identity: Mapping[str, Any], scores: FoldScores) -> None:
    """Write scores, whole or not at all.

    Parameters
    ----------
    folder
        Of the fold's model.
    identity
        What the scores depend on: `read_scores` gives them back for the same only.
    scores
        What to keep.

    Raises
    ------
    CheckpointError
        The folder cannot be written.
    """
    parts = [
        {"slide": slide, "table": table, "genes": list(part.index), "moments": part.to_dict(orient="list")}
        for (slide, table), part in scores.items()
    ]
    content = {"identity": identity, "scores": parts}
    try:
        with replace_file(folder / _FILE) as aside:
            aside.write_text(json.dumps(content | {"sha256": _hash(content)}), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"Scores cannot be written to {str(folder)!r} ({error.strerror or error}). Free some disk and make the "
            "same call again: the trained model is there."
        ) from error


def read_scores(folder: Path, identity: Mapping[str, Any]) -> FoldScores | None:
    """Scores that are there; None where there are none, or they are damaged or of another identity."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        found = parse_json(read_regular(path, most_bytes=_MOST_BYTES), allow_nan=True)
        if validated(ScoresSchema, found).sha256 != _hash({name: found[name] for name in ("identity", "scores")}):
            raise ValueError("it is not as it was written")
    except ValueError as error:  # CheckpointError is one
        logger.warning("%s cannot be used, and is made anew: %s", path, what_is_wrong(error))
        return None
    if found["identity"] != identity:
        return None
    return {(p["slide"], p["table"]): _frame(p) for p in found["scores"]}


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _frame(part: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(part["moments"], index=pd.Index(part["genes"], name="gene"))


_MOST_ROWS = 500_000
_LATTICE = ("array_row", "array_col")
_WHERE = ("image_key", "coordinate_system", "mpp")


@dataclass(frozen=True)
class Scoring:
    """How left-out slides are predicted and scored.

    Attributes
    ----------
    where
        Arguments of `fit` by which image and resolution are found.
    table_key
        Tables that are trained on, as given to `fit`.
    score_table_key
        Tables to score.
    n_symmetries, tile_px, device
        As of `predict`.
    show_progress_bar
        Show a bar.
    """

    where: dict[str, Any]
    table_key: str | Sequence[str] | None
    score_table_key: str | Sequence[str] | None
    n_symmetries: Literal[1, 4, 8]
    tile_px: int | None
    device: Any
    show_progress_bar: bool

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        score_table_key: str | Sequence[str] | None,
        n_symmetries: Literal[1, 4, 8],
        tile_px: int | None,
        show_progress_bar: bool,
    ) -> Scoring:
        """From the arguments of `cross_validate`, `options` being those of `fit`."""
        where = {name: options[name] for name in _WHERE if name in options}
        where["allow_any_mpp"] = TrainParams.read(options.get("train_params")).allow_any_mpp
        table_key, device = options.get("table_key"), options.get("device")
        return cls(where, table_key, score_table_key, n_symmetries, tile_px, device, show_progress_bar)

    def find(self, name: str, sdata: SpatialData, working_mpp: float) -> tuple[Slide, list[str]]:
        """Image of a slide, and the tables to score."""
        keys = self.score_table_key if self.score_table_key is not None else self.table_key
        regions = measured_regions(sdata, keys)
        slide = open_slide(sdata, working_mpp=working_mpp, name=name, region_keys=regions, **self.where)
        return slide, _tables(sdata, slide, self)

    def check(self, slides: Mapping[str, SpatialData]) -> None:
        """Find out before hours of training whether every slide can be scored.

        Raises
        ------
        PixNetError
            Saying what is missing.
        """
        wanted = self.score_table_key or []
        for name, sdata in slides.items():
            missing = [key for key in ([wanted] if isinstance(wanted, str) else wanted) if key not in tables_of(sdata)]
            if missing:
                there = ", ".join(map(repr, tables_of(sdata))) or "none"
                raise ElementError(f"score_table_key={missing}: slide {name!r} has no such table. Tables: {there}.")
            self.find(name, sdata, 1.0)  # any resolution: nothing is read

    def identity(self) -> dict[str, Any]:
        """What decides about scores besides model and slides."""
        tables = self.score_table_key if self.score_table_key is not None else self.table_key
        keys = [tables] if isinstance(tables, str) else tables
        return {
            "tables": None if keys is None else list(keys),
            "named": self.score_table_key is not None,
            "n_symmetries": self.n_symmetries,
            "tile_px": self.tile_px,
        }


@dataclass(frozen=True)
class LeftOut:
    """A slide, and the model that was trained without it.

    Attributes
    ----------
    sdata, slide
        The user's object, which is not changed, and its image.
    model
        The model.
    scoring
        How to score.
    tables
        Tables to score.
    """

    sdata: SpatialData
    slide: Slide
    model: PixNet
    scoring: Scoring
    tables: list[str]

    @classmethod
    def open(cls, name: str, sdata: SpatialData, model: PixNet, scoring: Scoring) -> LeftOut:
        """Find image and tables."""
        slide, tables = scoring.find(name, sdata, model.record.working_mpp)
        return cls(sdata, slide, model, scoring, tables)

    def parts(self) -> dict[str, Any]:
        """Parts of the scores' fingerprint: pixels, and regions and counts of each table."""
        parts: dict[str, Any] = slide_parts(self.slide, pixels_of(self.sdata, self.slide))
        for found in measured(self.sdata, self.slide, table_key=self.tables):
            counts = content_key(found, found.var_names)
            parts[found.table_key] = region_parts(found.regions, found.instances) | {"counts": counts}
        return parts

    def moments(self, table_key: str) -> pd.DataFrame:
        """Predict the regions of a table; what `pooled` needs of the result."""
        link = table_link(self.sdata, table_key=table_key, coordinate_system=self.slide.coordinate_system)
        beside = _beside(self.sdata, self.slide.image_key, link)
        predict(
            beside,
            self.model,
            shapes_key=link.element_key,
            image_key=self.slide.image_key,
            coordinate_system=self.slide.coordinate_system,
            mpp=self.slide.mpp,
            write=None,
            device=self.scoring.device,
            predict_params={
                "tile_px": self.scoring.tile_px,
                "n_symmetries": self.scoring.n_symmetries,
                "allow_any_mpp": True,  # was checked when the slide was opened
                "allow_poor_model": True,  # its scores say it
            },
            show_progress_bar=self.scoring.show_progress_bar,
        )
        key = f"pixnet_{link.element_key}"
        found = matched_values(self.sdata, table_key=table_key, predicted_key=key, predicted=beside.tables[key])
        return merged(moments(*block, found.genes) for block in found.blocks())


def _tables(sdata: SpatialData, slide: Slide, scoring: Scoring) -> list[str]:
    on_slide = partial(select_tables, sdata, coordinate_system=slide.coordinate_system, image_key=slide.image_key)
    if scoring.score_table_key is not None:
        return on_slide(table_key=scoring.score_table_key)
    found = on_slide(table_key=scoring.table_key)
    rows = {key: tables_of(sdata)[key].n_obs for key in found}
    few = [key for key in found if rows[key] <= _MOST_ROWS] or [min(found, key=lambda key: rows[key])]
    if len(few) < len(found):
        many = ", ".join(key for key in found if key not in few)
        logger.info("not scored for their many rows, unless named in score_table_key=: %s", many)
    return few


def _beside(sdata: SpatialData, image_key: str, link: TableLink) -> SpatialData:
    """An object in memory with the same image and regions, into which predictions can go."""
    shapes = {}
    for key, element in shapes_of(sdata).items():
        if isinstance(element, StoredShapes):
            shapes[key] = element.load() if key == link.element_key else element.sample
        else:
            shapes[key] = element
    return SpatialData(
        images={image_key: sdata.images[image_key]},
        labels=dict(sdata.labels),
        shapes=shapes,
        tables={link.table_key: _without_counts(sdata, link)},
    )


def _without_counts(sdata: SpatialData, link: TableLink) -> AnnData:
    """A table that tells which regions there are, and where on the lattice."""
    table = tables_of(sdata)[link.table_key]
    columns = {name: obs_column(table, name)[link.rows] for name in _LATTICE if name in obs_names(table)}
    obs = pd.DataFrame(columns).assign(region=pd.Categorical([link.element_key] * len(link.rows)))
    obs = obs.assign(instance=link.instances.to_numpy()).set_axis(obs.index.astype(str))
    bare = AnnData(sparse.csr_matrix((len(obs), 1), dtype="float32"), obs=obs)
    return TableModel.parse(bare, region=link.element_key, region_key="region", instance_key="instance")


_OWN = ("sdata", "checkpoint_dir", "record_model", "show_progress_bar")
"""Arguments of `fit` that are not passed through."""

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class CrossValidation:
    """What :func:`cross_validate` found.

    Attributes
    ----------
    per_gene
        One row a gene, table and left-out slide: ``fold``, ``slide``, ``table``, ``gene``, ``n_regions``, ``pcc``,
        ``mse``, ``mae``, as of :func:`evaluate`.
    per_slide
        One row a table and left-out slide: ``MSE``, ``MAE``, ``PCC@F``, ``PCC@S``, ``PCC@M`` (first quartile, median
        and mean over genes), ``n_regions``, ``n_genes``.
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


@checked(options_of=fit)
def cross_validate(
    sdatas: Mapping[str, SpatialData],
    *,
    groups: Mapping[str, str] | None = None,
    folds: Sequence[str] | None = None,
    score_table_key: str | Sequence[str] | None = None,
    n_symmetries: Literal[1, 4, 8] = 1,
    predict_tile_px: int | None = None,
    checkpoint_dir: str | Path | None = None,
    show_progress_bar: bool = True,
    **fit_options: Any,
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
        As in :func:`predict`.
    predict_tile_px
        Side of a tile at prediction, as `tile_px` of :func:`predict`.
    checkpoint_dir
        Folder with a folder per fold, which holds the fold's model and scores; when all folds are done also
        ``per_gene.csv``, ``per_slide.csv`` and ``summary.csv``. Default:
        ``pixnet_sd_models/cross_validation_<hash of the options>`` beside the (first) backed store, else in the working
        directory.
    show_progress_bar
        Show a bar over epochs and tiles; where nobody watches, lines in the log.
    fit_options
        As in :func:`fit`. `validation` has to be a share of each training slide, or None.

    Returns
    -------
    Scores by gene, by slide, and over all slides.

    Raises
    ------
    PixNetError
        One slide or one group only, or options that :func:`fit` does not have.
    CheckpointError
        A fold's folder holds a model of other options or data.
    ElementError, ResolutionError, DataError, StoreError
        As :func:`fit` and :func:`predict`.
    """
    slides = _several(sdatas)
    members = _folds(slides, groups)
    chosen = _chosen(folds, members)
    _check_options(fit_options)
    scoring = Scoring.of(fit_options, score_table_key, n_symmetries, predict_tile_px, show_progress_bar)
    scoring.check(slides)
    directory = _directory(checkpoint_dir, slides, members, fit_options)
    found = {}
    for k, fold in enumerate(chosen, start=1):
        training = {name: sdata for name, sdata in slides.items() if name not in members[fold]}
        left_out = {name: slides[name] for name in members[fold]}
        logger.info("fold %d of %d, %s left out: training on %s", k, len(chosen), [*left_out], [*training])
        options = fit_options | {"record_model": False, "show_progress_bar": show_progress_bar}
        model = fit(training, checkpoint_dir=directory / fold, **options)
        found[fold] = _scores(model, left_out, scoring, directory / fold)
    result = _result(found, {fold: directory / fold for fold in chosen})
    if set(chosen) == set(members):
        _write(result, directory)
    return result


def _several(sdatas: Mapping[str, SpatialData] | SpatialData) -> dict[str, SpatialData]:
    if isinstance(sdatas, SpatialData) or len(sdatas) == 1:
        raise PixNetError(
            "cross_validate leaves whole slides out, and sdatas= has one. Give it two or more, {name: sdata, ...}; "
            "with one slide, fit(sdata, validation=0.2) holds out blocks of it and reports their PCC."
        )
    return dict(sdatas)


def _folds(slides: Mapping[str, SpatialData], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Slides that each fold leaves out."""
    group_of = {name: name for name in slides} if groups is None else groups
    missing, unknown = set(slides) - set(group_of), set(group_of) - set(slides)
    if missing or unknown:
        raise PixNetError(
            f"groups= has no group for the slides {sorted(missing)} and names {sorted(unknown)}, which are none. "
            f"Slides: {list(slides)}."
        )
    members: dict[str, list[str]] = {}
    for name in slides:
        members.setdefault(group_of[name], []).append(name)
    if len(members) == 1:
        raise PixNetError(
            f"All slides are in group {next(iter(members))!r}: nothing would be left to train on. Leave groups= out, "
            "or give slides of other groups."
        )
    bad = [fold for fold in members if not _NAME.fullmatch(fold) or fold.strip(".") == ""]
    if bad:
        raise PixNetError(f"Folds become folders, and {bad} cannot: use letters, digits, '_', '-' and '.' in names.")
    return members


def _chosen(folds: Sequence[str] | None, members: Mapping[str, list[str]]) -> list[str]:
    if folds is None:
        return list(members)
    wanted = [folds] if isinstance(folds, str) else list(dict.fromkeys(folds))
    unknown = [fold for fold in wanted if fold not in members]
    if unknown:
        raise PixNetError(f"folds={wanted}: folds are called after what they leave out, {list(members)}.")
    return wanted


def _check_options(options: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(fit).parameters if name not in _OWN]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PixNetError(f"{name!r} is no option of cross_validate, nor one of fit that it passes on.{hint}")


def _directory(
    chosen: str | Path | None,
    slides: Mapping[str, SpatialData],
    members: Mapping[str, list[str]],
    options: Mapping[str, Any],
) -> Path:
    if chosen is not None:
        return Path(chosen).expanduser()
    stores = [Path(sdata.path).parent for sdata in slides.values() if sdata.path is not None]
    text = json.dumps([members, {name: options[name] for name in sorted(options)}], default=str)
    name = f"cross_validation_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return (stores[0] if stores else Path.cwd()) / "pixnet_sd_models" / name


def _scores(model: PixNet, left_out: Mapping[str, SpatialData], scoring: Scoring, folder: Path) -> FoldScores:
    """Scores of a fold: those in its folder, if they are of this model, or new ones."""
    slides = {name: LeftOut.open(name, sdata, model, scoring) for name, sdata in left_out.items()}
    parts = {name: slide.parts() for name, slide in slides.items()}
    identity = {"fingerprint": fingerprint({"model": model_parts(model), "slides": parts, **scoring.identity()})}
    scores = read_scores(folder, identity)
    if scores is not None:
        logger.info("scores taken from %s", folder)
        return scores
    scores = {(name, table): slide.moments(table) for name, slide in slides.items() for table in slide.tables}
    write_scores(folder, identity, scores)
    return scores


def _result(found: Mapping[str, FoldScores], folders: dict[str, Path]) -> CrossValidation:
    kinds = _kinds([key for scores in found.values() for key in scores])
    per_gene, per_slide = [], []
    for fold, scores in found.items():
        for (slide, table), part in scores.items():
            gene, at = pooled([part]), {"fold": fold, "slide": slide, "table": table}
            per_gene.append(gene.reset_index().assign(**at, n_regions=part["n"].to_numpy()))
            n_regions, n_genes = int(part["n"].max()), len(part)
            per_slide.append(at | summary(gene) | {"n_regions": n_regions, "n_genes": n_genes})
    genes = pd.concat(per_gene, ignore_index=True)
    slides = pd.DataFrame(per_slide)
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        parts = {key: part for scores in found.values() for key, part in scores.items() if kinds[key] == kind}
        rows += _summary_rows(kind, slides, parts)
    columns = ["fold", "slide", "table", "gene", "n_regions", "pcc", "mse", "mae"]
    return CrossValidation(genes[columns], slides, pd.DataFrame(rows), folders)


def _kinds(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Which tables of different slides are scored together: those of one name; all, where each slide has one."""
    tables = dict.fromkeys(table for _, table in keys)
    if len(tables) > 1 and len(keys) == len({slide for slide, _ in keys}):
        return {key: ", ".join(tables) for key in keys}
    return {key: key[1] for key in keys}


def _summary_rows(
    kind: str, slides: pd.DataFrame, parts: Mapping[tuple[str, str], pd.DataFrame]
) -> list[dict[str, Any]]:
    of_kind = [key in parts for key in zip(slides["slide"], slides["table"], strict=True)]
    each, together = slides[of_kind], pooled(list(parts.values()))
    count = {"n_slides": len(each), "n_regions": int(each["n_regions"].sum())}
    # a slide without a score makes the mean unknown: leaving it out would flatter
    mean = {name: float(each[name].mean(skipna=False)) for name in METRICS}
    n_genes = {"mean per slide": float(each["n_genes"].mean()), "pooled": float(len(together))}
    scores = {"mean per slide": mean, "pooled": summary(together)}
    return [{"table": kind, "how": how, **scores[how], **count, "n_genes": n_genes[how]} for how in scores]


def _write(result: CrossValidation, directory: Path) -> None:
    try:
        for name in ("per_gene", "per_slide", "summary"):
            with replace_file(directory / f"{name}.csv") as aside:
                getattr(result, name).to_csv(aside, index=False)
    except OSError as error:
        raise CheckpointError(
            f"Scores cannot be written to {str(directory)!r} ({error.strerror or error}). Free some disk and make the "
            "same call again: models and scores of the folds are there."
        ) from error
    logger.info("scores of %d folds in %s", len(result.folders), directory)
