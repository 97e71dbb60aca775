"""`config.json`: everything in it comes back; and the model card says what it knows, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tests.model.models import SHAPE, make_model, make_record, sealed

from pixnet_sd.model import ModelRecord, PixNet, read_record

SLIDE = {
    "image": "full_image",
    "coordinate_system": "global",
    "mpp": 0.27345,
    "mpp_rule": "bins",
    "tables": {"square_008um": "a_square_008um"},
    "training_regions": {"8 µm": 12345, "16 µm": 0},
    "held_out_regions": {"8 µm": 678},
}
KNOWN = {
    "encoder_weights": "imagenet",
    "freeze_encoder": True,
    "weights_sha256": "f" * 64,
    "slides": {"tumour A": SLIDE},
    "training": {"preset": None, "lr": 0.001, "keep_best": True, "fingerprint": "secret"},
    "versions": {"torch": "2.9"},
    "depends_on": {"a": {"pixels": "0f", "outlines": {"cells": "1e"}}},
}


@pytest.mark.parametrize("widths", [(2, 4, 8, 16), None])
def test_round_trip(tmp_path: Path, widths: tuple[int, ...] | None) -> None:
    decoder = replace(SHAPE, widths=widths)
    record = make_record(**KNOWN, decoder=decoder, held_out_pcc=[0.25, None, 0.5])
    assert read_record(sealed(tmp_path, record.to_json())) == record
    # fields of a later version are passed over
    assert read_record(sealed(tmp_path, json.dumps(asdict(record) | {"new_in_2030": 1}))) == record


def test_numpy_values_are_written_as_plain_ones_and_nan_as_null() -> None:
    record = make_record(
        slides={"a": {"mpp": np.float64(0.5), "n": np.int64(3), "seen": np.bool_(True), "box": np.arange(2)}},
        held_out_pcc=[np.float32(0.5), None, np.float32("nan")],
        history=[{"epoch": 1.0, "val_pcc": float("-inf"), "loss": np.float64("nan")}],
    )
    found = json.loads(record.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["slides"] == {"a": {"mpp": 0.5, "n": 3, "seen": True, "box": [0, 1]}}
    assert found["held_out_pcc"] == [0.5, None, None]
    assert found["history"] == [{"epoch": 1.0, "val_pcc": None, "loss": None}]


def test_var() -> None:
    record = make_record(held_out_pcc=[0.25, None, 0.5])
    assert list(record.var.index) == record.genes
    np.testing.assert_array_equal(record.var["held_out_pcc"], [0.25, np.nan, 0.5])
    assert list(make_record().var.columns) == []


# The model card


NETWORK = make_model().network


def section(record: ModelRecord, title: str, license: str | None = None) -> str:
    """A section of the card of a record."""
    text = PixNet(NETWORK, record).generate_model_card(repo_id="lab/model", license=license).text
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


@pytest.mark.parametrize(
    ("of_another", "says"),
    [
        (None, "square blocks of every slide"),
        ({}, "Nothing was held out"),
        ({"8 µm": 5}, "Held out: whole slides (new)"),
    ],
)
def test_data_and_splits(of_another: dict[str, int] | None, says: str) -> None:
    slides = {"a|b\n| c": SLIDE}  # a name that would break a table
    if of_another is not None:
        new = {**SLIDE, "training_regions": {}, "held_out_regions": of_another}
        slides = {"old": {**SLIDE, "held_out_regions": {}}, "new": new}
    text = section(make_record(slides=slides), "Training data")
    assert says in text
    if of_another is None:
        assert rows(text)[0][0].startswith("a\\|b \\")
        assert rows(text)[0][-4:] == ["0.2735 (bins)", "12,345 8 µm", "678 8 µm", "square_008um"]


def test_scores() -> None:
    record = make_record(genes=82, held_out_pcc=[*np.linspace(-0.1, 0.7, 81), None], training={"keep_best": True})
    text = section(record, "Held-out scores")
    assert rows(text)[0] == ["81 of 82", "0.300", "0.100", "0.300", "0.500", "0.700", "-0.100"]
    assert "best on these very regions" in text
    ends = rows(text.split("\n\n")[-1])
    assert len(ends) == 10
    assert ends[0] == ["GENE80", "0.700", "GENE0", "-0.100"]
    assert ends[-1] == ["GENE71", "0.610", "GENE9", "-0.010"]
    text = section(make_record(held_out_pcc=[0.25, None, 0.5]), "Held-out scores")  # few genes are all there
    assert rows(text.split("\n\n")[-1]) == [["GENE2", "0.500"], ["GENE0", "0.250"]]
    assert "best on these very regions" not in text


@pytest.mark.parametrize("pcc", [[], [None, None, None]])
def test_without_scores_it_claims_none(pcc: list[None]) -> None:
    text = section(make_record(held_out_pcc=pcc), "Held-out scores")
    assert "is not known" in text
    assert "|" not in text


def test_model_and_training() -> None:
    record = make_record(**KNOWN)
    model = dict(rows(section(record, "Model")))
    assert model["encoder"] == "timm `test_resnet`, from imagenet, frozen"
    assert model["image seen at"] == "0.5 µm per pixel"
    assert model["pitch of the map"] == "2 µm"
    training = dict(rows(section(record, "Training")))
    assert training == {"epochs run": "`2`", "lr": "`0.001`", "keep best": "`True`", "version of torch": "`2.9`"}


def test_licence() -> None:
    text = section(make_record(**KNOWN), "Licence", "cc-by-4.0")
    assert "`cc-by-4.0`." in text
    assert "(imagenet)" in text
    text = section(make_record(), "Licence")
    assert "nobody may use" in text
    assert "imagenet" not in text
