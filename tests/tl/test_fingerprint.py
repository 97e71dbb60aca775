"""What answers depend on: any single change to it gives another answer, any other change the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Point, box
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Translation, set_transformation
from tests.grouped import FIT as FIT_GROUPS
from tests.grouped import grouped

import pixnet_sd as ps
from pixnet_sd._fingerprint import content_sha256, differing_parts, fingerprint
from pixnet_sd.errors import CheckpointError, DataError, StoreError

SIDE, N = 96, 24
FLAT: dict[str, Any] = {
    "mpp": 0.5,
    "encoder": "test_resnet",
    "encoder_weights": None,
    "max_epochs": 1,
    "decoder_width": 8,
    "tile_px": 96,
    "validation": None,
    "genes": 3,
    "device": "cpu",
    "record_model": False,
    "show_progress_bar": False,
}
"""Parameters of `fit` that make it take half a second."""
PREDICT: dict[str, Any] = {
    "mpp": 0.5,
    "predict_params": {"tile_px": 64},
    "device": "cpu",
    "show_progress_bar": False,
}


def image(pixels: np.ndarray, channels: str = "rgb", **options: Any) -> Any:
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list(channels), **options)


def pixels(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 220, (3, SIDE // 8, SIDE // 8), np.uint8).repeat(8, 1).repeat(8, 2)


def circles(xy: np.ndarray, radius: np.ndarray, ids: np.ndarray) -> gpd.GeoDataFrame:
    return ShapesModel.parse(gpd.GeoDataFrame({"radius": radius}, geometry=[Point(*p) for p in xy], index=ids))


class Slide:
    """Arrays of a slide; `build` makes the object."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.pixels = pixels()
        self.xy = random.uniform(12, SIDE - 12, (N, 2))
        self.radius = np.full(N, 5.0)
        self.ids = np.arange(1, N + 1)
        self.counts = random.poisson(5, (N, 5)).astype(np.float32)
        self.genes = [f"g{k}" for k in range(5)]

    def build(self) -> sd.SpatialData:
        obs = pd.DataFrame({"region": pd.Categorical(["cells"] * N), "id": self.ids}, index=[f"o{k}" for k in range(N)])
        table = ad.AnnData(self.counts, obs=obs, var=pd.DataFrame(index=self.genes))
        table = TableModel.parse(table, region="cells", region_key="region", instance_key="id")
        shapes = {"cells": circles(self.xy, self.radius, self.ids)}
        return sd.SpatialData(images={"he": image(self.pixels)}, shapes=shapes, tables={"table": table})


Fit = Callable[..., ps.PixNet]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """`tl.fit`, small, of flat parameters, into a folder of its own unless one is given."""

    def fit(sdata: sd.SpatialData, **options: Any) -> ps.PixNet:
        place = {"checkpoint_dir": tmp_path_factory.mktemp("models") / "model"}
        return ps.tl.fit(sdata, **grouped(FIT_GROUPS, **(place | FLAT | options)))

    return fit


@pytest.fixture(scope="module")
def model(fit) -> ps.PixNet:
    return fit(Slide().build())


def asked(model: ps.PixNet) -> str:
    """Fingerprint of what a model was trained on."""
    found: str = model.record.training["fingerprint"]
    return found


def predicted(sdata: sd.SpatialData, model: ps.PixNet) -> tuple[str, dict[str, str]]:
    """Fingerprint of the map, and what the table says that it depends on."""
    ps.tl.predict(sdata, model, shapes_key="cells", overwrite=True, **PREDICT)
    of_map = sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"]["fingerprint"]
    return of_map, dict(sdata.tables["pixnet_cells"].uns["pixnet_sd"]["depends_on"])


@pytest.fixture(scope="module")
def answer(model) -> tuple[str, dict[str, str]]:
    return predicted(Slide().build(), model)


def one_pixel(slide: Slide, k: int) -> None:
    slide.pixels[k % 3, k % SIDE, (7 * k) % SIDE] ^= 1


def mirrored(slide: Slide, k: int) -> None:
    slide.pixels = slide.pixels[:, :, ::-1] if k % 2 else slide.pixels[:, ::-1]


def negative(slide: Slide, k: int) -> None:
    slide.pixels = 255 - slide.pixels


def other_stain(slide: Slide, k: int) -> None:
    slide.pixels = slide.pixels[[(0, 2, 1), (1, 0, 2), (2, 1, 0)][k % 3], :, :]


