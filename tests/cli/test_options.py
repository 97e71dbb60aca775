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
    assert len(text.splitlines()) <= (56 if command == "cross-validate" else 50)
    assert max(map(len, text.splitlines())) <= 120
    assert [flag.flag for flag in COMMANDS[command].flags.values() if flag.flag not in text.replace("[no-]", "")] == []
    assert f"\n  pixnet-sd {command}" in text


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--genes=A,B", "genes", ["A", "B"]),
        ("--genes=12", "genes", 12),
        ("--genes=all", "genes", "all"),
        ("--table-key=a", "table_key", "a"),
        ("--mpp=0.25", "mpp", 0.25),
        ("--mpp=coordinate_system", "mpp", "coordinate_system"),
        ("--max-steps=none", "max_steps", None),
        ("--validation=None", "validation", None),
        ("--validation=p1,p2", "validation", ["p1", "p2"]),
        ("--freeze-encoder", "freeze_encoder", True),
        ("--no-record-model", "record_model", False),
        ("--target-sum=1e6", "target_sum", 1e6),
        ("--encoder-weights=w.safetensors", "encoder_weights", "w.safetensors"),
    ],
)
def test_values(text, name, value):
    """What is not given is left to the verb."""
    assert parse(["fit", "a.zarr"], COMMANDS).options == {}
    ((found, read),) = parse(["fit", "a.zarr", text], COMMANDS).options.items()
    assert (found, read, type(read)) == (name, value, type(value))


def test_slides_may_stand_anywhere_and_lists_in_files(tmp_path: Path):
    panel = tmp_path / "panel.txt"
    panel.write_text("ERBB2\nESR1\n\nPGR\n")
    call = parse(["fit", "a.zarr", f"--genes=@{panel}", "b=c.zarr", "--freeze-encoder", "d.zarr"], COMMANDS)
    assert call.slides == ["a.zarr", "b=c.zarr", "d.zarr"]
    assert call.options == {"genes": ["ERBB2", "ESR1", "PGR"], "freeze_encoder": True}


def with_config(folder: Path, content: str, *arguments: str) -> Any:
    """Read a command line with a config file."""
    (folder / "run.toml").write_text(content)
    return parse([*arguments, "--config", str(folder / "run.toml")], COMMANDS)


CONFIG = 'genes = ["A", "B"]\nlr = 1e-3\nvalidation = "none"\nfreeze-encoder = true\nzarr = "s.zarr"\nmax_epochs = 5\n'


def test_a_config_file_is_its_options(tmp_path):
    content = 'slides = ["a.zarr"]\n' + CONFIG + '[predict]\nmodel = "m"\n[fit]\nseed = 3\n'
    options = ["--genes=A,B", "--lr=0.001", "--validation=none", "--freeze-encoder", "--zarr=s.zarr", "--max-epochs=5"]
    given, found = parse(["fit", "a.zarr", *options, "--seed=3"], COMMANDS), with_config(tmp_path, content, "fit")
    assert (found.slides, found.options) == (given.slides, given.options)
    assert {name: value for name, value in found.own.items() if name != "config"} == given.own


def test_groups_in_a_config_file_and_slides_of_the_command_line(tmp_path):
    call = with_config(tmp_path, 'groups = {C2 = "C", C3 = "C", B4 = "B"}\n', "cross-validate", "a", "b")
    assert call.options == {"groups": {"C2": "C", "C3": "C", "B4": "B"}}
    assert call.options == parse(["cross-validate", "a", "b", "--groups=C2=C,C3=C,B4=B"], COMMANDS).options
    call = with_config(tmp_path, 'slides = ["a.zarr"]\n' + CONFIG, "fit", "--lr=2", "--no-freeze-encoder", "b.zarr")
    assert call.slides == ["b.zarr"]
    assert (call.options["lr"], call.options["freeze_encoder"], call.options["max_epochs"]) == (2, False, 5)


def refuses(arguments: list[str], words: str, capsys) -> bool:
    """Whether wrong usage is what a command ends with, and it says all words, on stderr alone."""
    code, said = main(arguments), capsys.readouterr()
    return code == 2 and said.out == "" and all(word in said.err for word in words.split("|"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max_epoch = 3", "'max_epoch'|did you mean max_epochs?"),
        ("max_epochs = true", "'max_epochs'|True"),
        ("compile = 'yes'", "'compile'|true or false"),
        ("lr = 'fast'", "--lr|NUMBER"),
        ("lr = ", "no TOML"),
        ("config = 'b.toml'", "'config'"),
        ("[fti]", "'fti'|did you mean fit?"),
    ],
)
def test_config_files_that_are_refused(content, words, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(content)
    assert refuses(["fit", "a.zarr", f"--config={tmp_path / 'run.toml'}"], words, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fit a.zarr --max-epoch 3", "--max-epoch|did you mean --max-epochs?"),
        ("fit a.zarr --genes=", "--genes"),
        ("fit a.zarr --config nowhere.toml", "nowhere.toml"),
        ("predict", "SLIDE"),
        ("predict slide.zarr b.zarr", "b.zarr"),
        ("predict slide.zarr --n-symmetries 3", "--n-symmetries"),
        ("evaluate slide.zarr", "--table-key|--predicted-key"),
        ("cross-validate a b --groups a", "--groups|NAME=VALUE"),
        ("convert slide.zarr", "FOLDER STORE"),
        ("demo --seed x", "--seed"),
        ("predcit slide.zarr", "did you mean predict?"),
        ("--quiet fit", "command first"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    assert refuses(arguments.split(), words, capsys)
