"""The model card of a checkpoint: everything in it is read off the checkpoint's record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ._record import ModelRecord

__all__ = ["TAGS", "card_text"]

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
