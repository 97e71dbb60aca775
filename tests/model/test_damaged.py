"""Models that were damaged, edited, forged or planted: always the package's own error, and soon."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import fields
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.model.models import make_model, sealed

from pixnet_sd.errors import CheckpointError
from pixnet_sd.model import ModelRecord, PixNet, read_record

FILES = ("config.json", "model.safetensors", "checksums.json")
HUGE, LONG = 10**9, "x" * 5000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small model; not to be written to."""
    return make_model().save(tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(scope="module")
def content(whole: Path) -> dict[str, Any]:
    return json.loads((whole / "config.json").read_text())


def changed(content: dict[str, Any], where: str, value: Any) -> str:
    """The record with another value at a place, ``"decoder.widths.0"``."""
    copy = json.loads(json.dumps(content))
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    reduce(getitem, path, copy)[last] = value
    return json.dumps(copy)


WRONG: dict[str, list[Any]] = {
    "genes": [[], None, "ACTB", ["A", "A", "B"], ["", "A", "B"], [1, 2, 3], [None] * 3, {"A": 1}, ["A", LONG, "B"]],
    "target_sum": [-1, 0, None, "1e4", True, [], float("nan"), float("inf")],
    "log_base": [5, "10", None, "E", 2.718281828],
    "objective": ["x", None, 0, "MSE", [], "nb_pcc"],  # the last goes with sums
    "aggregation": ["x", None, 1, "median", ["mean"]],
    "working_mpp": [0, -0.5, None, "0.5", 1e9, True, float("nan")],
    "encoder": [None, 5, "", LONG, ["resnet18"]],
    "encoder_weights": [5, [], {}],
    "encoder_sha256": [None, 7],
    "freeze_encoder": [None, 0, "false"],
    "decoder": [None, [], 5, {}, {"widths": None}, {"widths": None, "hidden": [3, 3, 3], "depth": 4}],
    "decoder.widths": [[], [4], [4] * 5, 4, "4444"],
    "decoder.widths.0": [HUGE, 0, -4, 4.5, None, "4", True],
    "decoder.hidden": [[], [4, 4], [4] * 4, None],
    "decoder.hidden.2": [HUGE, 0, -4, 8.5, None],
    "decoder.dropout": [-0.1, 1, 2, None, "0.5"],
    "sizes": [{}, None, [], {"spots": 0}, {"spots": -1.0}, {"spots": "4"}, {"": 4.0}, {LONG: 4.0}, 3.0],
    "tile_px": [0, -128, 100, 127, 128.5, HUGE * 32, None, "128", 32],
    "halo_px": [0, -32, 100, HUGE * 32, None, "160", True],
    "sees_whole_tile": [None, 1, "no"],
    "weights_sha256": [None, 5, LONG],
    "training": [None, [], "x", 5],
    "slides": [None, [], {"a": None}, {"a": {"mpp": "x"}}, {"a": {"mpp": -1}}, {"a": {"training_regions": [1]}}],
    "held_out_pcc": [None, [0.5], [0.5] * 4, [0.5, 2.0, None], [0.5, -7, 0], ["a", None, 0.1], {}],
    "history": [None, {}, [1], [{"loss": 1.0}], [{"epoch": 1.5}], [{"epoch": None}], [{"epoch": 1, "loss": "x"}]],
    "versions": [None, [], {"torch": 2}, {"torch": LONG}],
    "depends_on": [None, [], "x"],
}


assert {where.split(".")[0] for where in WRONG} | {"format"} == {field.name for field in fields(ModelRecord)}


@pytest.mark.parametrize("where", WRONG)
def test_a_field_that_no_model_has(tmp_path: Path, content, where: str) -> None:
    """Though its checksum fits; nor may one be missing."""
    texts = [changed(content, where, value) for value in WRONG[where]]
    if where in content:
        texts.append(json.dumps({name: value for name, value in content.items() if name != where}))
    for text in texts:
        with pytest.raises(CheckpointError, match=where.split(".")[0]) as refused:
            read_record(sealed(tmp_path, text))
        assert len(str(refused.value)) < 700


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from([*WRONG, "genes.1", "history.0.loss", "held_out_pcc", "format"]), value=JSON)
def test_any_value_anywhere(tmp_path: Path, content, where: str, value: Any) -> None:
    """What is taken can be used: it is shown, and saved again."""
    try:
        record = read_record(sealed(tmp_path, changed(content, where, value)))
    except CheckpointError:
        return
    assert json.loads(record.to_json())
    record.check()
    assert len(record.var) == len(record.genes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "damaged"),
        ('{"format": "pixnet_sd/3", "genes": [', "damaged"),
        ("[1, 2]", "None"),
        ('{"architectures": ["ResNet"]}', "encoder_weights="),
        ('{"format": "pixnet_sd/1"}', "pixnet_sd/1"),
        ('{"format": "pixnet_sd/3", "genes": ["A"]}', "target_sum"),
        ('{"a":' * 100_000, "damaged"),
        ("9" * 100_000, "damaged"),
        ('{"format": NaN}', "nan"),
        ("\0" * 100, "damaged"),
    ],
    ids=range(10),
)
def test_text_that_is_no_record(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_record(sealed(tmp_path, text))


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_and_other_lengths(folder: Path, name: str) -> None:
    whole, damaged = (folder / name).read_bytes(), []
    for k in range(12):
        bit, flipped = k * (8 * len(whole) - 1) // 11, bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in (*damaged, b"", whole[:5], whole[:-1], whole + b"x"):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            PixNet.load(folder)


def in_place_of(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            here = Path.cwd()
            os.chdir(path.parent)  # the names of sockets are short
            bound.bind(path.name)
            os.chdir(here)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 42)


@pytest.mark.parametrize("kind", ["nothing", "pipe", "folder", "device", "loop", "socket", "huge"])
@pytest.mark.parametrize("name", FILES)
def test_something_else_in_place_of_a_file(folder: Path, name: str, kind: str) -> None:
    in_place_of(folder / name, kind)
    with pytest.raises(CheckpointError, match=name):
        PixNet.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_somebody_else(folder: Path, name: str, monkeypatch) -> None:
    real = os.open

    def refuse(path, *arguments, **options):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    (folder / name).chmod(0o600)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"{name}.*permission.*-rw-------"):
        PixNet.load(folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("decoder.widths", [8192] * 4),
        ("decoder.hidden", [8192] * 3),
        ("decoder.widths.0", 5),
        ("genes", [f"G{k}" for k in range(100_000)]),
        ("halo_px", 128),
        ("encoder", "test_convnext"),
        ("encoder", "resnet_of_2030"),
        ("encoder", "../../etc/passwd"),
        ("encoder", "hf-hub:nobody/nothing"),
        ("weights_sha256", "0" * 64),
    ],
    ids=range(10),
)
def test_a_record_of_another_network(folder: Path, content, where: str, value: Any) -> None:
    """Refused before memory is taken for it, though the checksums fit."""
    with pytest.raises(CheckpointError):
        PixNet.load(sealed(folder, changed(content, where, value)))


