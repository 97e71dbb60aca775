"""Hashes of a model's files, in ``checksums.json``: made when they are written, and looked at when they are read.

What a checkpoint says of its model: ``config.json``.

The model card of a checkpoint: everything in it is read off the checkpoint's record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from pixnet_sd._files import hash_regular, read_regular
from pixnet_sd._schemas import ChecksumsSchema, FileSchema, RecordSchema, parse_json, shown, validated, what_is_wrong
from pixnet_sd.errors import CheckpointError
from pixnet_sd.store import json_safe

from ._network import Aggregation, DecoderConfig, Link
from ._objectives import ObjectiveName

__all__ = [
    "CHECKSUMS",
    "CONFIG",
    "FORMAT",
    "TAGS",
    "TOTAL",
    "ModelRecord",
    "card_text",
    "check_file",
    "library_versions",
    "link_of",
    "outputs_of",
    "read_record",
    "write_checksums",
]

CHECKSUMS = "checksums.json"

_MOST_BYTES = 1 << 16


def write_checksums(folder: Path, names: list[str]) -> None:
    """Write the hashes of some files of a folder beside them."""
    files = {name: _checksum(folder / name).model_dump() for name in names}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")


def check_file(path: Path, *, most_bytes: int | None = None) -> None:
    """Look whether a file of a model is as it was written.

    Parameters
    ----------
    path
        The file, in the folder of its model.
    most_bytes
        Largest size that it can have, whatever was noted.

    Raises
    ------
    CheckpointError
        It is missing, no regular file or another one than was written; or nothing is known of it.
    """
    noted = _noted(path)
    try:
        found = _checksum(path, most_bytes=noted.bytes if most_bytes is None else min(noted.bytes, most_bytes))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{str(path)!r} is missing, and a model has it. Restore it, or train again.") from error
    if found != noted:
        raise CheckpointError(
            f"{str(path)!r} is not as it was written, says {CHECKSUMS} beside it: it was truncated, changed by "
            "hand or replaced, or saving was cut off. Restore the folder, or train again."
        )


def _checksum(path: Path, *, most_bytes: int | None = None) -> FileSchema:
    n_bytes, sha256 = hash_regular(path, most_bytes=most_bytes)
    return FileSchema(bytes=n_bytes, sha256=sha256)


def _noted(path: Path) -> FileSchema:
    where = path.with_name(CHECKSUMS)
    try:
        noted = validated(ChecksumsSchema, parse_json(read_regular(where, most_bytes=_MOST_BYTES)))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{str(path.parent)!r} has no {CHECKSUMS}, so nobody knows whether the model in it is whole: it was copied "
            "in part, or saving was cut off. Restore the folder, or train again."
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{str(where)!r} is damaged ({what_is_wrong(error)}). Restore it, or train again."
        ) from error
    if path.name not in noted.files:
        raise CheckpointError(f"{str(where)!r} is damaged ({path.name} is not in it). Restore it, or train again.")
    return noted.files[path.name]


FORMAT = "pixnet_sd/2"

CONFIG = "config.json"
_MOST_BYTES_RECORD = 32 << 20

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
        text = read_regular(path, most_bytes=_MOST_BYTES_RECORD)
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


TAGS = ("histology", "pixnet", "spatial-transcriptomics", "spatialdata")
"""What the hub files a model under."""

_SHOWN = 10
"""Genes at either end of the table of scores; all of them are in ``config.json``."""

_OBJECTIVES = {
    "mse_pcc": "squared error and correlation of log-normalised expression (Eq. 6 of the paper)",
    "poisson": "Poisson likelihood of raw counts",
    "nb": "negative binomial likelihood of raw counts",
}


def card_text(record: ModelRecord, *, repo_id: str, license: str | None) -> str:
    """Body of the model card, Markdown without the metadata block.

    Parameters
    ----------
    record
        Of the model.
    repo_id
        Where the model is, for the example: ``"owner/name"`` or a folder.
    license
        Identifier that the metadata has, or None: the card then says that there is none.

    Returns
    -------
    The text.
    """
    sections = {
        "Use": _use(record, repo_id),
        "Training data": _data(record.slides),
        "Held-out scores": _scores(record),
        "Model": _model(record),
        "Training": _training(record),
        "Intended use and limits": _limits(record),
        "Licence": _licence(record, license),
        "Citation": _CITATION,
    }
    return "\n\n".join([_summary(record), *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _summary(record: ModelRecord) -> str:
    return (
        "# PixNet model\n\n"
        f"Predicts the expression of {len(record.genes):,} genes at every pixel of an H&E image, seen at "
        f"{record.working_mpp:g} µm per pixel, and sums it up inside circles, bins, cells or annotations. Trained with "
        "`pixnet_sd`, which takes and returns SpatialData objects. This page was generated from the checkpoint; "
        f"its weights have the SHA-256 `{record.weights_sha256 or 'unknown'}`."
    )


def _use(record: ModelRecord, repo_id: str) -> str:
    return (
        "```python\n"
        "import pixnet_sd as ps\n"
        "import spatialdata as sd\n\n"
        f'model = ps.PixNet.from_pretrained("{repo_id}")\n'
        'sdata = sd.read_zarr("slide.zarr")               # an H&E image is enough\n'
        "ps.tl.predict(sdata, model, radius_um=8)         # mpp=... where the store does not tell it\n"
        "```\n\n"
        f"Genes: {_listed(record.genes)}."
    )


def _data(slides: dict[str, Any]) -> str:
    if not slides:
        return "The checkpoint does not say on which slides it was trained."
    columns = ("slide", "µm/px", "regions trained on", "regions held out", "tables")
    rows = [
        (
            name,
            f"{slide.get('mpp', math.nan):.4g} ({slide.get('mpp_rule', 'unknown')})",
            _counts(slide.get("training_regions", {})),
            _counts(slide.get("held_out_regions", {})),
            ", ".join(slide.get("tables", {})),
        )
        for name, slide in slides.items()
    ]
    return f"{_table(columns, rows)}\n\n{_split(slides)}"


def _split(slides: dict[str, Any]) -> str:
    """How the slides were split, as the counts of their regions say."""
    trained, held = (
        {name for name, slide in slides.items() if any(slide.get(regions, {}).values())}
        for regions in ("training_regions", "held_out_regions")
    )
    if not held:
        return "Nothing was held out."
    if trained & held:
        return (
            "Held out: square blocks of every slide, with a margin of one region around them. Tissue next to training "
            "tissue is easier than a new slide."
        )
    return f"Held out: whole slides ({_listed(sorted(held))})."


def _scores(record: ModelRecord) -> str:
    pcc = pd.Series(record.held_out_pcc, index=record.genes if record.held_out_pcc else None, dtype="float64")
    known = pcc.dropna().sort_values(ascending=False, kind="stable")
    if known.empty:
        return "None: nothing was held out, or no score could be computed. How good this model is, is not known."
    quartile, median, three = known.quantile([0.25, 0.5, 0.75])
    summary = _table(
        ("genes scored", "mean", "first quartile", "median", "third quartile", "best", "worst"),
        [
            (
                f"{len(known):,} of {len(pcc):,}",
                *map(_score, (known.mean(), quartile, median, three, *known.iloc[[0, -1]])),
            )
        ],
    )
    return (
        "Pearson correlation between predicted and measured expression over the held-out regions, gene by gene, "
        f"averaged over slides and sizes of regions.{_chosen(record)}\n\n{summary}\n\n{_ends(known)}"
    )


def _chosen(record: ModelRecord) -> str:
    """What makes the scores better than those of new tissue."""
    if not record.training.get("keep_best"):
        return ""
    return " Training ended with the epoch that did best on these very regions, so the scores flatter it a little."


def _ends(known: pd.Series) -> str:
    """Table of the genes at both ends, or of all when they are few."""
    if len(known) <= 2 * _SHOWN:
        return _table(("gene", "PCC"), [(gene, _score(value)) for gene, value in known.items()])
    best, worst = known.head(_SHOWN), known.tail(_SHOWN)[::-1]
    rows = [
        (high, _score(best[high]), low, _score(worst[low])) for high, low in zip(best.index, worst.index, strict=True)
    ]
    return _table(("best predicted", "PCC", "worst predicted", "PCC"), rows)


def _model(record: ModelRecord) -> str:
    weights = record.encoder_weights or "random weights"
    return _table(
        ("", ""),
        [
            ("encoder", f"timm `{record.encoder}`, from {weights}{', frozen' if record.freeze_encoder else ''}"),
            ("encoder's weights before training", f"SHA-256 `{record.encoder_sha256 or 'unknown'}`"),
            ("image seen at", f"{record.working_mpp:g} µm per pixel"),
            ("pitch of the map", f"{4 * record.working_mpp:g} µm"),
            ("objective", f"`{record.objective}`: {_OBJECTIVES[record.objective]}"),
            ("aggregation", f"`{record.aggregation}` over a region's pixels"),
            ("expression", f"log(1 + {record.target_sum:g} · share of the region's counts), natural logarithm"),
        ],
    )


def _training(record: ModelRecord) -> str:
    training = {k: v for k, v in record.training.items() if k != "fingerprint" and v is not None}
    if not training and not record.versions:
        return "The checkpoint does not say how it was trained."
    versions = [(f"version of {name}", value) for name, value in record.versions.items()]
    rows = [("epochs run", len(record.history)), *training.items(), *versions]
    return _table(("", ""), [(f"{name}".replace("_", " "), f"`{value}`") for name, value in rows])


def _limits(record: ModelRecord) -> str:
    return _LIMITS.format(working_mpp=f"{record.working_mpp:g}")


def _licence(record: ModelRecord, license: str | None) -> str:
    stated = f"`{license}`." if license else "None was stated, and without one nobody may use the weights."
    others = "The training slides have"
    if record.encoder_weights:
        others = f"The weights that its encoder started from ({record.encoder_weights}) and the training slides have"
    return f"{stated} {others} terms of their own."


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """Text that cannot break a table, whatever a slide or a gene is called."""
    return " ".join(str(value).replace("|", "\\|").split())


def _counts(regions: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {size}" for size, n in regions.items() if n) or "none"


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 2 * _SHOWN:,} more" if len(names) > 2 * _SHOWN else ""
    return ", ".join(names[: 2 * _SHOWN]) + rest


def _score(value: float) -> str:
    return f"{value:.3f}"


_LIMITS = """\
- For research. Not for diagnosis, nor for any decision about a patient.
- Predicted expression is an estimate from morphology. A gene that morphology does not tell of is predicted poorly,
  however smooth its map looks: see the scores above before reading a map.
- Other tissues, species, stains or scanners than those of the training slides were not tested.
- Images coarser than {working_mpp} µm per pixel lack detail that the network was trained to see, and wrong µm per pixel
  give wrong predictions without an error.
- Values are relative to the counts over all genes of the training tables, and compare with other measurements only as
  far as these do."""

_CITATION = """\
The method is PixNet, implemented independently of its authors:

```bibtex
@misc{zhang2025,
  title = {Spatial Transcriptomics Analysis of Spatially Dense Gene Expression Prediction},
  author = {Zhang, Ruikun and Yang, Yan and Pan, Liyuan},
  year = {2025},
  eprint = {2503.01347},
  archiveprefix = {arXiv}
}
```"""
