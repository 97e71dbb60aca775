"""Predict a slide: gene map, regions, table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._errors import CheckpointError, DataError, PixNetError
from pixnet_sd._logging import logger
from pixnet_sd.engine.device import make_fabric
from pixnet_sd.engine.tiling import check_tile_px
from pixnet_sd.engine.window_pass import InferSettings
from pixnet_sd.slide import Slide, check_genes, check_on_disk, open_slide, tissue_mask
from pixnet_sd.store import PixNet, recorded

from ._map_request import map_factor, map_info
from ._predict_job import PredictJob
from ._region_request import request_regions

__all__ = ["predict"]

_TILE_PX = 1024
_BATCH_SIZE = {"cuda": 4}


def predict(
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    radius_um: float | None = None,
    spacing_um: float | None = None,
    bin_um: float | None = None,
    shapes_key: str | None = None,
    genes: Sequence[str] | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
    map_um: float | None = None,
    write_map: bool = True,
    store: Literal["map", "factors"] = "map",
    tile_px: int | None = None,
    batch_size: int | None = None,
    n_symmetries: Literal[1, 4, 8] = 1,
    device: str | torch.device | None = None,
    key_added: str = "pixnet",
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> None:
    """Predict gene expression over a slide.

    The slide is streamed tile by tile; only tissue is predicted. A backed object gets its results on disk, one in
    memory keeps them there. A run that is cut off leaves the store as it was, and the same call goes on from the tiles
    that are done. When the map is there from an earlier call and has what is needed, the network is not run again.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image; expression is not needed.
    model
        A model, a checkpoint folder, or None: the one that :func:`fit` recorded in the object.
    radius_um
        Predict circles of this radius: on a grid over the tissue, or with `shapes_key` at the centroids of its
        regions.
    spacing_um
        Pitch of the grid of circles; default: touching.
    bin_um
        Predict square bins of this side over the tissue.
    shapes_key
        Predict the regions of this shapes or labels element.
    genes
        Genes to predict; default: all of the model's.
    image_key, coordinate_system, mpp, allow_any_mpp
        As in :func:`fit`.
    map_um
        Pixel size of the map, a whole multiple of the native one (4 times the model's working µm per pixel).
    write_map
        Write the map; False predicts regions only.
    store
        What of the map is written: ``"map"``, all genes, ready to be plotted; or ``"factors"``, the C channels of the
        feature map that all genes are made of, for any number of genes in the room of C.
        :func:`~pixnet_sd.get.gene_map` makes genes of either.
    tile_px
        Side of a tile, working pixels; decides about memory, not about the result (for encoders with global
        operations it does, and the training tile size is the default). Default 1024.
    batch_size
        Tiles per forward pass; default 4 on a CUDA GPU, 1 on a CPU.
    n_symmetries
        Average the prediction over 1, 4 (mirrored) or 8 (mirrored and turned) copies of each tile.
    device
        ``"cpu"``, ``"cuda"`` ...; default: a CUDA GPU if there is one.
    key_added
        First part of all names.
    overwrite
        Replace results of the same names.
    show_progress_bar
        Show a bar over tiles; where nobody watches, lines in the log.

    Returns
    -------
    Nothing; adds to `sdata`, and to its store when backed:

    ``images["{key_added}_map"]``
        Gene map (``store="map"``), multiscale, float32, ``c`` = genes, 0 off tissue: log-normalised expression, or of a
        model of counts densities in counts per µm², with one more channel ``total_counts``; with
        ``labels["{key_added}_map_tissue"]``.
    ``images["{key_added}_factors"]``, ``tables["{key_added}_factors_head"]``
        Factors (``store="factors"``), multiscale, float32, 0 off tissue, the last channel 1 on tissue, and the weights
        that make genes of them, for all genes of the model; with ``labels["{key_added}_factors_tissue"]``.
    ``tables["{key_added}_circles_8um"]``, ``shapes["{key_added}_circles_8um_shapes"]``
        For ``radius_um=8``; ``_bins_8um`` for ``bin_um=8``.
    ``tables["{key_added}_{shapes_key}"]``
        For `shapes_key`, annotating that element. ``X`` is predicted log-normalised expression, ``var`` has the
        held-out PCC where known. Regions are predicted from their tissue pixels; one without any, from all of them.
        With a model of counts also ``layers["expected_counts"]``, which add up over regions, and
        ``obs["expected_total_counts"]`` over all genes that were measured. ``uns["pixnet_sd"]`` says what is what.
    ``attrs["pixnet_sd"]``
        Where the results come from.

    Raises
    ------
    ElementError
        Image or regions missing or ambiguous.
    ResolutionError
        Micrometres per pixel unknown or absurd.
    DataError
        Genes that the model does not know, or an image that is not RGB uint8 or shows no tissue.
    CheckpointError
        No model, or a damaged one.
    StoreError
        A name is taken, the store cannot be written, or the disk is too small; or image or regions are in memory
        otherwise than in the store.
    """
    if not isinstance(sdata, SpatialData):
        raise PixNetError(
            f"predict needs a SpatialData object, got {type(sdata).__name__}: spatialdata.read_zarr(path)."
        )
    fabric = make_fabric(device)
    found = _model(sdata, model)
    index, names = _genes(found, genes)
    slide = open_slide(
        sdata,
        image_key=image_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
        allow_any_mpp=allow_any_mpp,
        working_mpp=found.record.working_mpp,
        element_key=shapes_key,
    )
    check_on_disk(sdata, slide.image_key, shapes_key)
    tissue = _tissue(slide)
    request = request_regions(
        sdata,
        slide,
        tissue,
        radius_um=radius_um,
        spacing_um=spacing_um,
        bin_um=bin_um,
        shapes_key=shapes_key,
        key_added=key_added,
    )
    if request is None and not write_map:
        raise PixNetError("Nothing to predict: write_map=False and no radius_um, bin_um or shapes_key.")
    factor = _factor(store, map_um, slide)
    batch_size = _BATCH_SIZE.get(fabric.device.type, 1) if batch_size is None else batch_size
    settings = _settings(found, tile_px, batch_size, n_symmetries)
    info = map_info(
        found.record,
        slide,
        tissue,
        factor=factor,
        n_symmetries=n_symmetries,
        tile_px=settings.tile_px,
    )
    job = PredictJob(sdata, found, slide, tissue, request, index, names, info, key_added, store, overwrite)
    job.run(settings, fabric, write_map=write_map, show_progress_bar=show_progress_bar)


def _model(sdata: SpatialData, model: PixNet | str | Path | None) -> PixNet:
    if isinstance(model, PixNet):
        return model
    if model is None:
        return PixNet.load(_recorded_folder(sdata))
    if not isinstance(model, str | Path):
        raise PixNetError(f"model= needs a PixNet or a checkpoint folder; got a {type(model).__name__}.")
    return PixNet.load(model)


def _recorded_folder(sdata: SpatialData) -> Path:
    folder = str(recorded(sdata, "model") or "")
    if not folder:
        raise CheckpointError(
            "No model was given, and none is recorded in this object. Give predict(sdata, model=...) a PixNet or "
            "a checkpoint folder, or train one with fit(sdata)."
        )
    if not Path(folder).exists():
        raise CheckpointError(
            f"The model that is recorded in this object, {folder!r}, is not there any more. Give model= the folder "
            "that it was moved to, or train again with fit(sdata)."
        )
    return Path(folder)


def _factor(store: str, map_um: float | None, slide: Slide) -> int:
    """Native map pixels per pixel of what is stored."""
    if store not in ("map", "factors"):
        raise PixNetError(f"store={store!r}: known are 'map' and 'factors'.")
    factor = map_factor(map_um, slide)
    if store == "factors" and factor != 1:
        raise PixNetError(f"Factors are kept at the native pitch only: leave out map_um={map_um:g} or store.")
    return factor


def _genes(model: PixNet, genes: Sequence[str] | None) -> tuple[NDArray[np.intp], list[str]]:
    """Indices into the head, and names, of the genes to predict."""
    names = model.genes if genes is None else [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not names:
        raise DataError("genes= names no gene. Leave it out for all of the model's.")
    check_genes(names, model.genes, "the model")
    return np.array([model.genes.index(gene) for gene in names], dtype=np.intp), names


def _tissue(slide: Slide) -> NDArray[np.bool_]:
    tissue = tissue_mask(slide)
    if not tissue.any():
        raise DataError(
            f"No tissue was found on image {slide.image_key!r}: it looks like empty glass. Check image_key= (an H&E "
            "image on a bright background is needed)."
        )
    return tissue


def _settings(model: PixNet, tile_px: int | None, batch_size: int, n_symmetries: Literal[1, 4, 8]) -> InferSettings:
    record = model.record
    if tile_px is None:
        tile_px = record.tile_px if record.sees_whole_tile else _TILE_PX
    elif record.sees_whole_tile and tile_px != record.tile_px:
        logger.warning(
            "encoder %r looks at whole tiles, so the result depends on tile_px: %d, trained with %d",
            *(record.encoder, tile_px, record.tile_px),
        )
    check_tile_px(tile_px)
    if n_symmetries not in (1, 4, 8) or batch_size < 1:
        raise PixNetError(f"n_symmetries={n_symmetries} must be 1, 4 or 8, and batch_size={batch_size} at least 1.")
    return InferSettings(tile_px, record.halo_px, batch_size, n_symmetries)
