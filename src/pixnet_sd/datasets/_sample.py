"""The drawn sample as a SpatialData object, and its truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from pixnet_sd._arguments import checked
from pixnet_sd._errors import DataError

from ._elements import CELLS, ElementNames, bin_elements, cell_elements, image_elements
from ._lattice import BASE_UM
from ._room import check_memory, density_bytes, image_bytes
from ._slide import DrawnSlide
from ._truth import Truth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData
    from xarray import DataArray

__all__ = ["sample", "sample_truth", "sample_truth_bins"]

_BIN_BYTES = 100  # of a bin's polygon and counts, at the least
_ON_TISSUE = 0.5  # of the bins, at the least


@checked(DataError)
def sample(
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    bin_um: Sequence[int] = (2, 8, 16),
    n_genes: int = 40,
    dataset_id: str = "sample",
    cells: bool = False,
    seed: int = 0,
) -> SpatialData:
    """Draw H&E tissue with expression that follows from what is drawn, shaped as ``spatialdata_io.visium_hd`` does.

    The tissue has fibrous stroma, glands with a lumen, tumour nests, and immune cells, on empty glass. Every
    nucleus and every area expresses by its kind and its surroundings: the same small dark nucleus makes *MS4A1* in
    an infiltrate, *CD68* in stroma, *GZMB* inside a tumour nest, and a tumour nest's outer cells make *MKI67*, its
    inner ones *VEGFA*. Some genes (*ACTB*, *GAPDH*, ...) have a constant density all over the tissue. Transcripts
    lie about their nucleus and diffuse by 2 µm along each axis (standard deviation) before they are caught. Counts are
    Poisson draws around the density's integral over each turned 2 µm bin times the bin's library size: log-normal with
    mean 1, the product of a smooth field (sigma 0.25, period 300 µm) and of each bin's own factor (sigma 0.5). Larger
    bins are exact sums of the 2 µm ones.

    Parameters
    ----------
    size_um
        Side of the square slide in µm, at least 100. Everything is held in memory and each bin is a polygon: up to
        about 3000 (2 million bins of 2 µm) is reasonable, beyond it see :func:`write_visium_hd`, which writes the same
        slide as a folder.
    mpp
        µm per pixel of the full image.
    bin_um
        Bin sizes in µm, out of 2, 4, 8 and 16.
    n_genes
        Number of genes: 34 named ones, then fillers ``GENE001``, ... whose total does not grow with their number.
    dataset_id
        Prefix of element names.
    cells
        Add segmented cells: nuclei as drawn, grown by 3 µm, with the sums of the 2 µm bins whose centre they cover.
    seed
        Another seed draws other tissue. Genes, their profiles, and the stains stay the same.

    Returns
    -------
    SpatialData
        ``images``: ``{id}_full_image`` (multiscale, uint8, c y x), ``{id}_hires_image``, ``{id}_lowres_image``.
        ``shapes``: ``{id}_square_002um``, ... squares in pixels of the full image. ``tables``: ``square_002um``, ...
        with raw counts (float32, CSR) of the bins on tissue and ``var["spatially_varying"]``. With ``cells``, shapes
        ``{id}_cell_segmentations`` and table ``cell_segmentations``. Coordinate systems: ``{id}``,
        ``{id}_downscaled_hires``, ``{id}_downscaled_lowres``.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    from spatialdata import SpatialData

    sizes = tuple(sorted(set(bin_um)))
    bins_bytes = sum(_BIN_BYTES * (size_um / um) ** 2 for um in sizes)
    check_memory(density_bytes(size_um) + image_bytes(size_um, mpp) + bins_bytes, size_um=size_um, mpp=mpp)
    slide = DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    names = ElementNames(dataset_id, slide)
    bands = list(slide.bands(slide.density))
    shapes, tables = bin_elements(slide, bands, sizes, names)
    if cells:
        shapes[names.cells], tables[CELLS] = cell_elements(slide, bands, names)
    return SpatialData(images=image_elements(slide, names), shapes=shapes, tables=tables)


@checked(DataError)
def sample_truth(
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    n_genes: int = 40,
    seed: int = 0,
    pitch_um: float = 2.0,
) -> DataArray:
    """Compute the expected counts of :func:`sample` at every pixel of a grid in the image's frame.

    Pixel (i, j) covers [i, i + 1) × [j, j + 1) times ``pitch_um``, from the full image's upper left corner. Sums of
    pixels are expected counts of the area they cover; divided by ``pitch_um²`` the values are a density per µm². They
    are what lies in the tissue, diffusion included: library sizes, which belong to bins and have mean 1, take no part.
    Give the arguments that :func:`sample` was given. For the means of its bins see :func:`sample_truth_bins`.

    Parameters
    ----------
    size_um, mpp, n_genes, seed
        As in :func:`sample`.
    pitch_um
        Side of a pixel in µm.

    Returns
    -------
    DataArray
        float32, dims ``c`` (genes), ``y``, ``x`` (pixel centres in µm). ``attrs``: ``units``, ``pitch_um``, and
        ``spatially_varying``, the names of the genes that vary over the tissue.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    values = 4 * n_genes * (size_um / pitch_um) ** 2
    check_memory(density_bytes(size_um) + values, size_um=size_um, pitch_um=pitch_um, n_genes=n_genes)
    truth = Truth.of(DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed))
    return truth.expected(pitch_um, *truth.pixels(pitch_um, None))


@checked(DataError)
def sample_truth_bins(
    bin_um: int = 8,
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    n_genes: int = 40,
    seed: int = 0,
    library_size: bool = True,
) -> pd.DataFrame:
    """Compute the Poisson means of the counts in a table of :func:`sample`.

    Parameters
    ----------
    bin_um
        Bin size of the table in µm.
    size_um, mpp, n_genes, seed
        As in :func:`sample`.
    library_size
        Means as the counts have them, with the library size of each 2 µm bin. Without, what lies in the bins: the
        integral of :func:`sample_truth` over them.

    Returns
    -------
    DataFrame
        Expected counts, bins × genes, in the order and with the names of the table.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    values = 8 * n_genes * (size_um / bin_um) ** 2
    check_memory(density_bytes(size_um) + _ON_TISSUE * values, size_um=size_um, n_genes=n_genes)
    slide = DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    expected = slide.expected()
    base, bins = (slide.lattice.bins_on(um, expected.on_tissue) for um in (BASE_UM, bin_um))
    caught = expected.sources * expected.library[:, None] if library_size else expected.sources
    means = (bins.gather(base) @ caught) @ slide.panel.profile
    return pd.DataFrame(means, index=bins.names, columns=slide.panel.names)
