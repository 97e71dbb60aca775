"""`import pixnet_sd` costs nothing, and its rooms come when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import pytest

import pixnet_sd

ROOMS = ("anndata", "dask", "geopandas", "pandas", "shapely", "spatialdata", "xarray", "zarr")
HEAVY = ("torch", "timm", "spatialdata", "anndata", "zarr", "squidpy", "pydantic")


def test_import_loads_nothing_heavy_and_what_needs_no_torch_loads_none():
    names = "datasets.sample get.gene_map io.convert_visium_hd io.open_store pl.training_regions settings.verbosity"
    code = f"""
import operator, sys, pixnet_sd as ps
dir(ps)
print([m for m in {HEAVY} if m in sys.modules])
from pixnet_sd.model import ModelRecord, read_record
print([m for m in {(*ROOMS, "torch", "timm")} if m in sys.modules])
print([n for n in {names.split()} if operator.attrgetter(n)(ps) is None or 'torch' in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"] * 3


def test_public_names_resolve():
    assert dir(pixnet_sd) == sorted(pixnet_sd.__all__)
    assert {"fit", "predict", "evaluate"} <= set(dir(pixnet_sd.tl))
    assert pixnet_sd.PixNet.__module__.startswith("pixnet_sd.model")
    with pytest.raises(AttributeError, match=r"module 'pixnet_sd' has no attribute 'predcit'"):
        pixnet_sd.predcit  # noqa: B018
    with suppress(PackageNotFoundError):  # a source tree that was never installed
        assert pixnet_sd.__version__ == version("pixnet_sd")
