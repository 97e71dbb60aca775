"""Regions that a call of `predict` asks for, and what their sums become in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import MAP_STRIDE, Circles, Lattice, Regions
from pixnet_sd.slide import Slide, ids_sha256, regions_sha256
from pixnet_sd.slide.elements import check_regions_on_image, regions_of
from pixnet_sd.store import Express, Expressed, MakeShapes, RowInfo, circles_element, expression, squares_element
from pixnet_sd.store.gene_map import image_transforms

from ._checks import check_regions

if TYPE_CHECKING:
    from pixnet_sd.model import ModelRecord, PixNet


_SAMPLE = 5000  # regions whose median area is taken
COUNTS, TOTAL, ON_TISSUE = "expected_counts", "expected_total_counts", "on_tissue"
LOWER, UPPER = "lower", "upper"


@dataclass(frozen=True)
class RegionRequest:
    """Regions to predict, any number of them, in working pixels: what is said of each is said of a few at a time."""

    table_key: str
    element_key: str  # that the table will annotate
    make_shapes: MakeShapes | None  # makes that element from centres and ids; None for one that is there
    regions: Regions
    ids: pd.Index
    diameter_um: float  # at which a region is drawn: of a circle, a bin's side, else of a disk of the median area
    slide: Slide

    @property
    def names(self) -> dict[str, str]:
        """Name → type of the elements to be."""
        return {self.table_key: "tables"} | ({} if self.make_shapes is None else {self.element_key: "shapes"})

    @cached_property
    def parts(self) -> dict[str, str]:
        """Parts of the answer's fingerprint: where the regions are, and what they are called."""
        return region_parts(self.regions, self.ids)

    def describe(self, start: int, stop: int, weight: NDArray[np.float64] | None) -> RowInfo:
        """List ids, centres and areas of some regions; `weight` counts tissue pixels."""
        regions = self.regions.subset(np.arange(start, stop))
        px_um2 = self.slide.working_mpp**2
        obs: dict[str, NDArray[Any]] = {"area_um2": regions.area * px_um2}
        if weight is not None:
            obs |= {"tissue_area_um2": weight * px_um2, ON_TISSUE: weight > 0}
        return RowInfo(self.ids[start:stop], regions.centre_xy * self.slide.working_scale, obs)


def request_regions(
    sdata: SpatialData,
    slide: Slide,
    tissue: NDArray[np.bool_],
    *,
    radius_um: float | None,
    spacing_um: float | None,
    bin_um: float | None,
    shapes_key: str | None,
    key_added: str,
) -> RegionRequest | None:
    """Turn the arguments of `predict` into regions; None when none are asked for."""
    name, per_width = ("bin_um", 1.0) if radius_um is None else ("radius_um", 0.5)
    width_um = bin_um if radius_um is None else 2 * radius_um
    least_um = slide.working_mpp / 2
    if width_um is not None and width_um < least_um:  # most would hold no pixel that the network sees
        raise PixNetError(
            f"{name}={width_um * per_width:g}: smaller than the model's pixels, {slide.working_mpp:g} µm. Give "
            f"{name}={least_um * per_width:g} or more."
        )
    regions: Regions
    if shapes_key is not None:
        key = f"{key_added}_{shapes_key}"
        regions, ids = placed_regions(sdata, slide, shapes_key)
        if width_um is None:
            area = regions.subset(np.unique(np.linspace(0, len(regions) - 1, _SAMPLE).astype(np.int64))).area
            diameter_um = 2 * float(np.sqrt(np.median(area) / np.pi)) * slide.working_mpp
            return RegionRequest(key, shapes_key, None, regions, ids, diameter_um, slide)
        corners_um = float(np.hypot(*slide.working_shape)) * slide.working_mpp
        if width_um > 2 * corners_um:
            why = f"the slide is {corners_um:.0f} µm from corner to corner"
            raise PixNetError(f"radius_um={radius_um:g}: {why}. Give less.")
    elif width_um is None:
        return None
    else:
        key, pitch_um = key_added, width_um if spacing_um is None else spacing_um
        pitch = f"{name}={width_um * per_width:g}" if spacing_um is None else f"spacing_um={spacing_um:g}"
        check_regions(pitch, pitch_um, slide, tissue)
        regions = _grid_on_tissue(slide, tissue, pitch_um, pitch)
        ids = pd.RangeIndex(len(regions))
    transforms = image_transforms(sdata, slide.image_key)
    if radius_um is None:
        key += f"_bins_{width_um:g}um"
        make = partial(squares_element, side_px=width_um / slide.mpp, transforms=transforms)
    else:
        key += f"_circles_{radius_um:g}um"
        make = partial(circles_element, radius_px=radius_um / slide.mpp, transforms=transforms)
        radius = radius_um / slide.working_mpp
        if isinstance(regions, Lattice):
            regions = replace(regions, radius=radius)
        else:
            regions = Circles(regions.centre_xy, np.full(len(regions), radius))
    return RegionRequest(key, f"{key}_shapes", make, regions, ids, width_um, slide)


