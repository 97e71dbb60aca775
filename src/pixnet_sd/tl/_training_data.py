"""From SpatialData objects to training slides: genes, targets, and what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._fingerprint import content_sha256
from pixnet_sd._util import warn
from pixnet_sd.engine import MeasuredRegions, TrainingSlide
from pixnet_sd.engine.train import hold_out_blocks
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Regions
from pixnet_sd.slide import Slide, open_slide, regions_sha256
from pixnet_sd.slide.tables import (
    Measured,
    StoredTargets,
    Targets,
    choose_genes,
    measured,
    measured_regions,
    targets_of,
)

from ._checks import check_working_size

if TYPE_CHECKING:
    from pixnet_sd.params import ObjectiveName

__all__ = ["Source", "TrainingData", "Validation", "check_validation", "open_sources", "split_slides", "training_data"]

Validation = float | Sequence[str] | None

_FEW_REGIONS = 20

_SAMPLE = 1001  # regions whose mean area is taken


@dataclass(frozen=True)
class Source:
    """A slide with measured expression.

    Attributes
    ----------
    slide
        Its image.
    tables
        Its measured expression, one entry a table.
    """

    slide: Slide
    tables: list[Measured]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes
    ----------
    genes
        Genes to learn.
    training, held_out
        Slides with training regions, and with held-out ones.
    """

    genes: pd.Index
    training: list[TrainingSlide]
    held_out: list[TrainingSlide]


def open_sources(
    slides: Mapping[str, SpatialData],
    *,
    image_key: str | None,
    table_key: str | Sequence[str] | None,
    coordinate_system: str | None,
    mpp: float | Literal["coordinate_system"] | None,
    allow_any_mpp: bool,
    working_mpp: float,
) -> dict[str, Source]:
    """Open every slide and its tables; arguments as of :func:`pixnet_sd.tl.fit`."""
    sources = {}
    for name, sdata in slides.items():
        slide = open_slide(
            sdata,
            image_key=image_key,
            coordinate_system=coordinate_system,
            mpp=mpp,
            allow_any_mpp=allow_any_mpp,
            working_mpp=working_mpp,
            region_keys=measured_regions(sdata, table_key),
            name=name,
        )
        check_working_size(slide)
        sources[name] = Source(slide, measured(sdata, slide, table_key=table_key))
    return sources


def check_validation(validation: Validation, names: Sequence[str]) -> None:
    """Refuse names that do not fit the slides, before any of them is read."""
    _held_out_names(validation, names)


def _held_out_names(validation: Validation, names: Sequence[str]) -> list[str]:
    """Slides that are held out whole."""
    if validation is None or isinstance(validation, int | float):
        return []
    wanted = [validation] if isinstance(validation, str) else list(validation)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted or len(set(wanted)) == len(names):
        raise PixNetError(
            f"validation={wanted} must name some but not all of the slides {list(names)}. Give a share such as 0.1 to "
            "hold out spatial blocks, or None."
        )
    return wanted


def _block_share(validation: Validation) -> float | None:
    return float(validation) if isinstance(validation, int | float) else None


def _as_training_slide(source: Source, targets: Sequence[Targets]) -> TrainingSlide:
    height, width = source.slide.working_shape
    groups = tuple(
        MeasuredRegions(table.table_key, t.regions, t.values) for table, t in zip(source.tables, targets, strict=True)
    )
    return TrainingSlide(source.slide.name, source.slide.read, height, width, groups)


