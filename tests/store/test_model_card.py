"""The model card says what the checkpoint knows, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pixnet_sd.model import DecoderConfig, ModelRecord
from pixnet_sd.model._record import card_text

SLIDE = {
    "image": "full_image",
    "coordinate_system": "global",
    "mpp": 0.27345,
    "mpp_rule": "bins",
    "tables": {"square_008um": "a_square_008um"},
    "training_regions": {"8 µm": 12345, "16 µm": 0},
    "held_out_regions": {"8 µm": 678},
}


def make_record(pcc: list[float | None], **changes) -> ModelRecord:
    record = ModelRecord(
        genes=[f"GENE{k}" for k in range(len(pcc) or 3)],
        target_sum=1e4,
        objective="mse_pcc",
        aggregation="mean",
        working_mpp=0.5,
        encoder="resnet18",
        encoder_weights="imagenet",
        encoder_sha256="e" * 64,
        freeze_encoder=True,
        decoder=DecoderConfig(widths=(4, 8, 8, 16), hidden=(4, 8, 8)),
        tile_px=512,
        halo_px=160,
        sees_whole_tile=False,
        weights_sha256="f" * 64,
        slides={"tumour A": SLIDE},
        held_out_pcc=pcc,
        training={"preset": None, "lr": 0.001, "keep_best": True, "fingerprint": "secret"},
        versions={"torch": "2.9"},
    )
    return replace(record, **changes)


def text_of(record: ModelRecord, license: str | None = None) -> str:
    return card_text(record, repo_id="lab/model", license=license)


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def test_data_and_splits():
    data = section(text_of(make_record([])), "Training data")
    assert rows(data) == [["tumour A", "0.2735 (bins)", "12,345 8 µm", "678 8 µm", "square_008um"]]
    assert "square blocks of every slide" in data


@pytest.mark.parametrize(
    ("held_out", "says"), [({}, "Nothing was held out"), ({"8 µm": 5}, r"Held out: whole slides (new)")]
)
def test_other_splits(held_out, says):
    new = {**SLIDE, "training_regions": {}, "held_out_regions": held_out}
    slides = {"old": {**SLIDE, "held_out_regions": {}}, "new": new}
    assert says in section(text_of(make_record([], slides=slides)), "Training data")


def test_scores_of_many_genes():
    pcc = np.linspace(-0.1, 0.7, 81)
    found = section(text_of(make_record([*pcc, None])), "Held-out scores")
    assert rows(found)[0] == ["81 of 82", "0.300", "0.100", "0.300", "0.500", "0.700", "-0.100"]
    assert "best on these very regions" in found
    ends = rows(found.split("\n\n")[-1])
    assert len(ends) == 10
    assert ends[0] == ["GENE80", "0.700", "GENE0", "-0.100"]
    assert ends[-1] == ["GENE71", "0.610", "GENE9", "-0.010"]


def test_scores_of_few_genes_are_all_there():
    found = section(text_of(make_record([0.25, None, 0.5], training={})), "Held-out scores")
    assert "| GENE2 | 0.500 |\n| GENE0 | 0.250 |" in found
    assert "GENE1" not in found
    assert "best on these very regions" not in found


@pytest.mark.parametrize("pcc", [[], [None, None]])
def test_without_scores_it_claims_none(pcc):
    found = section(text_of(make_record(pcc)), "Held-out scores")
    assert "is not known" in found
    assert "|" not in found


def test_model_and_training():
    text = text_of(make_record([0.1], history=[{"epoch": 1.0}, {"epoch": 2.0}]))
    model = dict(rows(section(text, "Model")))
    assert model["encoder"] == "timm `resnet18`, from imagenet, frozen"
    assert model["image seen at"] == "0.5 µm per pixel"
    assert model["pitch of the map"] == "2 µm"
    training = dict(rows(section(text, "Training")))
    assert training == {"epochs run": "`2`", "lr": "`0.001`", "keep best": "`True`", "version of torch": "`2.9`"}


def test_licence():
    stated = section(text_of(make_record([]), "cc-by-4.0"), "Licence")
    assert stated.startswith("\n`cc-by-4.0`. The weights that its encoder started from (imagenet) and the training")
    assert "without one nobody may use" in section(text_of(make_record([])), "Licence")
    bare = section(text_of(make_record([], encoder_weights=None), "mit"), "Licence")
    assert bare.strip() == "`mit`. The training slides have terms of their own."


def test_names_that_would_break_a_table():
    slides = {"a|b\n| c": SLIDE}
    assert rows(section(text_of(make_record([], slides=slides)), "Training data"))[0][0].startswith("a\\|b \\")
