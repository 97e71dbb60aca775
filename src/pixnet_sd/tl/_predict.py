"""Predict a slide: gene map, regions, table.

A call is checked and planned as a whole before anything is opened for writing: `_Job` knows the names and fingerprints
of its results, `PredictPlan` what one pass over the slide computes. The pass yields windows, which writer threads put
away while the next is computed, and a transaction moves all results in at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from skimage.measure import block_reduce
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._fingerprint import differing_parts, fingerprint
from pixnet_sd._notes import stored_note, table_uns
from pixnet_sd._util import logger
from pixnet_sd.engine import BLOCK_WRITERS, Writer, make_fabric
from pixnet_sd.engine.predict import (
    Block,
    Lent,
    PredictPlan,
    RegionPlan,
    StoredMap,
    Tiling,
    Walk,
    plan_regions,
    window_side,
)
from pixnet_sd.errors import CheckpointError, DataError, ElementError, PixNetError
from pixnet_sd.geometry import MAP_STRIDE, Circles, Grid, Regions, RegionShare
from pixnet_sd.model import Factors, Head, PixNet, dispersion_of, gene_columns, outputs_of
from pixnet_sd.params import PredictParams
from pixnet_sd.slide import PixelContent, Slide, check_on_disk, check_same_pixels, open_slide, tissue_mask
from pixnet_sd.slide.elements import affine_matrix
from pixnet_sd.slide.tables import check_genes
from pixnet_sd.store import (
    MemorySums,
    RegionWriter,
    Transaction,
    attach_written,
    recorded,
    recover,
    region_table,
    size_text,
    spatial_library,
    thumbnail,
    written_by,
)
from pixnet_sd.store.gene_map import (
    FactorHead,
    GeneMapWriter,
    MapLayout,
    factor_names,
    factors_key,
    head_key,
    image_transforms,
    is_as_written,
    map_key,
    map_layout,
    open_map,
    tissue_labels,
)

from ._checks import check_batch, check_working_size, map_factor, map_parts, pixels_of, slide_note, why_poor
from ._regions import RegionRequest, Units, check_together, express, request_regions, units_of

_TILE_PX = 1024
_BATCH_SIZE = {"cuda": 4}
_MANY_TILES = 50  # from which on it is worth two more to say how long they take
_WRITTEN_PER_S = 150e6  # bytes that are compressed and written while the network runs, roughly, on two cores
_OTHER_FILES = 1000  # of tables, shapes and the tissue mask


@checked()
def predict(  # noqa: PLR0913
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    shapes_key: str | None = None,
    radius_um: float | None = None,
    spacing_um: float | None = None,
    bin_um: float | None = None,
    genes: Sequence[str] | None = None,
    write: Literal["map", "factors"] | None = "map",
    map_um: float | None = None,
    interval: float | None = 0.9,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    predict_params: PredictParams | Mapping[str, Any] | None = None,
    key_added: str = "pixnet",
    overwrite: bool = False,
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
    shapes_key
        Predict the regions of this shapes or labels element.
    radius_um
        Predict circles of this radius: on a grid over the tissue, or with `shapes_key` at the centroids of its
        regions.
    spacing_um
        Pitch of the grid of circles; default: touching.
    bin_um
        Predict square bins of this side over the tissue.
    genes
        Genes to predict; default: all of the model's.
    write
        What of the map is written: ``"map"``, all genes, ready to be plotted; ``"factors"``, the C channels of the
        feature map that all genes are made of, for any number of genes in the room of C
        (:func:`~pixnet_sd.get.gene_map` makes genes of either); None predicts regions only.
    map_um
        Pixel size of the map, a whole multiple of the native one (4 times the model's working µm per pixel).
    interval
        Share of what is measured, 0.5 to 0.99, that lies between the layers ``"lower"`` and ``"upper"`` of a table;
        None: without them. Only with a model of counts.
    image_key, coordinate_system, mpp
        As in :func:`fit`.
    device
        ``"cpu"``, ``"cuda"`` ...; default: a CUDA GPU if there is one.
    batch_size
        Tiles per forward pass; default 4 on a CUDA GPU, 1 on a CPU.
    predict_params
        Tiles, symmetries and what is refused otherwise: a :class:`~pixnet_sd.PredictParams`, or some of its fields as
        a dictionary.
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
        Gene map (``write="map"``), multiscale, float32, ``c`` = genes, 0 off tissue: log-normalised expression, or of a
        model of counts densities in counts per µm², with one more channel ``total_counts``; with
        ``labels["{key_added}_map_tissue"]``.
    ``images["{key_added}_factors"]``, ``tables["{key_added}_factors_head"]``
        Factors (``write="factors"``), multiscale, float32, 0 off tissue, the last channel 1 on tissue, and the weights
        that make genes of them, for all genes of the model; with ``labels["{key_added}_factors_tissue"]``.
    ``tables["{key_added}_circles_8um"]``, ``shapes["{key_added}_circles_8um_shapes"]``
        For ``radius_um=8``; ``_bins_8um`` for ``bin_um=8``.
    ``tables["{key_added}_{shapes_key}"]``
        For `shapes_key`, annotating that element. ``X`` is predicted log-normalised expression, ``var`` has the
        held-out PCC where known. With a model of counts also ``layers["expected_counts"]``, which add up over regions,
        ``obs["expected_total_counts"]`` over all genes that were measured, ``layers["lower"]`` and ``layers["upper"]``
        (`interval`), in the units of ``X``, and the genes' dispersion in ``var``. Regions are predicted from their
        tissue pixels, of which ``obs["tissue_area_um2"]`` is the area; without any, all of these are NaN, and
        ``obs["on_tissue"]`` is False. ``uns["pixnet_sd"]`` says what is what.
    ``attrs``
        Where the results come from, under ``"pixnet_sd"``.

    Raises
    ------
    ElementError
        Image or regions missing or ambiguous.
    ResolutionError
        Micrometres per pixel unknown or absurd.
    DataError
        Genes that the model does not know, regions of which none has tissue, an image that is not RGB uint8 or shows no
        tissue, or one that was changed while it was read.
    CheckpointError
        No model, a damaged one, or one that is worse than none.
    StoreError
        A name is taken, the store cannot be written, or the disk is too small; or image or regions are in memory
        otherwise than in the store.
    """
    asked: Any = {"radius_um": radius_um, "spacing_um": spacing_um, "bin_um": bin_um, "shapes_key": shapes_key}
    check_together(**asked)
    if write is None and all(value is None for value in asked.values()):
        raise PixNetError("Nothing to predict: write=None and no radius_um, bin_um or shapes_key.")
    params = PredictParams.read(predict_params)
    recover(sdata)
    fabric, trained = make_fabric(device), _model(sdata, model)
    _check_quality(trained, params.allow_poor_model)
    names = trained.genes if genes is None else [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    check_genes(names, trained.genes, "the model")
    where: Any = {"image_key": image_key, "coordinate_system": coordinate_system, "mpp": mpp, "element_key": shapes_key}
    where |= {"allow_any_mpp": params.allow_any_mpp, "working_mpp": trained.record.working_mpp}
    slide = open_slide(sdata, **where)
    check_on_disk(sdata, slide.image_key, shapes_key)
    tiling = _tiling(trained, slide, params, batch_size, fabric)
    factor = map_factor(map_um, slide, trained.network.head.in_features + len(names))
    if write == "factors" and factor != 1:
        raise PixNetError(
            f"Factors are kept at the native pitch only: leave out map_um={map_um:g}, or write='factors'."
        )
    tissue = _tissue(slide)
    request = request_regions(sdata, slide, tissue, key_added=key_added, **asked)
    pixels = pixels_of(sdata, slide)
    parts = map_parts(trained, slide, pixels, tissue, n_symmetries=params.n_symmetries, tile_px=tiling.tile_px)
    job = _Job(
        sdata, trained, slide, pixels, tissue, request, names, factor, parts, key_added, write, interval, overwrite
    )
    attach_written(sdata, job.names)
    stored = _stored_maps(job)
    to_do = job.without_results(stored)
    if not to_do.names:
        logger.info(
            "%r of this model and slide is there already", job.map_key if request is None else request.table_key
        )
        return
    _run(to_do, tiling, next(iter(stored.items()), None), fabric, show_progress_bar=show_progress_bar)


def predict_regions(
    model: PixNet,
    slide: Slide,
    regions: Regions,
    *,
    params: PredictParams | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    show_progress_bar: bool = True,
) -> NDArray[np.float32]:
    """Predict regions, working pixels, as ``X`` of the table of `predict`: (n, genes), NaN without tissue."""
    fabric = make_fabric(device)
    tiling = _tiling(model, slide, params or PredictParams(), batch_size, fabric)
    head, side = _head(model, range(len(model.genes))), window_side(tiling.tile_px, None)
    region_plan = _planned(slide, _tissue(slide), regions, side)
    plan = PredictPlan(region_plan, tiling, side, head, pooled=_is_pooled(head, None))
    n, n_genes = len(regions), len(model.genes)
    rows = MemorySums(n, plan.n_columns, n_genes * (1 + len(units_of(model.record).layers)))
    with Walk(model.network, slide.read, plan, plan.visits([], rows.is_done), fabric) as walk:
        _put_away(walk, rows, None, {}, show_progress_bar=show_progress_bar)
    return express(model, range(n_genes), plan.n_columns)(*rows.rows(0, n)).x


@dataclass(frozen=True)
class _Job:
    """One call of `predict`: what it writes, under which names, and what that depends on."""

    sdata: SpatialData
    model: PixNet
    slide: Slide
    pixels: PixelContent
    tissue: NDArray[np.bool_]
    request: RegionRequest | None
    genes: list[str]
    factor: int  # native map pixels per stored map pixel
    parts: dict[str, Any]  # what the map's values depend on, besides its genes
    key_added: str
    write: Literal["map", "factors"] | None
    interval: float | None
    overwrite: bool

    @cached_property
    def fingerprint(self) -> str:
        """Hash over model, image, resolution, tissue and averaging."""
        return fingerprint(self.parts)

    @property
    def units(self) -> Units:
        """What the numbers are."""
        return units_of(self.model.record, self.interval)

    @property
    def index(self) -> list[int]:
        """Genes of this call among the model's."""
        return pd.Index(self.model.genes).get_indexer(pd.Index(self.genes)).tolist()

    @property
    def outputs(self) -> list[str]:
        """What the map holds: the genes, and of counts their sum over all genes."""
        return outputs_of(self.genes, self.model.record.objective)

    @property
    def map_key(self) -> str:
        return factors_key(self.key_added) if self.write == "factors" else map_key(self.key_added)

    @property
    def map_names(self) -> dict[str, str]:
        names = {self.map_key: "images", f"{self.map_key}_tissue": "labels"}
        return {None: {}, "map": names, "factors": names | {head_key(self.map_key): "tables"}}[self.write]

    @property
    def names(self) -> dict[str, str]:
        """Name → type of all elements that are written."""
        return self.map_names | ({} if self.request is None else self.request.names)

    @property
    def layout(self) -> MapLayout | None:
        """How the map is stored."""
        if self.write is None:
            return None
        n, factor, shape = len(self.channels), self.factor, self.slide.map_shape
        native = map_layout(n, shape, whole_channels=self.write == "factors")
        if factor == 1:
            return native
        # a power of two, at least 32, whose native pixels are as many as of a native block
        block_px = max(32, 1 << max(native.block_px // factor, 1).bit_length() - 1)
        return map_layout(n, (-(-shape[0] // factor), -(-shape[1] // factor)), block_px)

    @property
    def channels(self) -> list[str]:
        return factor_names(self.model.network.head.in_features) if self.write == "factors" else self.outputs

    def identity(self, **parts: Any) -> str:
        """Hash what decides about a map or a table: equal for two calls that write the same."""
        transforms = image_transforms(self.sdata, self.slide.image_key)
        place = {name: each.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for name, each in transforms.items()}
        return fingerprint({"map": self.fingerprint, "place": place, **parts})

    @property
    def map_identity(self) -> str:
        return self.identity(factor=self.factor, store=self.write, outputs=self.outputs)

    @property
    def table_identity(self) -> str:
        if self.request is None:
            return ""
        about = {"diameter_um": self.request.diameter_um, "genes": self.genes, "interval": self.interval}
        return self.identity(**about, **self.request.parts)

    @property
    def provenance(self) -> dict[str, Any]:
        """What maps and tables note of where they come from."""
        named = ("working_mpp", "objective", "aggregation", "target_sum", "log_base")
        of_model = {name: getattr(self.model.record, name) for name in named}
        return {"model_sha256": self.parts["model"]["weights"], **slide_note(self.slide), **of_model}

    def without_results(self, stored: Mapping[str, StoredMap]) -> _Job:
        """Leave out a native map that can be read back, and what this call left when cut off as results moved in."""
        write, request = self.write, self.request
        is_read_back = self.factor == 1 and self.map_key in stored
        if is_read_back or self._is_there("maps", self.map_key, self.map_names):
            write = None
        if not write and request and self._is_there("tables", request.table_key, request.names):
            request = None
        return replace(self, write=write, request=request)

    def _is_there(self, section: str, key: str, names: dict[str, str]) -> bool:
        identity = self.map_identity if section == "maps" else self.table_identity
        is_there = bool(names) and written_by(self.sdata, section, key, identity, names)
        if is_there and self.overwrite:  # they replace what is in memory
            attach_written(self.sdata, names, again=True)
        return is_there


def _stored_maps(job: _Job) -> dict[str, StoredMap]:
    """Find the maps of earlier calls from which this one can be had exactly; factors, which have all genes, first."""
    # Of the same model, image and tissue, at the native pitch, where the image still lies, and untouched since.
    stored = {}
    for key, has_features in ((factors_key(job.key_added), True), (map_key(job.key_added), False)):
        note = stored_note(job.sdata, "maps", key)
        if not note or key not in job.sdata.images:
            continue
        if why_not := _why_not(job, key, note):
            logger.info("map %r is not read back, but computed anew: %s", key, why_not)
            continue
        reader = open_map(job.sdata, key)
        channels = pd.Index(reader.genes).get_indexer(pd.Index(reader.genes[:-1] if has_features else job.outputs))
        if (channels >= 0).all():
            stored[key] = StoredMap(partial(reader.read, channels.tolist()), reader.shape, has_features)
    return stored


def _why_not(job: _Job, key: str, note: Mapping[str, Any]) -> str:
    """Say why a map that is there cannot be read back; empty if it can."""
    if note.get("fingerprint") != job.fingerprint:
        parts = differing_parts(note.get("depends_on", {}), job.parts)
        return f"it differs in {', '.join(map(repr, parts)) or 'its fingerprint'}"
    if note.get("factor") != 1:
        return "it is coarser than the native pitch"  # and has lost what the bilinear resize needs
    pitch = MAP_STRIDE * job.slide.working_scale
    with suppress(ElementError):  # it may not be in this coordinate system
        matrix = affine_matrix(job.sdata.images[key], job.slide.coordinate_system)
        if np.allclose(matrix, job.slide.to_system @ np.diag([pitch, pitch, 1.0]), rtol=1e-6):
            return "" if is_as_written(job.sdata, key) else "it is not as it was written"
    return "the image was aligned anew since"


def _head(model: PixNet, index: Sequence[int]) -> Head:
    """For some genes, and of counts the sum of all; densities per µm²."""
    head, n_genes = model.network.head, len(model.genes)
    outputs = np.append(np.asarray(index, np.intp), np.arange(n_genes, head.n_outputs))
    return head.select(outputs, scale=model.record.working_mpp**-2)


def _is_pooled(head: Head, stored: StoredMap | None) -> bool:
    """Whether D is summed over the regions, where that takes less room than its genes."""
    return head.is_linear and (stored is None or stored.has_features) and head.in_features < head.n_outputs


def _planned(slide: Slide, tissue: NDArray[np.bool_], regions: Regions | None, side: int) -> RegionPlan:
    """Plan regions, None being none, before the network runs; a DataError tells that not one has tissue."""
    asked = Circles(np.empty((0, 2)), np.empty(0)) if regions is None else regions
    plan = plan_regions(asked, Grid(*slide.map_shape, MAP_STRIDE), tissue)
    if len(asked) and not plan.has_tissue(side):
        raise DataError(
            f"None of the {len(asked)} regions has tissue, which was found on {tissue.mean():.1%} of image "
            f"{slide.image_key!r}. Are they of this slide? Check shapes_key= and coordinate_system=; predict without "
            "regions writes the tissue beside the map."
        )
    return plan


def _run(
    job: _Job, tiling: Tiling, reused: tuple[str, StoredMap] | None, fabric: Fabric, *, show_progress_bar: bool
) -> None:
    """Check that results can be written, predict, and write them all at once."""
    layout, request, head = job.layout, job.request, _head(job.model, job.index)
    stored = None if reused is None else reused[1]
    pooled = _is_pooled(head, stored)
    side = window_side(tiling.tile_px, None if layout is None else layout.block_px * job.factor)
    region_plan = _planned(job.slide, job.tissue, None if request is None else request.regions, side)
    with Transaction(job.sdata, job.names, overwrite=job.overwrite) as out, ExitStack() as stack:
        blocks, rows = None, None
        if layout is not None:
            blocks = GeneMapWriter(
                out,
                key=job.map_key,
                channels=job.channels,
                layout=layout,
                transforms=image_transforms(job.sdata, job.slide.image_key),
                pitch_image_px=MAP_STRIDE * job.slide.working_scale * job.factor,
                fingerprint=job.fingerprint,
            )
            stack.enter_context(blocks)
        if request is not None:
            rows = RegionWriter(
                out,
                table_key=request.table_key,
                n_regions=len(request.regions),
                genes=job.genes,
                n_columns=head.in_features if pooled else head.n_outputs,
                n_layers=len(job.units.layers),
                fingerprint=fingerprint({"map": job.fingerprint, "window": side, **request.parts}),
            )
            stack.enter_context(rows)
        writers = [writer for writer in (blocks, rows) if writer is not None]
        n_bytes = sum(writer.missing_bytes for writer in writers)
        out.check_room(n_bytes, _OTHER_FILES + (0 if blocks is None else blocks.missing_files))
        shown = Factors(head.in_features) if job.write == "factors" else head
        plan = PredictPlan(region_plan, tiling, side, head, shown, pooled, stored)
        height, width = job.slide.map_shape
        to_write = {}  # native map pixels of each block of the map → the block
        for block in () if blocks is None else blocks.pending:
            row0, row1, col0, col1 = (v * job.factor for v in block)
            to_write[row0, min(row1, height), col0, min(col1, width)] = block
        visits = plan.visits(list(to_write), None if rows is None else rows.is_done)
        with Walk(job.model.network, job.slide.read, plan, visits, fabric) as walk:
            _announce(walk, n_bytes, writers)
            _put_away(walk, rows, blocks, to_write, job.factor, show_progress_bar=show_progress_bar)
        if reused is not None and request is not None:
            logger.info(
                "gene map %r reused for the regions: %d tiles run, %d windows read back",
                *(reused[0], walk.n_tiles, sum(visit.reuse for visit in visits)),
            )
        check_same_pixels(job.slide, job.pixels)
        elements, notes = _map_results(job, blocks) if blocks is not None else ({}, {})
        if rows is not None and request is not None:
            units = job.units
            about = job.provenance | {"X": units.x, "layers": units.layers}
            elements |= _region_results(job, request, rows, about)
            notes["tables"] = {request.table_key: about | {"identity": job.table_identity}}
        if job.pixels.is_settled:
            notes["content"] = {job.slide.image_key: job.pixels.note()}
        out.commit(elements, provenance=notes)


def _put_away(
    walk: Walk,
    rows: RegionWriter | MemorySums | None,
    blocks: GeneMapWriter | None,
    to_write: Mapping[Block, Block],
    factor: int = 1,
    *,
    show_progress_bar: bool,
) -> None:
    """Write the results of windows in threads, few at a time, while the next window is computed."""

    def write(block: Block, lent: Lent[NDArray[np.float32]]) -> None:
        assert blocks is not None  # blocks are only planned with it
        with lent() as values:
            if factor != 1:  # over the far edge the squares are filled up with 0
                mean = partial(np.mean, dtype=np.float32)
                values = block_reduce(values, (1, factor, factor), mean)  # type: ignore[no-untyped-call]
            blocks.write(to_write[block], values)

    def add(lent: Lent[RegionShare]) -> None:
        assert rows is not None  # regions are only planned with them
        with lent() as share:
            rows.put(share)

    with Writer(BLOCK_WRITERS) as block_writer, Writer() as row_writer:
        for result in walk.results(show_progress_bar=show_progress_bar):
            for block, values in result.blocks:
                block_writer.submit(write, block, values)
            if result.share is not None:
                row_writer.submit(add, result.share)


def _announce(walk: Walk, n_bytes: int, writers: Sequence[GeneMapWriter | RegionWriter]) -> None:
    """Log how much is to be computed and written, and how long that will take."""
    time = ""
    if walk.n_tiles >= _MANY_TILES:
        seconds = walk.n_tiles * walk.seconds_per_tile() + n_bytes / _WRITTEN_PER_S
        hours = f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
        time = f", about {seconds:.0f} s" if seconds < 100 else f", about {hours}"
    logger.info("%d tiles through the network%s, at most %s on disk", walk.n_tiles, time, size_text(n_bytes))
    for writer in writers:
        logger.info("%s", writer.summary())


def _map_results(job: _Job, blocks: GeneMapWriter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Elements of the map, and what is noted of it."""
    units, model, slide = job.units.map, job.model, job.slide
    transforms = image_transforms(job.sdata, slide.image_key)
    elements: dict[str, Any] = {job.map_key: blocks.element()}
    elements[f"{job.map_key}_tissue"] = tissue_labels(job.tissue, MAP_STRIDE * slide.working_scale, transforms)
    if job.write == "factors":  # weights of all genes of the model, whichever are predicted for regions
        head = _head(model, range(len(model.genes)))
        tensors = [head.weight, head.bias, *([] if head.is_linear else [head.unit])]
        arrays = (each.detach().cpu().numpy() for each in tensors)
        factor_head = FactorHead(outputs_of(model.genes, model.record.objective), *arrays)
        elements[head_key(job.map_key)] = factor_head.table(units, job.fingerprint)
    about: dict[str, Any] = {"units": units, "identity": job.map_identity, "fingerprint": job.fingerprint}
    about["factor"], dispersion = job.factor, dispersion_of(model)
    if dispersion is not None:  # of the genes that the channels are, or that factors make
        genes = pd.Index(model.genes if job.write == "factors" else job.genes)
        of_genes = dispersion.of(pd.Index(model.genes).get_indexer(genes))
        about["dispersion"] = {"genes": genes.tolist(), **of_genes.note()}
    return elements, {"maps": {job.map_key: job.provenance | about | {"depends_on": job.parts}}}


def _region_results(job: _Job, request: RegionRequest, rows: RegionWriter, about: dict[str, Any]) -> dict[str, Any]:
    """Table, and shapes where they are not there."""
    slide = job.slide
    # what the values depend on and may change later: `evaluate` compares it
    depends_on = {"pixels": job.pixels.sha256, **({} if request.make_shapes is not None else request.parts)}
    picture = thumbnail(job.sdata, slide.image_key, channels=slide.pyramid.levels[0].channels)
    spatial = spatial_library(slide.coordinate_system, request.diameter_um / slide.mpp, picture)
    make_table = partial(
        region_table,
        genes=job.genes,
        region=request.element_key,
        var=gene_columns(job.model),
        uns=table_uns(about | {"depends_on": depends_on}) | {"spatial": spatial},
    )
    return rows.results(
        request.describe,
        make_table=make_table,
        express=express(job.model, job.index, rows.n_columns, job.interval),
        shapes_key=None if request.make_shapes is None else request.element_key,
        make_shapes=request.make_shapes,
    )


def _model(sdata: SpatialData, model: PixNet | str | Path | None) -> PixNet:
    if isinstance(model, PixNet):
        return model
    if model is not None:
        return PixNet.load(model)
    folder, stored = str(recorded(sdata, "model") or ""), stored_note(sdata, "model")
    if folder and stored is not None and stored != folder:
        raise CheckpointError(
            f"Two models are recorded: {folder!r} in this object, and {stored!r} in its store. Give model= one of them."
        )
    if not folder:
        raise CheckpointError("No model is recorded in this object. Give model=, or train one with fit(sdata).")
    if not Path(folder).exists():
        raise CheckpointError(
            f"The recorded model {folder!r} is not there any more. Give model= its new folder, or train again."
        )
    return PixNet.load(folder)


def _check_quality(model: PixNet, allow_poor_model: bool) -> None:
    poor = why_poor(model.record)
    if poor and allow_poor_model:
        logger.warning("the model is worse than none: %s", poor)
    elif poor:
        raise CheckpointError(
            f"The model is worse than none: {poor}. Train it again, with a lower lr= than "
            f"{model.record.training.get('lr')} or for longer; "
            "predict_params={'allow_poor_model': True} predicts all the same."
        )


def _tissue(slide: Slide) -> NDArray[np.bool_]:
    tissue = tissue_mask(slide)
    if not tissue.any():
        raise DataError(
            f"No tissue on image {slide.image_key!r}: image_key= has to be an H&E image on a bright background."
        )
    return tissue


def _tiling(model: PixNet, slide: Slide, params: PredictParams, batch_size: int | None, fabric: Fabric) -> Tiling:
    """Choose tiles, and refuse those that do not fit the machine."""
    check_working_size(slide)
    record, tile_px = model.record, params.tile_px
    if tile_px is None:
        tile_px = record.tile_px if record.sees_whole_tile else _TILE_PX
    elif record.sees_whole_tile and tile_px != record.tile_px:
        logger.warning(
            "encoder %r looks at whole tiles, so the result depends on tile_px: %d, trained with %d",
            *(record.encoder, tile_px, record.tile_px),
        )
    batch_size = _BATCH_SIZE.get(fabric.device.type, 1) if batch_size is None else batch_size
    side, channels = tile_px + 2 * record.halo_px, model.network.encoder.channels
    check_batch([(side, side)], batch_size, tile_px, channels, record.decoder, fabric.device)
    return Tiling(tile_px, record.halo_px, batch_size, params.n_symmetries)
