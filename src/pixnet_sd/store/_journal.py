"""What is needed to finish a commit, believed only when this user's pixnet_sd wrote it for this very store.

A journal comes from a folder beside the user's data, and so perhaps with an archive, or from someone else. It holds no
paths: every place follows from names of elements, which cannot leave the work folder and the store. It is signed with a
secret of the user, and names the store by its inode, which a copy does not share (the number of the device would change
with every mount).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixnet_sd._errors import StoreError

from ._disk import read_json, write_json
from ._names import ELEMENT_TYPES, is_name
from ._planted import is_ours
from ._secret import known_secrets, secret

__all__ = ["COMMIT", "JOURNAL", "Journal", "Move", "read_journal", "remove_journal", "write_journal"]

JOURNAL = "journal.json"
COMMIT = "commit"
"""Folder, inside the work folder, of elements that are written when they are committed."""

_PLACE = re.compile(r"(commit/new|map-[\w.-]+/map|table-[\w.-]+/(table|shapes))\.zarr")


@dataclass(frozen=True)
class Move:
    """One element on its way from a scratch store into the store.

    Attributes
    ----------
    name, kind
        Of the element.
    place
        The scratch store, ``{folder}/{store}``, in the work folder.
    replaces
        Whether it takes the place of another.
    """

    name: str
    kind: str
    place: str
    replaces: bool

    @property
    def path(self) -> str:
        """Of the element inside either store."""
        return f"{self.kind}/{self.name}"


@dataclass
class Journal:
    """All that is needed to finish a commit.

    Attributes
    ----------
    moves
        Elements.
    nodes
        Consolidated metadata of them, key → node.
    groups
        Element type → metadata of its group.
    notes
        For ``attrs["pixnet_sd"]``.
    """

    moves: list[Move] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def folders(self) -> list[str]:
        """Folders of the work folder that are not needed once the elements are in the store."""
        return sorted({COMMIT, *(move.place.partition("/")[0] for move in self.moves)})


def write_journal(work: Path, store: Path, journal: Journal) -> None:
    """Write the journal; from here on the next run finishes the commit.

    Raises
    ------
    OSError
        When that fails.
    """
    value = asdict(journal)
    write_json(work / JOURNAL, {"journal": value, "signature": _signature(secret(), store, value)}, scratch=work)


def read_journal(work: Path, store: Path) -> Journal | None:
    """The journal of a commit that was cut off, or None.

    Raises
    ------
    StoreError
        When it is damaged, or was not written here by this user.
    """
    path = work / JOURNAL
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path)
        owner, value = path.lstat().st_uid, found["journal"]
        signed = any(hmac.compare_digest(_signature(key, store, value), found["signature"]) for key in known_secrets())
        if signed and is_ours(owner, work):
            return _parsed(value)
        why = "it is not signed by this user for this store"
    except (KeyError, TypeError, OSError, ValueError) as error:
        why = f"it cannot be read ({error})"
    raise StoreError(
        f"{path} asks for a write into {store} to be finished, but {why}, so nothing of it was done. Was the store "
        f"copied or unpacked with it, or is the run another user's? Look at {work}; if you miss no results that are in "
        "it, delete it."
    )


def remove_journal(work: Path) -> None:
    """The commit is finished."""
    (work / JOURNAL).unlink(missing_ok=True)


def _signature(key: bytes, store: Path, value: dict[str, Any]) -> str:
    text = json.dumps([store.stat().st_ino, value], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _parsed(value: dict[str, Any]) -> Journal:
    """The journal, each part of which is what it should be."""
    journal = Journal(**{**value, "moves": [Move(**move) for move in value["moves"]]})
    paths = [move.path for move in journal.moves]
    if not all(_is_sound(move) for move in journal.moves) or not all(
        isinstance(part, dict) for part in (journal.nodes, journal.groups, journal.notes)
    ):
        raise ValueError("elements that cannot be")
    if not set(journal.groups) <= {move.kind for move in journal.moves}:
        raise ValueError("groups of no element")
    if not all(any(key == path or key.startswith(f"{path}/") for path in paths) for key in journal.nodes):
        raise ValueError("metadata of other elements")
    return journal


def _is_sound(move: Move) -> bool:
    return (
        move.kind in ELEMENT_TYPES
        and is_name(move.name)
        and _PLACE.fullmatch(move.place) is not None
        and isinstance(move.replaces, bool)
    )
