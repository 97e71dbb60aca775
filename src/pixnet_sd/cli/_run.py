"""What each subcommand does: opens what it is given, calls the verb, prints the result on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pixnet_sd as ps
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

from ._inputs import open_slide, open_slides

if TYPE_CHECKING:
    import pandas as pd
    from spatialdata import SpatialData

    from ._parser import Call

__all__ = ["run"]

_KINDS = ("images", "labels", "shapes", "tables")


def run(call: Call) -> int | None:
    """Do what a command line asks for; returns the exit code, or None for 0."""
    code: int | None = _RUN[call.command.name](call)
    return code


def _fit(call: Call) -> None:
    slides = open_slides(call.slides, call.own["zarr"])
    model = ps.tl.fit(slides, **call.options)
    known = [pcc for pcc in model.record.held_out_pcc if pcc is not None]
    if known:
        logger.info("held-out PCC over %d genes: mean %.3f", len(known), sum(known) / len(known))
    if call.options["record_model"]:
        print(next(iter(slides.values())).attrs["pixnet_sd"]["model"])


def _predict(call: Call) -> None:
    (path,) = call.slides
    sdata = open_slide(Path(path).expanduser(), call.own["zarr"])
    before = _elements(sdata)
    ps.tl.predict(sdata, **call.options)
    written = [key for key, inode in _elements(sdata).items() if before.get(key) != inode]
    for kind, name in sorted(written):
        print(f"{kind}/{name}")


def _elements(sdata: SpatialData) -> dict[tuple[str, str], int]:
    """Elements in the store, with what tells one that was replaced."""
    folders = [Path(str(sdata.path)) / kind for kind in _KINDS]
    return {(f.name, e.name): e.stat().st_ino for f in folders if f.is_dir() for e in f.iterdir() if e.is_dir()}


def _evaluate(call: Call) -> None:
    (path,) = call.slides
    output = _writable(call.own["output"])
    sdata = open_slide(Path(path).expanduser())  # before the verb is imported: a wrong path is told at once
    found = ps.tl.evaluate(sdata, **call.options)
    for name, value in found.attrs.items():
        print(f"{name:10}{_number(value)}")
    _write(found, output, index=True)


def _cross_validate(call: Call) -> None:
    output = _writable(call.own["output"])
    slides = open_slides(call.slides, None)
    found = ps.tl.cross_validate(slides, **call.options)
    print(found.per_slide.to_string(index=False, float_format=_number))
    print(f"\n{found.summary.to_string(index=False, float_format=_number)}")
    _write(found.per_gene, output, index=False)


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4f}"


def _writable(output: str | None) -> Path | None:
    """Find out before the work whether a file can be written."""
    if output is None:
        return None
    path = Path(output).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise StoreError(f"--output {output!r} cannot be written ({error.strerror or error}).") from error
    return path


def _write(scores: pd.DataFrame, path: Path | None, *, index: bool) -> None:
    if path is not None:
        scores.to_csv(path, index=index)
        logger.info("scores of all genes in %s", path)


def _convert(call: Call) -> None:
    folder, store = call.slides
    logger.info("reading %s", folder)  # before the libraries that take seconds to import
    ps.io.convert_visium_hd(folder, store, **call.options)
    print(store)


def _info(call: Call) -> None:
    from ._info import describe

    (path,) = call.slides
    print(describe(path, **call.options))


def _demo(call: Call) -> int:
    from ._demo import demo

    return demo(**call.options)


_RUN: dict[str, Any] = {
    "fit": _fit,
    "predict": _predict,
    "evaluate": _evaluate,
    "cross-validate": _cross_validate,
    "convert": _convert,
    "info": _info,
    "demo": _demo,
}
