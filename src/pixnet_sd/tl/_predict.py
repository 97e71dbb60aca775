"""Predict a slide: gene map, regions, table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._errors import CheckpointError, DataError, PixNetError
from pixnet_sd._logging import logger
from pixnet_sd.engine.device import make_fabric
from pixnet_sd.engine.infer import Inference, InferSettings, infer, window_side
from pixnet_sd.engine.region_plan import RegionPlan, plan_regions
from pixnet_sd.nn.grid import Grid
from pixnet_sd.nn.head import Head
from pixnet_sd.nn.model import MAP_STRIDE
from pixnet_sd.nn.regions import Circles
from pixnet_sd.slide import Slide, check_genes, open_slide, tissue_mask
from pixnet_sd.store import (
    GeneMapWriter,
    PixNet,
    RegionResults,
    RegionWriter,
    check_target,
    commit,
    image_transforms,
    outputs_of,
    recorded,
    region_table,
    thumbnail,
    tissue_labels,
)

from ._announce import announce
from ._express import Units, express, units_of
from ._map_request import MapInfo, ReusedMap, find_map, map_factor, map_info, sink_of
from ._recipe import check_tile_px
from ._region_request import RegionRequest, request_regions

__all__ = ["predict"]

_TILE_PX = 1024
_BATCH_SIZE = {"cuda": 4}
_BLOCK_PX = 512  # native map pixels that a block of a coarser map may span


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
        Show a bar over tiles.

    Returns
    -------
    Nothing; adds to `sdata`, and to its store when backed:

    ``images["{key_added}_map"]``
        Gene map, multiscale, float32, ``c`` = genes, 0 off tissue: log-normalised expression, or of a model of counts
        densities in counts per µm², with one more channel ``total_counts``; with ``labels["{key_added}_map_tissue"]``.
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
        A name is taken, the store cannot be written, or the disk is too small.
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
    tissue = _tissue(sdata, slide)
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
    batch_size = _BATCH_SIZE.get(fabric.device.type, 1) if batch_size is None else batch_size
    settings = _settings(found, tile_px, batch_size, n_symmetries)
    info = map_info(
        found.record,
        slide,
        tissue,
        factor=map_factor(map_um, slide),
        n_symmetries=n_symmetries,
        tile_px=settings.tile_px,
    )
    job = _Job(sdata, found, slide, tissue, request, index, names, info, f"{key_added}_map", overwrite)
    job.run(settings, fabric, write_map=write_map, show_progress_bar=show_progress_bar)


@dataclass
class _Job:
    """One call's pass over the slide and what comes of it."""

    sdata: SpatialData
    model: PixNet
    slide: Slide
    tissue: NDArray[np.bool_]
    request: RegionRequest | None
    index: NDArray[np.intp]
    genes: list[str]
    info: MapInfo
    map_key: str
    overwrite: bool

    def run(self, settings: InferSettings, fabric: Fabric, *, write_map: bool, show_progress_bar: bool) -> None:
        """Check that results can be written, predict, and write them all at once."""
        reused = find_map(self.sdata, self.map_key, self.info, self.outputs, self.slide)
        write_map = write_map and not (reused is not None and self.info.factor == 1)
        if reused is not None and self.request is None and not write_map:
            logger.info("the gene map %r of this model and slide is there already", self.map_key)
            return
        check_target(self.sdata, self._names(write_map), overwrite=self.overwrite)
        # what takes less room is summed up over the regions
        n_columns, head = len(self.outputs), self._head()
        if reused is None and head.is_linear:
            n_columns = min(n_columns, head.in_features)
        with ExitStack() as stack:
            blocks = stack.enter_context(self._map_writer()) if write_map else None
            side = window_side(settings.tile_px // MAP_STRIDE, self._block_px(blocks))
            rows = None
            if self.request is not None:
                rows = stack.enter_context(self._region_writer(self.request, n_columns, side, blocks))
            plan = self._plan(side)
            found = infer(
                self.model.network,
                self.slide.read,
                plan,
                head=head,
                fabric=fabric,
                settings=settings,
                blocks=sink_of(blocks, self.info.factor, self.slide.map_shape) if blocks is not None else None,
                block_px=self._block_px(blocks),
                rows=rows,
                pooled=n_columns < len(self.outputs),
                stored=reused,
                announce=partial(announce, blocks, rows),
                show_progress_bar=show_progress_bar,
            )
            self._say_reused(reused, plan, found)
            self._commit(blocks, rows, plan.on_glass)

    @property
    def outputs(self) -> list[str]:
        """What the map holds: the genes, and of counts their sum over all genes."""
        return outputs_of(self.genes, self.model.record.objective)

    @property
    def units(self) -> Units:
        """What the numbers are."""
        return units_of(self.model.record)

    def _head(self) -> Head:
        """For the outputs; densities per µm²."""
        head, n_genes = self.model.network.head, len(self.model.genes)
        index = np.append(self.index, np.arange(n_genes, head.n_outputs))
        return head.select(index, scale=self.model.record.working_mpp**-2)

    def _names(self, write_map: bool) -> dict[str, str]:
        names = {self.map_key: "images", f"{self.map_key}_tissue": "labels"} if write_map else {}
        if self.request is not None:
            names[self.request.table_key] = "tables"
            if self.request.make_shapes is not None:
                names[self.request.element_key] = "shapes"
        return names

    def _plan(self, side: int) -> RegionPlan:
        height, width = self.slide.map_shape
        regions = self.request.regions if self.request is not None else Circles(np.empty((0, 2)), np.empty(0))
        return plan_regions(regions, Grid(height, width, MAP_STRIDE), self.tissue, side)

    def _block_px(self, blocks: GeneMapWriter | None) -> int | None:
        """Side of the map's blocks in native map pixels."""
        return None if blocks is None else blocks.layout.block_px * self.info.factor

    def _map_writer(self) -> GeneMapWriter:
        height, width = (-(-size // self.info.factor) for size in self.slide.map_shape)
        pitch_um = MAP_STRIDE * self.slide.working_mpp * self.info.factor
        return GeneMapWriter.open(
            self.sdata,
            key=self.map_key,
            genes=self.outputs,
            shape=(height, width),
            pitch_image_px=pitch_um / self.slide.mpp,
            image_key=self.slide.image_key,
            fingerprint=self.info.fingerprint,
            block_px=None if self.info.factor == 1 else _power_of_two(_BLOCK_PX // self.info.factor),
            overwrite=self.overwrite,
        )

    def _region_writer(
        self, request: RegionRequest, n_columns: int, side: int, blocks: GeneMapWriter | None
    ) -> RegionWriter:
        parts = [self.info.fingerprint, request.hash(), side]
        return RegionWriter.open(
            self.sdata,
            table_key=request.table_key,
            shapes_key=None if request.make_shapes is None else request.element_key,
            n_regions=len(request.regions),
            genes=self.genes,
            n_columns=n_columns,
            n_layers=len(self.units.layers),
            fingerprint=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            overwrite=self.overwrite,
            also_needed=0 if blocks is None else blocks.missing_bytes,
        )

    def _say_reused(self, reused: ReusedMap | None, plan: RegionPlan, found: Inference) -> None:
        if reused is None or self.request is None:
            return
        logger.info(
            "gene map %r reused for the regions: %d tiles run, %d windows read back",
            *(self.map_key, found.tiles_run, found.windows_reused),
        )
        if plan.on_glass.any():
            logger.info("%d regions lie off tissue, where the map is 0: their tiles are run", plan.on_glass.sum())

    def _commit(self, blocks: GeneMapWriter | None, rows: RegionWriter | None, on_glass: NDArray[np.bool_]) -> None:
        """Write everything, and note where it comes from."""
        results = RegionResults()
        notes: dict[str, dict[str, Any]] = {}
        if rows is not None and self.request is not None:
            results = self._region_results(self.request, rows, on_glass)
            notes["tables"] = {self.request.table_key: self._provenance() | self.units.table}
        if blocks is None:
            commit(
                self.sdata,
                results.elements,
                overwrite=self.overwrite,
                staged=results.staged,
                provenance=notes,
                cleanup=results.cleanup,
            )
            return
        pitch = MAP_STRIDE * self.slide.working_scale
        transforms = image_transforms(self.sdata, self.slide.image_key)
        tissue = tissue_labels(self.tissue, pitch, transforms)
        notes["maps"] = {self.map_key: self._provenance() | {"units": self.units.map} | asdict(self.info)}
        blocks.commit({f"{self.map_key}_tissue": tissue}, results, provenance=notes)

    def _region_results(self, request: RegionRequest, rows: RegionWriter, on_glass: NDArray[np.bool_]) -> RegionResults:
        make_table = partial(
            region_table,
            genes=self.genes,
            region=request.element_key,
            spot_diameter_px=request.diameter_um / self.slide.mpp,
            picture=thumbnail(self.sdata, self.slide.image_key),
            library_id=self.slide.coordinate_system,
            var=self.model.record.var,
            uns={"pixnet_sd": self._provenance() | self.units.table},
        )
        return rows.results(
            partial(request.describe, on_glass),
            make_table=make_table,
            express=express(self.model, self.index, rows.n_columns),
            shapes_key=None if request.make_shapes is None else request.element_key,
            make_shapes=request.make_shapes,
        )

    def _provenance(self) -> dict[str, Any]:
        record = self.model.record
        return {
            "model_sha256": record.weights_sha256,
            "image": self.slide.image_key,
            "coordinate_system": self.slide.coordinate_system,
            "mpp": self.slide.mpp,
            "mpp_rule": self.slide.mpp_rule,
            "working_mpp": record.working_mpp,
            "objective": record.objective,
            "aggregation": record.aggregation,
            "target_sum": record.target_sum,
            "log_base": record.log_base,
        }


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


def _genes(model: PixNet, genes: Sequence[str] | None) -> tuple[NDArray[np.intp], list[str]]:
    """Indices into the head, and names, of the genes to predict."""
    names = model.genes if genes is None else [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not names:
        raise DataError("genes= names no gene. Leave it out for all of the model's.")
    check_genes(names, model.genes, "the model")
    return np.array([model.genes.index(gene) for gene in names], dtype=np.intp), names


def _tissue(sdata: SpatialData, slide: Slide) -> NDArray[np.bool_]:
    tissue = tissue_mask(sdata, slide)
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


def _power_of_two(value: float) -> int:
    """Largest power of two not above a value, at least 32."""
    return max(32, 1 << max(int(value), 1).bit_length() - 1)
