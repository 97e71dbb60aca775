"""What users get wrong, and what they are told; whatever it is, their store stays as it was."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Translation, get_transformation, set_transformation

from pixnet_sd import tl
from pixnet_sd.errors import CheckpointError, DataError, ElementError, PixNetError, ResolutionError, StoreError
from pixnet_sd.slide import open_slide

FULL, BINS, TABLE = "sample_full_image", "sample_square_008um", "square_008um"


def all_files(store) -> dict[str, str]:
    files = sorted(path for path in Path(store).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True)
def _store_stays_as_it_was(fitted, forward_passes):
    """Every test here breaks the object in memory; nothing of that, nor of a refused call, may reach the disk."""
    before = all_files(fitted.path)
    yield
    assert all_files(fitted.path) == before
    assert len(list(sd.read_zarr(fitted.path).gen_elements())) == 5
    assert forward_passes == []  # refused before any work
    assert not list(Path(fitted.path).parent.glob(".*pixnet_sd*"))


@pytest.fixture
def refused(fit, predict, fitted, tmp_path):
    """Both verbs refuse the object with this message; `fit` makes no folder."""

    def check(
        error: type[PixNetError], message: str, *, only: str | None = None, backed: bool = False, **arguments
    ) -> None:
        if only != "predict":
            with pytest.raises(error, match=message):
                fit(fitted, checkpoint_dir=tmp_path / "new", **arguments)
            assert not (tmp_path / "new").exists()
        if only != "fit":
            # of a backed object, what was changed in memory is refused for that reason alone
            there = fitted if backed else sd.SpatialData.init_from_elements(elements(fitted), attrs=fitted.attrs)
            with pytest.raises(error, match=message):
                predict(there, radius_um=8, **arguments)

    return check


def elements(sdata) -> dict:
    """All elements by name."""
    return {name: element for _, name, element in sdata.gen_elements()}


def replaced(sdata, pixels, names, **options):
    """The full image with other pixels."""
    there = get_transformation(sdata.images[FULL], get_all=True)
    dims = ("c", "y", "x")
    sdata.images[FULL] = Image2DModel.parse(pixels, dims=dims, c_coords=names, transformations=there, **options)


def pixels_of(sdata) -> np.ndarray:
    return sdata.images[FULL]["scale0"]["image"].values


class TestImage:
    def test_none(self, fitted, refused):
        fitted.images.clear()
        refused(ElementError, r"has no slide image. Add the H&E image with Image2DModel")

    def test_only_our_own(self, fitted, refused):
        element = fitted.images[FULL]
        fitted.images.clear()
        fitted.images["pixnet_map"] = element
        fitted.attrs["pixnet_sd"]["maps"] = {"pixnet_map": {}}
        refused(ElementError, r"no slide image. Only images written by pixnet_sd were found: 'pixnet_map'")

    def test_several(self, fitted, refused):
        fitted.images["one"] = Image2DModel.parse(pixels_of(fitted)[:, ::-1], transformations={"sample": Identity()})
        message = r"Several images could be the slide: 'sample_full_image' \(3 c x 200 y x 200 x; channels r, g, b; .*"
        refused(ElementError, message + r"'one' \(.*Name one with image_key=")

    def test_wrong_name(self, refused):
        refused(ElementError, "There is no image 'full'. Images: 'sample_full_image', ", image_key="full")

    def test_smaller_copy(self, fitted, refused):
        """The hires image with mpp of the full one is not noticed, one by its own scale is."""
        small = Image2DModel.parse(
            np.full((3, 40, 40), 200, np.uint8),
            transformations={"sample": sd.transformations.Scale([5, 5], axes=("x", "y"))},
        )
        fitted.images["small"] = small
        message = r"mpp = 5 µm per pixel .* larger than 2.*perhaps 'small' is a downscaled copy"
        refused(ResolutionError, message, image_key="small")

    @pytest.mark.parametrize(
        ("change", "names", "message"),
        [
            (lambda p: p[:1], ["he"], r"found 1 channel\(s\) \(he\), an RGB H&E image is needed"),
            (lambda p: np.concatenate([p, p[:2]]), list("abcde"), r"found 5 channel\(s\)"),
            (lambda p: np.concatenate([p, p[:1]]), ["DAPI", "CD3", "CD20", "CK"], r"4 channel\(s\) \(DAPI, CD3"),
            (lambda p: p.astype(np.uint16) * 257, ["r", "g", "b"], r"(?s)uint16 pixels \(.* to 6.*clip\(0, 65535\)"),
            (lambda p: p.astype(np.float32) / 255, ["r", "g", "b"], r"(?s)float32 pixels \(.* to 0.*clip\(0, 1\)"),
        ],
        ids=["1 channel", "5 channels", "4 stains", "uint16", "float"],
    )
    def test_not_rgb(self, fitted, refused, change, names, message):
        replaced(fitted, change(pixels_of(fitted)), names)
        refused(DataError, message, image_key=FULL)

    def test_conversion_that_the_message_gives_works(self, fitted, fit, tmp_path):
        replaced(fitted, pixels_of(fitted).astype(np.uint16) * 257, ["r", "g", "b"])
        with pytest.raises(DataError) as caught:
            fit(fitted, image_key=FULL, checkpoint_dir=tmp_path / "new")
        exec(str(caught.value).partition(":\n")[2], {"sdata": fitted})
        with pytest.raises(ElementError, match="counts"):  # the next thing that is wrong: the image is fine
            fit(fitted, image_key=f"{FULL}_uint8", table_key="counts")
        assert fitted.images[f"{FULL}_uint8"]["scale0"]["image"].dtype == np.uint8

    def test_blank_glass(self, fitted, refused):
        noise = np.random.default_rng(0).integers(238, 243, (3, 200, 200)).astype(np.uint8)
        replaced(fitted, noise, ["r", "g", "b"])
        message = "No tissue was found on image 'sample_full_image': it looks like empty glass. Check image_key="
        refused(DataError, message, only="predict")


class TestResolution:
    def test_unknown(self, fitted, refused):
        fitted.shapes["bins"] = fitted.shapes.pop(BINS)
        message = r"Micrometres per pixel of image 'sample_full_image' are unknown.*shapes there: 'bins'. Give mpp="
        refused(ResolutionError, message)

    @pytest.mark.parametrize(
        ("mpp", "message"),
        [
            (8.0, r"mpp = 8 µm per pixel \(from the argument mpp=\) is larger than 2.0.*image_key=, or correct mpp="),
            (0.0005, r"mpp = 0.0005 µm .* smaller than 0.1: perhaps the value is in mm"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:mpp = ")
    def test_absurd(self, refused, mpp, message):
        refused(ResolutionError, message, mpp=mpp)

    def test_shears(self, fitted, refused):
        sheared = sd.transformations.Affine([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))
        set_transformation(fitted.images[FULL], sheared, "sample")
        refused(ResolutionError, r"scales its two axes differently or shears", image_key=FULL)

    def test_another_coordinate_system(self, refused):
        refused(ElementError, "coordinate system 'global'", coordinate_system="global")


class TestRegions:
    def moved(self, sdata, geometry):
        frame = gpd.GeoDataFrame(geometry=list(geometry), index=sdata.shapes[BINS].index)
        there = get_transformation(sdata.shapes[BINS], get_all=True)
        sdata.shapes[BINS] = ShapesModel.parse(frame, transformations=there)

    def test_off_the_image(self, fitted, refused):
        self.moved(fitted, fitted.shapes[BINS].geometry.translate(5000, 0))
        message = r"none of 408 regions touches the image. Regions span x 50\d\d to 51\d\d and .* the image x 0 to 200"
        refused(ResolutionError, message + r".*Check coordinate_system=, image_key=", shapes_key=BINS, only="predict")
        refused(ResolutionError, message, only="fit")

    def test_swapped_axes(self, fitted, refused):
        """On a slide that is wider than high, with tissue on its right."""
        wide = np.full((3, 200, 600), 240, np.uint8)
        wide[:, :, 400:] = pixels_of(fitted)
        replaced(fitted, wide, ["r", "g", "b"])
        del fitted.images["sample_hires_image"], fitted.images["sample_lowres_image"]  # which are no longer of it
        swapped = [
            sd.transformations.Affine([[0, 1, 0], [1, 0, 0], [0, 0, 1]], ("x", "y"), ("x", "y")),
            Translation([0, 400], axes=("x", "y")),
        ]
        set_transformation(fitted.shapes[BINS], sd.transformations.Sequence(swapped), "sample")
        message = r"100% of 408 regions lie outside the image, but 100% would lie inside with x and y swapped"
        refused(ResolutionError, message, only="fit")
        refused(ResolutionError, message, only="predict", shapes_key=BINS)

    def test_empty_element(self, fitted, refused):
        blank = Labels2DModel.parse(np.zeros((20, 20), np.int32), transformations={"sample": Identity()})
        fitted.labels["blank"] = blank
        refused(DataError, "blank", only="predict", shapes_key="blank")

    def test_an_image_as_shapes(self, refused):
        message = f"no shapes or labels element '{FULL}'.*Shapes: '{BINS}'. Labels: none"
        refused(ElementError, message, only="predict", shapes_key=FULL)

    @pytest.mark.parametrize("ids", [float, "datetime64[ns]", lambda k: "a" if k == 3 else k, lambda k: (k, k), None])
    def test_ids_that_no_table_can_hold(self, fitted, refused, ids):
        """Found before the network has run for them, as the fixture of this module checks."""
        index = fitted.shapes[BINS].index
        fitted.shapes["cells"] = fitted.shapes[BINS].copy()
        changed = index.map(ids) if callable(ids) and ids is not float else index.astype(ids or object)
        fitted.shapes["cells"].index = changed.where(index != 3, None) if ids is None else changed
        remedy = r"astype\(int\)" if ids is float else r"map\(str\)"
        refused(DataError, rf"'cells'.*sdata\['cells'\].index = .*{remedy}", only="predict", shapes_key="cells")

    def test_bin_that_occurs_twice(self, fitted, refused):
        bins = fitted.shapes[BINS]
        twice = gpd.GeoDataFrame(geometry=[*bins.geometry, bins.geometry.iloc[0]], index=[*bins.index, bins.index[0]])
        fitted.shapes[BINS] = ShapesModel.parse(twice, transformations=get_transformation(bins, get_all=True))
        refused(DataError, rf"'{BINS}': 1 of 409 ids occurred before \(first 0\)")
        with pytest.raises(DataError, match=f"'{BINS}': 1 of 409 ids"):
            open_slide(fitted)
        measured = fitted.tables[TABLE].copy()
        measured.uns["pixnet_sd"] = {"target_sum": 1e4}
        fitted.tables["pixnet_bins"] = measured
        with pytest.raises(DataError, match=f"'{BINS}': 1 of 409 ids"):
            tl.evaluate(fitted, table_key=TABLE, predicted_key="pixnet_bins")

    def test_no_shared_system(self, fitted, refused):
        set_transformation(fitted.shapes[BINS], {"elsewhere": Identity()}, set_all=True)
        refused(ElementError, "elsewhere", only="predict", shapes_key=BINS)
        refused(PixNetError, "elsewhere|Give mpp=", only="fit")


class TestTable:
    def test_without_region(self, fitted, refused):
        fitted.tables[TABLE] = ad.AnnData(fitted.tables[TABLE].X.copy())
        refused(ElementError, r"No table annotates shapes or labels.*TableModel.parse\(table, region=", only="fit")
        message = r"Table 'square_008um' annotates no region"
        refused(ElementError, message, only="fit", table_key=TABLE)

    def test_region_that_is_gone(self, fitted, refused):
        fitted.shapes["sample_bins_008um"] = fitted.shapes.pop(BINS)
        message = f"annotates '{BINS}', not in this SpatialData object. Shapes: 'sample_bins_008um'"
        refused(ElementError, message, only="fit", table_key=TABLE)

    def test_no_tables(self, fitted, fit):
        """Neither in the object nor in a store: those of a store would be found."""
        alone = sd.SpatialData(images=dict(fitted.images), shapes=dict(fitted.shapes))
        with pytest.raises(ElementError, match=r"No table annotates .* Tables: none"):
            fit(alone)

    def test_several(self, fitted, refused):
        table = fitted.tables.pop(TABLE)
        fitted.shapes["cells"] = gpd.GeoDataFrame(fitted.shapes[BINS])
        for key in ("one", "two"):
            other = ad.AnnData(table.X.copy(), obs=table.obs.assign(region=pd.Categorical(["cells"] * table.n_obs)))
            fitted.tables[key] = TableModel.parse(
                other, region="cells", region_key="region", instance_key="location_id"
            )
        message = "Several tables measure the same regions 'cells': 'one', 'two', .*Name one with table_key="
        refused(ElementError, message, only="fit")

    @pytest.mark.parametrize("axis", ["rows", "genes"])
    def test_empty(self, fitted, refused, axis):
        table = fitted.tables[TABLE]
        fitted.tables.data[TABLE] = table[:0].copy() if axis == "rows" else table[:, :0].copy()
        refused(DataError, r"Table 'square_008um' is empty: \d+ rows x \d+ genes", only="fit", table_key=TABLE)

    def test_ids_that_do_not_match(self, fitted, refused):
        fitted.tables[TABLE].obs["location_id"] += 1000
        refused(
            DataError, r"none of its 408 instance ids \(such as 1000\) is in element .* \(ids such as 0\)", only="fit"
        )

    def test_all_zero(self, fitted, refused):
        fitted.tables[TABLE].X = sparse.csr_matrix((408, 40), dtype=np.float32)
        refused(DataError, "all 408 regions on the image have no counts at all", only="fit")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                np.nan,
                r"X holds NaN or infinite values \(1 in 408 rows, first nan for gene 'ACTB' in row 7\). Remove",
            ),
            (np.inf, "NaN or infinite"),
            (-2.0, "negative values .* Scaled values will not do: give raw counts"),
        ],
    )
    def test_values(self, fitted, refused, value, message):
        x = fitted.tables[TABLE].X.tolil()
        x[7, fitted.tables[TABLE].var_names.get_loc("ACTB")] = value
        fitted.tables[TABLE].X = x.tocsr()
        refused(DataError, message, only="fit")

    def test_no_matrix(self, fitted, refused):
        fitted.tables[TABLE].X = None
        refused(DataError, "has no X. Put raw counts there", only="fit")

    def test_genes_named_twice(self, fitted, refused):
        table = fitted.tables[TABLE]
        table.var_names = ["ACTB", "ACTB", *table.var_names[2:]]
        refused(DataError, "1 gene names occur more than once .*var_names_make_unique", only="fit")


class TestGenes:
    def test_missing_at_predict(self, model, refused):
        message = f"1 of 2 genes are not in the model: '{model.genes[0].lower()}' .there is '{model.genes[0]}'."
        refused(DataError, message, only="predict", genes=[model.genes[1], model.genes[0].lower()])


class TestModel:
    def test_none_recorded(self, fitted, refused):
        fitted.attrs.clear()
        message = r"No model was given, and none is recorded in this object.*train one with fit\(sdata\)"
        refused(CheckpointError, message, only="predict")

    def test_recorded_one_is_gone(self, fitted, refused, tmp_path):
        fitted.attrs["pixnet_sd"]["model"] = str(tmp_path / "moved")
        message = r"The model that is recorded in this object, '.*moved', is not there any more. Give model="
        refused(CheckpointError, message, only="predict")

    def test_truncated(self, checkpoint, refused, tmp_path):
        shutil.copytree(checkpoint, tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])
        refused(CheckpointError, "truncated", only="predict", model=tmp_path / "cut")

    def test_of_another_kind(self, checkpoint, refused, tmp_path):
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "config.json").write_text('{"model_type": "vit"}')
        refused(CheckpointError, "not a checkpoint of this package", only="predict", model=tmp_path / "hub")
        refused(CheckpointError, "is a file", only="predict", model=checkpoint / "model.safetensors")


class TestStore:
    def test_read_only(self, fitted, refused, monkeypatch):
        real = tempfile.TemporaryFile

        def refuse(*args, dir=None, **kwargs):
            if dir is not None and Path(dir) == Path(fitted.path):
                raise OSError(errno.EROFS, "Read-only file system")
            return real(*args, dir=dir, **kwargs)

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        message = r"is read-only .*sdata.write\('/some/folder.zarr'\).*\(Read-only file system\)"
        refused(StoreError, message, only="predict", backed=True)

    @pytest.mark.parametrize("request_", [{}, {"radius_um": 8}, {"map_um": 8}], ids=["map", "circles too", "coarse"])
    def test_disk_too_small(self, fitted, predict, monkeypatch, request_):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        with pytest.raises(
            StoreError, match=r"may take up to \d+\.\d+ [MG]B, but only .* are free at .*genes=.*map_um="
        ):
            predict(fitted, **request_)

    def test_taken_by_another_kind(self, fitted, refused):
        labels = Labels2DModel.parse(np.zeros((20, 20), np.int32), transformations={"sample": Identity()})
        fitted.labels["pixnet_map"] = labels
        message = "already an element 'pixnet_map' under labels, so it cannot be used for images"
        refused(StoreError, message, only="predict", backed=True, overwrite=True)

    def test_not_a_folder(self, fitted, refused, tmp_path):
        store, fitted.path = fitted.path, tmp_path / "s.zarr.zip"
        fitted.path.touch()
        refused(StoreError, "not a local folder", only="predict", backed=True)
        fitted.path = store


class TestOnlyInMemory:
    """R11: results go into the store, and would lie beside what it has."""

    def test_moved_image(self, fitted, refused):
        set_transformation(fitted.images[FULL], Translation([40, 0], axes=("x", "y")), "again")
        message = rf"'{FULL}' has another transformation.*'again'.*sdata.write_transformations\('{FULL}'\)"
        refused(StoreError, message, only="predict", backed=True)

    def test_other_pixels(self, fitted, refused):
        replaced(fitted, pixels_of(fitted)[:, :, ::-1], ["r", "g", "b"], scale_factors=[2])
        refused(StoreError, f"'{FULL}' has other pixels", only="predict", backed=True)

    def test_moved_regions(self, fitted, refused, predict):
        set_transformation(fitted.shapes[BINS], Translation([4, 0], axes=("x", "y")), "sample")
        with pytest.raises(StoreError, match=f"'{BINS}' has another transformation.*'sample'"):
            predict(fitted, shapes_key=BINS)
