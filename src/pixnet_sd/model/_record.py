"""A checkpoint's record: ``config.json``, the hashes of a checkpoint's files, and the model card made from the record.

Nothing here needs torch, so that a model can be described without loading it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter
from pydantic_core import to_json

from pixnet_sd._files import hash_regular, read_regular
from pixnet_sd._schemas import ChecksumsSchema, RecordSchema, parse_json, what_is_wrong
from pixnet_sd._util import shown
from pixnet_sd.errors import CheckpointError
from pixnet_sd.geometry import MAP_STRIDE
from pixnet_sd.params import Aggregation, ObjectiveName

if TYPE_CHECKING:
    import pandas  # noqa: ICN001 - as the pages link it

Link = Literal["identity", "softplus"]

CHECKSUMS = "checksums.json"
CONFIG = "config.json"
FORMAT = "pixnet_sd/3"
TOTAL = "total_counts"
"""Name of the output that is the sum over all genes, as scanpy calls it."""

_MOST_CHECKSUMS_BYTES = 1 << 16
_MOST_CONFIG_BYTES = 32 << 20
_LIBRARIES = ("pixnet_sd", "torch", "timm", "numpy", "spatialdata", "anndata")
_REMEDY = "Restore the folder, or train again."


def link_of(objective: ObjectiveName) -> Link:
    """Return the link of the head for an objective."""
    return "identity" if objective == "mse_pcc" else "softplus"


def outputs_of(genes: Sequence[str], objective: ObjectiveName) -> list[str]:
    """Name the outputs of a head: the genes, and of counts their sum over all genes that were measured."""
    return [*genes] if objective == "mse_pcc" else [*genes, TOTAL]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder.

    Attributes
    ----------
    widths
        Channels of D per level, finest first; None: the encoder's own channels, without laterals.
    hidden
        Hidden channels of the feed-forwards, finest first.
    dropout
        Channel dropout of the laterals.
    """

    widths: tuple[int, ...] | None
    hidden: tuple[int, ...]
    dropout: float = 0.0


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
        ``"nb_pcc"``, for a model of counts, or ``"mse_pcc"``.
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
    sizes
        Median area of the training regions of each table, µm².
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
        Versions of the libraries.
    format
        Format of ``config.json``.
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
    sizes: dict[str, float]
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

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs of the head."""
        return outputs_of(self.genes, self.objective)

    @property
    def var(self) -> pandas.DataFrame:
        """Columns by gene for predicted tables, ``held_out_pcc`` when known."""
        import pandas as pd  # the loops run without it

        frame = pd.DataFrame(index=pd.Index(self.genes))
        if self.held_out_pcc:
            frame["held_out_pcc"] = pd.Series(self.held_out_pcc, index=frame.index, dtype="float64")
        return frame

    def to_json(self) -> str:
        """Write ``config.json``'s text; NaN becomes null."""
        # The fallback is for NumPy's numbers and arrays.
        return to_json(asdict(self), indent=2, inf_nan_mode="null", fallback=lambda value: value.tolist()).decode()

    def check(self) -> None:
        """Raise CheckpointError where `read_record` will not take what `to_json` gives."""
        try:
            RecordSchema.model_validate(parse_json(self.to_json().encode()))
        except ValueError as error:
            raise CheckpointError(f"The model's record cannot be saved: {what_is_wrong(error)}.") from error


