"""Whether a model knows more than the mean of each gene."""

from __future__ import annotations

import math
from typing import Any

from pixnet_sd.store import ModelRecord

__all__ = ["quality_of", "why_poor"]

_ABOVE, _FAR_ABOVE = 1.5, 10.0
_NO_PCC = 0.1


def quality_of(found: dict[str, Any]) -> dict[str, Any]:
    """What a record says of a model's scores; what is not known is None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}


def why_poor(record: ModelRecord) -> str:
    """What makes a model worse than predicting each gene's mean over the training regions; nothing if it is not.

    It is where its mean squared error is more than 1.5 times that of the means and its correlation shows nothing (at
    most 0.1), or more than ten times it: a short or honest run on few regions ends within a third of it, either way.
    """
    said = record.training
    mse, of_means, pcc = (said.get(name) for name in ("mse", "gene_mean_mse", "pcc"))
    if not isinstance(mse, int | float) or not isinstance(of_means, int | float) or of_means <= 0:
        return ""
    limit = _FAR_ABOVE if isinstance(pcc, int | float) and pcc > _NO_PCC else _ABOVE
    if mse <= limit * of_means:
        return ""
    which = "held-out" if said.get("scored_on") == "held_out" else "training"
    return f"on {which} regions its mean squared error is {mse:.3g}, and that of each gene's mean is {of_means:.3g}"
