from __future__ import annotations

import pytest

from pixnet_sd.errors import StoreError
from pixnet_sd.store._disk import check_names


def test_free_names_pass(slide):
    check_names(slide, {"pixnet_map": "images", "pixnet.cells-8um": "tables"})


@pytest.mark.parametrize("name", ["a b", "", "..", "__x", "a/b", "gène*"])
def test_names_that_spatialdata_refuses(slide, name):
    with pytest.raises(StoreError, match="cannot be the name"):
        check_names(slide, {name: "images"})


def test_taken_name_needs_overwrite(slide):
    with pytest.raises(StoreError, match=r"images\['_full_image'\] exists already.*overwrite=True"):
        check_names(slide, {"_full_image": "images"})
    check_names(slide, {"_full_image": "images"}, overwrite=True)


def test_name_of_another_type_is_never_overwritten(slide):
    with pytest.raises(StoreError, match="element 'cells' under shapes"):
        check_names(slide, {"cells": "tables"}, overwrite=True)


def test_case_variants_collide(slide):
    with pytest.raises(StoreError, match="upper and lower case"):
        check_names(slide, {"CELLS": "shapes"})
    with pytest.raises(StoreError, match="upper and lower case"):
        check_names(slide, {"new": "shapes", "NEW": "tables"})


def test_element_only_on_disk_is_seen(slide):
    del slide.shapes["cells"]
    with pytest.raises(StoreError, match=r"shapes\['cells'\] exists already"):
        check_names(slide, {"cells": "shapes"})


def test_element_only_in_memory_is_seen(slide, in_memory):
    slide.shapes["drawn"] = in_memory.shapes["cells"]
    with pytest.raises(StoreError, match="element 'drawn' under shapes"):
        check_names(slide, {"drawn": "tables"})
