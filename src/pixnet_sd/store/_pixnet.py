"""The model as users hold it: a network, its record, and a directory to keep them in."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pixnet_sd._errors import CheckpointError, PixNetError
from pixnet_sd.nn.encoder import build_encoder
from pixnet_sd.nn.model import Network
from pixnet_sd.nn.weights import hash_weights

from ._record import ModelRecord, library_versions, link_of, read_record, write_json_atomically

__all__ = ["PixNet"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


class PixNet(ModelHubMixin, library_name="pixnet_sd", tags=["spatial-transcriptomics", "histology"]):
    """A trained model.

    Made by :func:`pixnet_sd.tl.fit` or :meth:`load`, used by :func:`pixnet_sd.tl.predict`. `save_pretrained`,
    `from_pretrained` and `push_to_hub` come from huggingface_hub and use the same directory layout.

    Parameters
    ----------
    network
        The network.
    record
        What is known of it.
    """

    def __init__(self, network: Network, record: ModelRecord) -> None:
        self.network = network.eval()
        self.record = record

    def __repr__(self) -> str:
        r = self.record
        return f"PixNet({r.encoder}, {len(r.genes)} genes, {r.aggregation}, {r.working_mpp:g} µm/px)"

    @property
    def genes(self) -> list[str]:
        """Genes that it predicts, in order."""
        return self.record.genes

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch: loss, lr, seconds and, with held-out regions, val_pcc and val_mse."""
        frame = pd.DataFrame(self.record.history)
        return frame.astype({"epoch": int}).set_index("epoch") if len(frame) else frame

    def save(self, directory: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json`` into a directory.

        Parameters
        ----------
        directory
            Made if it is not there; a model in it is replaced, weights first, so that a kill in between is noticed by
            `load` (the hash in the config differs).

        Returns
        -------
        The directory.

        Raises
        ------
        CheckpointError
            The disk is full, or the directory cannot be written.
        """
        directory = Path(directory)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        partial = directory / f"{_WEIGHTS}.partial"
        self.record = replace(self.record, weights_sha256=hash_weights(self.network))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            partial.replace(directory / _WEIGHTS)
            write_json_atomically(directory / _CONFIG, self.record.to_json())
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"The model cannot be written to {str(directory)!r} ({error}). Free some disk, or save it elsewhere."
            ) from error
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> PixNet:
        """Read a model from a directory.

        Parameters
        ----------
        directory
            What `save` or `fit` left.

        Returns
        -------
        The model, on the CPU.

        Raises
        ------
        CheckpointError
            No checkpoint, a truncated one, or one of another kind.
        """
        directory = Path(directory).expanduser()
        record = read_record(directory / _CONFIG)
        network = _empty_network(record)
        try:
            tensors = load_file(directory / _WEIGHTS)
            network.load_state_dict(tensors)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{str(directory / _WEIGHTS)!r} is missing, truncated or of another network "
                f"({type(error).__name__}). Restore it, or train again."
            ) from error
        if hash_weights(network) != record.weights_sha256:
            raise CheckpointError(
                f"The weights in {str(directory)!r} are not those its config.json was written for: one of the two was "
                "replaced, or saving was cut off. Restore the folder, or train again."
            )
        return cls(network, record)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> PixNet:
        """Read a model from a folder or from the Hugging Face hub.

        Parameters
        ----------
        pretrained_model_name_or_path
            A folder, or ``"owner/name"`` on the hub.
        options
            ``revision``, ``token``, ``cache_dir``, ``local_files_only`` ... as in huggingface_hub.

        Returns
        -------
        The model, on the CPU.

        Raises
        ------
        CheckpointError
            It cannot be had, or is no checkpoint of ours.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(
                f"{str(pretrained_model_name_or_path)!r} is neither a folder here nor could it be fetched from the "
                f"hub ({type(error).__name__}). Check its name, and the network."
            ) from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_: Any,
    ) -> PixNet:
        if Path(model_id).is_dir():
            return cls.load(model_id)
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[_CONFIG, _WEIGHTS],
        )
        return cls.load(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)


def _empty_network(record: ModelRecord) -> Network:
    try:
        encoder = build_encoder(record.encoder, None, frozen=record.freeze_encoder)
    except PixNetError as error:
        then, now = record.versions.get("timm", "(unknown)"), library_versions()["timm"]
        raise CheckpointError(
            f"The checkpoint was made with encoder {record.encoder!r} of timm {then}, and the timm installed here, "
            f"{now}, does not have it. Install that version."
        ) from error
    return Network(encoder, record.decoder, len(record.outputs), record.aggregation, link_of(record.objective))
