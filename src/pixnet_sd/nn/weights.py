"""Encoder weights from a file: safetensors, or a torch file opened without running any code in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixnet_sd._errors import CheckpointError
from pixnet_sd._files import home_expanded, open_regular
from pixnet_sd._logging import logger

__all__ = ["MatchReport", "hash_weights", "load_encoder_weights", "read_weights"]

_PREFIXES = ("module.", "model.", "resnet.", "encoder.", "backbone.", "body.")
_MOST_TIMES = 32  # of the encoder's size: files of self-supervised training hold two networks, heads and moments
_BESIDE_BYTES = 1 << 30
_MIN_MATCHED = 0.5  # a head is a small part of a backbone; half unmatched means another network


class MatchReport(NamedTuple):
    """What of a weights file fitted the encoder."""

    matched: int
    missing: list[str]
    unused: list[str]
    wrong_shape: list[str]


def read_weights(path: str | Path, *, most_bytes: int | None = None) -> dict[str, Tensor]:
    """Read tensors from a safetensors or torch file.

    Parameters
    ----------
    path
        ``.safetensors``, or any file that ``torch.load(weights_only=True)`` opens; a nested ``state_dict`` (Lightning)
        or ``model`` is unwrapped.
    most_bytes
        Largest size of a file that is opened; None: any.

    Returns
    -------
    Tensors by key.

    Raises
    ------
    CheckpointError
        No such file, or nothing in it that is a set of tensors.
    """
    path = home_expanded(path)
    _check_file(path, most_bytes)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        # Bytes that are no weights fail in any way. Torch's own text tells how to run a file's code, so it stays out.
        raise CheckpointError(
            f"{str(path)!r} cannot be opened as weights ({type(error).__name__}). A safetensors file, or a torch file "
            "that holds tensors only, is needed; other objects in a torch file are never run."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no named tensors, so it is not a weights file.")
    return tensors


def _check_file(path: Path, most_bytes: int | None) -> None:
    """Look at what is there before a library opens it, and waits for a pipe."""
    try:
        open_regular(path, most_bytes=most_bytes).close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"There is no weights file at {str(path)!r}. Give encoder_weights= a file.") from error
    except CheckpointError as error:
        raise CheckpointError(f"encoder_weights= cannot be read: {error}") from error


def _bare(key: str) -> str:
    """A key without wrapper prefixes, and in the spelling that timm's feature wrappers use."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                key, stripped = key[len(prefix) :], True
    return key.replace(".", "_")


def _match(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], MatchReport]:
    by_bare = {_bare(key): value for key, value in found.items()}
    fitting: dict[str, Tensor] = {}
    wrong_shape = []
    for key, value in own.items():
        candidate = by_bare.get(_bare(key))
        if candidate is not None and candidate.shape == value.shape:
            fitting[key] = candidate
        elif candidate is not None:
            wrong_shape.append(key)
    missing = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    known = {_bare(key) for key in own}
    unused = [key for key in found if _bare(key) not in known]
    return fitting, MatchReport(len(fitting), missing, unused, wrong_shape)


def load_encoder_weights(body: nn.Module, path: str | Path) -> MatchReport:
    """Load a file's weights into an encoder body.

    Prefixes such as ``model.``, ``resnet.`` or ``module.`` (the pathology SimCLR ResNet18 of Ciga et al., Lightning
    and DataParallel files) are understood; a classifier head is left out.

    Parameters
    ----------
    body
        timm feature extractor.
    path
        File, see `read_weights`.

    Returns
    -------
    What matched; the same is logged.

    Raises
    ------
    CheckpointError
        Less than half of the encoder's tensors have a match.
    """
    own = body.state_dict()
    n_bytes = sum(value.numel() * value.element_size() for value in own.values())
    fitting, report = _match(own, read_weights(path, most_bytes=_MOST_TIMES * n_bytes + _BESIDE_BYTES))
    needed = [k for k in own if not k.endswith("num_batches_tracked")]
    share = 1 - len(report.missing) / len(needed)
    if share < _MIN_MATCHED:
        raise CheckpointError(
            f"Only {len(needed) - len(report.missing)} of the encoder's {len(needed)} tensors have a match in "
            f"{str(path)!r} ({len(report.wrong_shape)} of another shape). The file is of another network: it needs "
            f"e.g. {report.missing[:3]}, and has {report.unused[:3]}. Set encoder= to the network it was made for."
        )
    body.load_state_dict(fitting, strict=False)
    level = logger.info if not report.missing else logger.warning
    level(
        "encoder weights %s: %d of %d tensors matched, missing %s, not used %s",
        Path(path).name,
        len(needed) - len(report.missing),
        len(needed),
        report.missing[:5],
        report.unused[:5],
    )
    return report


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over the tensors of a module, names and values, as hex."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
