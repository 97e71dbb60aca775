"""What a store, a checkpoint or a Space Ranger folder holds, and what a prediction on a slide would take."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnet_sd._notes import memory_note, table_note
from pixnet_sd._util import logger
from pixnet_sd.errors import PixNetError
from pixnet_sd.params import ModelParams

from ._commands import COMMANDS
from ._run import is_store, space_ranger_folder

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from pixnet_sd.slide import Slide

    from ._parser import Call


_CHECKPOINT = ", or the folder of a model (a checkpoint has a config.json)"
_FEW = 8  # genes that are named


def info(call: Call) -> None:
    """Print what a path holds; nothing is changed."""
    place = dict(call.options)
    model = place.pop("model", None)
    folder = Path(call.slides[0]).expanduser()
    logger.info("reading %s", folder)  # before the libraries that take seconds to import
    if is_store(folder):
        lines = _store(folder, model, place)
    elif (folder / "config.json").is_file():
        lines = _checkpoint(folder)
    else:
        lines = _space_ranger(space_ranger_folder(folder, also=_CHECKPOINT))
    print("\n".join(lines))


def _space_ranger(folder: Path) -> list[str]:
    from pixnet_sd.io import find_files, open_matrix

    lines = [f"{folder}: Space Ranger folder of Visium HD"]
    try:
        files = find_files(folder, None, None, None)
    except PixNetError as error:
        return [*lines, f"  cannot be converted as it is: {error} (See the options of pixnet-sd convert.)"]
    for name, matrix in files.matrices().items():
        with open_matrix(matrix) as counts:
            lines.append(f"  {name}: {counts.n_rows:,}")
    return [*lines, f"  full-resolution image: {files.image}", f"make a store of it: pixnet-sd convert {folder} STORE"]


def _checkpoint(folder: Path) -> list[str]:
    """Describe genes, objective, encoder, training slides and held-out PCC."""
    import pandas as pd

    from pixnet_sd.model import read_record

    record = read_record(folder)
    weights = "random weights" if record.encoder_weights is None else f"weights {record.encoder_weights}"
    genes = ", ".join(record.genes[:_FEW]) + (", ..." if len(record.genes) > _FEW else "")
    best = record.training.get("best_epoch")
    lines = [
        f"{folder}: pixnet_sd checkpoint",
        f"  genes: {len(record.genes)}: {genes}",
        f"  objective: {record.objective}, aggregation: {record.aggregation}, target_sum: {record.target_sum:g}",
        f"  encoder: {record.encoder}, {weights}{', frozen' if record.freeze_encoder else ''}",
        f"  resolution: {record.working_mpp:g} µm per pixel, map pixels of {4 * record.working_mpp:g} µm",
        f"  tiles in training: {record.tile_px} px; sees {record.halo_px} px around",
        *([] if best is None else [f"  epochs: {len(record.history)}, of which {best} was kept"]),
        f"  training slides: {len(record.slides)}",
    ]
    for name, slide in record.slides.items():
        trained, held = (
            ", ".join(f"{n:,} of {table}" for table, n in slide.get(regions, {}).items() if n) or "none"
            for regions in ("training_regions", "held_out_regions")
        )
        mpp = slide.get("mpp", float("nan"))
        lines.append(f"    {name}: {mpp:.4g} µm per pixel; trained on {trained}; held out {held}")
    pcc = pd.Series(record.held_out_pcc, index=record.genes[: len(record.held_out_pcc)], dtype=float).dropna()
    if pcc.empty:
        return [*lines, "  held-out PCC: unknown, nothing was held out"]
    return [
        *lines,
        f"  held-out PCC: first quartile {pcc.quantile(0.25):.3f}, median {pcc.median():.3f}, mean {pcc.mean():.3f}",
        "    best: " + ", ".join(f"{gene} {value:.2f}" for gene, value in pcc.nlargest(_FEW).items()),
    ]


def _store(store: Path, model: str | None, place: Mapping[str, Any]) -> list[str]:
    """Describe elements, the slide image, and the map that `model`, or the one that `fit` noted, would make of it."""
    from pixnet_sd.slide import open_slide
    from pixnet_sd.slide.elements import open_store

    level = logger.level
    logger.setLevel(logging.WARNING)  # what is found is printed, and needs no log
    try:
        sdata = open_store(store)
        lines = [f"{store}: SpatialData store", *_elements(sdata)]
        folder = model or memory_note(sdata, "model")
        gone = " (not there)" if folder and not Path(folder).exists() else ""
        lines.append(f"model: {folder or 'none recorded'}{gone}")
        try:
            slide = open_slide(sdata, **place)
        except PixNetError as error:
            return [*lines, f"slide image: cannot be told. {error}"]
    finally:
        logger.setLevel(level)
    return [*lines, *_prediction(slide, folder)]


def _elements(sdata: SpatialData) -> list[str]:
    """Describe images, regions and tables, in a line each."""
    from pixnet_sd.slide.elements import bin_lattice, coordinate_systems, names, scale0, shapes_of, tables_of

    def bins(key: str) -> str:
        lattice = bin_lattice(sdata, key)
        return f", bins of {lattice.size_um} µm" if lattice else ""

    def raster(element: Any) -> str:
        image, n = scale0(element), len(element.children) if hasattr(element, "children") else 1
        sizes = " x ".join(f"{image.sizes[axis]:,}" for axis in ("y", "x"))
        channels = f"{image.sizes['c']} channels, " if "c" in image.sizes else ""
        systems = names(coordinate_systems(element))
        return f"{sizes} px, {channels}{image.dtype}, {n} level{'s' * (n > 1)}, in {systems}"

    def rows(table: Any) -> str:
        region = table.uns.get("spatialdata_attrs", {}).get("region")
        regions = [region] if isinstance(region, str) else [*map(str, region if region is not None else [])]
        of = f"annotates {names(regions)}{bins(regions[0])}" if regions else "annotates nothing"
        origin = "predicted by pixnet_sd" if table_note(table) is not None else "measured"
        return f"{table.n_obs:,} rows x {table.n_vars:,} genes, {origin}, {of}"

    regions = {key: f"{len(shapes):,} shapes{bins(key)}" for key, shapes in shapes_of(sdata).items()}
    regions |= {key: f"labels, {raster(labels)}{bins(key)}" for key, labels in sdata.labels.items()}
    sections = {
        "images": {key: raster(image) for key, image in sdata.images.items()},
        "shapes and labels": regions,
        "tables": {key: rows(table) for key, table in tables_of(sdata).items()},
    }
    lines = []
    for title, entries in sections.items():
        lines += [f"{title}:{'' if entries else ' none'}", *(f"  {key}: {text}" for key, text in entries.items())]
    return lines


def _prediction(slide: Slide, folder: str | None) -> list[str]:
    """Describe a gene map, at most: as if all of the slide were tissue, before compression."""
    from pixnet_sd.geometry import MAP_STRIDE
    from pixnet_sd.model import outputs_of, read_record
    from pixnet_sd.store import size_text
    from pixnet_sd.store.gene_map import map_layout

    genes, objective = (COMMANDS["fit"].flags[name].default for name in ("genes", "objective"))
    n_outputs, working_mpp = len(outputs_of([""] * genes, objective)), ModelParams().working_mpp
    whose = "a model with the defaults of fit"
    if folder and (Path(folder) / "config.json").is_file():
        record = read_record(Path(folder))
        n_outputs, working_mpp, whose = len(record.outputs), record.working_mpp, "this model"
    height_mm, width_mm = (size * slide.mpp / 1000 for size in (slide.height_px, slide.width_px))
    height, width = slide.at(working_mpp).map_shape
    n_bytes = size_text(map_layout(n_outputs, (height, width)).nbytes)
    return [
        f"slide image: {slide.image_key!r} in coordinate system {slide.coordinate_system!r}",
        f"resolution: {slide.mpp:.6g} µm per pixel, from the {slide.mpp_rule}; {height_mm:.2f} x {width_mm:.2f} mm",
        f"gene map of {whose}: {height:,} x {width:,} px of {MAP_STRIDE * working_mpp:g} µm, {n_outputs} channels",
        f"  disk: at most {n_bytes}, if all of the slide is tissue and nothing compresses",
        f"  memory: tiles are streamed into the store; an object that is not in a store would hold all {n_bytes}",
    ]