def read_record(folder: Path) -> ModelRecord:
    """Read ``config.json``; CheckpointError where it is missing, damaged, or of something else than a model of ours."""
    path = folder / CONFIG
    why = f"{str(folder)!r} is no pixnet_sd checkpoint: it has no config.json."
    if not os.path.isdir(folder):  # unlike those of a path these raise for no folder
        why = f"{str(folder)!r} is a file." if os.path.exists(folder) else f"There is no folder {str(folder)!r}."
    # NaN is taken here, so that the schema names the field that has it.
    content = _read_json(path, _MOST_CONFIG_BYTES, f"{why} Give the folder that fit left.", allow_nan=True)
    stated = content.get("format") if isinstance(content, dict) else None
    if stated != FORMAT:
        remedy = "Weights of an encoder alone go to fit(encoder_weights=...)."
        if isinstance(stated, str) and stated.startswith(FORMAT.partition("/")[0] + "/"):
            remedy = "Train again, or install the version of pixnet_sd that it was made with."
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of this package: its format is {shown(stated)}, and {FORMAT!r} is "
            f"needed. {remedy}"
        )
    with _noticing_damage(path):
        RecordSchema.model_validate(content)
    check_file(path)
    known = {f.name: content[f.name] for f in fields(ModelRecord)}
    return ModelRecord(**known | {"decoder": TypeAdapter(DecoderConfig).validate_python(known["decoder"])})


def _read_json(path: Path, most_bytes: int, if_missing: str, *, allow_nan: bool = False) -> Any:
    """Read a JSON file of a checkpoint, or raise CheckpointError."""
    try:
        text = read_regular(path, most_bytes=most_bytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(if_missing) from error
    with _noticing_damage(path):
        return parse_json(text, allow_nan=allow_nan)


@contextmanager
def _noticing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise damaged(path, what_is_wrong(error)) from error


def damaged(path: Path, why: str) -> CheckpointError:
    """Return the error for a file of a checkpoint that is not what it should be."""
    return CheckpointError(f"{str(path)!r} is damaged, or of another model ({why}). {_REMEDY}")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    versions = dict.fromkeys(_LIBRARIES, "unknown")
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):  # a source tree that was never installed
            versions[name] = version(name)
    return versions


def write_checksums(folder: Path, names: Sequence[str]) -> None:
    """Write sizes and hashes of files of a folder beside them."""
    files = {name: dict(zip(("bytes", "sha256"), hash_regular(folder / name), strict=True)) for name in names}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")


def check_file(path: Path, *, most_bytes: int | None = None) -> None:
    """Compare a model's file with what was noted when it was written; CheckpointError also where it is larger."""
    checksums = path.with_name(CHECKSUMS)
    missing = (
        f"{str(path.parent)!r} has no {CHECKSUMS}, so nobody knows whether the model in it is whole: it was copied in "
        f"part, or saving was cut off. {_REMEDY}"
    )
    content = _read_json(checksums, _MOST_CHECKSUMS_BYTES, missing)
    with _noticing_damage(checksums):
        wanted = ChecksumsSchema.model_validate(content).files.get(path.name)
    if wanted is None:
        raise damaged(checksums, f"{path.name} is not in it")
    try:
        actual = hash_regular(path, most_bytes=min(wanted.bytes, wanted.bytes if most_bytes is None else most_bytes))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{str(path)!r} is missing, and a model has it. {_REMEDY}") from error
    if actual != (wanted.bytes, wanted.sha256):
        raise damaged(path, f"its hash is not that in {CHECKSUMS}: it was truncated or replaced, or saving was cut off")


# The model card

_SHOWN = 10  # genes at either end of the table of scores; all of them are in config.json

_OBJECTIVES = {
    "mse_pcc": "squared error and correlation of log-normalised expression (Eq. 6 of the paper)",
    "nb_pcc": "negative binomial likelihood of raw counts, with correlation and squared error of what it expects",
}


