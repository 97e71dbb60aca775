"""Kill predictions and trainings at random points, or let them run into a full disk, and look at what is left.

    python scripts/kills.py FOLDER --kills 200
    python scripts/kills.py FOLDER --kills 0 --full-disks 4      # as root: mounts small file systems

FOLDER is made, and deleted when all went well. An equal part of the kills goes to each of a prediction into a store
without results, one that overwrites others, one of factors, and a training. Half of them come at a random time; the
others at a random operation on the names of files (rename, mkdir, remove ...), every second one of these while results
are moved into the store. Then the user's files have to be the same, the store has to open with all of the results or
none, and the same call has to finish, with the results of a run that nothing disturbed and nothing left over.

Every run is a forked child, so that imports are paid for once; the parent itself only looks at files, since a child of
a process with threads may wait for ever for one that it does not have.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import spatialdata as sd
import torch
import zarr

import pixnet_sd as ps
import pixnet_sd.store._transaction as commit
import pixnet_sd.store.gene_map._element as layout
from pixnet_sd import tl
from pixnet_sd.errors import PixNetError

REFUSED, BROKEN = 3, 4
USERS = (
    *(f"images/sample_{size}_image" for size in ("full", "hires", "lowres")),
    "shapes/sample_square_008um",
    "tables/square_008um",
)
SMALL: dict[str, Any] = {
    "genes": 6,
    "validation": 0.25,
    "max_epochs": 3,
    "batch_size": 4,
    "model_params": {"encoder": "test_resnet", "encoder_weights": None, "decoder_width": 16, "working_mpp": 1.0},
    "train_params": {"tile_px": 128},
    "device": "cpu",
    "show_progress_bar": False,
}
QUIET: dict[str, Any] = {"predict_params": {"tile_px": 128}, "device": "cpu", "show_progress_bar": False}
KINDS: dict[str, dict[str, Any]] = {
    "fresh": {"shapes_key": "sample_square_008um"},
    "overwrite": {"radius_um": 8, "overwrite": True},
    "factors": {"bin_um": 8, "write": "factors"},
}
NAMES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
LEFT = ("*.pixnet_sd", "*.partial", "*.json.tmp", "*.pixnet_sd-*")


def predict(store: Path, kind: str) -> None:
    """Many small windows; regions on the borders between them have shares in several."""
    check(hasattr(layout, "BLOCK_PX"), "the limit of the blocks' side has another name")
    layout.BLOCK_PX = (32, 32)
    tl.predict(sd.read_zarr(store), **QUIET, **KINDS[kind])


def fit(store: Path, checkpoint: Path) -> None:
    """A small training."""
    tl.fit(sd.read_zarr(store), checkpoint_dir=checkpoint, **SMALL)


def draw(folder: Path) -> None:
    """A slide, the same with a model, and that one with other results."""
    ps.datasets.sample(size_um=200, mpp=1.0, bin_um=(8,)).write(folder / "slide.zarr")
    shutil.copytree(folder / "slide.zarr", folder / "fresh.zarr")
    fit(folder / "fresh.zarr", folder / "fitted")
    for kind in ("overwrite", "factors"):
        shutil.copytree(folder / "fresh.zarr", folder / f"{kind}.zarr")
    sdata = sd.read_zarr(folder / "overwrite.zarr")
    genes = [str(gene) for gene in ps.PixNet.load(folder / "fitted").genes[:2]]
    params = QUIET["predict_params"] | {"n_symmetries": 4}
    tl.predict(sdata, radius_um=8, genes=genes, **(QUIET | {"predict_params": params}))
    (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))


def import_all(folder: Path) -> None:
    """Import what runs import when they need it, torch's compiler among it: no child has to, which takes seconds."""
    for name in json.loads((folder / "modules.json").read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    check(threading.active_count() == 1, "a module has started a thread")


def start(function: Callable[..., None], *arguments: object) -> int:
    """Run in a forked child; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = BROKEN
    try:
        torch.set_num_threads(1)
        function(*arguments)
        status = 0
    except PixNetError as error:
        sys.stderr.write(f"refused: {error}\n")
        status = REFUSED
    finally:
        if status == BROKEN:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(status)


def finish(child: int) -> int:
    """Exit status of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(condition: bool, what: str) -> None:
    """End with a message unless a condition holds."""
    if not condition:
        raise SystemExit(what)


class Killer:
    """Audit hook that counts operations on names, all and those since a journal was written, and kills at one."""

    def __init__(self, *, at: int = 0, since_journal: int = 0) -> None:
        self.at, self.at_since = at, since_journal
        self.seen = self.since = 0
        self.has_journal = False

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        """Count an operation, or kill."""
        if event not in NAMES:
            return
        self.seen += 1
        self.since += self.has_journal
        if self.seen == self.at or (self.at_since and self.since == self.at_since):
            os.kill(os.getpid(), signal.SIGKILL)
        self.has_journal |= event == "os.rename" and str(args[1]).endswith("journal.json")


def watched(killer: Killer, counts: Path | None, function: Callable[..., None], *arguments: object) -> None:
    """Run with an audit hook, and note how many operations there were."""
    sys.addaudithook(killer)
    function(*arguments)
    if counts is not None:
        seen, since = killer.seen, killer.since
        counts.write_text(json.dumps([seen, since]))


class Points:
    """Where to kill a run: times and operations, spread over all of it."""

    def __init__(self, folder: Path, function: Callable[..., None], *arguments: object) -> None:
        counts = folder / "counts.json"
        started = time.monotonic()
        check(finish(start(watched, Killer(), counts, function, *arguments)) == 0, "a run failed without being killed")
        self.seconds = time.monotonic() - started
        self.n, self.n_since_journal = json.loads(counts.read_text())

    def kill(self, k: int, of: int, rng: random.Random, function: Callable[..., None], *arguments: object) -> str:
        """Run and kill at the k-th point; where, or nothing when it was done before."""
        share = (k + rng.random()) / of
        if k % 2 == 0:
            child = start(function, *arguments)
            time.sleep(share * self.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            where = f"after {share * self.seconds:.2f} s"
        else:
            late = k % 4 == 3 and self.n_since_journal
            at = 1 + int(share * (self.n_since_journal if late else self.n))
            killer = Killer(since_journal=at) if late else Killer(at=at)
            child = start(watched, killer, None, function, *arguments)
            where = f"at operation {at}{' since the journal' if late else ''}"
        return where if finish(child) == -signal.SIGKILL else ""


def users_files(store: Path) -> str:
    """Hash of every file of the user's own elements."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in USERS for p in (store / folder).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(store)).encode() + path.read_bytes())
    return digest.hexdigest()


def elements(store: Path) -> set[str]:
    """Results that are in a store."""
    return {f"{path.parent.name}/{path.name}" for path in store.glob("*/*") if path.is_dir()} - set(USERS)


def values(store: Path) -> dict[str, str]:
    """Hash of every array, and of every file of shapes, of the results."""
    target = store.with_suffix(".json")
    check(finish(start(write_values, store, target)) == 0, "the results cannot be read")
    found: dict[str, str] = json.loads(target.read_text())
    target.unlink()
    return found


def write_values(store: Path, target: Path) -> None:
    """What `values` returns, into a file."""
    found = {}
    for name in sorted(elements(store)):
        for path in sorted((store / name).rglob("shapes.parquet")):
            found[str(path.relative_to(store))] = hashlib.sha256(path.read_bytes()).hexdigest()
        for metadata in sorted((store / name).rglob("zarr.json")):
            if json.loads(metadata.read_text())["node_type"] == "array":
                array = np.asarray(zarr.open_array(str(metadata.parent), mode="r")[...])
                plain = array.dtype.kind in "biuf"
                content = array.tobytes() if plain else "\n".join(map(str, np.ravel(array))).encode()
                found[str(metadata.parent.relative_to(store))] = hashlib.sha256(content).hexdigest()
    target.write_text(json.dumps(found))


def readable(store: Path, wholes: list[set[str]]) -> None:
    """Opens, with all of the user's elements and the results of one run or none."""
    names = {f"{kind}/{name}" for kind, name, _ in sd.read_zarr(store).gen_elements()}
    check(set(USERS) <= names, f"elements of the user are gone: {names}")
    check(names - set(USERS) in wholes, f"a part of the results: {names}")


def left_over(folder: Path) -> list[str]:
    """Names of files and folders that a run should have removed."""
    return [str(path.relative_to(folder)) for pattern in LEFT for path in folder.rglob(pattern)]


def kill_predictions(folder: Path, kind: str, n: int, rng: random.Random) -> int:
    """Kill one kind of prediction n times; how many of the kills came in time."""
    template, home = folder / f"{kind}.zarr", folder / kind
    home.mkdir()
    whole, store = home / "whole.zarr", home / "slide.zarr"
    shutil.copytree(template, whole)
    points = Points(home, predict, whole, kind)
    expected, users = values(whole), users_files(template)
    allowed = [set(), elements(template), elements(whole)]
    check(len(expected) > 8, f"too few arrays in the results: {list(expected)}")
    shutil.rmtree(whole)
    killed = 0
    for k in range(n):
        shutil.copytree(template, store)
        where = points.kill(k, n, rng, predict, store, kind)
        killed += bool(where)
        what = f"{kind}, killed {where or 'too late'}"
        check(users_files(store) == users, f"{what}: the user's files changed")
        check(finish(start(readable, store, allowed)) == 0, f"{what}: the store cannot be read")
        check(finish(start(predict, store, kind)) == 0, f"{what}: the same call does not finish")
        check(values(store) == expected, f"{what}: other results")
        check(users_files(store) == users, f"{what}: the user's files changed by going on")
        check(not left_over(home), f"{what}: left over are {left_over(home)}")
        shutil.rmtree(store)
    return killed


def weights(checkpoint: Path) -> str:
    """Hash of a model's weights."""
    found: str = json.loads((checkpoint / "config.json").read_text())["weights_sha256"]
    return found


def kill_trainings(folder: Path, n: int, rng: random.Random) -> int:
    """The same for trainings."""
    home = folder / "fit"
    home.mkdir()
    store, checkpoint = home / "slide.zarr", home / "model"
    shutil.copytree(folder / "slide.zarr", store)
    points = Points(home, fit, store, checkpoint)
    expected, users = weights(checkpoint), users_files(store)
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")}
    killed = 0
    for k in range(n):
        shutil.rmtree(checkpoint, ignore_errors=True)
        where = points.kill(k, n, rng, fit, store, checkpoint)
        killed += bool(where)
        what = f"fit, killed {where or 'too late'}"
        check(users_files(store) == users, f"{what}: the user's files changed")
        check(finish(start(fit, store, checkpoint)) == 0, f"{what}: the same call does not finish")
        check(weights(checkpoint) == expected, f"{what}: another model")
        check({str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")} == files, f"{what}: other files")
        check(not left_over(home), f"{what}: left over are {left_over(home)}")
    return killed


@contextlib.contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """A file system of a few bytes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize_disk(folder: Path, n_bytes: int) -> None:
    """Give a file system another size."""
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(folder)], check=True)


def unaware(function: Callable[..., None], *arguments: object) -> None:
    """As if another process took the disk after it was looked at."""
    commit.check_free_disk = lambda *_: None
    function(*arguments)


def bytes_in(folder: Path) -> int:
    """Bytes that a folder takes, about."""
    return sum(path.stat().st_size + 4096 for path in folder.rglob("*"))


def fill_disk_predicting(folder: Path, n: int) -> int:
    """Predictions that find the disk full after a while, and go on once there is room; how many did."""
    template, whole = folder / "fresh.zarr", folder / "disk" / "whole.zarr"
    shutil.copytree(template, whole)
    check(finish(start(predict, whole, "fresh")) == 0, "the prediction failed on a large disk")
    expected, users = values(whole), users_files(template)
    base, more = bytes_in(template), bytes_in(whole) - bytes_in(template)
    refused = 0
    for k in range(n):
        disk = folder / "disk" / str(k)
        with small_disk(disk, base + 65536 + int(more * 0.2 * k / n)):
            store = disk / "slide.zarr"
            shutil.copytree(template, store)
            refused += finish(start(unaware, predict, store, "fresh")) == REFUSED
            check(users_files(store) == users, f"the user's elements changed on full disk {k}")
            check(finish(start(readable, store, [set(), elements(whole)])) == 0, f"unreadable on full disk {k}")
            resize_disk(disk, 20 * base)
            check(finish(start(predict, store, "fresh")) == 0, f"it does not go on after full disk {k}")
            check(values(store) == expected, f"other results after full disk {k}")
            check(not left_over(disk), f"left over after full disk {k} are {left_over(disk)}")
    return refused


def fill_disk_training(folder: Path, n: int) -> int:
    """The same for trainings."""
    store, whole = folder / "slide.zarr", folder / "disk" / "model"
    check(finish(start(fit, store, whole)) == 0, "the training failed on a large disk")
    expected, room = weights(whole), bytes_in(whole)
    refused = 0
    for k in range(n):
        disk = folder / "disk" / f"training {k}"
        with small_disk(disk, 16384 + int(room * k / n)):
            refused += finish(start(fit, store, disk / "model")) == REFUSED
            resize_disk(disk, 100 * room)
            check(finish(start(fit, store, disk / "model")) == 0, f"it does not go on after full disk {k}")
            check(weights(disk / "model") == expected, f"another model after full disk {k}")
    return refused


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to make, on a local disk")
    parser.add_argument("--kills", type=int, default=200, help="how many in all (default: 200)")
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "fit"], default=[*KINDS, "fit"], help="kinds of runs")
    parser.add_argument("--full-disks", type=int, default=0, help="full disks of each kind (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default: 0)")
    options = parser.parse_args(arguments)
    folder, rng = options.folder.resolve(), random.Random(options.seed)
    folder.mkdir(parents=True)
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    check(finish(start(draw, folder)) == 0, "the slides cannot be made")
    import_all(folder)
    each, more = divmod(options.kills, len(options.only))
    for place, kind in enumerate(options.only):
        n = each + (place < more)
        if n:
            killed = kill_trainings(folder, n, rng) if kind == "fit" else kill_predictions(folder, kind, n, rng)
            print(f"{kind}: {killed} of {n} killed before the end; nothing lost, nothing left over", flush=True)
    if options.full_disks:
        (folder / "disk").mkdir()
        n = options.full_disks
        predictions, trainings = fill_disk_predicting(folder, n), fill_disk_training(folder, n)
        print(f"{predictions} predictions and {trainings} trainings of {n} found the disk full")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