def check_together(
    radius_um: float | None, spacing_um: float | None, bin_um: float | None, shapes_key: str | None
) -> None:
    """Refuse arguments of regions that do not go together."""
    if bin_um is not None and (radius_um is not None or shapes_key is not None):
        raise PixNetError("bin_um asks for bins over the tissue: leave out radius_um and shapes_key, or call twice.")
    if spacing_um is not None and (radius_um is None or shapes_key is not None):
        raise PixNetError("spacing_um is the pitch of a grid of circles: give it with radius_um, without shapes_key.")


def _grid_on_tissue(slide: Slide, tissue: NDArray[np.bool_], pitch_um: float, what: str) -> Lattice:
    """Squares of a lattice over the slide, working pixels, whose centres lie on tissue."""
    pitch = pitch_um / slide.working_mpp
    height, width = slide.working_shape
    rows, cols = (np.floor(np.arange(pitch / 2, size, pitch) / MAP_STRIDE).astype(np.int64) for size in (height, width))
    row, col = (index.astype(np.int32) for index in np.nonzero(tissue[np.ix_(rows, cols)]))
    if not len(row):
        raise PixNetError(
            f"{what} gives no region: the slide is {width * slide.working_mpp:.0f} x {height * slide.working_mpp:.0f} "
            f"µm, of which {100 * tissue.mean():.1f} % was found to be tissue."
        )
    return Lattice(row, col, np.diag([pitch, pitch, 1.0]))


def placed_regions(sdata: SpatialData, slide: Slide, shapes_key: str) -> tuple[Regions, pd.Index]:
    """Read the regions of a shapes or labels element, working pixels, and their ids; refuse those of another slide."""
    regions, ids = regions_of(
        sdata, shapes_key, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system
    )
    height, width = slide.working_shape
    check_regions_on_image(regions, width=width, height=height, what=f"Element {shapes_key!r}")
    return regions, ids


def region_parts(regions: Regions, ids: pd.Index) -> dict[str, str]:
    """Hash where regions are, working pixels, and what they are called."""
    return {"regions": regions_sha256(regions), "ids": ids_sha256(ids)}


class Units(NamedTuple):
    """What the numbers of a prediction are, in words: of the map, of a table's ``X``, and of each layer."""

    map: str
    x: str
    layers: dict[str, str]


def units_of(record: ModelRecord, interval: float | None = None) -> Units:
    """Say in which units a model predicts, with what share of measurements between the layers of an interval."""
    logs = "log1p({:g} * {} / sum), natural logarithm, the sum over all genes measured"
    if record.objective == "mse_pcc":
        pooled = "sum over a region's pixels of" if record.aggregation == "sum" else "mean over a region's pixels of"
        measured = logs.format(record.target_sum, "counts")
        return Units(measured, f"{pooled} {measured}", {})
    counts = "expected counts in a region, at the mean depth of the training slides; they add up over regions"
    layers, x = {COUNTS: counts}, logs.format(record.target_sum, COUNTS)
    if interval is not None:
        known = "held-out" if record.training.get("scored_on") == "held_out" else "training"
        within = f"{interval:g} of what is measured, at {TOTAL}, by the scatter of {known} regions; as X"
        layers |= {LOWER: f"lower end of the middle {within}", UPPER: f"upper end of the middle {within}"}
    return Units("counts per µm²", x, layers)


def express(model: PixNet, index: Sequence[int], n_columns: int, interval: float | None = None) -> Express:
    """Choose how sums over regions, a column a gene (of counts one more for all) or a channel of D, become values.

    Those of counts get the ends of an interval that holds a share of what is measured.
    """
    import torch  # plots look for regions, and load none

    from pixnet_sd.model import apply_head, dispersion_of, log_normalised
    from pixnet_sd.model.noise import quantiles

    record, head = model.record, model.network.head
    if record.objective == "mse_pcc" and n_columns == len(index):
        return partial(expression, aggregation=record.aggregation)
    weight, bias = (each.detach().cpu().float()[list(index)] for each in (head.weight, head.bias))

    @torch.inference_mode()
    def of_features(pooled: NDArray[np.float32], n_px: NDArray[np.float64]) -> Expressed:
        n_px_column = torch.from_numpy(n_px).float()[:, None]
        return Expressed(apply_head(torch.from_numpy(pooled), n_px_column, weight, bias, record.aggregation).numpy())

    dispersion, area_um2 = dispersion_of(model), record.working_mpp**2

    def of_densities(sums: NDArray[np.float32], n_px: NDArray[np.float64]) -> Expressed:
        """From sums of densities per µm² over pixels, the last column that of all genes."""
        expected = sums * np.float32(area_um2)
        counts, total = np.ascontiguousarray(expected[:, :-1]), expected[:, -1:]

        def logs(values: torch.Tensor) -> NDArray[np.float32]:
            return log_normalised(values, torch.from_numpy(total), record.target_sum).numpy()

        mean, layers = torch.from_numpy(counts), {COUNTS: counts}
        if interval is not None and dispersion is not None:
            scatter = torch.from_numpy(dispersion.of(np.array(index)).at(n_px * area_um2))
            ends = map(logs, quantiles(mean, scatter, [(1 - interval) / 2, (1 + interval) / 2]))
            layers |= zip((LOWER, UPPER), ends, strict=True)
        return Expressed(logs(mean), layers, {TOTAL: total[:, 0]})

    return of_features if record.objective == "mse_pcc" else of_densities
