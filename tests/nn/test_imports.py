"""The network runs anywhere that has torch: no SpatialData, and none of what comes with it."""

from __future__ import annotations

import json
import subprocess
import sys

LOAD_ALL = """
import importlib, json, pkgutil, sys
import pixnet_sd.geometry, pixnet_sd.model
rooms = (pixnet_sd.geometry, pixnet_sd.model)
names = [f"{room.__name__}.{m.name}" for room in rooms for m in pkgutil.iter_modules(room.__path__)]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def test_nn_needs_no_spatialdata() -> None:
    output = subprocess.run([sys.executable, "-c", LOAD_ALL], capture_output=True, text=True, check=True).stdout
    names, loaded = json.loads(output)
    assert "pixnet_sd.model._aggregation" in names
    unwanted = {"anndata", "dask", "geopandas", "pandas", "shapely", "spatialdata", "squidpy", "xarray", "zarr"}
    assert not unwanted & set(loaded)
