"""A left-out slide: predicted beside the user's object, which stays as it is, and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel

from pixnet_sd._errors import ElementError
from pixnet_sd._logging import logger
from pixnet_sd.slide import (
    Slide,
    TableLink,
    content_key,
    measured,
    measured_regions,
    open_slide,
    select_tables,
    table_link,
    tables_of,
)
from pixnet_sd.slide._stored_shapes import StoredShapes, shapes_of
from pixnet_sd.slide._stored_table import obs_column, obs_names
from pixnet_sd.store import PixNet

from ._matched import matched_values
from ._pixels import pixels_of, slide_parts
from ._predict import predict
from ._region_request import region_parts
from ._scores import merged, moments

__all__ = ["LeftOut", "Scoring"]

_MOST_ROWS = 500_000
_LATTICE = ("array_row", "array_col")
_WHERE = ("image_key", "coordinate_system", "mpp", "allow_any_mpp")


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
            allow_any_mpp=True,  # was checked when the slide was opened
            write_map=False,
            tile_px=self.scoring.tile_px,
            n_symmetries=self.scoring.n_symmetries,
            device=self.scoring.device,
            allow_poor_model=True,  # its scores say it
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
