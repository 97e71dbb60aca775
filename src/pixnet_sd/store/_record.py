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
from pixnet_sd._files import read_regular
from pixnet_sd._schemas import RecordSchema, parse_json, shown, validated, what_is_wrong
from pixnet_sd.nn.head import Link
from pixnet_sd.nn.model import Aggregation, DecoderConfig
from pixnet_sd.nn.objectives import ObjectiveName

from ._checksums import check_file
from ._provenance import json_safe

__all__ = ["CONFIG", "FORMAT", "TOTAL", "ModelRecord", "library_versions", "link_of", "outputs_of", "read_record"]

FORMAT = "pixnet_sd/2"

CONFIG = "config.json"
_MOST_BYTES = 32 << 20

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

    def check(self) -> None:
        """Look whether `read_record` will take what `to_json` gives.

        Raises
        ------
        CheckpointError
            A field has a value that no record has.
        """
        try:
            validated(RecordSchema, parse_json(self.to_json().encode()))
        except ValueError as error:
            raise CheckpointError(f"The model's record cannot be saved: {what_is_wrong(error)}.") from error


def read_record(folder: Path) -> ModelRecord:
    """Read ``config.json``.

    Parameters
    ----------
    folder
        Of the model.

    Returns
    -------
    The record.

    Raises
    ------
    CheckpointError
        There is none, it is damaged, or it is not one of ours.
    """
    path = folder / CONFIG
    content = _content(path)
    missing = [f.name for f in fields(ModelRecord) if f.name not in content]
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks {missing}. Restore it, or train again.")
    try:
        validated(RecordSchema, content)
    except ValueError as error:
        raise CheckpointError(_damaged(path, error)) from error
    check_file(path)
    return ModelRecord(**{f.name: content[f.name] for f in fields(ModelRecord)})


def _content(path: Path) -> dict[str, Any]:
    """What the file holds, if it says that it is ours."""
    try:
        text = read_regular(path, most_bytes=_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{_no_checkpoint(path.parent)} Give the folder that fit left.") from error
    try:
        content = parse_json(text, allow_nan=True)  # so that the field is named that has it
    except ValueError as error:
        raise CheckpointError(_damaged(path, error)) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found == FORMAT:
        return dict(content)
    earlier = isinstance(found, str) and found.startswith(FORMAT.partition("/")[0] + "/")
    remedy = (
        "Train again, or install the version of pixnet_sd that it was made with."
        if earlier
        else "Weights of an encoder alone go to fit(encoder_weights=...)."
    )
    raise CheckpointError(
        f"{str(path)!r} is not a checkpoint of this package: its format is {shown(found)}, and {FORMAT!r} is "
        f"needed. {remedy}"
    )


def _damaged(path: Path, error: ValueError) -> str:
    return f"{str(path)!r} is damaged ({what_is_wrong(error)}). Restore it, or train again."


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
