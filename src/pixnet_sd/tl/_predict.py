"""Predict a slide: gene map, regions, table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._errors import CheckpointError, DataError, PixNetError
from pixnet_sd._fingerprint import fingerprint
from pixnet_sd._logging import logger
from pixnet_sd.engine.device import make_fabric
from pixnet_sd.engine.window_pass import InferSettings
from pixnet_sd.slide import Slide, check_genes, check_on_disk, open_slide, tissue_mask
from pixnet_sd.store import PixNet, recorded, recover, stored_note

from ._depends import map_parts
from ._map_request import MapInfo, map_factor
from ._pixels import pixels_of
from ._predict_job import PredictJob
from ._quality import why_poor
from ._region_request import check_together, request_regions
from ._room import check_batch, check_working_size, values_per_px

__all__ = ["predict"]

_TILE_PX = 1024
_BATCH_SIZE = {"cuda": 4}


@checked()
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
    allow_poor_model: bool = False,
    show_progress_bar: bool = True,
) -> None:
    """Predict gene expression over a slide.

    The slide is streamed tile by tile; only tissue is predicted. A backed object gets its results on disk, one in
    memory keeps them there. A run that is cut off leaves the store as it was, and the same call goes on from the tiles
    that are done. When the map is there from an earlier call and has what is needed, the network is not run again:
    regions then sum what the map holds, which differs from a fresh run by no more than rounding in single precision
    (about one part in a million). A call whose results lie in the store as it left them finds them, and returns.

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
    allow_poor_model
        Predict with a model whose record says that it is worse than predicting the mean of each gene: its mean squared
        error (``model.record.training["mse"]``) is more than 1.5 times that of the means (``"gene_mean_mse"``) with a
        PCC of at most 0.1, or more than ten times it.
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
        Genes that the model does not know, an image that is not RGB uint8 or shows no tissue, or one that was changed
        while it was read.
    CheckpointError
        No model, a damaged one, or one that is worse than none.
    StoreError
        A name is taken, the store cannot be written, or the disk is too small; or image or regions are in memory
        otherwise than in the store.
    """
    check_together(radius_um, spacing_um, bin_um, shapes_key)
    if not write_map and radius_um is None and bin_um is None and shapes_key is None:
        raise PixNetError("Nothing to predict: write_map=False and no radius_um, bin_um or shapes_key.")
    recover(sdata)
    fabric = make_fabric(device)
    found = _model(sdata, model)
    _check_quality(found, allow_poor_model)
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
    check_working_size(slide)
    batch_size = _BATCH_SIZE.get(fabric.device.type, 1) if batch_size is None else batch_size
    settings = _settings(found, tile_px, batch_size, n_symmetries)
    side = settings.tile_px + 2 * settings.halo_px
    values = values_per_px(found.network.encoder.channels, found.record.decoder)
    check_batch([(side, side)], batch_size, settings.tile_px, values, fabric.device)
    factor = _factor(store, map_um, slide, found.network.head.in_features + len(names))
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
    pixels = pixels_of(sdata, slide)
    parts = map_parts(found, slide, pixels, tissue, n_symmetries=n_symmetries, tile_px=settings.tile_px)
    info = MapInfo(fingerprint(parts), factor, parts)
    job = PredictJob(sdata, found, slide, pixels, tissue, request, index, names, info, key_added, store, overwrite)
    job.run(settings, fabric, write_map=write_map, show_progress_bar=show_progress_bar)


def _model(sdata: SpatialData, model: PixNet | str | Path | None) -> PixNet:
    if isinstance(model, PixNet):
        return model
    if model is None:
        return PixNet.load(_recorded_folder(sdata))
    return PixNet.load(model)


def _check_quality(model: PixNet, allow_poor_model: bool) -> None:
    poor = why_poor(model.record)
    if poor and allow_poor_model:
        logger.warning("the model is worse than none: %s", poor)
    elif poor:
        raise CheckpointError(
            f"The model is worse than none: {poor}. Train it again, with a lower lr= (it was "
            f"{model.record.training.get('lr')}) or for longer; allow_poor_model=True predicts all the same."
        )


def _recorded_folder(sdata: SpatialData) -> Path:
    folder, stored = str(recorded(sdata, "model") or ""), stored_note(sdata, "model")
    if folder and stored is not None and stored != folder:
        raise CheckpointError(
            f"Two models are recorded: {folder!r} in this object, and {stored!r} in its store, which another run has "
            "written to since. Give model= one of them, or open the store anew."
        )
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


def _factor(store: str, map_um: float | None, slide: Slide, n_values: int) -> int:
    """Native map pixels per pixel of what is stored."""
    factor = map_factor(map_um, slide, n_values)
    if store == "factors" and factor != 1:
        raise PixNetError(f"Factors are kept at the native pitch only: leave out map_um={map_um:g} or store.")
    return factor


def _genes(model: PixNet, genes: Sequence[str] | None) -> tuple[NDArray[np.intp], list[str]]:
    """Indices into the head, and names, of the genes to predict."""
    names = model.genes if genes is None else [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
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
    return InferSettings(tile_px, record.halo_px, batch_size, n_symmetries)
