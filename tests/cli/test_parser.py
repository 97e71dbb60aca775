"""Options are the verbs' parameters; a config file is the same as options."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path

import pytest

import pixnet_sd as ps
from pixnet_sd.cli._commands import COMMANDS
from pixnet_sd.cli._demo import demo
from pixnet_sd.cli._info import describe
from pixnet_sd.cli._parser import parse
from pixnet_sd.cli._verbs import read_verb

REQUIRED = {"evaluate": ["--table-key=a", "--predicted-key=b"]}
PATHS = {"cross-validate": ["a", "b"], "convert": ["a", "b"], "demo": []}


def verb_parameters(command: str) -> dict[str, inspect.Parameter]:
    """What Python says, in place of our reading of the source."""
    functions = {
        "fit": [ps.tl.fit],
        "predict": [ps.tl.predict],
        "evaluate": [ps.tl.evaluate],
        "cross-validate": [ps.tl.cross_validate, ps.tl.fit],
        "convert": [ps.io.convert_visium_hd],
        "info": [describe],
        "demo": [demo],
    }[command]
    found: dict[str, inspect.Parameter] = {}
    for function in functions:
        names = dict(inspect.signature(function).parameters)
        if command != "demo":
            names.pop(next(iter(names)))  # the slide itself
        found = {**names, **found}
    return {name: p for name, p in found.items() if p.kind is not p.VAR_KEYWORD}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_a_parameter_with_its_default(command):
    call = parse([command, *PATHS.get(command, ["a"]), *REQUIRED.get(command, [])])
    expected = verb_parameters(command)
    left_out = {"cross-validate": {"record_model"}, "convert": {"store"}}.get(command, set())
    assert set(call.options) == set(expected) - left_out
    for name, value in call.options.items():
        if expected[name].default is not inspect.Parameter.empty:
            assert (value, type(value)) == (expected[name].default, type(expected[name].default)), name


@pytest.mark.parametrize(("room", "name"), [room for command in COMMANDS.values() for room in command.rooms])
def test_every_option_has_a_text_and_takes_something(room, name):
    for parameter in read_verb(room, name).parameters.values():
        assert len(parameter.help) > 8, parameter.name
        assert parameter.kind.flag or parameter.kind.metavar(), parameter.name


def test_choices_are_those_of_the_annotations():
    from pixnet_sd.params import Aggregation, ObjectiveName

    parameters = read_verb("tl._fit", "fit").parameters
    assert parameters["objective"].kind.literals == typing.get_args(ObjectiveName)
    assert parameters["aggregation"].kind.literals == typing.get_args(Aggregation)
    assert read_verb("tl._predict", "predict").parameters["n_symmetries"].kind.literals == (1, 4, 8)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--genes=A,B", "genes", ["A", "B"]),
        ("--genes=A", "genes", ["A"]),
        ("--table-key=a", "table_key", "a"),
        ("--table-key=a,b", "table_key", ["a", "b"]),
        ("--mpp=0.25", "mpp", 0.25),
        ("--mpp=coordinate_system", "mpp", "coordinate_system"),
        ("--n-genes=none", "n_genes", None),
        ("--n-genes=12", "n_genes", 12),
        ("--validation=0.2", "validation", 0.2),
        ("--validation=None", "validation", None),
        ("--validation=p1,p2", "validation", ["p1", "p2"]),
        ("--freeze-encoder", "freeze_encoder", True),
        ("--no-record-model", "record_model", False),
        ("--lr=1e-3", "lr", 0.001),
        ("--target-sum=1e6", "target_sum", 1e6),
        ("--encoder-weights=w.safetensors", "encoder_weights", "w.safetensors"),
    ],
)
def test_values(text, name, value):
    found = parse(["fit", "a.zarr", text]).options[name]
    assert (found, type(found)) == (value, type(value))


def test_lists_from_a_file(tmp_path: Path):
    panel = tmp_path / "panel.txt"
    panel.write_text("ERBB2\nESR1\n\nPGR\n")
    assert parse(["fit", "a.zarr", f"--genes=@{panel}"]).options["genes"] == ["ERBB2", "ESR1", "PGR"]


def test_slides_may_stand_anywhere():
    call = parse(["fit", "a.zarr", "--lr", "1e-3", "b=c.zarr", "--freeze-encoder", "d.zarr"])
    assert call.slides == ["a.zarr", "b=c.zarr", "d.zarr"]


OPTIONS = ["--genes=A,B", "--lr=0.001", "--validation=none", "--freeze-encoder", "--zarr=s.zarr", "--n-genes=5"]
CONFIG = 'genes = ["A", "B"]\nlr = 1e-3\nvalidation = "none"\nfreeze-encoder = true\nzarr = "s.zarr"\nn_genes = 5\n'


def test_a_config_file_is_its_options(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('slides = ["a.zarr"]\n' + CONFIG + '[predict]\nmodel = "m"\n[fit]\nseed = 3\n')
    given, found = parse(["fit", "a.zarr", *OPTIONS, "--seed=3"]), parse(["fit", "--config", str(path)])
    assert (found.slides, found.options) == (given.slides, given.options)
    assert {**found.own, "config": None} == given.own


def test_groups_in_a_config_file(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('groups = {C2 = "C", C3 = "C", B4 = "B"}\n')
    call = parse(["cross-validate", "a", "b", "--config", str(path)])
    assert call.options["groups"] == {"C2": "C", "C3": "C", "B4": "B"}
    assert call.options == parse(["cross-validate", "a", "b", "--groups=C2=C,C3=C,B4=B"]).options


def test_the_command_line_wins(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('slides = ["a.zarr"]\n' + CONFIG)
    call = parse(["fit", "--lr=2", "--no-freeze-encoder", "b.zarr", "--config", str(path)])
    assert call.slides == ["b.zarr"]
    assert (call.options["lr"], call.options["freeze_encoder"], call.options["n_genes"]) == (2, False, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_gene = 3", "'n_gene' in the config file {path!r} is no option of fit: did you mean 'n_genes'?"),
        ("[fit]\nlearning_rate = 3", "'learning_rate' in the config file {path!r} is no option of fit"),
        ("n_genes = true", "'n_genes' in the config file {path!r} is True, and a text, a number or a list is needed"),
        ("compile = 'yes'", "'compile' in the config file {path!r} is 'yes', and true or false is needed"),
        ("lr = 'fast'", "argument --lr: 'fast' is not one of NUMBER"),
        ("lr = ", "the config file {path!r} is no TOML"),
        ("config = 'b.toml'", "'config' in the config file {path!r} is no option of fit"),
        ("[fti]", "has a table [fti]. There is no command 'fti', and no such option of fit. Did you mean [fit]?"),
        ("[x]", "There is no command 'x', and no such option of fit. The commands are fit, predict, "),
    ],
)
def test_config_files_that_are_refused(content, message, tmp_path: Path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        parse(["fit", "a.zarr", "--config", str(path)])
    assert stopped.value.code == 2
    assert message.format(path=str(path)) in capsys.readouterr().err


def test_no_config_file(capsys):
    with pytest.raises(SystemExit):
        parse(["fit", "a.zarr", "--config", "nowhere.toml"])
    assert "the config file 'nowhere.toml' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *((name, "After the last two the same command goes on from what is done.") for name in ("fit", "predict")),
        ("cross-validate", "After the last two the same command goes on from what is done."),
        ("convert", "After the last two the same command starts anew."),
        ("info", ""),
        ("evaluate", ""),
    ],
)
def test_help_says_what_the_same_command_does_after_a_stop(command, said, capsys):
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    assert capsys.readouterr().out.partition("143 terminated.")[2].strip() == said


def test_help_lists_all_that_is_given(capsys):
    with pytest.raises(SystemExit):
        parse(["convert", "--help"])
    assert "FOLDER STORE  " in capsys.readouterr().out


def test_help_of_another_verb_is_shown_in_full(capsys):
    with pytest.raises(SystemExit):
        parse(["predict", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--image-key TEXT Slide image; found when only one reading is possible." in text
    assert "pixnet-sd predict slide.zarr --model models/breast" in text
