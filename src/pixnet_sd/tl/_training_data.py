"""From SpatialData objects to training slides: genes, targets, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from pixnet_sd._fingerprint import content_sha256
from pixnet_sd._util import warn
from pixnet_sd.engine import MeasuredRegions, TrainingSlide
from pixnet_sd.engine.train import hold_out_blocks
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Regions
from pixnet_sd.params import ObjectiveName
from pixnet_sd.slide import Slide, open_slide, regions_sha256
from pixnet_sd.slide.tables import Measured, StoredTargets, choose_genes, measured, measured_regions, targets_of

from ._checks import check_working_size, slide_note

Validation = float | Sequence[str] | None

_FEW_REGIONS = 20
_SAMPLE = 1001  # regions whose mean area is taken


class Source(NamedTuple):
    """A slide with its measured expression, one entry a table."""

    slide: Slide
    tables: list[Measured]


class TrainingData(NamedTuple):
    """Genes to learn, and slides with training regions and with held-out ones."""

    genes: pd.Index
    training: list[TrainingSlide]
    held_out: list[TrainingSlide]


def open_sources(
    slides: Mapping[str, SpatialData], *, table_key: str | Sequence[str] | None, **how: Any
) -> dict[str, Source]:
    """Open every slide (`how`: as `open_slide` takes it) and its tables."""
    sources = {}
    for name, sdata in slides.items():
        slide = open_slide(sdata, region_keys=measured_regions(sdata, table_key), **how).named(name)
        check_working_size(slide)
        sources[name] = Source(slide, measured(sdata, slide, table_key=table_key))
    return sources


def held_out_names(validation: Validation, names: Sequence[str]) -> list[str]:
    """Read which slides are held out whole."""
    if validation is None or isinstance(validation, int | float):
        return []
    wanted = [validation] if isinstance(validation, str) else list(validation)
    if not wanted or not set(wanted) <= set(names) or len(set(wanted)) == len(names):
        what = f"validation={wanted} must name some but not all of the slides {list(names)}"
        raise PixNetError(f"{what}. Give a share such as 0.1 to hold out spatial blocks, or None.")
    return wanted


def training_data(
    sources: Mapping[str, Source],
    *,
    genes: Sequence[str] | int | Literal["all"],
    target_sum: float,
    objective: ObjectiveName,
    validation: Validation,
    seed: int,
    cache: Path,
) -> TrainingData:
    """Choose genes on training slides, make targets, hold some out; counts too many for memory go to folder `cache`."""
    tables = {name: source.tables for name, source in sources.items()}
    unseen = {name: tables[name] for name in held_out_names(validation, list(sources))}
    seen = {name: own for name, own in tables.items() if name not in unseen}
    n_genes = genes if isinstance(genes, int) else None
    named = None if genes == "all" or isinstance(genes, int) else genes
    chosen = choose_genes(seen, held_out=unseen, n_genes=n_genes, genes=named, target_sum=target_sum)
    slides = {}
    for name, targets in targets_of(tables, chosen, target_sum, cache, objective).items():
        slide, (height, width) = sources[name].slide, sources[name].slide.working_shape
        keys = [table.table_key for table in tables[name]]
        groups = (MeasuredRegions(key, t.regions, t.values) for key, t in zip(keys, targets, strict=True))
        slides[name] = TrainingSlide(slide.name, slide.read, height, width, tuple(groups))
    if objective != "mse_pcc":  # counts per px², relative to the mean of all training slides
        density = {name: np.mean([_density(group) for group in slides[name].measured]) for name in seen}
        mean = float(np.mean(list(density.values())))
        slides |= {name: replace(slides[name], depth=float(own) / mean) for name, own in density.items()}
    data = TrainingData(chosen, *split_slides(slides, validation, seed))
    n_regions = sum(len(group.regions) for slide in data.training for group in slide.measured)
    if n_regions < _FEW_REGIONS:
        warn(f"Only {n_regions} regions to learn from: too few for a model that holds elsewhere.")
    return data


def sizes_of(data: TrainingData, working_mpp: float) -> dict[str, float]:
    """Give the median area of the training regions of each table, µm², in the order in which they are met."""
    areas: dict[str, list[float]] = {}
    for slide in data.training:
        for group in slide.measured:
            areas.setdefault(group.size_name, []).append(float(np.median(_sampled(group).area)) * working_mpp**2)
    return {name: float(np.mean(of_slides)) for name, of_slides in areas.items()}


def _sampled(group: MeasuredRegions) -> Regions:
    return group.regions.subset(np.unique(np.linspace(0, len(group.regions) - 1, _SAMPLE).astype(np.int64)))


def _density(group: MeasuredRegions) -> float:
    """Compute the mean counts of all genes per px²."""
    return float(group.values.mean(axis=0)[-1] / _sampled(group).area.mean())


def split_slides(
    slides: Mapping[str, TrainingSlide], validation: Validation, seed: int
) -> tuple[list[TrainingSlide], list[TrainingSlide]]:
    """Split slides into what is trained on and what is held out: spatial blocks of each, or whole slides."""
    if isinstance(validation, int | float):
        pairs = [hold_out_blocks(slide, float(validation), seed + k) for k, slide in enumerate(slides.values())]
        return [training for training, _ in pairs], [held_out for _, held_out in pairs]
    unseen = held_out_names(validation, list(slides))
    return [slide for name, slide in slides.items() if name not in unseen], [slides[name] for name in unseen]


def describe(sources: Mapping[str, Source], data: TrainingData) -> dict[str, Any]:
    """Describe slides for a checkpoint: elements, resolution, and how many regions trained and were held out."""
    training, held_out = (
        {slide.name: {m.size_name: len(m.regions) for m in slide.measured} for slide in slides}
        for slides in (data.training, data.held_out)
    )
    return {
        name: {
            **slide_note(slide),
            "tables": {m.table_key: m.element_key for m in tables},
            "training_regions": training.get(name, {}),
            "held_out_regions": held_out.get(name, {}),
        }
        for name, (slide, tables) in sources.items()
    }


def data_parts(data: TrainingData) -> dict[str, Any]:
    """Hash what each slide trains on and is scored on: outlines of the regions, and their targets."""
    parts: dict[str, Any] = {}
    for use, slides in (("training", data.training), ("held out", data.held_out)):
        for slide in slides:
            for group in slide.measured:
                values: list[Any] = [group.values]
                if isinstance(group.values, StoredTargets):  # the hash of their counts, and which of them they are
                    stored = group.values
                    values = [f"{stored.counts.sha256} {stored.target_sum}"]
                    values += [] if stored.index is None else [stored.index]
                hashes = {"regions": regions_sha256(group.regions), "targets": content_sha256(*values)}
                parts.setdefault(slide.name, {})[f"{use}, {group.size_name}"] = hashes
    return parts
