from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd

from pixnet_sd.errors import StoreError
from pixnet_sd.store import record, recorded


def test_notes_survive_the_round_trip(slide, user_files):
    before = user_files(slide.path)
    record(slide, "mpp", "_full_image", np.float32(0.25))
    record(slide, "maps", "a", {"genes": np.array(["x"]), "path": Path("/m"), "pcc": float("nan"), "t": (1, 2)})
    record(slide, "maps", "b", {})
    record(slide, "model", None, Path("/m"))
    again = sd.read_zarr(slide.path)
    for sdata in (slide, again):
        assert recorded(sdata, "mpp", "_full_image") == 0.25
        assert recorded(sdata, "maps") == {"a": {"genes": ["x"], "path": "/m", "pcc": None, "t": [1, 2]}, "b": {}}
        assert recorded(sdata, "model") == "/m"
        assert recorded(sdata, "tables", "c") is None
    assert again.attrs["lab"] == {"name": "A"}
    assert again.has_consolidated_metadata()
    assert user_files(slide.path) == before


def test_other_attributes_of_the_user_stay_their_business(slide):
    slide.attrs["unsavable"] = object()
    slide.attrs["pixnet_sd"] = {"mpp": {"_full_image": 0.5}}
    record(slide, "mpp", "other", 1.0)
    root = json.loads((slide.path / "zarr.json").read_text())["attributes"]
    assert "unsavable" not in root
    assert root["pixnet_sd"]["mpp"] == {"_full_image": 0.5, "other": 1.0}


def test_notes_of_another_run_are_kept(slide):
    other = sd.read_zarr(slide.path)
    record(other, "maps", "theirs", {"n": 1})
    record(slide, "maps", "ours", {"n": 2})
    assert recorded(sd.read_zarr(slide.path), "maps") == {"theirs": {"n": 1}, "ours": {"n": 2}}


def test_the_draft_of_a_killed_run_goes(slide):
    work = slide.path.with_name(f".{slide.path.name}.pixnet_sd")
    (work / ".pixnet_sd-0123.partial").mkdir(parents=True)
    (work / ".pixnet_sd-0123.partial" / "zarr.json").write_text("{")
    record(slide, "model", None, "/m")
    assert not work.exists()


def test_in_memory(in_memory):
    record(in_memory, "mpp", "_full_image", 0.5)
    assert in_memory.attrs["pixnet_sd"] == {"mpp": {"_full_image": 0.5}}


def test_what_json_cannot_hold_is_refused(slide):
    with pytest.raises(StoreError, match="it is not JSON"):
        record(slide, "maps", "a", object())
    assert "pixnet_sd" not in slide.attrs


def test_foreign_content_is_refused(slide):
    slide.attrs["pixnet_sd"] = "mine"
    with pytest.raises(StoreError, match="keeps a dict there"):
        record(slide, "maps", "a", 1)
