from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixnet_sd.errors import DataError
from pixnet_sd.io import _cells as _outlines
from pixnet_sd.io._cells import read_outlines

RING = [[0.5, 1.25], [10.0, 1.0], [10.0, 12.0], [0.5, 1.25]]


def collection(n: int) -> dict[str, object]:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x + i, y] for x, y in RING]]},
            "properties": {"cell_id": i, "name": 'with "features": [ in it'},
        }
        for i in range(n)
    ]
    return {"type": "FeatureCollection", "name": "cells", "features": features, "end": {"more": [1]}}


@given(n=st.integers(0, 5), block=st.integers(1, 300), indent=st.sampled_from([None, 0, 2]))
def test_features_are_read_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, n: int, block: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("geojson") / "cells.geojson"
    path.write_text(json.dumps(collection(n), indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_outlines, "_BLOCK_CHARACTERS", block)
        found = read_outlines(path)
    assert list(found) == [f"cellid_{i:09d}-1" for i in range(n)]
    for i, outline in enumerate(found.values()):
        assert list(outline.exterior.coords) == [(x + i, y) for x, y in RING]


@pytest.mark.parametrize(
    "text", ["", "{}", '{"features": [', '{"features": [{"a": 1}', '{"features": [{"geometry": 1}]}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cells.geojson").write_text(text)
    with pytest.raises(DataError, match="not a GeoJSON collection"):
        read_outlines(tmp_path / "cells.geojson")
