"""Regions that a call of `predict` asks for, and what their sums become in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

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
COUNTS, TOTAL = "expected_counts", "expected_total_counts"


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

    def describe(
        self, on_glass: NDArray[np.bool_], start: int, stop: int, weight: NDArray[np.float64] | None
    ) -> RowInfo:
        """List ids, centres and areas of some regions; `weight` counts tissue pixels, or all pixels ``on_glass``."""
        regions = self.regions.subset(np.arange(start, stop))
        px_um2 = self.slide.working_mpp**2
        obs = {"area_um2": regions.area * px_um2}
        if weight is not None:
            obs["tissue_area_um2"] = np.where(on_glass[start:stop], 0.0, weight * px_um2)
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
    if shapes_key is not None:
        return _at_shapes(sdata, slide, shapes_key, radius_um, key_added)
    if radius_um is not None:
        spacing = spacing_um if spacing_um is not None else 2 * radius_um
        pitch = f"radius_um={radius_um:g}" if spacing_um is None else f"spacing_um={spacing:g}"
        check_regions(pitch, spacing, slide, tissue)
        _check_size("radius_um", radius_um, 2 * radius_um, slide)
        grid = _grid_on_tissue(slide, tissue, spacing, f"radius_um={radius_um:g}, spacing_um={spacing:g}")
        ids = pd.RangeIndex(len(grid))
        return _circles(sdata, slide, grid, radius_um, f"{key_added}_circles_{radius_um:g}um", ids)
    if bin_um is not None:
        check_regions(f"bin_um={bin_um:g}", bin_um, slide, tissue)
        _check_size("bin_um", bin_um, bin_um, slide)
        grid = _grid_on_tissue(slide, tissue, bin_um, f"bin_um={bin_um:g}")
        transforms = image_transforms(sdata, slide.image_key)
        make = partial(squares_element, side_px=bin_um / slide.mpp, transforms=transforms)
        key = f"{key_added}_bins_{bin_um:g}um"
        return RegionRequest(key, f"{key}_shapes", make, grid, pd.RangeIndex(len(grid)), bin_um, slide)
    return None


def check_together(
    radius_um: float | None, spacing_um: float | None, bin_um: float | None, shapes_key: str | None
) -> None:
    """Refuse arguments of regions that do not go together."""
    if bin_um is not None and (radius_um is not None or shapes_key is not None):
        raise PixNetError("bin_um asks for bins over the tissue: leave out radius_um and shapes_key, or call twice.")
    if spacing_um is not None and (radius_um is None or shapes_key is not None):
        raise PixNetError("spacing_um is the pitch of a grid of circles: give it with radius_um, without shapes_key.")


def _check_size(name: str, value: float, width_um: float, slide: Slide) -> None:
    """Refuse regions of which most hold no pixel that the network sees."""
    if width_um < slide.working_mpp / 2:
        least = slide.working_mpp / 2 * value / width_um
        raise PixNetError(
            f"{name}={value:g}: smaller than the model's pixels, {slide.working_mpp:g} µm. Give {name}={least:g} or "
            "more."
        )


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


def _circles(
    sdata: SpatialData, slide: Slide, centred: Regions, radius_um: float, key: str, ids: pd.Index
) -> RegionRequest:
    """Circles about the centres of other regions."""
    transforms = image_transforms(sdata, slide.image_key)
    make = partial(circles_element, radius_px=radius_um / slide.mpp, transforms=transforms)
    radius = radius_um / slide.working_mpp
    if isinstance(centred, Lattice):
        about: Regions = replace(centred, radius=radius)
    else:
        about = Circles(centred.centre_xy, np.full(len(centred), radius))
    return RegionRequest(key, f"{key}_shapes", make, about, ids, 2 * radius_um, slide)


def _at_shapes(
    sdata: SpatialData, slide: Slide, shapes_key: str, radius_um: float | None, key_added: str
) -> RegionRequest:
    regions, ids = placed_regions(sdata, slide, shapes_key)
    key = f"{key_added}_{shapes_key}"
    if radius_um is not None:
        _check_size("radius_um", radius_um, 2 * radius_um, slide)
        most = float(np.hypot(*slide.working_shape)) * slide.working_mpp
        if radius_um > most:
            raise PixNetError(f"radius_um={radius_um:g}: the slide is {most:.0f} µm from corner to corner. Give less.")
        return _circles(sdata, slide, regions, radius_um, f"{key}_circles_{radius_um:g}um", ids)
    area = regions.subset(np.unique(np.linspace(0, len(regions) - 1, _SAMPLE).astype(np.int64))).area
    diameter_um = 2 * float(np.sqrt(np.median(area) / np.pi)) * slide.working_mpp
    return RegionRequest(key, shapes_key, None, regions, ids, diameter_um, slide)


def placed_regions(sdata: SpatialData, slide: Slide, shapes_key: str) -> tuple[Regions, pd.Index]:
    """Read the regions of a shapes or labels element that lie on the slide, working pixels, and their ids."""
    regions, ids = regions_of(
        sdata, shapes_key, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system
    )
    height, width = slide.working_shape
    keep = check_regions_on_image(regions, width=width, height=height, what=f"Element {shapes_key!r}")
    if keep.all():
        return regions, ids
    return regions.subset(np.flatnonzero(keep)), ids[keep]


def region_parts(regions: Regions, ids: pd.Index) -> dict[str, str]:
    """Hash where regions are, working pixels, and what they are called."""
    return {"regions": regions_sha256(regions), "ids": ids_sha256(ids)}


@dataclass(frozen=True)
class Units:
    """What the numbers of a prediction are, in words: of the map, of a table's ``X``, and of each layer."""

    map: str
    x: str
    layers: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Any]:
        """Entries for a table's ``uns``."""
        return {"X": self.x, "layers": self.layers}


