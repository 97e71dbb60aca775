"""Messages in the terms of the command line."""

from __future__ import annotations

import pytest

from pixnet_sd.cli._messages import as_options
from pixnet_sd.cli._verbs import read_verb

NAMES = [*read_verb("tl._fit", "fit").parameters, *read_verb("tl._predict", "predict").parameters, "dataset_id"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Pass `overwrite=True` to replace it, or choose another `key_added`.",
            "Pass `--overwrite` to replace it, or choose another `--key-added`.",
        ),
        ("fit with record_model=False.", "fit with --no-record-model."),
        ("name one with `dataset_id=`.", "name one with `--dataset-id`."),
        ("Give another checkpoint_dir, or delete it.", "Give another --checkpoint-dir, or delete it."),
        (
            "validation=1.5: a share between 0 and 1, names of slides, or None is needed.",
            "--validation 1.5: a share between 0 and 1, names of slides, or none is needed.",
        ),
        (
            "Use validation=None, or validation=[names of slides].",
            "Use --validation none, or --validation [names of slides].",
        ),
        (
            "validation=['p 1', 'p2'] must name some but not all of the slides ['p 1', 'p2'].",
            "--validation 'p 1,p2' must name some but not all of the slides ['p 1', 'p2'].",
        ),
        (
            "Give mpp= (see the scanner's metadata), or mpp='coordinate_system' if the scanner's is in µm.",
            "Give --mpp (see the scanner's metadata), or --mpp coordinate_system if the scanner's is in µm.",
        ),
        ("tile_px=512 or more, or a coarser working_mpp.", "--tile-px 512 or more, or a coarser --working-mpp."),
        ("Use device='cpu', mpp=0.5.", "Use --device cpu, --mpp 0.5."),
        ("None of the 3 cells, or None of them", "None of the 3 cells, or None of them"),
        ("There is no table 'table_key' in /a/key_added/b.", "There is no table 'table_key' in /a/key_added/b."),
        ("fit(sdata, validation=0.2), `region_key`", "fit(sdata, validation=0.2), `region_key`"),
    ],
)
def test_python_as_options(said, expected):
    assert as_options(said, NAMES) == expected


def test_a_command_without_options():
    assert as_options("mpp= or None.", []) == "mpp= or none."
