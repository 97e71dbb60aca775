"""Every argument of every public verb: wrong values are refused by name before anything is done, right ones are taken.

The cases come from the signatures: an argument without wrong values here fails the test.
"""

from __future__ import annotations

import inspect
import io
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pixnet_sd as ps
from pixnet_sd._arguments import checked
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import STRIDES

mpl.use("Agg")

NAMES = [f"{room}.{name}" for room in ("pl", "get", "io", "datasets") for name in getattr(ps, room).__all__]
NAMES += [f"tl.{name}" for name in ("fit", "predict", "evaluate", "cross_validate")]
NAMES += ["ModelParams", "TrainParams", "PredictParams", "PixNet.load", "PixNet.save", "PixNet.generate_model_card"]
NAMES += ["PixNet.from_pretrained", "PixNet.save_pretrained", "PixNet.push_to_hub"]
VERBS: dict[str, Callable[..., Any]] = {name: operator.attrgetter(name)(ps) for name in NAMES}

HUGE = 10**400  # no float
ODD: list[Any] = [object(), 1j, {}, b"8", io.BytesIO(), Decimal("8")]
NO_NUMBER = [*ODD, True, "8", [8], math.nan, math.inf, -math.inf, HUGE, np.array([8.0]), pd.NA]
NO_SIZE = [*NO_NUMBER, 0, -1, -1e-9]
NO_WHOLE = [*NO_NUMBER, 1.5, 64.0, np.float64(64), -1]
NO_FLAG = [*ODD, 0, 1, "True", "no", [], math.nan, np.int64(1)]
BAD_TEXT = ["a\0b", "x" * 300, "\ud800"]
NO_TEXT = [*ODD, 5, 2.5, True, ["a"], ("a",), {"a"}, Path("a"), *BAD_TEXT]
NO_LIST = [*ODD, 2.5, True, [], [5], ["A", None], ["A", math.nan], {"A"}, {"A": 1}, iter("A"), *BAD_TEXT]
NO_LIST += [[BAD_TEXT[0]], [["A"]], (c for c in "AB"), bytearray(b"A"), np.array([["A"]]), pd.Index([1, 2])]
NO_NAMES = [5, *NO_LIST, pd.DataFrame({"A": ["B"]})]
NO_PATH = [*ODD, 5, 2.5, True, ["a"], "", "a\0b", "x" * 300, Path("a/" * 3000), "~no_such_user_here/a", "\ud800"]
NO_PREFIX = [*NO_TEXT, "..", ".", ".hidden", "__own", "a b", "a/b", "../up", "a\nb", "µ" * 60]
NO_OBJECT = [*ODD, None, 5, "slide.zarr", Path("slide.zarr"), [], pd.DataFrame(), np.zeros(3)]
NO_CHOICE = [*ODD, "nope", "", 5, True, 1.0, ["mean"], math.nan]
NO_FRAMES = [*ODD, None, 5, "x", [], pd.DataFrame(), pd.DataFrame({"pcc": ["a"]}), {"a": pd.DataFrame()}, {"a": 1}]
NO_SIZES = [*ODD, 3, 2.0, True, "8", [3], [2.0], [True], [], {2, 8}, (8, None), iter([8])]
NO_BOX = [*ODD, 5, "0,0,1,1", (0, 0, 1), (0, 0, 1, 1, 1), (0, 0, 0, 1), (0, 0, 1, math.nan), {0, 1, 2, 3}]
NO_BOX += [("0", 0, 1, 1)]

FILE = Path(__file__)  # in which no folder can be made