def card_text(record: ModelRecord, *, repo_id: str, license: str | None) -> str:
    """Write the model card, Markdown without the metadata block; `repo_id` is a name on the hub or a folder."""
    stated = f"`{license}`." if license else "None was stated, and without one nobody may use the weights."
    started = f"weights that its encoder started from ({record.encoder_weights}) and the "
    template = Template((Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
    return template.substitute(
        n_genes=f"{len(record.genes):,}",
        working_mpp=f"{record.working_mpp:g}",
        sha256=record.weights_sha256 or "unknown",
        repo_id=repo_id,
        genes=_listed(record.genes),
        data=_data(record.slides),
        scores=_scores(record),
        model=_model(record),
        training=_training(record),
        licence=f"{stated} The {started if record.encoder_weights else ''}training slides have terms of their own.",
    )


def _data(slides: dict[str, Any]) -> str:
    """Tell on which slides a model was trained, and how they were split, as the counts of their regions say."""
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
    trained, held_out = (
        {name for name, slide in slides.items() if any(slide.get(regions, {}).values())}
        for regions in ("training_regions", "held_out_regions")
    )
    split = f"Held out: whole slides ({_listed(sorted(held_out))})." if held_out else "Nothing was held out."
    if trained & held_out:
        split = (
            "Held out: square blocks of every slide, with a margin of one region around them. Tissue next to training "
            "tissue is easier than a new slide."
        )
    return f"{_table(columns, rows)}\n\n{split}"


def _scores(record: ModelRecord) -> str:
    import pandas as pd

    pcc = pd.Series(record.held_out_pcc, index=record.genes if record.held_out_pcc else None, dtype="float64")
    known = pcc.dropna().sort_values(ascending=False, kind="stable")
    if known.empty:
        return "None: nothing was held out, or no score could be computed. How good this model is, is not known."
    values = (known.mean(), *known.quantile([0.25, 0.5, 0.75]), *known.iloc[[0, -1]])
    columns = ("genes scored", "mean", "first quartile", "median", "third quartile", "best", "worst")
    summary = _table(columns, [(f"{len(known):,} of {len(pcc):,}", *(f"{value:.3f}" for value in values))])
    scores = [(gene, f"{value:.3f}") for gene, value in known.items()]
    genes = _table(("gene", "PCC"), scores)
    if len(scores) > 2 * _SHOWN:
        ends = [(*best, *worst) for best, worst in zip(scores[:_SHOWN], scores[: -_SHOWN - 1 : -1], strict=True)]
        genes = _table(("best predicted", "PCC", "worst predicted", "PCC"), ends)
    flattering = " Training ended with the epoch that did best on these very regions, which flatters it a little."
    return (
        "Pearson correlation between predicted and measured expression over the held-out regions, gene by gene, "
        f"averaged over slides and sizes of regions.{flattering if record.training.get('keep_best') else ''}\n\n"
        f"{summary}\n\n{genes}"
    )


def _model(record: ModelRecord) -> str:
    weights = record.encoder_weights or "random weights"
    rows = {
        "encoder": f"timm `{record.encoder}`, from {weights}{', frozen' if record.freeze_encoder else ''}",
        "encoder's weights before training": f"SHA-256 `{record.encoder_sha256 or 'unknown'}`",
        "image seen at": f"{record.working_mpp:g} µm per pixel",
        "pitch of the map": f"{MAP_STRIDE * record.working_mpp:g} µm",
        "objective": f"`{record.objective}`: {_OBJECTIVES[record.objective]}",
        "aggregation": f"`{record.aggregation}` over a region's pixels",
        "expression": f"log(1 + {record.target_sum:g} · share of the region's counts), natural logarithm",
    }
    return _table(("", ""), rows.items())


def _training(record: ModelRecord) -> str:
    training = {k: v for k, v in record.training.items() if k != "fingerprint" and v is not None}
    if not training and not record.versions:
        return "The checkpoint does not say how it was trained."
    versions = {f"version of {name}": value for name, value in record.versions.items()}
    rows = {"epochs run": len(record.history), **training, **versions}
    return _table(("", ""), [(name.replace("_", " "), f"`{value}`") for name, value in rows.items()])


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Make a Markdown table that no name of a slide or a gene can break."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([" ".join(str(value).replace("|", "\\|").split()) for value in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _counts(regions: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {size}" for size, n in regions.items() if n) or "none"


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 2 * _SHOWN:,} more" if len(names) > 2 * _SHOWN else ""
    return ", ".join(names[: 2 * _SHOWN]) + rest
