"""The Hugging Face hub: what is there, and why it could not be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pixnet_sd._errors import CheckpointError, PixNetError

__all__ = ["hub_errors", "is_local", "snapshot"]

_LOG_IN = "log in with `hf auth login` or give token="

_UNREACHABLE = (
    "the hub was not reached, and the cache here does not have it. Check the network; without one, copy the model's "
    "folder here and give its path"
)

_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "names are 'owner/name' there. Check the name"),
    (GatedRepoError, f"its owner must let you in: ask on its page, then {_LOG_IN}"),
    (RepositoryNotFoundError, f"there is no such model. Check the name; of a private one, {_LOG_IN}"),
    (RevisionNotFoundError, "it has no such revision. Give a branch, tag or commit that it has"),
    (LocalTokenNotFoundError, f"nobody is logged in: {_LOG_IN}"),
    (LocalEntryNotFoundError, _UNREACHABLE),
    (EntryNotFoundError, "it lacks a file that a model of pixnet_sd has. Check the name"),
)
"""What each error means, the more special ones first."""

_BY_STATUS = {
    401: f"the hub does not know you: {_LOG_IN}",
    403: f"you may not: {_LOG_IN}, one that may write there",
}


def is_local(name: str) -> bool:
    """Whether a name is a folder or file here, or could not be anything else."""
    return Path(name).expanduser().exists() or name.startswith(("~", "/", "./", "../"))


def snapshot(repo_id: str, files: list[str], **options: Any) -> Path:
    """Fetch files of a model.

    Parameters
    ----------
    repo_id
        ``"owner/name"``.
    files
        Names; those that it lacks are left out.
    options
        Of `huggingface_hub.snapshot_download`.

    Returns
    -------
    The folder in the cache.
    """
    return Path(snapshot_download(repo_id, allow_patterns=files, **options))


@contextmanager
def hub_errors(what_failed: str) -> Iterator[None]:
    """Say what the hub's client means.

    Parameters
    ----------
    what_failed
        Start of the message.

    Raises
    ------
    CheckpointError
        For whatever the client raises; its errors differ between versions, down to the classes of two HTTP libraries.
    """
    try:
        yield
    except (PixNetError, TypeError):  # the latter: an argument that nobody has
        raise
    except Exception as error:
        raise CheckpointError(f"{what_failed}: {_cause(error)}.") from error


def _cause(error: Exception) -> str:
    for kind, text in _CAUSES:
        if isinstance(error, kind):
            return text
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return _BY_STATUS.get(status or 0, f"the hub answered with status {status} ({type(error).__name__})")
    return _UNREACHABLE if _of_network(error) else f"{type(error).__name__}: {error}"


def _of_network(error: Exception) -> bool:
    """Errors of both HTTP libraries that its client has had, without importing either."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in {
        "httpcore",
        "httpx",
        "requests",
        "urllib3",
    }
