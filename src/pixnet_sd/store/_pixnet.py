"""The model as users hold it: a network, its record, and a directory to keep them in."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pixnet_sd._arguments import checked
from pixnet_sd._errors import CheckpointError, PixNetError
from pixnet_sd._logging import logger
from pixnet_sd.nn.encoder import build_encoder
from pixnet_sd.nn.model import Network
from pixnet_sd.nn.weights import hash_weights

from ._hub import hub_errors, is_local, snapshot
from ._model_card import TAGS, card_text
from ._record import ModelRecord, library_versions, link_of, read_record, write_json_atomically

__all__ = ["PixNet"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_CARD = "README.md"


class PixNet(ModelHubMixin, library_name="pixnet_sd"):
    """A trained model.

    Made by :func:`pixnet_sd.tl.fit` or :meth:`load`, used by :func:`pixnet_sd.tl.predict`. `save_pretrained`,
    `from_pretrained` and `push_to_hub` are those that huggingface_hub's models have; their folders are those of `save`
    with a model card beside.

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
        """One row an epoch, with loss, lr, seconds and, with held-out regions, val_pcc and val_mse."""
        frame = pd.DataFrame(self.record.history)
        return frame.astype({"epoch": int}).set_index("epoch") if len(frame) else frame

    @checked(CheckpointError)
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
    @checked(CheckpointError)
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
    @checked(CheckpointError)
    def from_pretrained(  # type: ignore[override]  # no **kwargs: a slip in an option is an error
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> PixNet:
        """Read a model from a folder or from the Hugging Face hub.

        Parameters
        ----------
        pretrained_model_name_or_path
            A folder, or ``"owner/name"`` on the hub.
        revision
            Branch, tag or commit on the hub; default: its main branch.
        token
            Of the hub; default: that of ``hf auth login``.
        cache_dir
            Where downloads are kept; default: huggingface_hub's cache.
        force_download
            Fetch what is in the cache anew.
        local_files_only
            Take what is in the cache, and do not ask the hub.

        Returns
        -------
        The model, on the CPU.

        Raises
        ------
        CheckpointError
            It cannot be had, or is no checkpoint of ours.
        """
        name = str(pretrained_model_name_or_path)
        if is_local(name):
            return cls.load(name)
        # Not through the mixin: it would first hand our constructor what any foreign config.json holds.
        return cls._from_pretrained(
            model_id=name,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> PixNet:
        unavailable = f"{model_id!r} is no folder here, and cannot be fetched from the hub"
        with hub_errors(unavailable):
            config = snapshot(model_id, [_CONFIG], **options) / _CONFIG
        try:
            read_record(config)  # before the weights come, which of a foreign model can be any size
        except CheckpointError as error:
            raise CheckpointError(f"{model_id!r} on the hub is no model of pixnet_sd: {error}") from error
        with hub_errors(unavailable):
            folder = snapshot(model_id, [_CONFIG, _WEIGHTS], **options)
        return cls.load(folder)

    @checked(CheckpointError, options_of=ModelHubMixin.push_to_hub)
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_options: Any,
    ) -> str | None:
        """Write what `save` writes, and a model card.

        Parameters
        ----------
        save_directory
            As for `save`. A ``README.md`` that is in it already stays as it is.
        repo_id
            ``"owner/name"`` that the card names; with `push_to_hub` where to push to. Default: the folder's name.
        push_to_hub
            Call :meth:`push_to_hub` afterwards.
        model_card_kwargs
            Of :meth:`generate_model_card`.
        push_to_hub_options
            Of :meth:`push_to_hub`.

        Returns
        -------
        Address of the commit on the hub, or None.

        Raises
        ------
        CheckpointError
            The disk is full, or the directory cannot be written; or as for :meth:`push_to_hub`.
        """
        # Not the mixin's: it deletes the config.json of a model that is there before anything is written.
        directory = self.save(save_directory)
        options = {"repo_id": repo_id or directory.name, **(model_card_kwargs or {})}
        self._write_card(directory / _CARD, options)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, model_card_kwargs=model_card_kwargs, **push_to_hub_options)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    def _write_card(self, path: Path, options: dict[str, Any]) -> None:
        if not path.exists():
            write_json_atomically(path, str(self.generate_model_card(**options)))
        elif self.record.weights_sha256 not in path.read_text(encoding="utf-8"):
            logger.warning("%s was not written for this model, and stays as it is; delete it for a new one", path)

    @checked(CheckpointError, options_of=ModelHubMixin.push_to_hub)
    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Upload the model and its card to the Hugging Face hub.

        The names of the training slides, as they were given to :func:`pixnet_sd.tl.fit`, are in the model's
        ``config.json`` and on its card, for everyone who can read the repository.

        Parameters
        ----------
        repo_id
            ``"owner/name"``; made if it is not there.
        license
            Identifier of the licence that the weights are given under, such as ``"cc-by-4.0"``.
        model_card_kwargs
            More of :meth:`generate_model_card`.
        options
            ``private``, ``token``, ``branch``, ``create_pr``, ``commit_message`` ... as in huggingface_hub.

        Returns
        -------
        Address of the commit.

        Raises
        ------
        CheckpointError
            The hub cannot be reached or does not let you; or the disk is full.
        """
        card = {"repo_id": repo_id, "license": license, **(model_card_kwargs or {})}
        with hub_errors(f"The model cannot be written to {repo_id!r} on the hub"):
            return str(super().push_to_hub(repo_id, model_card_kwargs=card, **options))

    @checked(CheckpointError)
    def generate_model_card(
        self,
        *,
        repo_id: str = "owner/name",
        license: str | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
        datasets: list[str] | None = None,
        language: list[str] | None = None,
    ) -> ModelCard:
        """The model card: training data and splits, held-out scores, the model, intended use and limits.

        Parameters
        ----------
        repo_id
            Where the model will be; the card's example names it.
        license, license_name, license_link
            Licence of the weights, as the hub wants it: an identifier such as ``"cc-by-4.0"``, or ``"other"`` with a
            name and a link. Without one the card says that nobody may use them.
        datasets, language
            Further metadata of the hub.

        Returns
        -------
        The card; ``card.save(path)`` writes it, ``card.text`` is its body.
        """
        metadata = ModelCardData(
            library_name="pixnet_sd",
            license=license,
            license_name=license_name,
            license_link=license_link,
            datasets=datasets,
            language=language,
            metrics=["pearsonr"],
            tags=list(TAGS),
        )
        stated = license_name or license
        return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{card_text(self.record, repo_id=repo_id, license=stated)}")


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
