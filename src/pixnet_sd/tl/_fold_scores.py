"""Scores of a fold, kept beside its model for calls that go on, and for the call that puts all folds together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from pixnet_sd._errors import CheckpointError
from pixnet_sd._files import read_regular, replace_file
from pixnet_sd._logging import logger
from pixnet_sd._schemas import ScoresSchema, parse_json, validated, what_is_wrong

__all__ = ["FoldScores", "read_scores", "write_scores"]

FoldScores: TypeAlias = dict[tuple[str, str], pd.DataFrame]
"""`moments` by slide and table."""

_FILE = "scores.json"
_MOST_BYTES = 1 << 29


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
    content = {"identity": identity, "scores": parts}
    try:
        with replace_file(folder / _FILE) as aside:
            aside.write_text(json.dumps(content | {"sha256": _hash(content)}), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"Scores cannot be written to {str(folder)!r} ({error.strerror or error}). Free some disk and make the "
            "same call again: the trained model is there."
        ) from error


def read_scores(folder: Path, identity: Mapping[str, Any]) -> FoldScores | None:
    """Scores that are there; None where there are none, or they are damaged or of another identity."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        found = parse_json(read_regular(path, most_bytes=_MOST_BYTES), allow_nan=True)
        if validated(ScoresSchema, found).sha256 != _hash({name: found[name] for name in ("identity", "scores")}):
            raise ValueError("it is not as it was written")
    except ValueError as error:  # CheckpointError is one
        logger.warning("%s cannot be used, and is made anew: %s", path, what_is_wrong(error))
        return None
    if found["identity"] != identity:
        return None
    return {(p["slide"], p["table"]): _frame(p) for p in found["scores"]}


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _frame(part: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(part["moments"], index=pd.Index(part["genes"], name="gene"))
