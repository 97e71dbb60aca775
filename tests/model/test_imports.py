"""Geometry and the model run anywhere that has torch: no SpatialData, and none of what comes with it."""

from __future__ import annotations

import subprocess
import sys

LOAD_ALL = """
import sys
from pixnet_sd.geometry import *
from pixnet_sd.model import {names}
print(*sorted(m.partition(".")[0] for m in sys.modules))
"""


def loaded_by(names: str) -> set[str]:
    code = LOAD_ALL.format(names=names)
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_model_needs_no_spatialdata_and_the_record_no_torch() -> None:
    unwanted = {"anndata", "dask", "geopandas", "shapely", "spatialdata", "squidpy", "xarray", "zarr"}
    assert not unwanted & loaded_by("*")
    assert not (unwanted | {"torch", "timm"}) & loaded_by("ModelRecord, read_record")
