"""What a prediction will take, said before it is begun.

From sums over regions to what a table says of them, and in which units.

The gene map of a call of `predict`: whether it is there already, is to be written, or neither.

One call of `predict`: what is there already, the pass over the slide, and what comes of it.

Predict a slide: gene map, regions, table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from anndata import AnnData
from lightning_fabric import Fabric
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._fingerprint import differing_parts, fingerprint
from pixnet_sd._notes import stored_note
from pixnet_sd._util import logger
from pixnet_sd.engine import make_fabric
from pixnet_sd.engine.predict import BlockSink, Inference, InferSettings, RegionPlan, infer, plan_regions, window_side
from pixnet_sd.errors import CheckpointError, DataError, ElementError, PixNetError
from pixnet_sd.geometry import MAP_STRIDE, Circles, Grid, Window
from pixnet_sd.model import Factors, Head, ModelRecord, PixNet, apply_head, log_normalised, outputs_of
from pixnet_sd.params import PredictParams
from pixnet_sd.slide import PixelContent, Slide, check_on_disk, check_same_pixels, open_slide, tissue_mask
from pixnet_sd.slide.elements import affine_matrix
from pixnet_sd.slide.tables import check_genes
from pixnet_sd.store import (
    Express,
    Expressed,
    RegionResults,
    RegionWriter,
    attach_written,
    check_target,
    commit,
    expression,
    recorded,
    recover,
    region_table,
    size_text,
    thumbnail,
    written_by,
)
from pixnet_sd.store.gene_map import (
    FactorHead,
    GeneMapReader,
    GeneMapWriter,
    factor_names,
    factors_key,
    head_key,
    image_transforms,
    is_as_written,
    map_key,
    open_map,
    tissue_labels,
)

from ._checks import check_batch, check_map_um, check_working_size, map_parts, pixels_of, values_per_px, why_poor
from ._regions import RegionRequest, check_together, request_regions

__all__ = [
    "CoarseSink",
    "MapInfo",
    "PredictJob",
    "ReusedMap",
    "Units",
    "announce",
    "express",
    "find_factors",
    "find_map",
    "map_factor",
    "predict",
    "sink_of",
    "units_of",
]

_WRITTEN_PER_S = 150e6
"""Bytes that are compressed and written in a second while the network runs, roughly, on two cores."""


def announce(
    blocks: GeneMapWriter | None, rows: RegionWriter | None, n_tiles: int, seconds_per_tile: float | None
) -> None:
    """Log how much is to be computed and written, and how long that will take.

    Parameters
    ----------
    blocks, rows
        What will be written.
    n_tiles
        Tiles that go through the network.
    seconds_per_tile
        What one took; None: not measured, because there are few.
    """
    n_bytes = sum(writer.missing_bytes for writer in (blocks, rows) if writer is not None)
    time = ""
    if seconds_per_tile is not None:
        time = f", about {_duration(n_tiles * seconds_per_tile + n_bytes / _WRITTEN_PER_S)}"
    logger.info("%d tiles through the network%s, at most %s on disk", n_tiles, time, size_text(n_bytes))
    for what in (blocks, rows):
        if what is not None:
            logger.info("%s", what.summary())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


COUNTS, TOTAL = "expected_counts", "expected_total_counts"


@dataclass(frozen=True)
class Units:
    """What the numbers of a prediction are, in words.

    Attributes
    ----------
    map, x
        Of the map, and of a table's ``X``.
    layers
        Of each layer of a table.
    """

    map: str
    x: str
    layers: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Any]:
        """Entries for a table's ``uns``."""
        return {"X": self.x, "layers": self.layers}


def units_of(record: ModelRecord) -> Units:
    """Units of a model's predictions."""
    logs = "log1p({:g} * {} / sum), natural logarithm, the sum over all genes measured"
    if record.objective == "mse_pcc":
        pooled = "sum over a region's pixels of" if record.aggregation == "sum" else "mean over a region's pixels of"
        measured = logs.format(record.target_sum, "counts")
        return Units(measured, f"{pooled} {measured}")
    counts = "expected counts in a region, at the mean depth of the training slides; they add up over regions"
    return Units("counts per µm²", logs.format(record.target_sum, COUNTS), {COUNTS: counts})


