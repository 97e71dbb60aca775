"""From the arguments of `fit` to the shape of the network and the settings of a run."""

from __future__ import annotations

from typing import Literal

from pixnet_sd._errors import PixNetError
from pixnet_sd.engine.settings import TrainSettings
from pixnet_sd.nn.grid import STRIDES
from pixnet_sd.nn.model import Aggregation, DecoderConfig
from pixnet_sd.nn.objectives import ObjectiveName

__all__ = ["Preset", "check_choices", "decoder_config", "default_aggregation", "train_settings"]

Preset = Literal["paper"] | None

DROPOUT = 0.5
"""Channel dropout of the decoder's laterals."""

MIN_WIDTH = 32
"""Fewest channels of a level, unless `decoder_width` itself is smaller."""

PCC_WEIGHT, PAPER_PCC_WEIGHT = 2.0, 0.5
"""λ of Eq. 6: the weight with the best correlation over left-out sections (`benchmarks/her2st.py`), and the paper's."""

_LEVELS = len(STRIDES)


def decoder_config(decoder_width: int, preset: Preset) -> DecoderConfig:
    """Shape of the decoder.

    By default every level of the pyramid is standardised and projected, to `decoder_width` channels at the coarsest
    stride and half as many at each finer one, where maps have four times the pixels, down to 32: the finest width is
    the rank of the gene map. ``preset="paper"`` feeds in the encoder's own channels, and every feed-forward is
    `decoder_width` wide (Eq. 3).
    """
    if preset == "paper":
        return DecoderConfig(widths=None, hidden=(decoder_width,) * (_LEVELS - 1))
    least = min(decoder_width, MIN_WIDTH)
    widths = tuple(max(decoder_width >> (_LEVELS - 1 - k), least) for k in range(_LEVELS))
    return DecoderConfig(widths=widths, hidden=tuple(2 * w for w in widths[:-1]), dropout=DROPOUT)


def default_aggregation(preset: Preset, objective: ObjectiveName) -> Aggregation:
    """Eq. 5 sums, and so do counts; the mean is what puts logarithms of several sizes on one scale."""
    return "sum" if preset == "paper" or objective != "mse_pcc" else "mean"


def check_choices(preset: Preset, objective: ObjectiveName, aggregation: Aggregation | None) -> None:
    """Options that do not go together."""
    if objective != "mse_pcc" and (preset == "paper" or aggregation == "mean"):
        raise PixNetError(
            f"objective={objective!r} sums densities: leave out aggregation= and preset=, which belong to 'mse_pcc'."
        )


def train_settings(
    *,
    preset: Preset,
    max_epochs: int,
    max_steps: int | None = None,
    lr: float,
    weight_decay: float,
    objective: ObjectiveName,
    pcc_weight: float | None,
    target_sum: float,
    tile_px: int,
    batch_size: int,
    patience: int | None,
    holds_out: bool,
    compile: bool,
    seed: int,
) -> TrainSettings:
    """Settings of a run.

    A run with held-out regions may stop at any epoch, so its rate stays constant; one of known length anneals it.
    ``preset="paper"``: Adam at a constant rate for all epochs, the last of which is kept; nothing jittered.
    """
    paper = preset == "paper"
    if pcc_weight is None:
        pcc_weight = PAPER_PCC_WEIGHT if paper else PCC_WEIGHT
    return TrainSettings(
        max_epochs=max_epochs,
        max_steps=max_steps,
        lr=lr,
        weight_decay=weight_decay,
        optimizer="adam" if paper else "adamw",
        anneal=not paper and not holds_out,
        objective=objective,
        pcc_weight=pcc_weight,
        target_sum=target_sum,
        tile_px=tile_px,
        batch_size=batch_size,
        patience=None if paper or not holds_out else patience,
        keep_best=not paper,
        stain_jitter=0.0 if paper else 0.05,
        compile=compile,
        seed=seed,
    )
