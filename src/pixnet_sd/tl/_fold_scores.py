"""Scores of a fold, kept beside its model for calls that go on, and for the call that puts all folds together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from pixnet_sd._errors import CheckpointError

__all__ = ["FoldScores", "read_scores", "write_scores"]

FoldScores: TypeAlias = dict[tuple[str, str], pd.DataFrame]
"""`moments` by slide and table."""

_FILE = "scores.json"


def write_scores(folder: Path, identity: Mapping[str, Any], scores: FoldScores) -> None:
    """Write scores, whole or not at all.

    Parameters
    ----------
    folder
        Of the fold's model.
    identity
        What the scores depend on: `read_scores` gives them back for the same only.
    scores
        What to keep.

    Raises
    ------
    CheckpointError
        The folder cannot be written.
    """
    parts = [
        {"slide": slide, "table": table, "genes": list(part.index), "moments": part.to_dict(orient="list")}
        for (slide, table), part in scores.items()
    ]
    partial = folder / f"{_FILE}.partial"
    try:
        partial.write_text(json.dumps({"identity": identity, "scores": parts}), encoding="utf-8")
        partial.replace(folder / _FILE)
    except OSError as error:
        raise CheckpointError(
            f"Scores cannot be written to {str(folder)!r} ({error.strerror or error}). Free some disk and make the "
            "same call again: the trained model is there."
        ) from error


def read_scores(folder: Path, identity: Mapping[str, Any]) -> FoldScores | None:
    """Scores that are there; None where there are none, or they are damaged or of another identity."""
    try:
        found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        if found["identity"] != identity:
            return None
        return {(p["slide"], p["table"]): _frame(p) for p in found["scores"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _frame(part: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(part["moments"], index=pd.Index(part["genes"], name="gene"))