def express(model: PixNet, index: NDArray[np.intp], n_columns: int) -> Express:
    """What makes values of the sums over regions.

    Parameters
    ----------
    model
        The model.
    index
        Genes that are predicted, among the model's.
    n_columns
        Columns of the sums: one a gene (and one for all of them, of a model of counts), or one for each channel of D.

    Returns
    -------
    See `Express`.
    """
    record, head = model.record, model.network.head
    if record.objective != "mse_pcc":
        return partial(_counts, px_um2=record.working_mpp**2, target_sum=record.target_sum)
    if n_columns == len(index):
        return partial(expression, aggregation=record.aggregation)
    weight, bias = (part.detach().cpu().float()[index] for part in (head.weight, head.bias))

    @torch.inference_mode()
    def values(pooled: NDArray[np.float32], n_px: NDArray[np.float64]) -> Expressed:
        n_px_column = torch.from_numpy(n_px).float()[:, None]
        return Expressed(apply_head(torch.from_numpy(pooled), n_px_column, weight, bias, record.aggregation).numpy())

    return values


def _counts(sums: NDArray[np.float32], _n_px: NDArray[np.float64], *, px_um2: float, target_sum: float) -> Expressed:
    """Of a model of counts, from sums of densities per µm² over pixels, the last column that of all genes."""
    expected = sums * np.float32(px_um2)
    counts, total = np.ascontiguousarray(expected[:, :-1]), expected[:, -1:]
    x = log_normalised(torch.from_numpy(counts), torch.from_numpy(total), target_sum).numpy()
    return Expressed(x, {COUNTS: counts}, {TOTAL: total[:, 0]})


@dataclass(frozen=True)
class MapInfo:
    """What decides the values of a gene map, besides its genes.

    Attributes
    ----------
    fingerprint
        Hash over model, image, resolution, tissue and averaging.
    factor
        Native map pixels per stored map pixel.
    depends_on
        What is hashed, part by part.
    """

    fingerprint: str
    factor: int
    depends_on: dict[str, Any]


def map_factor(map_um: float | None, slide: Slide, n_values: int) -> int:
    """Native map pixels per pixel of the map that is asked for; `n_values` is what a native one holds.

    Raises
    ------
    PixNetError
        `map_um` is not a whole multiple of the native pitch, so the map would have to be interpolated, or too large.
    """
    native = MAP_STRIDE * slide.working_mpp
    factor = 1.0 if map_um is None else map_um / native
    if factor < 1 - 1e-6 or abs(factor - round(factor)) > 1e-6:
        near = max(round(factor), 1) * native
        raise PixNetError(
            f"map_um={map_um}: map pixels are whole multiples of the native {native:g} µm. Give map_um={near:g}."
        )
    if map_um is not None:
        check_map_um(map_um, round(factor), slide, n_values)
    return round(factor)


@dataclass(frozen=True)
class ReusedMap:
    """A native gene map, or its factors, written by an earlier call with the same model and slide.

    Attributes
    ----------
    key
        Its name.
    reader
        Its pixels.
    channels
        Those of the genes that are asked for, or of D.
    has_features
        Whether it is D.
    """

    key: str
    reader: GeneMapReader
    channels: list[int]
    has_features: bool = False

    def covers(self, window: Window) -> bool:
        """Whether the map reaches over a window; all of it was predicted."""
        return window.row1 <= self.reader.shape[0] and window.col1 <= self.reader.shape[1]

    def read(self, window: Window) -> NDArray[np.float32]:
        """Values (genes, rows, columns) of a window, or D (C, rows, columns)."""
        return self.reader.read(*window, self.channels)