WRONG_VALUES: list[tuple[list[Any], str]] = [
    (NO_OBJECT, "sdata evaluate.sdata"),
    ([*NO_OBJECT, {"a": 5}, {"a": "slide.zarr"}, {"a": None}], "fit.sdata training_regions.sdata sdatas"),
    (
        NO_TEXT,
        "evaluate.table_key gene_map.table_key evaluation.table_key reliability.table_key convert_visium_hd.dataset_id",
    ),
    (NO_NAMES, "table_key score_table_key genes folds keys datasets language"),
    ([*NO_NAMES, "A"], "sections visium_hd_truth.genes"),
    ([*NO_LIST, 0, -1, 10**9, math.nan], "fit.genes"),
    ([*ODD, True, "0.5", "system", 0, -1, math.nan, math.inf, [0.5], HUGE], "mpp"),
    ([*NO_SIZE, 20, 0.01], "sample.mpp sample_truth.mpp sample_truth_bins.mpp write_visium.mpp write_visium_hd.mpp"),
    (NO_SIZE, "working_mpp lr target_sum radius_um spacing_um bin_um map_um pitch_um dpi"),
    ([*NO_NUMBER, -1, -1e-300], "weight_decay pcc_weight"),
    ([*NO_SIZE, 1.1], "alpha"),
    ([*NO_SIZE, 0.4, 1.0, 90], "interval"),
    ([*NO_NUMBER, -0.1, 1.1], "stain_jitter"),
    ([*ODD[:2], 5, "a", [], ["a"], True, {1: 2}, b"a"], "model_params train_params predict_params fit_params"),
    ([*NO_SIZE, 99, 1e9, 1e300], "size_um"),
    ([*ODD, True, 0, 1, -0.1, 1.5, math.nan, [], [5], {"a"}, iter("a"), HUGE], "validation"),
    ([*NO_WHOLE, 0, 2**64], "max_epochs max_steps patience n_workers"),
    ([*NO_WHOLE, 0, 10**9], "n_genes decoder_width batch_size"),
    ([*NO_WHOLE, -(2**63), 2**63], "seed"),
    ([*NO_WHOLE, 10**9], "n_labels"),
    ([*NO_WHOLE, 0, 32, 10**6], "chunk_px"),
    ([*NO_WHOLE, 0, 32, 100, np.int64(65)], "tile_px predict_tile_px"),
    (NO_CHOICE, "objective aggregation decoder optimizer write what colorbar_loc"),
    ([*ODD, 2, 0, -1, True, 1.0, "4", [4], HUGE], "n_symmetries"),
    ([*NO_CHOICE, [], ["truth"], {"image"}, [None]], "panels"),
    ([*ODD, 3.5, 0, True, "", "a\0b", ["cpu"]], "device"),
    ([*NO_PREFIX, ""], "key_added"),
    (NO_PREFIX, "dataset_id"),
    (NO_PATH, "path folder store image directory save_directory cache_dir model encoder_weights"),
    (NO_PATH, "pretrained_model_name_or_path"),
    ([*NO_PATH, FILE, FILE / "a" / "b"], "checkpoint_dir"),
    ([*ODD[:2], 5, "a", [], ["a"], True, {"a": 1}, {1: "a"}, {"a": None}, {"a": "x" * 300}, b"a"], "groups"),
    ([*ODD[:2], 5, "a", ["license"], True, {"nope": 1}, {1: 2}, {"licence": "mit"}, b"a"], "model_card_kwargs"),
    ([*ODD, 5, 2.5, "", "a\0b", ["hf"], np.int64(1)], "token"),
    (NO_FRAMES, "evaluation"),
    (NO_BOX, "crop_um window_um"),
    ([*ODD, 5, "4,3", (4,), (4, 3, 2), (0, 3), (-1, 3), (math.nan, 3), (4, 1e9), {4, 3}], "figsize"),
    ([*ODD, 5, "ax", [], [5], np.zeros(2), {"a": 1}, True], "ax"),
    ([*ODD, 5, "no such map", "", True, ["viridis"], None], "cmap"),
    ([*ODD, True, "99", "p101", "p-1", "px", math.nan, math.inf, [], [True], {"p1"}], "vmin vmax"),
    ([*NO_PATH, "figure.nope", "no/such/folder/a.png", FILE.parent], "save"),
    (NO_SIZES, "sample.bin_um write_visium_hd.bin_um"),
    ([*ODD, 3, 2.0, True, "8", [8], 0, -2, None], "sample_truth_bins.bin_um"),
    ([*ODD, 0, -2, 2.0, True, "8", [2.0], [], {2}], "convert_visium_hd.bin_um"),
]
WRONG = {name: values for values, names in WRONG_VALUES for name in names.split()}
"""Values that each argument refuses, by its name, or by verb and name where a verb has its own meaning of it."""
WRONG_BY_TYPE = {"bool": NO_FLAG, "str": NO_TEXT}


def parameters(verb: str) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(VERBS[verb]).parameters.values() if p.kind is not p.VAR_KEYWORD]


@pytest.fixture(scope="module")
def slide():
    return ps.datasets.sample(size_um=100, mpp=1.0, bin_um=(16,), n_genes=5)


