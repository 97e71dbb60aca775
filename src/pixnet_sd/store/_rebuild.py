"""From a checkpoint's record and weights back to its network, which is measured before it takes any memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pixnet_sd._errors import CheckpointError, PixNetError
from pixnet_sd.nn.encoder import build_encoder
from pixnet_sd.nn.model import Network
from pixnet_sd.nn.receptive_field import receptive_radius_px
from pixnet_sd.nn.weights import hash_weights

from ._checksums import check_file
from ._record import ModelRecord, library_versions, link_of

__all__ = ["WEIGHTS", "read_network"]

WEIGHTS = "model.safetensors"

_HEADER_BYTES = 1 << 20
_BYTES_A_TENSOR = 1 << 10
"""Most that a tensor takes in the header: name, type, shape and place."""


def read_network(folder: Path, record: ModelRecord) -> Network:
    """Build the network of a record, with the weights beside it.

    Parameters
    ----------
    folder
        Of the model.
    record
        Its record.

    Returns
    -------
    The network, on the CPU.

    Raises
    ------
    CheckpointError
        Weights are missing, damaged, or of another network than the record says.
    """
    path = folder / WEIGHTS
    outline = _outline(record)
    check_file(path, most_bytes=None if outline is None else _most_bytes(outline))
    if outline is not None:
        _check_shapes(path, outline)
    network = _network(record)
    _check_halo(network, record, folder)
    _load(network, path)
    if hash_weights(network) != record.weights_sha256:
        raise CheckpointError(
            f"The weights in {str(folder)!r} are not those its config.json was written for: one of the two was "
            "replaced. Restore the folder, or train again."
        )
    return network


def _network(record: ModelRecord) -> Network:
    try:
        encoder = build_encoder(record.encoder, None, frozen=record.freeze_encoder)
    except PixNetError as error:
        then, now = record.versions.get("timm", "(unknown)"), library_versions()["timm"]
        raise CheckpointError(
            f"The checkpoint was made with encoder {record.encoder!r} of timm {then}, and the timm installed here, "
            f"{now}, does not have it. Install that version."
        ) from error
    try:
        return Network(encoder, record.decoder, len(record.outputs), record.aggregation, link_of(record.objective))
    except (MemoryError, RuntimeError) as error:  # torch's own word for no memory is the latter
        raise CheckpointError(
            f"The network that the checkpoint describes cannot be built ({str(error)[:200]}): decoder {record.decoder}."
        ) from error


def _outline(record: ModelRecord) -> Network | None:
    """The network without memory for its weights; None for an encoder that cannot be made so."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what timm says of a model on the meta device does not concern a user
            return _network(record)
    except (RuntimeError, TypeError, ValueError):
        return None


def _most_bytes(outline: Network) -> int:
    """Size that a file of a network's weights cannot exceed."""
    tensors = outline.state_dict().values()
    return sum(t.numel() * t.element_size() + _BYTES_A_TENSOR for t in tensors) + _HEADER_BYTES


def _check_shapes(path: Path, outline: Network) -> None:
    """Compare tensors by name and shape, before memory is taken for any."""
    wanted = {key: tuple(tensor.shape) for key, tensor in outline.state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_of_another_network(path, type(error).__name__)) from error
    if shapes != wanted:
        other = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        raise CheckpointError(_of_another_network(path, f"{len(other)} tensors differ, such as {other[0]!r}"))


def _check_halo(network: Network, record: ModelRecord, folder: Path) -> None:
    """Tiles with too small a halo would show in the map."""
    needed = receptive_radius_px(network)
    if record.halo_px < needed:
        raise CheckpointError(
            f"{str(folder)!r} is damaged: its record has halo_px {record.halo_px}, and the network sees {needed} px "
            "around. Restore the folder, or train again."
        )


def _load(network: Network, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(_of_another_network(path, type(error).__name__)) from error


def _of_another_network(path: Path, why: str) -> str:
    return f"{str(path)!r} is truncated or of another network ({why}). Restore the folder, or train again."
