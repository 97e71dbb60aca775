"""One call of `predict`: what is there already, the pass over the slide, and what comes of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from lightning_fabric import Fabric
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._fingerprint import fingerprint
from pixnet_sd._logging import logger
from pixnet_sd.engine.infer import Inference, infer
from pixnet_sd.engine.region_plan import RegionPlan, plan_regions
from pixnet_sd.engine.visits import window_side
from pixnet_sd.engine.window_pass import InferSettings
from pixnet_sd.nn.grid import Grid
from pixnet_sd.nn.head import Factors, Head
from pixnet_sd.nn.model import MAP_STRIDE
from pixnet_sd.nn.regions import Circles
from pixnet_sd.slide import PixelContent, Slide, check_same_pixels
from pixnet_sd.store import (
    FactorHead,
    GeneMapWriter,
    PixNet,
    RegionResults,
    RegionWriter,
    attach_written,
    check_target,
    commit,
    factor_names,
    factors_key,
    head_key,
    image_transforms,
    map_key,
    outputs_of,
    region_table,
    thumbnail,
    tissue_labels,
    written_by,
)

from ._announce import announce
from ._express import Units, express, units_of
from ._map_request import MapInfo, ReusedMap, find_factors, find_map, sink_of
from ._region_request import RegionRequest

__all__ = ["PredictJob"]

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
