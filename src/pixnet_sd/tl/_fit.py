"""Train a model on slides that have both an image and measured expression."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from spatialdata import SpatialData

from pixnet_sd._errors import CheckpointError, PixNetError, StoreError
from pixnet_sd._folders import no_empty_folders_left
from pixnet_sd._logging import logger
from pixnet_sd.engine.device import make_fabric
from pixnet_sd.engine.settings import TrainSettings
from pixnet_sd.engine.state import RunState
from pixnet_sd.engine.train import train
from pixnet_sd.nn.encoder import build_encoder
from pixnet_sd.nn.model import Aggregation, Network
from pixnet_sd.nn.objectives import ObjectiveName
from pixnet_sd.nn.receptive_field import receptive_radius_px, sees_whole_tile
from pixnet_sd.nn.weights import hash_weights
from pixnet_sd.store import ModelRecord, PixNet, library_versions, link_of, outputs_of
from pixnet_sd.store import record as note

from ._recipe import check_choices, decoder_config, default_aggregation, train_settings
from ._training_data import TrainingData, check_validation, data_hash, describe, open_sources, training_data

__all__ = ["fit"]

_BATCH_SIZE = {"cuda": 8, "mps": 4, "cpu": 2}


def fit(
    sdata: SpatialData | Mapping[str, SpatialData],
    *,
    image_key: str | None = None,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
    genes: Sequence[str] | None = None,
    n_genes: int | None = 250,
    target_sum: float = 1e4,
    encoder: str = "resnet18",
    encoder_weights: str | Path | None = "imagenet",
    freeze_encoder: bool = False,
    decoder_width: int = 512,
    working_mpp: float = 0.5,
    objective: ObjectiveName = "mse_pcc",
    aggregation: Aggregation | None = None,
    pcc_weight: float | None = None,
    preset: Literal["paper"] | None = None,
    max_epochs: int = 500,
    max_steps: int | None = None,
    lr: float = 5e-4,
    weight_decay: float = 1e-4,
    tile_px: int = 512,
    batch_size: int | None = None,
    validation: float | Sequence[str] | None = 0.1,
    patience: int | None = 30,
    compile: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    record_model: bool = True,
    show_progress_bar: bool = True,
) -> PixNet:
    """Train PixNet.

    A run that was cut off goes on from its last epoch when the same call is made again, and ends with the same weights
    (on the same device and number of threads).

    Parameters
    ----------
    sdata
        A slide, or slides by name. Each needs an RGB image and a table that annotates shapes or labels.
    image_key
        Slide image; found when only one reading is possible. The same for all slides.
    table_key
        Table or tables with raw counts; default: all Visium HD bins, or the only table with a region.
    coordinate_system
        Where image and regions meet; found when only one reading is possible.
    mpp
        Micrometres per pixel of the image's scale 0, or ``"coordinate_system"`` when `coordinate_system` is in
        micrometres; default: from the bins, spots or ``sdata.attrs``.
    allow_any_mpp
        Accept a resolution outside 0.1-2 µm per pixel.
    genes
        Genes to learn; default: the `n_genes` with the highest mean expression on the training slides.
    n_genes
        How many genes, when they are not named; None: the whole transcriptome, that is all genes with at least 10
        counts; the loss takes them some at a time.
    target_sum
        Targets are ``log1p(target_sum * x / sum(x))``, natural logarithm, the sum over all genes of a region.
    encoder
        timm model: a ConvNet with maps at strides 4 to 32, or a ViT.
    encoder_weights
        ``"imagenet"``, a path to a safetensors or torch file, or None for random weights.
    freeze_encoder
        Keep encoder weights and batch-norm statistics. Its features are then computed once and kept on disk during
        the run, which makes training on a CPU several times faster.
    decoder_width
        Channels of the decoder at the coarsest stride; each finer level has half. With ``preset="paper"`` the hidden
        width of all feed-forwards.
    working_mpp
        Micrometres per pixel at which the network sees a slide; the map's pixels are four times as large.
    objective
        ``"mse_pcc"``: Eq. 6, on log-normalised expression. ``"poisson"`` or ``"nb"`` (negative binomial): the
        likelihood of raw counts, whose means are sums of a density over the region, so that what is predicted adds up
        from the smallest regions to the largest. Genes are learnt relative to the counts that each region has, and
        these relative to the slide's counts per area.
    aggregation
        ``"mean"`` over a region's pixels (the default), or ``"sum"`` (Eq. 5 to the letter, and what the paper's preset
        uses). Log-normalised targets do not add up, so with regions of several sizes only the mean puts them on one
        scale; at one size the two differ by a constant. Counts are always summed.
    pcc_weight
        λ of Eq. 6; default: 2, or the paper's 0.5 with its preset.
    preset
        ``"paper"``: decoder, aggregation, λ, optimizer and schedule as in the paper, the last epoch kept; None: this
        package's.
    max_epochs
        Most passes over the tiles.
    max_steps
        Most steps of the optimizer, each on `batch_size` tiles; None: as many as `max_epochs` takes. On a large slide,
        where a pass over all tiles is long, this bounds the time.
    lr, weight_decay
        Of AdamW (Adam for the paper's preset). The rate is constant when `validation` is given, and follows one cycle
        otherwise.
    tile_px
        Side of a training tile in working pixels, a multiple of 32.
    batch_size
        Tiles of one slide per step; default 8 on a CUDA GPU, 2 on a CPU.
    validation
        Share of spatial blocks to hold out on every slide, names of slides to hold out, or None.
    patience
        Stop after so many epochs without a better held-out PCC; None never stops early.
    compile
        Run the network through ``torch.compile``.
    device
        ``"cpu"``, ``"cuda"`` ...; default: a CUDA GPU if there is one.
    seed
        Of everything random.
    checkpoint_dir
        Where the model goes; default: a folder ``pixnet_sd_models/<hash of data and settings>`` beside the (first)
        backed store, else in the working directory. Counts of millions of bins are kept compact in a folder
        ``pixnet_sd_cache`` beside it, for the next call too; it can be deleted at any time between calls.
    record_model
        Record the model's folder in every slide, where :func:`predict` finds it.
    show_progress_bar
        Show a bar over epochs, with loss and held-out PCC; where nobody watches, lines in the log.

    Returns
    -------
    The model, with the weights of its best epoch. Its folder is recorded in ``sdata.attrs["pixnet_sd"]["model"]`` of
    every slide (and of its store when backed) with `record_model`; nothing else of the slides is changed.

    Raises
    ------
    ElementError
        Image, table or regions are missing or ambiguous.
    ResolutionError
        Micrometres per pixel are unknown or absurd, or regions do not lie on the image.
    DataError
        Counts, genes or pixels cannot be used.
    CheckpointError
        Encoder weights cannot be had, or `checkpoint_dir` holds another run or cannot be written.
    StoreError
        Compact counts cannot be written beside `checkpoint_dir`.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 1-6.
    """
    slides = _named(sdata)
    check_choices(preset, objective, aggregation, target_sum)
    check_validation(validation, list(slides))
    fabric = make_fabric(device)
    settings = train_settings(
        preset=preset,
        max_epochs=max_epochs,
        max_steps=max_steps,
        lr=lr,
        weight_decay=weight_decay,
        objective=objective,
        pcc_weight=pcc_weight,
        target_sum=target_sum,
        tile_px=tile_px,
        batch_size=batch_size or _BATCH_SIZE.get(fabric.device.type, 2),
        patience=patience,
        holds_out=validation is not None,
        compile=compile,
        seed=seed,
    )
    torch.manual_seed(seed)
    backbone = build_encoder(encoder, encoder_weights, frozen=freeze_encoder)
    sources = open_sources(
        slides,
        image_key=image_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
        allow_any_mpp=allow_any_mpp,
        working_mpp=working_mpp,
    )
    data = training_data(
        sources,
        genes=genes,
        n_genes=n_genes,
        target_sum=target_sum,
        raw_counts=objective != "mse_pcc",
        validation=validation,
        seed=seed,
        cache=_models_folder(checkpoint_dir, slides) / "pixnet_sd_cache",
    )
    described = describe(sources, data)
    del sources  # of millions of bins it holds what the training does not need
    genes_learnt = [str(gene) for gene in data.genes]
    network = Network(
        backbone,
        decoder_config(decoder_width, preset),
        len(outputs_of(genes_learnt, objective)),
        aggregation or default_aggregation(preset, objective),
        link_of(objective),
    )
    record = _record(
        network,
        settings,
        genes=genes_learnt,
        objective=objective,
        target_sum=target_sum,
        working_mpp=working_mpp,
        encoder=encoder,
        encoder_weights=None if encoder_weights is None else Path(encoder_weights).name,
        preset=preset,
        slides=described,
        data_sha256=data_hash(data),
    )
    directory = _directory(checkpoint_dir, slides, record.training["fingerprint"])
    model = _finished(directory, record) or _trained(
        PixNet(network, record), data, settings, fabric, directory, show_progress_bar
    )
    if record_model:
        for slide in slides.values():
            _note(slide, str(directory.resolve()))
    return model


def _named(sdata: SpatialData | Mapping[str, SpatialData]) -> dict[str, SpatialData]:
    if isinstance(sdata, SpatialData):
        return {"slide": sdata}
    if not isinstance(sdata, Mapping) or not sdata:
        raise PixNetError(f"fit needs a SpatialData object, or a mapping of names to some; got {type(sdata).__name__}.")
    wrong = {name: type(s).__name__ for name, s in sdata.items() if not isinstance(s, SpatialData)}
    if wrong:
        raise PixNetError(f"These slides are not SpatialData objects: {wrong}.")
    return {str(name): slide for name, slide in sdata.items()}


def _record(
    network: Network, settings: TrainSettings, *, preset: str | None, data_sha256: str, **known: Any
) -> ModelRecord:
    """Describe a network that is about to be trained; `known` are fields of the record."""
    halo_px = receptive_radius_px(network)
    record = ModelRecord(
        aggregation=network.aggregation,
        encoder_sha256=hash_weights(network.encoder),
        freeze_encoder=network.encoder.frozen,
        decoder=network.decoder_config,
        tile_px=settings.tile_px,
        halo_px=halo_px,
        sees_whole_tile=sees_whole_tile(network, halo_px),
        versions=library_versions(),
        **known,
    )
    text = json.dumps([asdict(record), asdict(settings), preset, data_sha256], sort_keys=True)
    # Equal for two calls exactly when they would train the same network on the same data.
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    record.training = {"preset": preset, **asdict(settings), "fingerprint": fingerprint}
    return record


def _directory(chosen: str | Path | None, slides: Mapping[str, SpatialData], fingerprint: str) -> Path:
    return Path(chosen).expanduser() if chosen is not None else _models_folder(None, slides) / fingerprint[:12]


def _models_folder(chosen: str | Path | None, slides: Mapping[str, SpatialData]) -> Path:
    """Folder that the checkpoint is in."""
    if chosen is not None:
        return Path(chosen).expanduser().parent
    stores = [Path(s.path).parent for s in slides.values() if s.path is not None]
    return (stores[0] if stores else Path.cwd()) / "pixnet_sd_models"


def _finished(directory: Path, record: ModelRecord) -> PixNet | None:
    """The model, if the same run is already there."""
    if not (directory / "config.json").exists():
        return None
    found = PixNet.load(directory)
    if found.record.training.get("fingerprint") != record.training["fingerprint"]:
        raise CheckpointError(
            f"{str(directory)!r} already holds a model of another run. Give another checkpoint_dir, or delete it."
        )
    RunState.remove(directory / "training")  # of a run that was killed when it had saved its model
    logger.info("the same run has finished before: its model is taken from %s", directory)
    return found


def _check_writable(directory: Path) -> None:
    """Find out before the training, not after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{str(directory)!r} cannot be written ({error.strerror or error}). Give checkpoint_dir= a folder that can "
            "be."
        ) from error


def _note(slide: SpatialData, folder: str) -> None:
    """Record the model in the object, and in its store if that can be written."""
    try:
        note(slide, "model", None, folder)
    except StoreError as error:
        slide.attrs["pixnet_sd"] = {**(slide.attrs.get("pixnet_sd") or {}), "model": folder}
        logger.warning("the model is recorded in memory only: %s", error)


def _trained(
    model: PixNet,
    data: TrainingData,
    settings: TrainSettings,
    fabric: Fabric,
    directory: Path,
    show_progress_bar: bool,
) -> PixNet:
    """Train, and save into the directory."""
    with no_empty_folders_left(directory / "training"):
        _check_writable(directory)
        result = train(
            model.network,
            data.training,
            data.held_out,
            settings,
            fabric=fabric,
            directory=directory / "training",
            fingerprint=model.record.training["fingerprint"],
            show_progress_bar=show_progress_bar,
        )
    model.network.cpu()
    model.record.history = result.history
    model.record.held_out_pcc = [None if math.isnan(v) else v for v in result.pcc_per_gene]
    model.record.training["best_epoch"] = result.best_epoch
    model.save(directory)
    RunState.remove(directory / "training")
    logger.info("model of epoch %d saved to %s", result.best_epoch, directory)
    return model
