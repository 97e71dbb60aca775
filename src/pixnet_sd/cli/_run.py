"""What the commands that are verbs do: set up the log, open slides, call the verb, print the result on stdout.

A slide is a store, or a Space Ranger folder, which becomes a store first. That something is read is said before the
libraries are imported that take seconds.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pixnet_sd as ps
from pixnet_sd._notes import memory_note
from pixnet_sd._util import logger
from pixnet_sd.errors import PixNetError, StoreError
from pixnet_sd.io import changed_files, is_visium, is_visium_hd, visium_advice
from pixnet_sd.params import ModelParams, PredictParams, TrainParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from spatialdata import SpatialData

    from ._parser import Call


_PACKAGE = str(Path(__file__).parents[1])
_CHATTY = ("spatialdata._logging", "spatialdata_plot._logging")  # they log to stdout, where results go
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<path>.+)")
_OUTS = "outs"


def set_up_logging(*, verbose: bool, quiet: bool) -> None:
    """Log to stderr, with times where it goes to a file, and with `verbose` what other libraries say."""
    watched = sys.stderr.isatty()
    formatter = logging.Formatter("%(message)s" if watched else "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in logger.handlers:
        handler.setFormatter(formatter)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)

    def divert(record: logging.LogRecord) -> bool:
        if verbose or record.levelno >= logging.WARNING:
            logger.handle(record)
        return False

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if filename.startswith(_PACKAGE) and issubclass(category, UserWarning):
            logger.warning("warning: %s", message)
        elif verbose:
            logger.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    for name in _CHATTY:
        logging.getLogger(name).filters[:] = [divert]
    warnings.simplefilter("default")
    warnings.showwarning = show  # type: ignore[assignment]  # the rest of its arguments is not looked at


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr store."""
    return (path / "zarr.json").is_file() or (path / ".zgroup").is_file()


def space_ranger_folder(path: Path, *, also: str = "") -> Path:
    """Find the Space Ranger folder of Visium HD that a path is, or has as its ``outs``; `also` ends an error."""
    for folder in (path, path / _OUTS):
        if is_visium_hd(folder):
            return folder
        if is_visium(folder):
            raise StoreError(visium_advice(folder))
    problem = (
        f"{str(path)!r} is neither a SpatialData store (it has no zarr.json) nor a Space Ranger folder of Visium HD "
        "(no binned_outputs, no *feature_slice.h5)"
        if path.exists()
        else f"There is nothing at {str(path)!r}"
    )
    raise StoreError(f"{problem}. Give the folder that sdata.write(...) made, or Space Ranger's outs{also}.")


def _named_paths(slides: Sequence[str]) -> dict[str, Path]:
    """Read ``NAME=PATH``, or a path after whose file, or the folder around ``outs``, the slide is called."""
    paths: dict[str, Path] = {}
    for text in slides:
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        path = Path(match["path"] if match else text).expanduser()
        whole = path.resolve()
        file = whole.parent.name if whole.name == _OUTS else whole.name.removesuffix(".zarr")
        name = match["name"] if match else file
        if name in paths:
            raise PixNetError(
                f"Two slides are called {name!r}: {str(paths[name])!r} and {str(path)!r}. Give them names, as in "
                f"{name}_1={paths[name]} {name}_2={path}."
            )
        paths[name] = path
    return paths


def _open_slides(call: Call) -> dict[str, SpatialData]:
    paths, store = _named_paths(call.slides), call.own.get("zarr")
    if store is not None and len(paths) > 1:
        raise PixNetError(
            f"--zarr names one store, and there are {len(paths)} slides. Leave it out: each Space Ranger folder gets "
            "a store beside it. Or convert them first with pixnet-sd convert."
        )
    return {name: _open_slide(path, store) for name, path in paths.items()}


def _open_slide(path: Path, store: str | None) -> SpatialData:
    """Open a store, or make one of a Space Ranger folder, at `store` or beside it."""
    if not is_store(path):
        path = _converted(space_ranger_folder(path), store)
    elif store is not None:
        raise PixNetError(f"--zarr is for Space Ranger folders, and {str(path)!r} is none. Leave it out.")
    logger.info("reading %s", path)
    return ps.io.open_store(path)