def training_data(
    sources: Mapping[str, Source],
    *,
    genes: Sequence[str] | None,
    n_genes: int | None,
    target_sum: float,
    objective: ObjectiveName,
    validation: Validation,
    seed: int,
    cache: Path,
) -> TrainingData:
    """Choose genes on the training slides and split off what is held out.

    Parameters
    ----------
    sources
        Slides by name.
    genes, n_genes, target_sum, objective, validation, seed
        As of :func:`pixnet_sd.tl.fit`.
    cache
        Folder for compact counts, where there are too many for memory.

    Returns
    -------
    Training and held-out slides.

    Raises
    ------
    PixNetError
        `validation` fits neither the slides nor a share.
    DataError
        Genes are missing, or counts cannot be used.
    StoreError
        Compact counts cannot be written.
    """
    held_names = _held_out_names(validation, list(sources))
    tables = {name: source.tables for name, source in sources.items() if name not in held_names}
    unseen = {name: sources[name].tables for name in held_names}
    chosen = choose_genes(tables, held_out=unseen, n_genes=n_genes, genes=genes, target_sum=target_sum)
    every = {name: source.tables for name, source in sources.items()}
    targets = targets_of(every, chosen, target_sum, cache, objective)
    slides = {name: _as_training_slide(source, targets[name]) for name, source in sources.items()}
    if objective != "mse_pcc":
        slides |= {slide.name: slide for slide in _with_depth([slides[name] for name in tables])}
    data = TrainingData(chosen, *split_slides(slides, validation, seed))
    n_regions = sum(len(table.regions) for slide in data.training for table in slide.measured)
    if n_regions < _FEW_REGIONS:
        warn(f"Only {n_regions} regions to learn from: too few for a model that holds elsewhere.")
    return data


def split_slides(
    slides: Mapping[str, TrainingSlide], validation: Validation, seed: int
) -> tuple[list[TrainingSlide], list[TrainingSlide]]:
    """Slides with what is trained on, and with what is held out.

    Parameters
    ----------
    slides
        Slides by name.
    validation, seed
        As of :func:`pixnet_sd.tl.fit`.

    Raises
    ------
    PixNetError
        `validation` fits neither the slides nor a share.
    """
    held_names = _held_out_names(validation, list(slides))
    share = _block_share(validation)
    training = [slide for name, slide in slides.items() if name not in held_names]
    if share is None:
        return training, [slides[name] for name in held_names]
    pairs = [hold_out_blocks(slide, share, seed + k) for k, slide in enumerate(training)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _with_depth(slides: list[TrainingSlide]) -> list[TrainingSlide]:
    """Slides with their counts per area, relative to the mean of all."""
    density = [np.mean([m.values.mean(axis=0)[-1] / _mean_area(m.regions) for m in slide.measured]) for slide in slides]
    mean = float(np.mean(density))
    return [replace(slide, depth=float(own) / mean) for slide, own in zip(slides, density, strict=True)]


def _mean_area(regions: Regions) -> float:
    picked = np.unique(np.linspace(0, len(regions) - 1, min(len(regions), _SAMPLE)).astype(np.int64))
    return float(regions.subset(picked).area.mean())


def describe(sources: Mapping[str, Source], data: TrainingData) -> dict[str, Any]:
    """What a checkpoint says of its slides: elements, resolution, and how many regions trained and were held out."""
    counts = {
        kind: {s.name: {m.size_name: len(m.regions) for m in s.measured} for s in slides}
        for kind, slides in (("training", data.training), ("held_out", data.held_out))
    }
    return {
        name: {
            "image": source.slide.image_key,
            "image_px": [source.slide.height_px, source.slide.width_px],
            "channels": list(source.slide.channels),
            "coordinate_system": source.slide.coordinate_system,
            "mpp": source.slide.mpp,
            "mpp_rule": source.slide.mpp_rule,
            "tables": {m.table_key: m.element_key for m in source.tables},
            "training_regions": counts["training"].get(name, {}),
            "held_out_regions": counts["held_out"].get(name, {}),
        }
        for name, source in sources.items()
    }


def data_parts(data: TrainingData) -> dict[str, Any]:
    """Hash what each slide trains on and is scored on: outlines of the regions, and their targets."""
    parts: dict[str, Any] = {}
    for kind, slides in (("training", data.training), ("held out", data.held_out)):
        for slide in slides:
            for group in slide.measured:
                hashes = {"regions": regions_sha256(group.regions), "targets": content_sha256(*_content(group.values))}
                parts.setdefault(slide.name, {})[f"{kind}, {group.size_name}"] = hashes
    return parts


def _content(values: Any) -> Iterator[str | NDArray[Any]]:
    """Targets themselves, or, of those on disk, the hash of their counts and which of them they are."""
    if not isinstance(values, StoredTargets):
        yield values
        return
    yield f"{values.counts.sha256} {values.target_sum}"
    if values.index is not None:
        yield values.index