def units_of(record: ModelRecord) -> Units:
    """Say in which units a model predicts."""
    logs = "log1p({:g} * {} / sum), natural logarithm, the sum over all genes measured"
    if record.objective == "mse_pcc":
        pooled = "sum over a region's pixels of" if record.aggregation == "sum" else "mean over a region's pixels of"
        measured = logs.format(record.target_sum, "counts")
        return Units(measured, f"{pooled} {measured}")
    counts = "expected counts in a region, at the mean depth of the training slides; they add up over regions"
    return Units("counts per µm²", logs.format(record.target_sum, COUNTS), {COUNTS: counts})


def express(model: PixNet, index: Sequence[int], n_columns: int) -> Express:
    """Choose how sums over regions, a column a gene (of counts one more for all) or a channel of D, become values."""
    import torch  # plots look for regions, and load none

    from pixnet_sd.model import apply_head, log_normalised

    record, head = model.record, model.network.head
    if record.objective == "mse_pcc" and n_columns == len(index):
        return partial(expression, aggregation=record.aggregation)
    weight, bias = (each.detach().cpu().float()[list(index)] for each in (head.weight, head.bias))

    @torch.inference_mode()
    def of_features(pooled: NDArray[np.float32], n_px: NDArray[np.float64]) -> Expressed:
        n_px_column = torch.from_numpy(n_px).float()[:, None]
        return Expressed(apply_head(torch.from_numpy(pooled), n_px_column, weight, bias, record.aggregation).numpy())

    def of_densities(sums: NDArray[np.float32], _n_px: NDArray[np.float64]) -> Expressed:
        """From sums of densities per µm² over pixels, the last column that of all genes."""
        expected = sums * np.float32(record.working_mpp**2)
        counts, total = np.ascontiguousarray(expected[:, :-1]), expected[:, -1:]
        x = log_normalised(torch.from_numpy(counts), torch.from_numpy(total), record.target_sum).numpy()
        return Expressed(x, {COUNTS: counts}, {TOTAL: total[:, 0]})

    return of_features if record.objective == "mse_pcc" else of_densities
