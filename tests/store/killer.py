"""Run a prediction's writes in a child process and kill it at a chosen file operation. Started by test_kill.py.

Usage: ``python killer.py FOLDER new|overwrite POINT...``; prints how many runs were killed. An audit hook counts the
operations that change names on the file system (mkdir, rename, remove …). A point is a fraction of all of them, or
``+n``: the n-th after the journal was written, when results are being moved into the user's store.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import spatialdata as sd

from pixnet_sd.nn.grid import Window
from pixnet_sd.store._commit import recover
from pixnet_sd.store._gene_map import GeneMapWriter
from pixnet_sd.store._raster import image_transforms, tissue_labels
from pixnet_sd.store._region_writer import RegionWriter
from pixnet_sd.store._rows import RowInfo, expression
from pixnet_sd.store._shapes import circles_element
from pixnet_sd.store._table import region_table

COUNTED = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
NEW = {"pixnet_map", "pixnet_map_tissue", "spots", "pixnet_spots"}


def predict(store: Path, scale: float, overwrite: bool) -> None:
    """What `tl.predict` does with the store: a map in blocks, regions in shares, then everything at once."""
    sdata = sd.read_zarr(store)
    recover(sdata)
    if "pixnet_map" in sdata and sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"] == {"scale": scale}:
        return
    transforms = image_transforms(sdata, "_full_image")
    writer = GeneMapWriter.open(
        sdata,
        key="pixnet_map",
        genes=["A", "B"],
        shape=(40, 64),
        pitch_image_px=4.0,
        image_key="_full_image",
        fingerprint=str(scale),
        block_px=32,
        overwrite=overwrite,
    )
    rows = RegionWriter.open(
        sdata,
        table_key="pixnet_spots",
        shapes_key="spots",
        n_regions=2,
        genes=["A", "B"],
        fingerprint=str(scale),
        overwrite=overwrite,
    )
    tissue = tissue_labels(np.ones((40, 64), dtype=bool), 4.0, transforms)
    with writer, rows:
        for row0, row1, col0, col1 in writer.pending:
            writer.write((row0, row1, col0, col1), np.full((2, row1 - row0, col1 - col0), scale, dtype=np.float32))
        for window in (Window(0, 32, 0, 64), Window(32, 40, 0, 64)):
            share = np.full((2, 2), scale, dtype=np.float32)
            rows.put(window, np.arange(2), share, np.ones(2), np.zeros(2, dtype=bool))
        made = rows.results(
            describe,
            make_table=partial(region_table, genes=["A", "B"], region="spots", spot_diameter_px=8.0),
            express=partial(expression, aggregation="mean"),
            shapes_key="spots",
            make_shapes=partial(circles_element, radius_px=4.0 * scale, transforms=transforms),
        )
        writer.commit({"pixnet_map_tissue": tissue}, made, provenance={"maps": {"pixnet_map": {"scale": scale}}})


def describe(start: int, stop: int, weight: np.ndarray | None) -> RowInfo:
    return RowInfo(np.arange(start, stop), np.array([[10.0, 20.0], [30.0, 40.0]])[start:stop])


def check(store: Path, *, complete: float | None) -> None:
    """Raise unless the store opens, holds all of the user's elements, and no result by halves."""
    sdata = sd.read_zarr(store)
    names = {name for _, name, _ in sdata.gen_elements()}
    if not {"_full_image", "cells", "table"} <= names:
        raise RuntimeError(f"elements of the user are gone: {names}")
    if names & NEW not in (set(), NEW):
        raise RuntimeError(f"a part of the result: {names}")
    if complete is not None and not names >= NEW:
        raise RuntimeError(f"no result: {names}")
    if names >= NEW:
        scale = sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"]["scale"]
        if complete not in (None, scale):
            raise RuntimeError(f"result of {scale}, not {complete}")
        for k in (0, 1):
            values = sdata.images["pixnet_map"][f"scale{k}"]["image"].values
            if not (values == scale).all():
                raise RuntimeError(f"level {k} of the map is incomplete")
        if not (scale == sdata.tables["pixnet_spots"].X).all() or sdata.shapes["spots"].radius.iloc[0] != 4 * scale:
            raise RuntimeError("map, table and shapes of different runs")


def user_bytes(store: Path) -> dict[str, bytes]:
    """Every file of the user's own elements."""
    folders = (store / "images/_full_image", store / "shapes/cells", store / "tables/table")
    return {str(path.relative_to(store)): path.read_bytes() for f in folders for path in f.rglob("*") if path.is_file()}


class Killer:
    """Audit hook that counts operations, and kills its process at one of them."""

    def __init__(self, *, at: int = 0, after_journal: int | None = None) -> None:
        self.seen, self.since_journal = 0, -1
        self.at, self.after_journal = at, after_journal

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if event not in COUNTED:
            return
        self.seen += 1
        if self.since_journal >= 0:
            self.since_journal += 1
        if self.seen == self.at or (self.after_journal is not None and self.since_journal == self.after_journal):
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and str(args[1]).endswith("journal.json"):
            self.since_journal = 0


def in_child(function, *args, killer: Killer | None = None, count_to: Path | None = None) -> int:
    """Exit status of ``function`` in a forked child."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    if killer is not None:
        sys.addaudithook(killer)
    function(*args)
    if count_to is not None and killer is not None:
        count_to.write_text(str(killer.seen))
    sys.stdout.flush()
    os._exit(0)


def look_and_repair(store: Path, overwrite: bool) -> None:
    """What the user does after a kill: opens the store, then runs the same call again."""
    check(store, complete=None)
    predict(store, 2.0, overwrite)
    check(store, complete=2.0)


def main(folder: Path, overwrite: bool, points: list[str]) -> None:
    """Kill at each point, look, run again, look again."""
    template, store = folder / "slide.zarr", folder / "victim.zarr"

    def fresh() -> None:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(template, store)

    if overwrite and in_child(predict, template, 1.0, False):
        raise SystemExit("the first prediction failed")
    fresh()
    if in_child(predict, store, 2.0, overwrite, killer=Killer(), count_to=folder / "count"):
        raise SystemExit("the prediction failed without a kill")
    total, killed = int((folder / "count").read_text()), 0
    for point in points:
        fresh()
        is_late = point.startswith("+")
        killer = Killer(after_journal=int(point)) if is_late else Killer(at=max(1, round(float(point) * total)))
        killed += os.WIFSIGNALED(in_child(predict, store, 2.0, overwrite, killer=killer))
        untouched = user_bytes(store) == user_bytes(template)
        if in_child(look_and_repair, store, overwrite):
            raise SystemExit(f"broken after a kill at {point} of {total} operations")
        if not untouched or user_bytes(store) != user_bytes(template):
            raise SystemExit(f"elements of the user changed after a kill at {point} of {total} operations")
        if (folder / ".victim.zarr.pixnet_sd").exists():
            raise SystemExit(f"scratch remains after a kill at {point} of {total} operations")
    sys.stdout.write(f"killed {killed} of {total}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "overwrite", sys.argv[3:])