@pytest.fixture
def required(slide, tmp_path, monkeypatch) -> Callable[[str], dict[str, Any]]:
    """What each verb has to be given, all of it right."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    known: dict[str, Any] = {
        "sdata": slide,
        "sdatas": {"a": slide, "b": slide},
        "table_key": "square_016um",
        "predicted_key": "pixnet_a",
        "genes": "ACTB",
        "model": tmp_path / "in",
        "evaluation": pd.DataFrame({"pcc": [0.5]}),
        "repo_id": "a/b",
        "store": tmp_path / "out",
        "self": object.__new__(ps.PixNet),
        **dict.fromkeys(("path", "folder"), tmp_path / "in"),
        **dict.fromkeys(("directory", "pretrained_model_name_or_path", "save_directory"), "in"),
    }

    return lambda verb: {p.name: known[p.name] for p in parameters(verb) if p.default is p.empty}


def refused(verb: Callable[..., Any], name: str, value: Any, arguments: dict[str, Any]) -> bool:
    given = {**arguments, name: value}
    own = [given.pop("self")] if "self" in given else []
    with pytest.raises(PixNetError) as caught:
        verb(*own, **given)
    return caught.value.argument == name and name in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_values_are_refused_by_name(verb, required, tmp_path):
    arguments, before = required(verb), sorted(tmp_path.rglob("*"))
    for parameter in parameters(verb):
        name, takes = parameter.name, str(parameter.annotation)
        if name == "self":
            continue
        by_type = WRONG_BY_TYPE.get(takes.removesuffix(" | None"))
        values = WRONG.get(f"{verb.rpartition('.')[2]}.{name}", WRONG.get(name, by_type))
        assert values is not None, f"{verb}: no wrong values are known of the new argument {name!r}"
        takes_none = parameter.default is None or "None" in takes
        for value in [*(value for value in values if value is not None), *([] if takes_none else [None])]:
            assert refused(VERBS[verb], name, value, arguments), (name, value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("name", "value"), [("private", "yes"), ("create_pr", 1), ("branch", ""), ("token", 5)])
def test_options_of_the_hub(name, value, required):
    assert refused(ps.PixNet.push_to_hub, name, value, required("PixNet.push_to_hub"))


def test_strides_are_those_of_the_geometry():
    """A rule has the coarsest as a number: a ``--help`` loads no numpy for it."""
    assert ps.TrainParams(tile_px=2 * STRIDES[-1]).tile_px == 2 * STRIDES[-1]
    with pytest.raises(PixNetError, match=f"multiple of {STRIDES[-1]}"):
        ps.TrainParams(tile_px=3 * STRIDES[-1] // 2)


def test_what_is_unknown_is_said_by_name():
    """A parameter without a rule, at once; an argument that is missing or that there is not, by Python itself."""

    def verb(*, brand_new: int = 0) -> None: ...

    for word, call in (
        ("brand_new", lambda: checked()(verb)),
        ("table_key", lambda: ps.tl.evaluate(None)),
        ("sed", lambda: ps.datasets.sample(sed=1)),
    ):
        with pytest.raises(TypeError, match=word):
            call()


@checked()
def taken(
    *, lr=1, seed=None, tile_px=None, genes=None, mpp=None, validation=None, write=None, show=None, checkpoint_dir=None
) -> dict[str, Any]:
    return dict(locals())


SCALARS = st.sampled_from([float, np.float64, np.float32, np.float16])
WHOLES = st.sampled_from([int, np.int64, np.int32, np.uint16])
LISTS = st.sampled_from([list, tuple, pd.Index, pd.Series, lambda names: np.array(names, dtype=object), np.array])
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@given(st.floats(2**-10, 100, width=16), SCALARS, st.integers(2, 1000), WHOLES)
def test_numbers_of_any_type_are_taken(value, scalar, n, whole):
    read = taken(lr=scalar(value), mpp=scalar(value), tile_px=whole(32 * n), seed=whole(n))
    assert repr([read[name] for name in ("lr", "mpp", "tile_px", "seed")]) == repr([value, value, 32 * n, n])
    assert taken(lr=whole(n))["lr"] == n
    assert taken(validation=scalar(value / 128))["validation"] == pytest.approx(value / 128, rel=1e-2)


@settings(max_examples=30)
@given(st.lists(TEXT, min_size=1, max_size=5), LISTS)
def test_names_in_any_list_are_taken(names, kind):
    read = taken(genes=kind(names), validation=kind(names))
    for each in (read["genes"], read["validation"]):
        assert list(each) == names
        assert {type(name) for name in each} == {str}


def test_other_right_values_are_taken(tmp_path):
    right = {"show": np.True_, "mpp": "coordinate_system", "write": np.str_("map")}
    right |= {"genes": "ACTB", "validation": "p3", "seed": None}
    assert {name: taken(**right)[name] for name in right} == right
    assert taken(**right)["show"] is True
    assert ps.PredictParams(n_symmetries=np.int8(4)).n_symmetries == 4
    for folder in (tmp_path, str(tmp_path / "new" / "deep"), "~/models", "relative", None):
        assert taken(checkpoint_dir=folder)["checkpoint_dir"] == folder
    assert refused(taken, "lr", None, {})  # whose default is another