@pytest.mark.parametrize("linked", ["files", "folder"])
def test_saving_follows_no_link_to_a_file(folder: Path, tmp_path: Path, linked: str) -> None:
    mine, other, target = tmp_path / "thesis.tex", make_model(1), folder
    mine.write_text("years of work")
    if linked == "folder":
        target = tmp_path / "link"
        target.symlink_to(folder)
    for name in FILES if linked == "files" else ():
        (folder / name).unlink()
        (folder / name).symlink_to(mine)
    other.save(target)
    assert mine.read_text() == "years of work"
    assert PixNet.load(folder).record == PixNet.load(target).record == other.record


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_those_of_new_files_or_of_the_replaced(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for expected in (mode, 0o600):
            folder = make_model().save(tmp_path / "model")
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {expected}
            for path in folder.iterdir():
                path.chmod(0o600)
    finally:
        os.umask(before)


def test_a_record_that_cannot_be_read_again_is_not_saved(folder: Path) -> None:
    before = (folder / "config.json").read_bytes()
    model = PixNet.load(folder)
    model.record.target_sum = -1
    with pytest.raises(CheckpointError, match="target_sum"):
        model.save(folder)
    assert (folder / "config.json").read_bytes() == before


def test_what_a_killed_save_left_goes(folder: Path) -> None:
    (folder / ".pixnet_sd-abc.partial").mkdir()
    (folder / ".pixnet_sd-abc.partial" / "model.safetensors").write_bytes(b"half")
    (folder / ".pixnet_sd-link.partial").symlink_to(folder.parent)  # not ours, and not followed
    make_model(1).save(folder)
    assert {path.name for path in folder.iterdir()} == {*FILES, ".pixnet_sd-link.partial"}


def test_a_card_that_is_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "README.md")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        make_model().save_pretrained(folder)
