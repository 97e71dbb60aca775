"""`config.json`: everything in it comes back, and what is no checkpoint of ours is told so."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tests.store.sealing import sealed

from pixnet_sd.model import DecoderConfig, ModelRecord, library_versions, read_record


@pytest.fixture
def record() -> ModelRecord:
    return ModelRecord(
        genes=["ACTB", "µ-gene"],
        target_sum=1e4,
        objective="mse_pcc",
        aggregation="mean",
        working_mpp=0.5,
        encoder="test_resnet",
        encoder_weights=None,
        encoder_sha256="e",
        freeze_encoder=True,
        decoder=DecoderConfig(widths=(2, 4, 8, 16), hidden=(4, 8, 16), dropout=0.5),
        tile_px=128,
        halo_px=160,
        sees_whole_tile=False,
        weights_sha256="w",
        training={"seed": 0, "preset": None},
        slides={"a": {"mpp": 0.25}},
        held_out_pcc=[0.25, None],
        history=[{"epoch": 1.0, "loss": 2.0}],
        versions={"torch": "2"},
        depends_on={"a": {"pixels": "0f", "outlines": {"cells": "1e"}}},
    )


@pytest.mark.parametrize("widths", [(2, 4, 8, 16), None])
def test_round_trip(record: ModelRecord, tmp_path: Path, widths) -> None:
    record = replace(record, decoder=replace(record.decoder, widths=widths))
    assert read_record(sealed(tmp_path, record.to_json())) == record


def test_nan_is_null_in_the_file(record: ModelRecord) -> None:
    record.history = [{"epoch": 1.0, "val_pcc": float("-inf"), "loss": np.float64("nan")}]
    found = json.loads(record.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["history"] == [{"epoch": 1.0, "val_pcc": None, "loss": None}]


def test_numpy_values_are_written_as_plain_ones(record: ModelRecord) -> None:
    record.slides = {"a": {"mpp": np.float64(0.5), "n": np.int64(3), "seen": np.bool_(True)}}
    record.held_out_pcc = [np.float32(0.5), None]
    found = json.loads(record.to_json())
    assert found["slides"] == {"a": {"mpp": 0.5, "n": 3, "seen": True}}
    assert found["held_out_pcc"] == [0.5, None]


def test_fields_of_a_later_version_are_ignored(record: ModelRecord, tmp_path: Path) -> None:
    assert read_record(sealed(tmp_path, json.dumps(asdict(record) | {"new_in_2030": 1}))) == record


def test_var(record: ModelRecord) -> None:
    assert list(record.var.index) == record.genes
    assert record.var["held_out_pcc"].dtype == "float64"
    assert record.var["held_out_pcc"].tolist()[0] == 0.25
    assert np.isnan(record.var["held_out_pcc"].tolist()[1])
    assert list(replace(record, held_out_pcc=[]).var.columns) == []


def test_versions() -> None:
    assert {"pixnet_sd", "torch", "timm", "spatialdata"} <= set(library_versions())
    assert library_versions()["torch"][0].isdigit()