def find_map(sdata: SpatialData, key: str, info: MapInfo, genes: Sequence[str], slide: Slide) -> ReusedMap | None:
    """The map of an earlier call, if regions can be had from it exactly.

    That takes the same model, image and tissue, the native pitch (a coarser map has lost what the bilinear resize
    needs), all of the genes, and an image that was not aligned anew since.
    """
    reader = _reader(sdata, key, info, slide)
    if reader is None or not set(genes) <= set(reader.genes):
        return None
    return ReusedMap(key, reader, [reader.genes.index(gene) for gene in genes])


def find_factors(sdata: SpatialData, key: str, info: MapInfo, slide: Slide) -> ReusedMap | None:
    """The factors of an earlier call, under the same conditions; any genes can be had from them."""
    reader = _reader(sdata, key, info, slide)
    return None if reader is None else ReusedMap(key, reader, list(range(len(reader.genes) - 1)), has_features=True)


def _reader(sdata: SpatialData, key: str, info: MapInfo, slide: Slide) -> GeneMapReader | None:
    note = stored_note(sdata, "maps", key)
    if not note or key not in sdata.images:
        return None
    why_not = _why_not(sdata, key, note, info, slide)
    if why_not:
        logger.info("map %r is not read back, but computed anew: %s", key, why_not)
        return None
    return open_map(sdata, key)


def _why_not(sdata: SpatialData, key: str, note: Mapping[str, Any], info: MapInfo, slide: Slide) -> str:
    """Why a map that is there cannot be read back; empty if it can."""
    if note.get("fingerprint") != info.fingerprint:
        parts = differing_parts(note.get("depends_on", {}), info.depends_on)
        return f"it differs in {', '.join(map(repr, parts)) or 'its fingerprint'}"
    if note.get("factor") != 1:
        return "it is coarser than the native pitch"
    if not _lies_on(sdata, key, slide):
        return "the image was aligned anew since"
    if not is_as_written(sdata, key):
        return "it is not as it was written"
    return ""


def _lies_on(sdata: SpatialData, key: str, slide: Slide) -> bool:
    """Whether a native map still lies where its image does."""
    pitch = MAP_STRIDE * slide.working_scale
    try:
        found = affine_matrix(sdata.images[key], slide.coordinate_system)
    except ElementError:
        return False
    return bool(np.allclose(found, slide.to_system @ np.diag([pitch, pitch, 1.0]), rtol=1e-6))