def _converted(folder: Path, store: str | None) -> Path:
    whole = folder.resolve()
    target = whole.with_name(f"{whole.name}.zarr") if store is None else Path(store).expanduser()
    if is_store(target):  # it appears under its name only when it is complete
        changed = changed_files(folder, target)
        if changed:
            raise StoreError(
                f"{str(target)!r} was converted from other files than {str(folder)!r} has now: {changed[0]!r} and "
                f"{len(changed) - 1} more were changed or moved since. Delete the store, or give --zarr another path."
            )
        logger.info("%s was converted before: taking %s", folder, target)
        return target
    logger.info("converting the Space Ranger folder %s to the store %s", folder, target)
    try:
        ps.io.convert_visium_hd(folder, target)
    except PixNetError as error:
        raise type(error)(f"{error} (Its options are those of pixnet-sd convert, which makes a store.)") from error
    return target


def _arguments(call: Call, **groups: Any) -> dict[str, Any]:
    """Arguments of a verb: options that are fields of a group of parameters go into it."""
    arguments = ({"objective": "mse_pcc"} if call.own.get("paper") else {}) | call.options
    for key, group in groups.items():
        given = {f.name: arguments.pop(f.name) for f in fields(group) if f.name in arguments}
        arguments[key] = group.paper(**given) if call.own.get("paper") else group(**given)
    return arguments


def fit(call: Call) -> None:
    """Train, and print the folder of the model."""
    arguments = _arguments(call, model_params=ModelParams, train_params=TrainParams)
    slides = _open_slides(call)
    model = ps.tl.fit(slides, **arguments)
    known = [pcc for pcc in model.record.held_out_pcc if pcc is not None]
    if known:
        logger.info("held-out PCC over %d genes: mean %.3f", len(known), sum(known) / len(known))
    if call.options.get("record_model", True):
        print(memory_note(next(iter(slides.values())), "model"))


def predict(call: Call) -> None:
    """Predict, and print the names of what was written."""
    arguments = _arguments(call, predict_params=PredictParams)
    sdata = _open_slide(Path(call.slides[0]).expanduser(), call.own.get("zarr"))
    from pixnet_sd.store import WRITTEN

    before = memory_note(sdata, WRITTEN) or {}
    ps.tl.predict(sdata, **arguments)
    stamps = memory_note(sdata, WRITTEN) or {}
    store = Path(str(sdata.path))
    written = [path for name in stamps if stamps[name] != before.get(name) for path in store.glob(f"*/{name}")]
    for path in sorted(written):
        print(path.relative_to(store))


def evaluate(call: Call) -> None:
    """Print scores over all genes, and write those of each."""
    output = _writable(call.own.get("output"))
    sdata = _open_slide(Path(call.slides[0]).expanduser(), None)
    scores = ps.tl.evaluate(sdata, **call.options)
    for name, value in scores.attrs.items():
        print(f"{name:10}{_number(value)}")
    _write(scores.reset_index(), output)


def cross_validate(call: Call) -> None:
    """Print scores by slide and over all of them, and write those of each gene."""
    fit_params = _arguments(call, model_params=ModelParams, train_params=TrainParams)
    own = [flag.name for title in ("Folds", "Output") for flag in call.command.groups[title]]
    arguments = {name: fit_params.pop(name) for name in own if name in fit_params}
    output = _writable(call.own.get("output"))
    scores = ps.tl.cross_validate(_open_slides(call), fit_params=fit_params, **arguments)
    print(scores.per_slide.to_string(index=False, float_format=_number))
    print(f"\n{scores.summary.to_string(index=False, float_format=_number)}")
    _write(scores.per_gene, output)


def convert(call: Call) -> None:
    """Make a store of a Space Ranger folder, and print its path."""
    folder, store = call.slides
    logger.info("reading %s", folder)
    ps.io.convert_visium_hd(folder, store, **call.options)
    print(store)


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4f}"


def _writable(output: str | None) -> Path | None:
    """Find out before the work whether a file can be written."""
    if output is None:
        return None
    path = Path(output).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise StoreError(f"--output {output!r} cannot be written ({error.strerror or error}).") from error
    return path


def _write(scores: pd.DataFrame, path: Path | None) -> None:
    if path is not None:
        scores.to_csv(path, index=False)
        logger.info("scores of all genes in %s", path)