def moved(slide: Slide, k: int) -> None:
    slide.xy[k % N, k % 2] += 0.01


def grown(slide: Slide, k: int) -> None:
    slide.radius[k % N] *= 1.001


OF_IMAGE, OF_REGIONS = [one_pixel, mirrored, negative, other_stain], [moved, grown]


def one_more_count(slide: Slide, k: int) -> None:
    slide.counts[k % N, k % 5] += 1


def swapped_rows(slide: Slide, k: int) -> None:
    a, b = k % N, (k + 1 + k % 7) % N
    slide.counts[[a, b]] = slide.counts[[b, a]]
    if np.array_equal(slide.counts[a], slide.counts[b]):  # nothing was swapped
        slide.counts[a, 0] += 1


@given(change=st.sampled_from([*OF_IMAGE, *OF_REGIONS, one_more_count, swapped_rows]), k=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_any_change_of_the_data_is_another_question(model, fit, answer, change, k):
    slide = Slide()
    change(slide, k)
    assert asked(fit(slide.build())) != asked(model)
    before, after = answer, predicted(slide.build(), model)
    assert (after[0] != before[0]) == (change in OF_IMAGE)
    assert (after[1] != before[1]) == (change in OF_IMAGE + OF_REGIONS)


def as_squares(sdata: sd.SpatialData) -> None:
    found = sdata.shapes["cells"]
    outlines = [box(p.x - r, p.y - r, p.x + r, p.y + r) for p, r in zip(found.geometry, found.radius, strict=True)]
    sdata.shapes["cells"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=outlines, index=found.index))


def as_labels(sdata: sd.SpatialData) -> None:
    drawn = np.zeros((SIDE, SIDE), np.int32)
    for k, point in sdata.shapes["cells"].geometry.items():
        drawn[round(point.y) - 5 : round(point.y) + 5, round(point.x) - 5 : round(point.x) + 5] = k
    del sdata.shapes["cells"]
    sdata.labels["cells"] = Labels2DModel.parse(drawn, dims=("y", "x"))


def shifted_image(sdata: sd.SpatialData) -> None:
    set_transformation(sdata.images["he"], Translation([1, 0], ("x", "y")))


def shifted_cells(sdata: sd.SpatialData) -> None:
    set_transformation(sdata.shapes["cells"], Translation([0, 0.5], ("x", "y")))


@pytest.mark.parametrize("change", [as_squares, as_labels, shifted_image, shifted_cells])
def test_other_outlines_and_places(model, fit, change):
    sdata = Slide().build()
    change(sdata)
    assert asked(fit(sdata)) != asked(model)


@pytest.mark.parametrize(
    "option",
    [{"seed": 1}, {"lr": 1e-4}, {"target_sum": 1e3}, {"mpp": 0.25}, {"objective": "nb"}, {"genes": ["g1", "g0"]}],
    ids=str,
)
def test_options_train_anew(model, fit, option):
    assert asked(fit(Slide().build(), **option)) != asked(model)


def another_order(sdata: sd.SpatialData) -> sd.SpatialData:
    sdata.images["aaa"] = Image2DModel.parse(np.zeros((1, 8, 8), np.uint8), dims=("c", "y", "x"))
    sdata.images["he"] = sdata.images.pop("he")
    return sdata


def other_chunks(sdata: sd.SpatialData) -> sd.SpatialData:
    sdata.images["he"] = image(sdata.images["he"].data.rechunk((1, 17, 40)))
    return sdata


def unrelated(sdata: sd.SpatialData) -> sd.SpatialData:
    sdata.labels["nuclei"] = Labels2DModel.parse(np.eye(20, dtype=np.int32), dims=("y", "x"))
    sdata.tables["notes"] = ad.AnnData(np.ones((3, 2), np.float32))
    sdata.attrs["lab"] = {"microscope": 2}
    return sdata


def stored(sdata: sd.SpatialData, path: Any) -> sd.SpatialData:
    sdata.write(path)
    return sd.read_zarr(path)


