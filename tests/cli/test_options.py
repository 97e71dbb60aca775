"""Options are the verbs' parameters; a config file is the same as options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import pixnet_sd as ps
from pixnet_sd.cli import COMMANDS, main, parse
from pixnet_sd.params import ModelParams, PredictParams, TrainParams

VERBS = {
    "fit": (ps.tl.fit, ModelParams, TrainParams),
    "predict": (ps.tl.predict, PredictParams),
    "evaluate": (ps.tl.evaluate,),
    "cross-validate": (ps.tl.cross_validate, ps.tl.fit, ModelParams, TrainParams),
    "convert": (ps.io.convert_visium_hd,),
}
NO_OPTIONS = {"sdata", "sdatas", "folder", "store", "model_params", "train_params", "predict_params", "fit_params"}


def alternatives(annotation: Any) -> set[Any]:
    """What of an annotation can be typed."""
    is_one = typing.get_origin(annotation) in (None, typing.Literal, Sequence, Mapping)
    parts = {annotation} if is_one else set(typing.get_args(annotation))
    return {part for part in parts if typing.get_origin(part) or part in (bool, int, float, str, type(None))}


@pytest.mark.parametrize("command", VERBS)
def test_options_are_the_parameters_of_the_verb(command):
    """Names, types and defaults, those of the verb itself before those of what it passes on."""
    expected: dict[str, tuple[set[Any], Any]] = {}
    for verb in VERBS[command]:
        hints, parameters = typing.get_type_hints(verb), inspect.signature(verb).parameters.values()
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in expected]
        expected |= {p.name: (alternatives(hints[p.name]), p.default) for p in named}
    left_out = NO_OPTIONS | ({"record_model"} if command == "cross-validate" else set())
    expected = {name: each for name, each in expected.items() if name not in left_out}
    flags = {name: flag for name, flag in COMMANDS[command].flags.items() if not flag.own}
    assert set(flags) == set(expected)
    for name, (types, default) in expected.items():
        assert alternatives(flags[name].takes) == types, name
        assert flags[name].default == (... if default is inspect.Parameter.empty else default), name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= (56 if command == "cross-validate" else 51)
    assert max(map(len, text.splitlines())) <= 120
    assert [flag.flag for flag in COMMANDS[command].flags.values() if flag.flag not in text.replace("[no-]", "")] == []
    assert f"\n  pixnet-sd {command}" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fit a", {}),  # what is not given is left to the verb
        ("fit a --genes=A,B --mpp=0.25 --max-steps=none", {"genes": ["A", "B"], "mpp": 0.25, "max_steps": None}),
        ("fit a --genes=12 --mpp=coordinate_system", {"genes": 12, "mpp": "coordinate_system"}),
        ("fit a --genes=all --validation=None", {"genes": "all", "validation": None}),
        ("fit a --table-key=a --validation=p1,p2", {"table_key": "a", "validation": ["p1", "p2"]}),
        ("fit a --freeze-encoder --no-record-model", {"freeze_encoder": True, "record_model": False}),
        ("fit a --target-sum=1e6 --encoder-weights=w.pt", {"target_sum": 1e6, "encoder_weights": "w.pt"}),
        ("cross-validate a --groups=C2=C,B4=B", {"groups": {"C2": "C", "B4": "B"}}),
    ],
)
def test_values(text, expected):
    read = parse(text.split(), COMMANDS).options
    assert repr(sorted(read.items())) == repr(sorted(expected.items()))  # 12 is not 12.0


CONFIG = """slides = ["a.zarr"]
genes = ["A", "B"]
lr = 1e-3
freeze-encoder = true
predict.model = "m"
fit = {seed = 3, zarr = "s.zarr"}
cross-validate.groups = {C2 = "C", B4 = "B"}
"""


@pytest.mark.parametrize(
    ("given", "same"),
    [
        # slides may stand anywhere
        ("fit a --genes=@panel.txt b=c --freeze-encoder d", "fit a b=c d --genes=A,B --freeze-encoder"),
        ("fit --config=run.toml", "fit a.zarr --genes=A,B --lr=0.001 --freeze-encoder --seed=3 --zarr=s.zarr"),
        ("fit b --lr=2 --zarr=z --config=run.toml", "fit b --genes=A,B --lr=2 --freeze-encoder --seed=3 --zarr=z"),
        (
            "cross-validate a b --no-freeze-encoder --config=run.toml",
            "cross-validate a b --genes=A,B --lr=0.001 --no-freeze-encoder --groups=C2=C,B4=B",
        ),
    ],
)
def test_files_are_what_is_in_them(given, same, tmp_path, monkeypatch):
    """Options of the command line win over those of a config file."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(CONFIG)
    Path("panel.txt").write_text("A\n\nB\n")
    found, expected = (parse(text.split(), COMMANDS) for text in (given, same))
    assert (found.slides, found.options) == (expected.slides, expected.options)
    assert {name: value for name, value in found.own.items() if name != "config"} == expected.own


CONFIGURED = "fit a.zarr --config run.toml"


@pytest.mark.parametrize(
    ("arguments", "words", "content"),
    [
        (CONFIGURED, "'max_epoch'|did you mean max_epochs?", "max_epoch = 3"),
        (CONFIGURED, "'max_epochs'|True", "max_epochs = true"),
        (CONFIGURED, "'compile'|true or false", "compile = 'yes'"),
        (CONFIGURED, "--lr|NUMBER", "lr = 'fast'"),
        (CONFIGURED, "no TOML", "lr = "),
        (CONFIGURED, "'config'", "config = 'b.toml'"),
        (CONFIGURED, "'fti'|did you mean fit?", "[fti]"),
        ("fit a.zarr --max-epoch 3", "--max-epoch|did you mean --max-epochs?", ""),
        ("fit a.zarr --genes=", "--genes", ""),
        ("fit a.zarr --config nowhere.toml", "nowhere.toml", ""),
        ("predict", "SLIDE", ""),
        ("predict slide.zarr b.zarr", "b.zarr", ""),
        ("predict slide.zarr --n-symmetries 3", "--n-symmetries", ""),
        ("evaluate slide.zarr", "--table-key|--predicted-key", ""),
        ("cross-validate a b --groups a", "--groups|NAME=VALUE", ""),
        ("convert slide.zarr", "FOLDER STORE", ""),
        ("demo --seed x", "--seed", ""),
        ("predcit slide.zarr", "did you mean predict?", ""),
        ("--quiet fit", "command first", ""),
    ],
)
def test_wrong_usage(arguments, words, content, tmp_path, monkeypatch, capsys):
    """On the command line, or in a config file; said on stderr alone."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(content)
    assert main(arguments.split()) == 2
    said = capsys.readouterr()
    assert (said.out, [word for word in words.split("|") if word not in said.err]) == ("", [])
