"""The model as users hold it: a network, its record, and a directory or a place on the hub to keep them in.

On the way back the network of a record is measured before it takes any memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import safetensors.torch
import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, errors
from safetensors import SafetensorError, safe_open

from pixnet_sd._arguments import checked
from pixnet_sd._files import read_regular, replace_file, replace_files
from pixnet_sd._util import logger
from pixnet_sd.errors import CheckpointError, PixNetError

from ._encoder import build_encoder, hash_weights
from ._network import Network, receptive_radius_px
from ._record import (
    CHECKSUMS,
    CONFIG,
    ModelRecord,
    card_text,
    check_file,
    damaged,
    library_versions,
    link_of,
    read_record,
    write_checksums,
)
from .noise import Dispersion

_WEIGHTS = "model.safetensors"
_CARD = "README.md"
_CARD_BYTES = 4 << 20
_HEADER_BYTES = 1 << 20
_BYTES_A_TENSOR = 1 << 10  # the most that a tensor takes in the header: name, type, shape and place


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
        """Write ``model.safetensors``, ``config.json``, and the hashes of both in ``checksums.json``.

        Parameters
        ----------
        directory
            Made if it is not there; a model in it is replaced, checksums last, so that a kill in between is noticed by
            `load`.

        Returns
        -------
        The directory.

        Raises
        ------
        CheckpointError
            The disk is full, the directory cannot be written, or the record holds what no record can.
        """
        directory = Path(directory)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        record = replace(self.record, weights_sha256=hash_weights(self.network))
        record.check()
        with _writing(directory), replace_files(directory, [_WEIGHTS, CONFIG, CHECKSUMS]) as aside:
            safetensors.torch.save_file(tensors, aside / _WEIGHTS)
            (aside / CONFIG).write_text(record.to_json(), encoding="utf-8")
            write_checksums(aside, [_WEIGHTS, CONFIG])
        self.record = record
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
            No checkpoint, a damaged one, or one of another kind.
        """
        directory = Path(directory).expanduser()
        record = read_record(directory)
        return cls(_read_network(directory, record), record)

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
        if Path(name).expanduser().exists() or name.startswith(("~", "/", "./", "../")):  # could be nothing else
            return cls.load(name)
        # Not through the mixin: it would first hand our constructor what any foreign config.json holds.
        for files in ([CONFIG, CHECKSUMS], [CONFIG, CHECKSUMS, _WEIGHTS]):
            with _hub_errors(f"{name!r} is no folder here, and cannot be fetched from the hub"):
                folder = huggingface_hub.snapshot_download(
                    name,
                    allow_patterns=files,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            try:
                read_record(Path(folder))  # before the weights come, which of a foreign model can be any size
            except CheckpointError as error:
                raise CheckpointError(f"{name!r} on the hub is no model of pixnet_sd: {error}") from error
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
        path = directory / _CARD
        try:
            if self.record.weights_sha256.encode() not in read_regular(path, most_bytes=_CARD_BYTES):
                logger.warning("%s was not written for this model, and stays as it is; delete it for a new one", path)
        except FileNotFoundError:
            card = self.generate_model_card(**{"repo_id": repo_id or directory.name, **(model_card_kwargs or {})})
            with _writing(directory), replace_file(path) as aside:
                aside.write_text(str(card), encoding="utf-8")
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, model_card_kwargs=model_card_kwargs, **push_to_hub_options)

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
        with _hub_errors(f"The model cannot be written to {repo_id!r} on the hub"):
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
            tags=["histology", "pixnet", "spatial-transcriptomics", "spatialdata"],
        )
        stated = license_name or license
        return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{card_text(self.record, repo_id=repo_id, license=stated)}")


def dispersion_of(model: PixNet) -> Dispersion | None:
    """Take how much counts vary beyond Poisson, of every gene and size of regions; None of a model of logarithms."""
    learnt = model.network.log_dispersion
    return None if learnt is None else Dispersion.learnt(learnt[:, :-1], list(model.record.sizes.values()))