@pytest.mark.parametrize("change", [another_order, other_chunks, unrelated, stored])
def test_changes_to_something_else_do_not_matter(model, fit, answer, change, tmp_path):
    sdata = change(Slide().build(), *([tmp_path / "s.zarr"] if change is stored else []))
    assert asked(fit(sdata)) == asked(model)
    assert predicted(sdata, model) == answer


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
        negative(slide, 0)
        with pytest.raises(CheckpointError, match="slides / slide / pixels"):
            fit(slide.build(), checkpoint_dir=tmp_path / "m")
        again = fit(Slide().build(), checkpoint_dir=tmp_path / "m")
        assert again.record.weights_sha256 == model.record.weights_sha256

    def test_a_map_that_someone_else_rewrote_is_not_believed(self, model, tmp_path):
        sdata = stored(Slide().build(), tmp_path / "s.zarr")
        ps.tl.predict(sdata, model, **PREDICT)
        level = tmp_path / "s.zarr/images/pixnet_map/s0"
        chunk = next(path for path in level.rglob("*") if path.is_file() and path.name != "zarr.json")
        chunk.write_bytes(chunk.read_bytes())  # even if it is the same
        with pytest.raises(StoreError):
            ps.tl.predict(sdata, model, shapes_key="cells", **PREDICT)

    @pytest.mark.parametrize("lazy", [False, True])
    def test_a_map_in_memory_that_was_changed_is_not_believed(self, model, lazy):
        sdata = Slide().build()
        ps.tl.predict(sdata, model, **PREDICT)
        level = sdata.images["pixnet_map"]["scale0"]["image"]
        level.data = level.data * 2 if lazy else level.values * 2
        with pytest.raises(StoreError, match="pixnet_map"):
            ps.tl.predict(sdata, model, shapes_key="cells", **PREDICT)

    def test_scores_of_another_slide(self, tmp_path):
        slides = {"a": Slide(0).build(), "b": Slide(1).build()}
        options = grouped(FIT_GROUPS, **FLAT | {"genes": ["g0", "g1"]})
        del options["record_model"], options["show_progress_bar"]

        def scores(place):
            given = {"checkpoint_dir": tmp_path / place, "fit_params": options, "show_progress_bar": False}
            return ps.tl.cross_validate(slides, folds=["a"], **given).per_gene

        first = scores("m")
        slides["a"] = Slide(9).build()
        second, fresh = scores("m"), scores("fresh")
        assert first.pcc.tolist() != second.pcc.tolist() == fresh.pcc.tolist()

    @pytest.mark.parametrize("change", ["cells", "pixels"])
    def test_scores_of_regions_that_were_drawn_anew(self, model, change):
        sdata = Slide().build()
        ps.tl.predict(sdata, model, shapes_key="cells", write=None, **PREDICT)
        ps.tl.evaluate(sdata, table_key="table", predicted_key="pixnet_cells")
        other = Slide(5)
        if change == "cells":
            sdata.shapes["cells"] = other.build().shapes["cells"]
        else:
            sdata.images["he"] = image(255 - other.pixels)
        with pytest.raises(DataError, match="pixnet_cells"):
            ps.tl.evaluate(sdata, table_key="table", predicted_key="pixnet_cells")

    def test_notes_of_an_older_handle_do_not_go_over_newer_ones(self, model, fit, tmp_path):
        """Nor is a map read under the names of genes that the older handle remembers."""
        newer = stored(Slide().build(), tmp_path / "s.zarr")
        ps.tl.predict(newer, model, **PREDICT)
        older = sd.read_zarr(tmp_path / "s.zarr")
        other = fit(Slide().build(), genes=model.genes[::-1])
        ps.tl.predict(newer, other, overwrite=True, **PREDICT)
        with pytest.raises(StoreError, match="pixnet_map"):
            ps.get.gene_map(older, model.genes[0])
        ps.tl.predict(older, model, radius_um=4, write=None, **PREDICT)
        again = sd.read_zarr(tmp_path / "s.zarr")
        assert again.attrs["pixnet_sd"]["maps"]["pixnet_map"]["model_sha256"] == other.record.weights_sha256
        ps.tl.predict(again, model, shapes_key="cells", write=None, **PREDICT)
        fresh = Slide().build()
        ps.tl.predict(fresh, model, shapes_key="cells", write=None, **PREDICT)
        np.testing.assert_array_equal(again.tables["pixnet_cells"].X, fresh.tables["pixnet_cells"].X)

    def test_two_models_are_recorded(self, fit, tmp_path):
        newer = stored(Slide().build(), tmp_path / "s.zarr")
        fit(newer, record_model=True)
        older = sd.read_zarr(tmp_path / "s.zarr")
        fit(newer, record_model=True)
        with pytest.raises(CheckpointError, match="model="):
            ps.tl.predict(older, **PREDICT)
