"""What answers depend on: any single change to it gives another answer, any other change the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Translation, set_transformation

import pixnet_sd as ps
from pixnet_sd._fingerprint import content_sha256, differing_parts, fingerprint
from pixnet_sd.errors import CheckpointError, DataError, StoreError

SIDE, N = 96, 24
SMALL: dict[str, Any] = {"mpp": 0.5, "working_mpp": 0.5, "max_epochs": 1, "tile_px": 96, "validation": None, "genes": 3}


class Slide:
    """Arrays of a slide; `build` makes the object."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.xy = random.uniform(12, SIDE - 12, (N, 2))
        self.radius = np.full(N, 5.0)
        self.counts = random.poisson(5, (N, 5)).astype(np.float32)
        coarse = np.random.default_rng(7).integers(60, 220, (3, SIDE // 8, SIDE // 8), np.uint8)
        self.pixels = coarse.repeat(8, 1).repeat(8, 2)

    def build(self) -> sd.SpatialData:
        obs = pd.DataFrame({"region": pd.Categorical(["cells"] * N), "id": range(N)}, index=[f"o{k}" for k in range(N)])
        table = ad.AnnData(self.counts, obs=obs, var=pd.DataFrame(index=[f"g{k}" for k in range(5)]))
        table = TableModel.parse(table, region="cells", region_key="region", instance_key="id")
        cells = ShapesModel.parse(self.xy, geometry=0, radius=self.radius)
        return sd.SpatialData(images={"he": image(self.pixels)}, shapes={"cells": cells}, tables={"table": table})


def image(pixels: Any) -> Any:
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list("rgb"))


@pytest.fixture(scope="module")
def fit(fit, tmp_path_factory) -> Callable[..., ps.PixNet]:
    """`tl.fit` into a folder of its own unless one is given."""

    def fit_small(sdata: sd.SpatialData, **options: Any) -> ps.PixNet:
        place = {"checkpoint_dir": tmp_path_factory.mktemp("models") / "model", "record_model": False}
        return fit(sdata, **(place | SMALL | options))

    return fit_small


@pytest.fixture(scope="module")
def predict(predict) -> Callable[..., None]:
    return lambda sdata, model=None, **options: predict(sdata, model, mpp=0.5, tile_px=64, **options)


@pytest.fixture(scope="module")
def model(fit) -> ps.PixNet:
    return fit(Slide().build())


def asked(model: ps.PixNet) -> str:
    """Fingerprint of what a model was trained on."""
    return model.record.training["fingerprint"]


@pytest.fixture(scope="module")
def predicted(predict, model) -> Callable[..., tuple[str, dict[str, str]]]:
    """Fingerprint of the map, and what the table says that it depends on."""

    def found(sdata: sd.SpatialData) -> tuple[str, dict[str, str]]:
        predict(sdata, model, shapes_key="cells", overwrite=True)
        of_map = sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"]["fingerprint"]
        return of_map, dict(sdata.tables["pixnet_cells"].uns["pixnet_sd"]["depends_on"])

    return found


@pytest.fixture(scope="module")
def answer(predicted) -> tuple[str, dict[str, str]]:
    return predicted(Slide().build())


def one_pixel(slide: Slide, k: int) -> None:
    slide.pixels[k % 3, k % SIDE, (7 * k) % SIDE] ^= 1


def mirrored(slide: Slide, k: int) -> None:
    slide.pixels = slide.pixels[:, :, ::-1] if k % 2 else slide.pixels[:, ::-1]


def moved(slide: Slide, k: int) -> None:
    slide.xy[k % N, k % 2] += 0.01


def grown(slide: Slide, k: int) -> None:
    slide.radius[k % N] *= 1.001


OF_IMAGE, OF_REGIONS = [one_pixel, mirrored], [moved, grown]


def one_more_count(slide: Slide, k: int) -> None:
    slide.counts[k % N, k % 5] += 1


def swapped_rows(slide: Slide, k: int) -> None:
    a, b = k % N, (k + 1 + k % 7) % N
    slide.counts[[a, b]] = slide.counts[[b, a]]
    if np.array_equal(slide.counts[a], slide.counts[b]):  # nothing was swapped
        slide.counts[a, 0] += 1


@given(change=st.sampled_from([*OF_IMAGE, *OF_REGIONS, one_more_count, swapped_rows]), k=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_any_change_of_the_data_is_another_question(model, fit, predicted, answer, change, k):
    slide = Slide()
    change(slide, k)
    assert asked(fit(slide.build())) != asked(model)
    before, after = answer, predicted(slide.build())
    assert (after[0] != before[0]) == (change in OF_IMAGE)
    assert (after[1] != before[1]) == (change in OF_IMAGE + OF_REGIONS)


def test_an_image_that_was_aligned_anew(model, fit):
    sdata = Slide().build()
    set_transformation(sdata.images["he"], Translation([1, 0], ("x", "y")))
    assert asked(fit(sdata)) != asked(model)


@pytest.mark.parametrize(
    "option",
    [{"seed": 1}, {"lr": 1e-4}, {"target_sum": 1e3}, {"mpp": 0.25}, {"objective": "nb_pcc"}, {"genes": ["g1", "g0"]}],
    ids=str,
)
def test_options_train_anew(model, fit, option):
    assert asked(fit(Slide().build(), **option)) != asked(model)


def unrelated(sdata: sd.SpatialData) -> sd.SpatialData:
    """Other elements, before the image in the order of names and of the object."""
    sdata.images["aaa"] = Image2DModel.parse(np.zeros((1, 8, 8), np.uint8), dims=("c", "y", "x"))
    sdata.images["he"] = sdata.images.pop("he")
    sdata.tables["notes"] = ad.AnnData(np.ones((3, 2), np.float32))
    sdata.attrs["lab"] = {"microscope": 2}
    return sdata


def other_chunks(sdata: sd.SpatialData) -> sd.SpatialData:
    sdata.images["he"] = image(sdata.images["he"].data.rechunk((1, 17, 40)))
    return sdata


def stored(sdata: sd.SpatialData, path: Any) -> sd.SpatialData:
    sdata.write(path)
    return sd.read_zarr(path)


@pytest.mark.parametrize("change", [unrelated, other_chunks, stored])
def test_changes_to_something_else_do_not_matter(model, fit, predicted, answer, change, tmp_path):
    sdata = change(Slide().build(), *([tmp_path / "s.zarr"] if change is stored else []))
    assert asked(fit(sdata)) == asked(model)
    assert predicted(sdata) == answer


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1, max_size=4), st.data())
def test_parts(parts, data):
    """Order says nothing; any part does, and is named."""
    assert fingerprint(dict(reversed(parts.items()))) == fingerprint(parts)
    key = data.draw(st.sampled_from(sorted(parts)))
    other = parts | {key: [parts[key]]}
    assert fingerprint(other) != fingerprint(parts)
    assert differing_parts({"a": parts}, {"a": other}) == [f"a / {key}"]