class CoarseSink:
    """Averages blocks of the native map into the pixels of a coarser one.

    Parameters
    ----------
    writer
        Of the coarser map.
    factor
        Native pixels per coarse pixel.
    shape
        Native map size.
    """

    def __init__(self, writer: GeneMapWriter, factor: int, shape: tuple[int, int]) -> None:
        self._writer, self._factor, self._shape = writer, factor, shape
        self._coarse = {self._native(block): block for block in writer.blocks}

    def _native(self, block: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        height, width = self._shape
        row0, row1, col0, col1 = (v * self._factor for v in block)
        return row0, min(row1, height), col0, min(col1, width)

    @property
    def pending(self) -> list[tuple[int, int, int, int]]:
        """Blocks, native map pixels, that are not there yet."""
        return [self._native(block) for block in self._writer.pending]

    def write(self, block: tuple[int, int, int, int], values: NDArray[np.float32]) -> None:
        """Average a native block and write it."""
        f = self._factor
        rows, cols = (-values.shape[axis] % f for axis in (1, 2))
        padded = np.pad(values, ((0, 0), (0, rows), (0, cols)))
        n, height, width = padded.shape
        coarse = padded.reshape(n, height // f, f, width // f, f).mean(axis=(2, 4), dtype=np.float32)
        self._writer.write(self._coarse[block], coarse)


def sink_of(writer: GeneMapWriter, factor: int, shape: tuple[int, int]) -> BlockSink:
    """The writer itself at the native pitch, or one that averages."""
    return writer if factor == 1 else CoarseSink(writer, factor, shape)


_BLOCK_PX = 512  # native map pixels that a block of a coarser map may span


@dataclass
class PredictJob:
    """One call's pass over the slide and what comes of it."""

    sdata: SpatialData
    model: PixNet
    slide: Slide
    pixels: PixelContent
    tissue: NDArray[np.bool_]
    request: RegionRequest | None
    index: NDArray[np.intp]
    genes: list[str]
    info: MapInfo
    key_added: str
    store: Literal["map", "factors"]
    overwrite: bool

    def run(self, settings: InferSettings, fabric: Fabric, *, write_map: bool, show_progress_bar: bool) -> None:
        """Check that results can be written, predict, and write them all at once."""
        attach_written(self.sdata, self._names(write_map))
        there = self._there()
        write_map = write_map and not (self.map_key in there and self.info.factor == 1)
        write_map = write_map and not self._is_written("maps", self.map_key, self._map_identity, self._map_names())
        if not write_map and self._has_regions():
            key = self.map_key if self.request is None else self.request.table_key
            logger.info("%r of this model and slide is there already", key)
            return
        check_target(self.sdata, self._names(write_map), overwrite=self.overwrite)
        reused = next(iter(there.values()), None)
        # what takes less room is summed up over the regions
        n_columns, head = len(self.outputs), self._head()
        if head.is_linear and (reused is None or reused.has_features):
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
                shown=Factors(head.in_features) if self.store == "factors" else head,
                rows=rows,
                pooled=n_columns < len(self.outputs),
                stored=reused,
                announce=partial(announce, blocks, rows),
                show_progress_bar=show_progress_bar,
            )
            self._say_reused(reused, plan, found)
            self._commit(blocks, rows, plan.on_glass)

    @property
    def map_key(self) -> str:
        """Name of the image that is written."""
        return factors_key(self.key_added) if self.store == "factors" else map_key(self.key_added)

    def _there(self) -> dict[str, ReusedMap]:
        """What earlier calls have left that fits, under its name; factors first, as all can be had from them."""
        stored, factors = map_key(self.key_added), factors_key(self.key_added)
        found = {
            factors: find_factors(self.sdata, factors, self.info, self.slide),
            stored: find_map(self.sdata, stored, self.info, self.outputs, self.slide),
        }
        return {key: each for key, each in found.items() if each is not None}

    @property
    def outputs(self) -> list[str]:
        """What the map holds: the genes, and of counts their sum over all genes."""
        return outputs_of(self.genes, self.model.record.objective)

    @property
    def units(self) -> Units:
        """What the numbers are."""
        return units_of(self.model.record)

    def _head(self, index: NDArray[np.intp] | None = None) -> Head:
        """For the genes of this call, or others, and the sum of all; densities per µm²."""
        head, n_genes = self.model.network.head, len(self.model.genes)
        index = np.append(self.index if index is None else index, np.arange(n_genes, head.n_outputs))
        return head.select(index, scale=self.model.record.working_mpp**-2)

    def _names(self, write_map: bool) -> dict[str, str]:
        names = self._map_names() if write_map else {}
        return names if self.request is None else names | self._region_names(self.request)

    def _map_names(self) -> dict[str, str]:
        names = {self.map_key: "images", f"{self.map_key}_tissue": "labels"}
        return names | {head_key(self.map_key): "tables"} if self.store == "factors" else names

    def _region_names(self, request: RegionRequest) -> dict[str, str]:
        names = {request.table_key: "tables"}
        return names if request.make_shapes is None else names | {request.element_key: "shapes"}

    def _has_regions(self) -> bool:
        """Whether the regions that are asked for, if any, are there."""
        if self.request is None:
            return True
        key, identity = self.request.table_key, self._table_identity(self.request)
        return self._is_written("tables", key, identity, self._region_names(self.request))

    def _is_written(self, section: str, key: str, identity: str, names: dict[str, str]) -> bool:
        """Whether this very call has left its results, as when it was cut off while they were moved in."""
        found = written_by(self.sdata, section, key, identity, names)
        if found and self.overwrite:  # they replace what is in memory
            attach_written(self.sdata, names, again=True)
        return found

    @property
    def _map_identity(self) -> str:
        """Equal for two calls that write the same map."""
        parts = {"map": self.info.fingerprint, "factor": self.info.factor, "store": self.store, "outputs": self.outputs}
        return fingerprint(parts | {"place": self._place()})

    def _table_identity(self, request: RegionRequest) -> str:
        """Equal for two calls that write the same table."""
        parts = {"map": self.info.fingerprint, "diameter_um": request.diameter_um, "genes": self.genes}
        return fingerprint(parts | request.parts() | {"place": self._place()})

    def _place(self) -> dict[str, Any]:
        """Where the image lies, and with it the results."""
        transforms = image_transforms(self.sdata, self.slide.image_key)
        return {name: each.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for name, each in transforms.items()}

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
            genes=self.outputs if self.store == "map" else factor_names(self.model.network.head.in_features),
            shape=(height, width),
            pitch_image_px=pitch_um / self.slide.mpp,
            image_key=self.slide.image_key,
            fingerprint=self.info.fingerprint,
            block_px=None if self.info.factor == 1 else _power_of_two(_BLOCK_PX // self.info.factor),
            whole_channels=self.store == "factors",
            overwrite=self.overwrite,
        )

    def _region_writer(
        self, request: RegionRequest, n_columns: int, side: int, blocks: GeneMapWriter | None
    ) -> RegionWriter:
        return RegionWriter.open(
            self.sdata,
            table_key=request.table_key,
            shapes_key=None if request.make_shapes is None else request.element_key,
            n_regions=len(request.regions),
            genes=self.genes,
            n_columns=n_columns,
            n_layers=len(self.units.layers),
            fingerprint=fingerprint({"map": self.info.fingerprint, "window": side, **request.parts()}),
            overwrite=self.overwrite,
            also_needed=0 if blocks is None else blocks.missing_bytes,
        )

    def _say_reused(self, reused: ReusedMap | None, plan: RegionPlan, found: Inference) -> None:
        if reused is None or self.request is None:
            return
        logger.info(
            "gene map %r reused for the regions: %d tiles run, %d windows read back",
            *(reused.key, found.tiles_run, found.windows_reused),
        )
        if plan.on_glass.any():
            logger.info("%d regions lie off tissue, where the map is 0: their tiles are run", plan.on_glass.sum())

    def _commit(self, blocks: GeneMapWriter | None, rows: RegionWriter | None, on_glass: NDArray[np.bool_]) -> None:
        """Write everything, and note where it comes from."""
        check_same_pixels(self.slide, self.pixels)
        results = RegionResults()
        notes: dict[str, dict[str, Any]] = {}
        if rows is not None and self.request is not None:
            results = self._region_results(self.request, rows, on_glass)
            note = self._provenance() | self.units.table | {"identity": self._table_identity(self.request)}
            notes["tables"] = {self.request.table_key: note}
        if self.pixels.is_settled:
            notes["content"] = {self.slide.image_key: self.pixels.note()}
        if blocks is None:
            commit(
                self.sdata,
                results.elements,
                overwrite=self.overwrite,
                staged=results.staged,
                provenance=notes,
            )
            return
        pitch = MAP_STRIDE * self.slide.working_scale
        transforms = image_transforms(self.sdata, self.slide.image_key)
        elements: dict[str, Any] = {f"{self.map_key}_tissue": tissue_labels(self.tissue, pitch, transforms)}
        if self.store == "factors":
            elements[head_key(self.map_key)] = self._head_table()
        about = {"units": self.units.map, "identity": self._map_identity}
        notes["maps"] = {self.map_key: self._provenance() | about | asdict(self.info)}
        blocks.commit(elements, results, provenance=notes)

    def _head_table(self) -> AnnData:
        """Weights of all genes of the model, whichever are predicted for regions."""
        head = self._head(np.arange(len(self.model.genes)))
        names = outputs_of(self.model.genes, self.model.record.objective)
        parts = [head.weight, head.bias, *([] if head.is_linear else [head.unit])]
        return FactorHead(names, *(part.detach().cpu().numpy() for part in parts)).table(
            self.units.map, self.info.fingerprint
        )

    def _region_results(self, request: RegionRequest, rows: RegionWriter, on_glass: NDArray[np.bool_]) -> RegionResults:
        make_table = partial(
            region_table,
            genes=self.genes,
            region=request.element_key,
            spot_diameter_px=request.diameter_um / self.slide.mpp,
            picture=thumbnail(self.sdata, self.slide.image_key, channels=self.slide.pyramid.levels[0].channels),
            library_id=self.slide.coordinate_system,
            var=self.model.record.var,
            uns={"pixnet_sd": self._provenance() | self.units.table | self._depends_on(request)},
        )
        return rows.results(
            partial(request.describe, on_glass),
            make_table=make_table,
            express=express(self.model, self.index, rows.n_columns),
            shapes_key=None if request.make_shapes is None else request.element_key,
            make_shapes=request.make_shapes,
        )

    def _depends_on(self, request: RegionRequest) -> dict[str, Any]:
        """What the values of a table depend on and may change later: `check_current` compares it."""
        regions = {} if request.make_shapes is not None else request.parts()
        return {"depends_on": {"pixels": self.pixels.sha256, **regions}}

    def _provenance(self) -> dict[str, Any]:
        record = self.model.record
        return {
            "model_sha256": self.info.depends_on["model"]["weights"],
            "image": self.slide.image_key,
            "image_px": [self.slide.height_px, self.slide.width_px],
            "channels": list(self.slide.channels),
            "coordinate_system": self.slide.coordinate_system,
            "mpp": self.slide.mpp,
            "mpp_rule": self.slide.mpp_rule,
            "working_mpp": record.working_mpp,
            "objective": record.objective,
            "aggregation": record.aggregation,
            "target_sum": record.target_sum,
            "log_base": record.log_base,
        }


def _power_of_two(value: float) -> int:
    """Largest power of two not above a value, at least 32."""
    return max(32, 1 << max(int(value), 1).bit_length() - 1)


_TILE_PX = 1024
_BATCH_SIZE = {"cuda": 4}


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
    if write is None and radius_um is None and bin_um is None and shapes_key is None:
        raise PixNetError("Nothing to predict: write=None and no radius_um, bin_um or shapes_key.")
    params, store = PredictParams.read(predict_params), write or "map"
    recover(sdata)
    fabric = make_fabric(device)
    found = _model(sdata, model)
    _check_quality(found, params.allow_poor_model)
    index, names = _genes(found, genes)
    slide = open_slide(
        sdata,
        image_key=image_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
        allow_any_mpp=params.allow_any_mpp,
        working_mpp=found.record.working_mpp,
        element_key=shapes_key,
    )
    check_on_disk(sdata, slide.image_key, shapes_key)
    check_working_size(slide)
    batch_size = _BATCH_SIZE.get(fabric.device.type, 1) if batch_size is None else batch_size
    settings = _settings(found, params.tile_px, batch_size, params.n_symmetries)
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
    parts = map_parts(found, slide, pixels, tissue, n_symmetries=params.n_symmetries, tile_px=settings.tile_px)
    info = MapInfo(fingerprint(parts), factor, parts)
    job = PredictJob(sdata, found, slide, pixels, tissue, request, index, names, info, key_added, store, overwrite)
    job.run(settings, fabric, write_map=write is not None, show_progress_bar=show_progress_bar)


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
            f"{model.record.training.get('lr')}) or for longer; predict_params={{'allow_poor_model': True}} predicts "
            "all the same."
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
        raise PixNetError(
            f"Factors are kept at the native pitch only: leave out map_um={map_um:g}, or write='factors'."
        )
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
