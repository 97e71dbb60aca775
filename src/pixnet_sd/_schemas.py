"""Schemas of the package's files and notes: types and ranges, checked before anything is believed.

Nothing here is converted: a number written as text, or true in place of 1, is damage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from pixnet_sd._util import shown
from pixnet_sd.errors import StoreError

_MOMENTS = {"n", "predicted_mean", "predicted_ss", "measured_mean", "measured_ss", "product", "mse", "mae", "coverage"}
_MAX_GENES, _MAX_SIZES = 1_000_000, 1000
_SHOWN = 60  # characters of a key that a message repeats
_LEVELS, _ALIGN_PX = 4, 32  # of the feature pyramid, and its coarsest stride

Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Text = Annotated[str, StringConstraints(max_length=4096)]
Hash = Annotated[str, StringConstraints(max_length=128)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Width = Annotated[int, Field(ge=1, le=1 << 13)]  # a decoder this wide takes gigabytes
Side = Annotated[int, Field(ge=0, le=1 << 15, multiple_of=_ALIGN_PX)]
Pcc = Annotated[float, Field(ge=-1.001, le=1.001)]  # 1 with the rounding of 32 bits


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class DecoderSchema(_Strict):
    """Shape of a decoder."""

    model_config = ConfigDict(extra="forbid")

    widths: Annotated[list[Width], Field(min_length=_LEVELS, max_length=_LEVELS)] | None
    hidden: Annotated[list[Width], Field(min_length=_LEVELS - 1, max_length=_LEVELS - 1)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SlideSchema(_Strict):
    """What a record says of a slide; all of it may be missing."""

    model_config = ConfigDict(extra="allow")

    mpp: Positive = 1.0
    mpp_rule: Text = ""
    tables: dict[Name, Text] = {}
    training_regions: dict[Name, Count] = {}
    held_out_regions: dict[Name, Count] = {}


class RecordSchema(_Strict):
    """``config.json``; fields of later versions are passed over."""

    genes: Annotated[list[Name], Field(min_length=1, max_length=_MAX_GENES), FailFast()]
    target_sum: Annotated[float, Field(ge=1e-6, le=1e15)]
    log_base: Literal["e"]
    objective: Literal["nb_pcc", "mse_pcc"]
    aggregation: Literal["mean", "sum"]
    working_mpp: Annotated[float, Field(ge=1e-3, le=100)]
    encoder: Name
    encoder_weights: Text | None
    encoder_sha256: Hash
    freeze_encoder: bool
    decoder: DecoderSchema
    sizes: Annotated[dict[Name, Positive], Field(min_length=1, max_length=_MAX_SIZES)]
    tile_px: Annotated[Side, Field(ge=2 * _ALIGN_PX)]
    halo_px: Annotated[Side, Field(ge=_ALIGN_PX)]
    sees_whole_tile: bool
    weights_sha256: Hash
    training: dict[Name, JsonValue]
    slides: dict[Name, SlideSchema]
    held_out_pcc: Annotated[list[Pcc | None], Field(max_length=_MAX_GENES), FailFast()]
    history: Annotated[list[dict[Name, float | None]], FailFast()]
    versions: dict[Name, Text]
    depends_on: dict[Name, JsonValue]
    format: Text

    @model_validator(mode="after")
    def _fields_agree(self) -> RecordSchema:
        if len(set(self.genes)) < len(self.genes):
            raise ValueError(f"genes: {Counter(self.genes).most_common(1)[0][0]!r} is there twice")
        for row in self.history:
            epoch = row.get("epoch")
            if epoch is None or not (0 <= epoch < 2**53 and float(epoch).is_integer()):
                raise ValueError(f"history: a row is of epoch {epoch}")
        if self.held_out_pcc and len(self.held_out_pcc) != len(self.genes):
            raise ValueError(f"held_out_pcc has {len(self.held_out_pcc)} scores of {len(self.genes)} genes")
        if self.objective != "mse_pcc" and self.aggregation != "sum":
            raise ValueError(f"objective {self.objective!r} goes with aggregation 'sum', and it is 'mean'")
        return self


class FileSchema(_Strict):
    """Size and hash of a file."""

    bytes: Count
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ChecksumsSchema(_Strict):
    """``checksums.json``."""

    files: Annotated[dict[Name, FileSchema], Field(max_length=100)]


class BestSchema(_Strict):
    """The best epoch of a run; scores may be NaN, and minus infinity before there is one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)

    epoch: Count
    pcc: float
    pcc_per_gene: list[float]
    weights: dict[str, Any]


class StateSchema(_Strict):
    """``training_state.pt``; tensors are looked at where they are used."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)

    fingerprint: Name
    epoch: Count
    steps: Count
    network: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[Name, float]]
    best: BestSchema
    versions: dict[Name, str]


class MomentsSchema(_Strict):
    """Scores of one table of a slide, gene by gene."""

    model_config = ConfigDict(allow_inf_nan=True)

    slide: Name
    table: Name
    genes: list[Name]
    moments: dict[Name, list[int | float]]

    @model_validator(mode="after")
    def _one_value_a_gene(self) -> MomentsSchema:
        if set(self.moments) != _MOMENTS:
            raise ValueError(f"columns {sorted(self.moments)} in place of {sorted(_MOMENTS)}")
        if any(len(values) != len(self.genes) for values in self.moments.values()):
            raise ValueError("a column has another length than the genes")
        return self


class ScoresSchema(_Strict):
    """``scores.json`` of a fold."""

    identity: dict[str, Any]
    scores: list[MomentsSchema]
    sha256: Hash


class NotesSchema(_Strict):
    """Notes of the package about an object; sections that are not known here stay as they are."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    mpp: dict[str, Positive] = {}
    maps: dict[str, dict[str, Any]] = {}
    tables: dict[str, dict[str, Any]] = {}


def check_notes(notes: Any) -> dict[str, Any]:
    """Return the notes of an object as they are, None as none; StoreError if they are damaged."""
    where = "sdata.attrs['pixnet_sd']"
    if notes is None:
        return {}
    if not isinstance(notes, Mapping):
        raise StoreError(f"{where} is {type(notes).__name__}, but pixnet_sd keeps a dict there. Remove it.")
    try:
        NotesSchema.model_validate(dict(notes))
    except ValidationError as error:
        raise StoreError(f"{where} is damaged ({what_is_wrong(error)}). Correct or remove that entry.") from error
    return dict(notes)


def parse_json(text: bytes, *, allow_nan: bool = False) -> Any:
    """Parse a UTF-8 JSON text; ``allow_nan`` takes NaN and infinities. ValueError if it is none."""
    return from_json(text, allow_inf_nan=allow_nan)


def what_is_wrong(error: ValueError) -> str:
    """One line on the first thing that is wrong, with the name of the field."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(key)[:_SHOWN] for key in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "value_error"):  # the input is what is around it, or is told already
        return ": ".join(filter(None, [where, text]))
    return f"{where}: {text}, and it is {shown(first['input'])}"
