"""What a checkpoint says of its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from pixnet_sd.model import ModelRecord

__all__ = ["describe_checkpoint"]

_FEW = 8


def describe_checkpoint(folder: Path) -> str:
    """Lines on genes, objective, encoder, training slides and held-out PCC."""
    from pixnet_sd.model import read_record

    record = read_record(folder)
    weights = "random weights" if record.encoder_weights is None else f"weights {record.encoder_weights}"
    frozen = ", frozen" if record.freeze_encoder else ""
    lines = [
        f"{folder}: pixnet_sd checkpoint",
        f"  genes: {len(record.genes)}: {_some(record.genes)}",
        f"  objective: {record.objective}, aggregation: {record.aggregation}, target_sum: {record.target_sum:g}",
        f"  encoder: {record.encoder}, {weights}{frozen}",
        f"  resolution: {record.working_mpp:g} µm per pixel, map pixels of {4 * record.working_mpp:g} µm",
        f"  tiles in training: {record.tile_px} px; sees {record.halo_px} px around",
        *_epochs(record),
        *_slides(record),
        *_held_out(record),
    ]
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")


def _epochs(record: ModelRecord) -> list[str]:
    best = record.training.get("best_epoch")
    return [] if best is None else [f"  epochs: {len(record.history)}, of which {best} was kept"]


def _slides(record: ModelRecord) -> list[str]:
    lines = [f"  training slides: {len(record.slides)}"]
    for name, slide in record.slides.items():
        trained, held = (_regions(slide.get(key, {})) for key in ("training_regions", "held_out_regions"))
        mpp = slide.get("mpp", float("nan"))
        lines.append(f"    {name}: {mpp:.4g} µm per pixel; trained on {trained}; held out {held}")
    return lines


def _regions(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} of {table}" for table, n in counts.items() if n) or "none"


def _held_out(record: ModelRecord) -> list[str]:
    pcc = pd.Series(record.held_out_pcc, index=record.genes[: len(record.held_out_pcc)], dtype=float).dropna()
    if pcc.empty:
        return ["  held-out PCC: unknown, nothing was held out"]
    best = pcc.sort_values(ascending=False)[:_FEW]
    return [
        f"  held-out PCC: first quartile {pcc.quantile(0.25):.3f}, median {pcc.median():.3f}, mean {pcc.mean():.3f}",
        "    best: " + ", ".join(f"{gene} {value:.2f}" for gene, value in best.items()),
    ]