@given(st.lists(st.binary(max_size=3), max_size=3), st.lists(st.binary(max_size=3), max_size=3))
def test_pieces_are_kept_apart(one, other):
    assert (content_sha256(*one) == content_sha256(*other)) == (one == other)


class TestSameQuestionAskedOfOtherData:
    """R1-R3, R10 and F4 of the faults that users would meet."""

    def test_the_same_folder_is_refused_and_says_why(self, fit, model, tmp_path):
        fit(Slide().build(), checkpoint_dir=tmp_path / "m")
        slide = Slide()
        one_pixel(slide, 0)
        with pytest.raises(CheckpointError, match="slides / slide / pixels"):
            fit(slide.build(), checkpoint_dir=tmp_path / "m")
        for other in ({"lr": 1e-3}, {"aggregation": "sum"}):
            with pytest.raises(CheckpointError, match=f"{next(iter(other))}'.*checkpoint_dir"):
                fit(Slide().build(), checkpoint_dir=tmp_path / "m", **other)
        again = fit(Slide().build(), checkpoint_dir=tmp_path / "m")
        assert again.record.weights_sha256 == model.record.weights_sha256

    @pytest.mark.parametrize("what", ["map on disk", "map", "lazy map", "image on disk", "image"])
    def test_a_map_is_not_believed_when_it_or_its_image_was_changed_in_place(self, predict, model, tmp_path, what):
        store = tmp_path / "s.zarr"
        sdata = stored(Slide().build(), store) if "disk" in what else Slide().build()
        predict(sdata, model)
        if what == "map on disk":
            files = (path for path in (store / "images/pixnet_map/s0").rglob("*") if path.is_file())
            chunk = next(path for path in files if path.name != "zarr.json")
            chunk.write_bytes(chunk.read_bytes())  # even if it is the same
        elif "map" in what:
            level = sdata.images["pixnet_map"]["scale0"]["image"]
            level.data = level.values * 2 if what == "map" else level.data * 2
        else:
            pixels = zarr.open_array(store / "images/he/s0") if "disk" in what else sdata.images["he"].data
            pixels[0, 40, 40] = 0
        with pytest.raises(StoreError, match="pixnet_map"):
            predict(sdata, model, shapes_key="cells")

    @pytest.mark.parametrize("change", ["cells", "pixels"])
    def test_scores_of_regions_that_were_drawn_anew(self, predict, model, change):
        sdata = Slide().build()
        predict(sdata, model, shapes_key="cells", write=None)
        ps.tl.evaluate(sdata, table_key="table", predicted_key="pixnet_cells")
        other = Slide(5)
        if change == "cells":
            sdata.shapes["cells"] = other.build().shapes["cells"]
        else:
            sdata.images["he"] = image(255 - other.pixels)
        with pytest.raises(DataError, match="pixnet_cells"):
            ps.tl.evaluate(sdata, table_key="table", predicted_key="pixnet_cells")

    def test_notes_of_an_older_handle_do_not_go_over_newer_ones(self, predict, model, fit, tmp_path):
        newer = stored(Slide().build(), tmp_path / "s.zarr")
        predict(newer, model)
        older = sd.read_zarr(tmp_path / "s.zarr")
        other = fit(Slide().build(), genes=model.genes[::-1])
        predict(newer, other, overwrite=True)
        with pytest.raises(StoreError, match="pixnet_map"):
            ps.get.gene_map(older, model.genes[0])
        predict(older, model, radius_um=4, write=None)
        again = sd.read_zarr(tmp_path / "s.zarr")
        assert again.attrs["pixnet_sd"]["maps"]["pixnet_map"]["model_sha256"] == other.record.weights_sha256
        predict(again, model, shapes_key="cells", write=None)
        fresh = Slide().build()
        predict(fresh, model, shapes_key="cells", write=None)
        np.testing.assert_array_equal(again.tables["pixnet_cells"].X, fresh.tables["pixnet_cells"].X)
