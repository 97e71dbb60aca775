"""Kill predictions and trainings at random points, and let them run into a full disk. Started by test_disturbed.py.

Usage: ``python disturbed.py predict|fit|full FOLDER FIT_ARGUMENTS N``; prints what happened. FOLDER holds
``fitted.zarr`` and ``slide.zarr``. Every run is a forked child, so that imports are paid for once; the parent itself
only looks at files, since a child of a process with threads may wait for ever for one that it does not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import spatialdata as sd
import squidpy.experimental.im  # noqa: F401 - `predict` imports it on first use, which takes seconds
import torch
import zarr

import pixnet_sd.store._commit as commit
import pixnet_sd.store._map_layout as layout
import pixnet_sd.tl as tl
from pixnet_sd._errors import PixNetError

REFUSED, BROKEN = 3, 4
RESULTS = ("images/pixnet_map", "labels/pixnet_map_tissue", "tables/pixnet_sample_square_008um")
USERS = ("images/sample_full_image", "shapes/sample_square_008um", "tables/square_008um")


def predict(store: Path) -> None:
    """Many small windows; bins on the borders between them have shares in several."""
    layout.MAX_BLOCK_PX = 32
    tl.predict(
        sd.read_zarr(store), shapes_key="sample_square_008um", tile_px=128, device="cpu", show_progress_bar=False
    )


def fit(store: Path, checkpoint: Path, arguments: dict[str, object]) -> None:
    tl.fit(sd.read_zarr(store), checkpoint_dir=checkpoint, **arguments)


def start(function: Callable[..., None], *arguments: object) -> int:
    """Run in a forked child; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = BROKEN
    try:
        function(*arguments)
        status = 0
    except PixNetError as error:
        sys.stderr.write(f"refused: {error}\n")
        status = REFUSED
    finally:
        if status == BROKEN:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def finish(child: int) -> int:
    """Exit status of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(what)


def users_files(store: Path) -> str:
    """Hash of every file of the user's own elements."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in USERS for p in (store / folder).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(store)).encode() + path.read_bytes())
    return digest.hexdigest()


def results(store: Path) -> dict[str, str]:
    """Hash of every array of the results."""
    target = store.with_suffix(".json")
    check(finish(start(write_results, store, target)) == 0, "the results cannot be read")
    return json.loads(target.read_text())


def write_results(store: Path, target: Path) -> None:
    found = {}
    for metadata in sorted(m for folder in RESULTS for m in (store / folder).rglob("zarr.json")):
        if json.loads(metadata.read_text())["node_type"] == "array":
            values = np.asarray(zarr.open_array(str(metadata.parent), mode="r")[...])
            content = (
                values.tobytes() if values.dtype.kind in "biuf" else "\n".join(map(str, np.ravel(values))).encode()
            )
            found[str(metadata.parent.relative_to(store))] = hashlib.sha256(content).hexdigest()
    target.write_text(json.dumps(found))


def weights(checkpoint: Path) -> str:
    """Hash of a model's weights."""
    return json.loads((checkpoint / "config.json").read_text())["weights_sha256"]


def readable(store: Path) -> None:
    """Opens, with all of the user's elements and either all results or none."""
    sdata = sd.read_zarr(store)
    names = {f"{kind}/{name}" for kind, name, _ in sdata.gen_elements()}
    check(set(USERS) <= names, f"elements of the user are gone: {names}")
    check(names & set(RESULTS) in (set(), set(RESULTS)), f"a part of the results: {names}")


def kill_at(seconds: float, function: Callable[..., None], *arguments: object) -> bool:
    """Kill a run after some time; whether it was still there."""
    child = start(function, *arguments)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return finish(child) == -signal.SIGKILL


def points(n: int, whole: float) -> Iterator[float]:
    """Random moments of a run that takes so many seconds, spread over all of it."""
    rng = random.Random(0)
    for k in range(n):
        yield (k + rng.random()) / n * whole


def timed(function: Callable[..., None], *arguments: object) -> float:
    started = time.monotonic()
    check(finish(start(function, *arguments)) == 0, "the run failed without being disturbed")
    return time.monotonic() - started


