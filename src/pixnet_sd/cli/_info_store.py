"""What a store holds: elements, which image is the slide and at which resolution, and what a prediction takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnet_sd._util import logger
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import MAP_STRIDE
from pixnet_sd.slide import Slide, open_slide
from pixnet_sd.slide.elements import bin_lattice, coordinate_systems, names, open_store, scale0, shapes_of, tables_of
from pixnet_sd.store import recorded, size_text
from pixnet_sd.store.gene_map import map_layout

from ._messages import as_options
from ._verbs import read_verb

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["describe_store"]


def describe_store(store: Path, model: str | Path | None, where: Mapping[str, Any]) -> str:
    """Lines on a store.

    Parameters
    ----------
    store
        The store.
    model
        Checkpoint that a prediction is estimated for.
    where
        Arguments of `open_slide` that the user gave.
    """
    with _silent():
        sdata = open_store(store)
        lines = [f"{store}: SpatialData store", *_images(sdata), *_regions(sdata), *_tables(sdata)]
        slide = _slide(sdata, where)
    folder = model if model is not None else recorded(sdata, "model")
    gone = " (not there)" if folder and not Path(folder).exists() else ""
    lines.append(f"model: {folder or 'none recorded'}{gone}")
    if isinstance(slide, str):
        return "\n".join([*lines, slide])
    rule = as_options(slide.mpp_rule, where)
    return "\n".join([*lines, *_place(slide, rule), *_estimate(slide, folder)])


@contextmanager
def _silent() -> Iterator[None]:
    """Without the log of what was found: it is what is printed."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _section(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else [f"{title} none"]


def _images(sdata: SpatialData) -> list[str]:
    return _section("images:", [f"{key}: {_raster(element)}" for key, element in sdata.images.items()])


def _raster(element: Any) -> str:
    image = scale0(element)
    sizes = " x ".join(f"{image.sizes[axis]:,}" for axis in ("y", "x"))
    channels = f"{image.sizes['c']} channels, " if "c" in image.sizes else ""
    levels = len(element.children) if hasattr(element, "children") else 1
    where = names(coordinate_systems(element))
    return f"{sizes} px, {channels}{image.dtype}, {levels} level{'s' * (levels > 1)}, in {where}"


def _regions(sdata: SpatialData) -> list[str]:
    lines = [f"{key}: {len(element):,} shapes{_bins(sdata, key)}" for key, element in shapes_of(sdata).items()]
    lines += [f"{key}: labels, {_raster(element)}{_bins(sdata, key)}" for key, element in sdata.labels.items()]
    return _section("shapes and labels:", lines)


def _bins(sdata: SpatialData, key: str) -> str:
    bins = bin_lattice(sdata, key)
    return f", bins of {bins.size_um} µm" if bins else ""


def _tables(sdata: SpatialData) -> list[str]:
    return _section("tables:", [f"{key}: {_table(sdata, table)}" for key, table in tables_of(sdata).items()])


def _table(sdata: SpatialData, table: Any) -> str:
    region = table.uns.get("spatialdata_attrs", {}).get("region")
    regions = [region] if isinstance(region, str) else list(region if region is not None else [])
    of = "annotates nothing" if not regions else f"annotates {names(map(str, regions))}{_bins(sdata, str(regions[0]))}"
    what = "predicted by pixnet_sd" if "pixnet_sd" in table.uns else "measured"
    return f"{table.n_obs:,} rows x {table.n_vars:,} genes, {what}, {of}"


def _slide(sdata: SpatialData, where: Mapping[str, Any]) -> Slide | str:
    try:
        return open_slide(sdata, **where)
    except PixNetError as error:
        return f"slide image: cannot be told. {as_options(str(error), where)}"


def _place(slide: Slide, rule: str) -> list[str]:
    height, width = (size * slide.mpp / 1000 for size in (slide.height_px, slide.width_px))
    return [
        f"slide image: {slide.image_key!r} in coordinate system {slide.coordinate_system!r}",
        f"resolution: {slide.mpp:.6g} µm per pixel, from the {rule}; {height:.2f} x {width:.2f} mm",
    ]


def _estimate(slide: Slide, folder: str | Path | None) -> list[str]:
    """What a gene map takes, at most: as if all of the slide were tissue, before compression."""
    n_outputs, working_mpp, whose = _outputs(folder)
    at = slide.at(working_mpp)
    n_bytes = size_text(map_layout(n_outputs, at.map_shape).nbytes)
    height, width = at.map_shape
    return [
        f"gene map of {whose}: {height:,} x {width:,} px of {MAP_STRIDE * working_mpp:g} µm, {n_outputs} channels",
        f"  disk: at most {n_bytes}, if all of the slide is tissue and nothing compresses",
        f"  memory: tiles are streamed into the store; an object that is not in a store would hold all {n_bytes}",
    ]


def _outputs(folder: str | Path | None) -> tuple[int, float, str]:
    """Channels, µm per pixel at which the network sees a slide, and whose these are."""
    if folder and (Path(folder) / "config.json").is_file():
        from pixnet_sd.model import read_record

        record = read_record(Path(folder))
        return len(record.outputs), record.working_mpp, "this model"
    parameters = read_verb("tl._fit", "fit").parameters
    return parameters["n_genes"].default, parameters["working_mpp"].default, "a model with the defaults of fit"
