"""What a checkpoint says of its model: ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from pixnet_sd._errors import CheckpointError
from pixnet_sd.nn.head import Link
from pixnet_sd.nn.model import Aggregation, DecoderConfig
from pixnet_sd.nn.objectives import ObjectiveName

from ._provenance import json_safe

__all__ = [
    "FORMAT",
    "TOTAL",
    "ModelRecord",
    "library_versions",
    "link_of",
    "outputs_of",
    "read_record",
    "write_json_atomically",
]

FORMAT = "pixnet_sd/1"

TOTAL = "total_counts"
"""Name of the output that is the sum over all genes, as scanpy calls it."""
_LIBRARIES = ("pixnet_sd", "torch", "timm", "numpy", "spatialdata", "anndata")


def link_of(objective: ObjectiveName) -> Link:
    """Link of the head for an objective."""
    return "identity" if objective == "mse_pcc" else "softplus"


def outputs_of(genes: Sequence[str], objective: ObjectiveName) -> list[str]:
    """What a head gives: the genes, and of counts their sum over all genes that were measured."""
    return [*genes] if objective == "mse_pcc" else [*genes, TOTAL]


@dataclass
class ModelRecord:
    """Everything that a prediction needs to know besides the weights, and where the model comes from.

    Attributes
    ----------
    genes
        Names, in the order of the head; a model of counts has one more output, the sum over all genes of the tables.
    target_sum
        Counts per region after scaling; targets are ``log1p(target_sum * x / sum(x))``, the sum over all genes.
    log_base
        Base of that logarithm, always ``"e"``.
    objective
        ``"mse_pcc"``, or ``"poisson"`` or ``"nb"`` for a model of counts.
    aggregation
        ``"mean"`` or ``"sum"``.
    working_mpp
        µm per pixel at which the network sees a slide.
    encoder
        timm name.
    encoder_weights, encoder_sha256
        Where the encoder's weights came from (``"imagenet"``, a file's name, or None), and their hash before training.
    freeze_encoder
        Whether the encoder was kept as it was.
    decoder
        Shape of the decoder.
    tile_px
        Side of the training tiles, working px.
    halo_px
        How far the network sees, working px.
    sees_whole_tile
        True for encoders with global operations, whose predictions depend on the tile size.
    weights_sha256
        Hash of all weights; set when saving.
    training
        Settings of the run: preset, learning rate, epochs, pcc_weight, seed ...
    depends_on
        Hashes and settings that the training run depended on, part by part.
    slides
        Training slides: elements, mpp, regions per table, and how they were split.
    held_out_pcc
        Per gene Pearson correlation over held-out regions; None where unknown.
    history
        One row an epoch.
    versions
        Of the libraries.
    format
        Of this file.
    """

    genes: list[str]
    target_sum: float
    objective: ObjectiveName
    aggregation: Aggregation
    working_mpp: float
    encoder: str
    encoder_weights: str | None
    encoder_sha256: str
    freeze_encoder: bool
    decoder: DecoderConfig
    tile_px: int
    halo_px: int
    sees_whole_tile: bool
    log_base: str = "e"
    weights_sha256: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    depends_on: dict[str, Any] = field(default_factory=dict)
    slides: dict[str, Any] = field(default_factory=dict)
    held_out_pcc: list[float | None] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT

    def __post_init__(self) -> None:
        if isinstance(self.decoder, dict):
            shape = dict(self.decoder)
            widths = shape.pop("widths")
            self.decoder = DecoderConfig(
                widths=None if widths is None else tuple(widths), hidden=tuple(shape.pop("hidden")), **shape
            )

    @property
    def outputs(self) -> list[str]:
        """What the head gives."""
        return outputs_of(self.genes, self.objective)

    @property
    def var(self) -> pd.DataFrame:
        """Columns by gene for predicted tables, ``held_out_pcc`` when known."""
        frame = pd.DataFrame(index=pd.Index(self.genes))
        if self.held_out_pcc:
            frame["held_out_pcc"] = pd.Series(self.held_out_pcc, index=frame.index, dtype="float64")
        return frame

    def to_json(self) -> str:
        """Text of ``config.json``; NaN becomes null."""
        return json.dumps(json_safe(asdict(self)), indent=2)


def read_record(path: Path) -> ModelRecord:
    """Read ``config.json``.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    The record.

    Raises
    ------
    CheckpointError
        There is none, it is damaged, or it is not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{_no_checkpoint(path.parent)} Give the folder that fit left.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}). Restore it, or train again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of this package: its format is {found!r}, and {FORMAT!r} is needed. "
            "Weights of an encoder alone go to fit(encoder_weights=...)."
        )
    known = {f.name for f in fields(ModelRecord)}
    missing = [f.name for f in fields(ModelRecord) if f.name not in content]
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks {missing}. Restore it, or train again.")
    try:
        return ModelRecord(**{k: v for k, v in content.items() if k in known})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"its decoder is {content['decoder']!r}"
        raise CheckpointError(f"{str(path)!r} is damaged ({what}). Restore it, or train again.") from error


def _no_checkpoint(folder: Path) -> str:
    if not folder.exists():
        return f"There is no folder {str(folder)!r}."
    if not folder.is_dir():
        return f"{str(folder)!r} is a file, and a checkpoint is a folder."
    return f"{str(folder)!r} is no pixnet_sd checkpoint: it has no config.json."


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree that was never installed
            found[name] = "unknown"
    return found


def write_json_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
