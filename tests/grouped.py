"""Parameters of the verbs given flat, as tests like them, in the groups that the verbs take."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pixnet_sd as ps

FIT = {"model_params": ps.ModelParams, "train_params": ps.TrainParams}
PREDICT = {"predict_params": ps.PredictParams}


def grouped(groups: dict[str, type], **flat: Any) -> dict[str, Any]:
    """Put each parameter that is a field of a group into it."""
    for name, group in groups.items():
        own = {f.name: flat.pop(f.name) for f in fields(group) if f.name in flat}
        if own:
            flat[name] = own | flat.get(name, {})
    return flat
