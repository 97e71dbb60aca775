"""The dense truth of a drawn slide: expected counts on a grid, in memory or from the store beside its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pixnet_sd._arguments import checked
from pixnet_sd._errors import DataError

from ._density import DENSITY_WINDOW, density_shape, fill_density
from ._integrals import integrate_on_grid
from ._room import check_memory
from ._slide import DrawnSlide
from ._tissue import Source

if TYPE_CHECKING:
    from xarray import DataArray

__all__ = ["TRUTH", "Truth", "visium_hd_truth", "write_truth"]

TRUTH = "truth.zarr"
"""Name of the store in the folder of a slide."""


@checked(DataError)
def visium_hd_truth(
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    pitch_um: float = 2.0,
    window_um: tuple[float, float, float, float] | None = None,
) -> DataArray:
    """Read the expected counts of a slide that :func:`write_visium_hd` wrote; values as of :func:`sample_truth`.

    Only the part of the store that the window needs is read: 20 bytes per µm², and 4 bytes per gene and pixel come
    back, so take a large slide by windows.

    Parameters
    ----------
    path
        The folder.
    genes
        Names of genes, in the order wanted; all if None.
    pitch_um
        Side of a pixel in µm.
    window_um
        Smallest x, smallest y, largest x, largest y from the full image's upper left corner, in µm. All pixels that it
        meets are given; the whole slide if None.

    Returns
    -------
    DataArray
        float32, dims ``c`` (genes), ``y``, ``x`` (pixel centres in µm), and ``attrs`` as of :func:`sample_truth`.

    Raises
    ------
    DataError
        If there is no truth at ``path``, a gene is unknown, or the window does not meet the slide.
    """
    truth = _open(Path(path))
    columns = slice(None) if genes is None else _columns(genes, truth.names)
    rows, cols = truth.pixels(pitch_um, window_um)
    n_genes = len(truth.names[columns])
    check_memory(4.0 * n_genes * len(rows) * len(cols), pitch_um=pitch_um, n_genes=n_genes)
    return truth.expected(pitch_um, rows, cols, columns)


@dataclass(frozen=True)
class Truth:
    """What expected counts are made of."""

    size_um: float
    names: NDArray[np.str_]
    varying: NDArray[np.bool_]
    profile: NDArray[np.float64]  # (sources, genes)
    density: Any  # (sources, rows, cols), an array or a zarr array

    @classmethod
    def of(cls, slide: DrawnSlide) -> Truth:
        """Truth of a slide in memory."""
        panel = slide.panel
        return cls(slide.size_um, np.array(panel.names), panel.varying, panel.profile, slide.density)

    def pixels(self, pitch_um: float, window_um: tuple[float, float, float, float] | None) -> tuple[range, range]:
        """Rows and columns of the pixels that a window meets; DataError if there are none."""
        if pitch_um > self.size_um:
            raise DataError(f"pitch_um={pitch_um:g}: give at most the slide's side, {self.size_um:g} µm.")
        side = int(np.ceil(self.size_um / pitch_um - 1e-6))
        left, top, right, bottom = window_um or (0.0, 0.0, self.size_um, self.size_um)
        rows, cols = (
            range(max(int(np.floor(low / pitch_um + 1e-6)), 0), min(int(np.ceil(high / pitch_um - 1e-6)), side))
            for low, high in ((top, bottom), (left, right))
        )
        if not rows or not cols:
            raise DataError(f"window_um={window_um} does not meet the slide, which is {self.size_um:g} µm a side.")
        return rows, cols

    def expected(
        self, pitch_um: float, rows: range, cols: range, columns: slice | NDArray[np.int64] = slice(None)
    ) -> DataArray:
        """Expected counts of some pixels and genes."""
        from xarray import DataArray

        made = integrate_on_grid(self.density, self.size_um, pitch_um, rows, cols)
        values = np.tensordot(self.profile[:, columns].T.astype(np.float32), made, axes=1)
        names, varying = self.names[columns], self.varying[columns]
        attrs = {
            "units": "expected counts per pixel",
            "pitch_um": float(pitch_um),
            "spatially_varying": names[varying].tolist(),
        }
        y, x = ((np.array(part) + 0.5) * pitch_um for part in (rows, cols))
        return DataArray(values, dims=("c", "y", "x"), coords={"c": names, "y": y, "x": x}, attrs=attrs)


def write_truth(path: Path, slide: DrawnSlide, n_workers: int | None) -> Any:
    """Write the store, window by window; returns the density of every source, a zarr array."""
    group = zarr.create_group(path, zarr_format=3)
    group.attrs.update(
        {
            "size_um": slide.size_um,
            "genes": slide.panel.names,
            "spatially_varying": slide.panel.varying.tolist(),
            "sources": [source.name.lower() for source in Source],
        }
    )
    group.create_array("profile", data=slide.panel.profile)
    density = group.create_array(
        "density",
        shape=density_shape(slide.size_um),
        chunks=(len(Source), DENSITY_WINDOW, DENSITY_WINDOW),
        dtype="float16",
        dimension_names=("source", "y", "x"),
    )
    return fill_density(slide.tissue, density, n_workers)


def _open(path: Path) -> Truth:
    if not (path / TRUTH).is_dir():
        raise DataError(f"No {TRUTH} in {path}. Give a folder that datasets.write_visium_hd wrote.")
    attrs: dict[str, Any] = dict(zarr.open_group(path / TRUTH, mode="r").attrs)
    profile, density = (zarr.open_array(path / TRUTH / name, mode="r") for name in ("profile", "density"))
    varying = np.array(attrs["spatially_varying"], dtype=bool)
    return Truth(attrs["size_um"], np.array(attrs["genes"]), varying, np.asarray(profile[:]), density)


def _columns(genes: Sequence[str], names: NDArray[np.str_]) -> NDArray[np.int64]:
    number = {name: k for k, name in enumerate(names.tolist())}
    unknown = [gene for gene in genes if gene not in number]
    if unknown:
        raise DataError(f"Genes that the slide does not have: {', '.join(unknown[:5])}. It has {len(number)} others.")
    return np.array([number[gene] for gene in genes], dtype=np.int64)