def gene_columns(model: PixNet) -> pd.DataFrame:
    """Make the ``var`` of predicted tables: ``held_out_pcc`` when known, and the dispersion at each size."""
    dispersion = dispersion_of(model)
    return model.record.var.assign(**({} if dispersion is None else dispersion.columns()))


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:  # the last: a name that no folder can have
        raise CheckpointError(
            f"The model cannot be written to {str(directory)!r} ({error}). Free some disk, or save it elsewhere."
        ) from error


# From a record and weights back to a network


def _read_network(folder: Path, record: ModelRecord) -> Network:
    """Build the network of a record, on the CPU, with the weights beside it; all is checked before it is believed."""
    path = folder / _WEIGHTS
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what timm says of a model on the meta device does not concern a user
            outline = _network(record).state_dict()
    except (RuntimeError, TypeError, ValueError):  # an encoder of which no outline can be made
        check_file(path)
    else:
        sizes = (t.numel() * t.element_size() + _BYTES_A_TENSOR for t in outline.values())
        check_file(path, most_bytes=sum(sizes) + _HEADER_BYTES)
        _check_shapes(path, {key: tuple(tensor.shape) for key, tensor in outline.items()})
    network = _network(record)
    if record.halo_px < (needed := receptive_radius_px(network)):  # tiles with too small a halo would show in the map
        raise damaged(folder / CONFIG, f"halo_px is {record.halo_px}, and the network sees {needed} px around")
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise damaged(path, type(error).__name__) from error
    if hash_weights(network) != record.weights_sha256:
        raise damaged(path, f"its weights are not those that {CONFIG} was written for")
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
        link, n_sizes = link_of(record.objective), len(record.sizes)
        return Network(encoder, record.decoder, len(record.outputs), record.aggregation, link, n_sizes)
    except (MemoryError, RuntimeError) as error:  # torch's own word for no memory is the latter
        raise CheckpointError(
            f"The network that the checkpoint describes cannot be built ({str(error)[:200]}): decoder {record.decoder}."
        ) from error


def _check_shapes(path: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Compare tensors by name and shape, before memory is taken for any."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, type(error).__name__) from error
    if shapes != wanted:
        other = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        raise damaged(path, f"{len(other)} tensors differ, such as {other[0]!r}")


# The Hugging Face hub


_LOG_IN = "log in with `hf auth login` or give token="
_UNREACHABLE = (
    "the hub was not reached, and the cache here does not have it. Check the network; without one, copy the model's "
    "folder here and give its path"
)
_CAUSES: tuple[tuple[type[Exception], str], ...] = (  # the more special ones first
    (errors.HFValidationError, "names are 'owner/name' there. Check the name"),
    (errors.GatedRepoError, f"its owner must let you in: ask on its page, then {_LOG_IN}"),
    (errors.RepositoryNotFoundError, f"there is no such model. Check the name; of a private one, {_LOG_IN}"),
    (errors.RevisionNotFoundError, "it has no such revision. Give a branch, tag or commit that it has"),
    (errors.LocalTokenNotFoundError, f"nobody is logged in: {_LOG_IN}"),
    (errors.LocalEntryNotFoundError, _UNREACHABLE),
    (errors.EntryNotFoundError, "it lacks a file that a model of pixnet_sd has. Check the name"),
)
_BY_STATUS = {
    401: f"the hub does not know you: {_LOG_IN}",
    403: f"you may not: {_LOG_IN}, one that may write there",
}
_HTTP_LIBRARIES = {"httpcore", "httpx", "requests", "urllib3"}  # of both that the client has used


@contextmanager
def _hub_errors(what_failed: str) -> Iterator[None]:
    """Turn what the hub's client raises, which differs between versions, into a CheckpointError that says the cause."""
    try:
        yield
    except (PixNetError, TypeError):  # the latter: an argument that nobody has
        raise
    except Exception as error:
        raise CheckpointError(f"{what_failed}: {_cause(error)}.") from error


def _cause(error: Exception) -> str:
    if text := next((text for cause, text in _CAUSES if isinstance(error, cause)), None):
        return text
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return _BY_STATUS.get(status or 0, f"the hub answered with status {status} ({type(error).__name__})")
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _HTTP_LIBRARIES:
        return _UNREACHABLE
    return f"{type(error).__name__}: {error}"