def kill_predictions(folder: Path, n: int) -> int:
    template, store = folder / "fitted.zarr", folder / "victim.zarr"
    shutil.copytree(template, folder / "whole.zarr")
    whole = timed(predict, folder / "whole.zarr")
    expected, users = results(folder / "whole.zarr"), users_files(template)
    check(len(expected) > 8, f"too few arrays in the results: {list(expected)}")
    killed = 0
    for moment in points(n, whole):
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(template, store)
        killed += kill_at(moment, predict, store)
        check(users_files(store) == users, f"the user's elements changed, killed after {moment:.2f} s")
        check(finish(start(readable, store)) == 0, f"the store cannot be read, killed after {moment:.2f} s")
        if "tables/pixnet_sample_square_008um" not in existing(store):
            check(finish(start(predict, store)) == 0, f"it does not go on, killed after {moment:.2f} s")
        check(results(store) == expected, f"other results, killed after {moment:.2f} s")
        check(users_files(store) == users, f"the user's elements changed by going on, killed after {moment:.2f} s")
    return killed


def existing(store: Path) -> set[str]:
    """Results that the store has, when what a killed run left is finished first."""
    child = start(lambda: commit.recover(sd.read_zarr(store)))
    check(finish(child) == 0, "recovery failed")
    return {name for name in RESULTS if (store / name / "zarr.json").is_file()}


def kill_trainings(folder: Path, arguments: dict[str, object], n: int) -> int:
    store = folder / "slide.zarr"
    whole = timed(fit, store, folder / "whole", arguments)
    expected, users = weights(folder / "whole"), users_files(store)
    killed = 0
    for k, moment in enumerate(points(n, whole)):
        checkpoint = folder / f"model_{k}"
        killed += kill_at(moment, fit, store, checkpoint, arguments)
        check(users_files(store) == users, f"the user's elements changed, killed after {moment:.2f} s")
        check(finish(start(fit, store, checkpoint, arguments)) == 0, f"it does not go on, killed after {moment:.2f} s")
        check(weights(checkpoint) == expected, f"another model, killed after {moment:.2f} s")
        shutil.rmtree(checkpoint)
    return killed


@contextlib.contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """A file system of a few bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize_disk(folder: Path, n_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(folder)], check=True)


def unaware(function: Callable[..., None], *arguments: object) -> None:
    """As if another process took the disk after it was looked at."""
    commit.check_free_disk = lambda *_: None
    function(*arguments)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size + 4096 for path in folder.rglob("*"))


def fill_disk_predicting(folder: Path, n: int) -> int:
    """Predictions that find the disk full after a while, and go on once there is room; how many did."""
    shutil.copytree(folder / "fitted.zarr", folder / "whole.zarr")
    check(finish(start(predict, folder / "whole.zarr")) == 0, "the prediction failed on a large disk")
    expected, users = results(folder / "whole.zarr"), users_files(folder / "fitted.zarr")
    base = bytes_in(folder / "fitted.zarr")
    more = bytes_in(folder / "whole.zarr") - base
    refused = 0
    for k in range(n):
        disk = folder / f"disk_{k}"
        with small_disk(disk, base + 65536 + int(more * 0.2 * k / n)):
            store = disk / "slide.zarr"
            shutil.copytree(folder / "fitted.zarr", store)
            refused += finish(start(unaware, predict, store)) == REFUSED
            check(users_files(store) == users, f"the user's elements changed on full disk {k}")
            check(finish(start(readable, store)) == 0, f"the store cannot be read on full disk {k}")
            resize_disk(disk, 20 * base)
            if "tables/pixnet_sample_square_008um" not in existing(store):
                check(finish(start(predict, store)) == 0, f"it does not go on after full disk {k}")
            check(results(store) == expected, f"other results after full disk {k}")
    return refused


def fill_disk_training(folder: Path, arguments: dict[str, object], n: int) -> int:
    """The same for trainings."""
    store = folder / "slide.zarr"
    check(finish(start(fit, store, folder / "whole", arguments)) == 0, "the training failed on a large disk")
    expected, room = weights(folder / "whole"), bytes_in(folder / "whole")
    refused = 0
    for k in range(n):
        disk = folder / f"training_{k}"
        with small_disk(disk, 16384 + int(room * k / n)):
            refused += finish(start(fit, store, disk / "model", arguments)) == REFUSED
            resize_disk(disk, 100 * room)
            check(finish(start(fit, store, disk / "model", arguments)) == 0, f"it does not go on after full disk {k}")
            check(weights(disk / "model") == expected, f"another model after full disk {k}")
    return refused


def main(what: str, folder: Path, arguments: dict[str, object], n: int) -> None:
    torch.set_num_threads(1)
    if what == "predict":
        sys.stdout.write(f"{kill_predictions(folder, n)} of {n} killed\n")
    elif what == "fit":
        sys.stdout.write(f"{kill_trainings(folder, arguments, n)} of {n} killed\n")
    else:
        predictions, trainings = fill_disk_predicting(folder, n), fill_disk_training(folder, arguments, n)
        sys.stdout.write(f"{predictions} predictions and {trainings} trainings of {n} found the disk full\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
