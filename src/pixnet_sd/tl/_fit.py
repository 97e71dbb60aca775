"""From the arguments of `fit` to the shape of the network and the settings of a run.

One run at a time in a checkpoint's folder: two would overwrite one another's state.

Train a model on slides that have both an image and measured expression.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from lightning_fabric import Fabric
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._files import folder_for, home_expanded, no_empty_folders_left
from pixnet_sd._fingerprint import as_json, differing_parts, fingerprint
from pixnet_sd._util import logger, warn
from pixnet_sd.engine import MARGIN_SHARE, make_fabric
from pixnet_sd.engine.train import RunState, TrainSettings, train
from pixnet_sd.errors import CheckpointError, PixNetError, StoreError
from pixnet_sd.geometry import STRIDES
from pixnet_sd.model import (
    CHECKSUMS,
    DecoderConfig,
    ModelRecord,
    Network,
    PixNet,
    build_encoder,
    hash_weights,
    library_versions,
    link_of,
    outputs_of,
    receptive_radius_px,
    sees_whole_tile,
)
from pixnet_sd.params import Aggregation, ModelParams, ObjectiveName, TrainParams
from pixnet_sd.slide import PixelContent, Slide, check_same_pixels
from pixnet_sd.store import hold_lock
from pixnet_sd.store import record as note

from ._checks import check_batch, check_decoder, pixels_of, quality_of, training_parts, values_per_px, why_poor
from ._training_data import TrainingData, check_validation, data_parts, describe, open_sources, training_data

__all__ = [
    "aggregation_of",
    "alone_in",
    "alone_in_checkpoint_dir",
    "decoder_config",
    "fit",
    "train_settings",
]

DROPOUT = 0.5
"""Channel dropout of the decoder's laterals."""

MIN_WIDTH = 32
"""Fewest channels of a level, unless `decoder_width` itself is smaller."""

_LEVELS = len(STRIDES)


def decoder_config(params: ModelParams) -> DecoderConfig:
    """Shape of the decoder.

    By default every level of the pyramid is standardised and projected, to `decoder_width` channels at the coarsest
    stride and half as many at each finer one, where maps have four times the pixels, down to 32: the finest width is
    the rank of the gene map. ``decoder="paper"`` feeds in the encoder's own channels, and every feed-forward is
    `decoder_width` wide (Eq. 3).
    """
    width = params.decoder_width
    if params.decoder == "paper":
        return DecoderConfig(widths=None, hidden=(width,) * (_LEVELS - 1))
    least = min(width, MIN_WIDTH)
    widths = tuple(max(width >> (_LEVELS - 1 - k), least) for k in range(_LEVELS))
    return DecoderConfig(widths=widths, hidden=tuple(2 * w for w in widths[:-1]), dropout=DROPOUT)


def aggregation_of(params: ModelParams, objective: ObjectiveName) -> Aggregation:
    """Choose sum or mean: counts are summed, and the mean puts logarithms of several sizes on one scale.

    Raises
    ------
    PixNetError
        The mean of counts.
    """
    if objective == "mse_pcc":
        return params.aggregation or "mean"
    if params.aggregation == "mean":
        raise PixNetError(f"objective={objective!r} sums densities: leave out aggregation='mean'.")
    return "sum"


def train_settings(
    params: TrainParams, *, objective: ObjectiveName, target_sum: float, holds_out: bool, **given: Any
) -> TrainSettings:
    """Settings of a run; `given` are max_epochs, batch_size and seed.

    A run with held-out regions may stop at any epoch, so its rate stays constant; one of known length anneals it.
    """
    shared = asdict(params)
    del shared["allow_any_mpp"]
    shared["anneal"] = not holds_out if params.anneal is None else params.anneal
    shared["patience"] = params.patience if holds_out else None
    return TrainSettings(objective=objective, target_sum=target_sum, **shared, **given)


_LOCK = ".training.lock"

P = ParamSpec("P")
R = TypeVar("R")


def alone_in_checkpoint_dir(verb: Callable[P, R]) -> Callable[P, R]:
    """Make a verb hold the folder that its argument `checkpoint_dir` names, before it does anything that takes long."""

    @functools.wraps(verb)
    def alone(*args: P.args, **options: P.kwargs) -> R:
        directory = options.get("checkpoint_dir")
        if not isinstance(directory, str | Path) or not str(directory):
            return verb(*args, **options)  # a default that is only known later, or an argument that is refused
        with alone_in(home_expanded(directory)):
            return verb(*args, **options)

    return alone


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a checkpoint's folder; one with a finished model is only read, by as many as want to.

    Parameters
    ----------
    directory
        The folder; made if it is not there, and taken back if nothing was put into it.

    Raises
    ------
    CheckpointError
        It cannot be written, or another run is in it.
    """
    if os.path.exists(directory / CHECKSUMS):  # unlike that of a path it raises for no name
        _unlock_left_over(directory)
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(folder_for(directory))
            with tempfile.TemporaryFile(dir=directory):  # `os.access` is wrong for network mounts and the superuser
                pass
        except (OSError, ValueError) as error:  # the latter: a name that no folder can have
            why = error.strerror if isinstance(error, OSError) else None
            raise CheckpointError(
                f"{str(directory)!r} cannot be written ({why or error}). Give checkpoint_dir= a folder that can be."
            ) from error
        busy = (
            f"Another run is training in {str(directory)!r}. Give another checkpoint_dir, or wait: the same call takes "
            "the model when that run has finished."
        )
        try:
            held.enter_context(hold_lock(directory / _LOCK, wait_s=0, busy=busy))
        except StoreError as error:
            raise CheckpointError(str(error)) from error
        yield


def _unlock_left_over(directory: Path) -> None:
    """Remove the lock file of a run that was killed when its model was there."""
    if (directory / _LOCK).exists():
        with contextlib.suppress(OSError, StoreError), hold_lock(directory / _LOCK, wait_s=0, busy=""):
            pass


_FIRST = 5  # differences that are named

_BATCH_SIZE = {"cuda": 8, "mps": 4, "cpu": 2}


@checked()
@alone_in_checkpoint_dir
def fit(  # noqa: PLR0913
    sdata: SpatialData | Mapping[str, SpatialData],
    *,
    image_key: str | None = None,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    genes: Sequence[str] | int | Literal["all"] = 250,
    objective: ObjectiveName = "mse_pcc",
    validation: float | Sequence[str] | None = 0.1,
    max_epochs: int = 500,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    model_params: ModelParams | Mapping[str, Any] | None = None,
    train_params: TrainParams | Mapping[str, Any] | None = None,
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
    genes
        Genes to learn, or how many: those with the highest mean expression on the training slides. ``"all"``: the whole
        transcriptome, that is all genes with at least 10 counts; the loss takes them some at a time.
    objective
        ``"mse_pcc"``: Eq. 6, on log-normalised expression. ``"poisson"`` or ``"nb"`` (negative binomial): the
        likelihood of raw counts, whose means are sums of a density over the region, so that what is predicted adds up
        from the smallest regions to the largest. Genes are learnt relative to the counts that each region has, and
        these relative to the slide's counts per area.
    validation
        Share of spatial blocks to hold out on every slide, names of slides to hold out, or None.
    max_epochs
        Most passes over the tiles.
    batch_size
        Tiles of one slide per step; default 8 on a CUDA GPU, 2 on a CPU.
    device
        ``"cpu"``, ``"cuda"`` ...; default: a CUDA GPU if there is one.
    seed
        Random seed.
    model_params
        Encoder, decoder and targets: a :class:`~pixnet_sd.ModelParams`, or some of its fields as a dictionary.
        ``ModelParams.paper()`` is the paper's network.
    train_params
        Optimizer, schedule and tiles: a :class:`~pixnet_sd.TrainParams`, or some of its fields as a dictionary.
        ``TrainParams.paper()`` is the paper's training.
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
        Counts, genes or pixels cannot be used, a likelihood of counts is to be learnt from other values, or an image
        was changed during the training.
    DivergenceError
        The loss, or the scores, left any sane range: `lr` is too high. No model is saved. When an epoch before was the
        best on held-out regions, the run ends with it and a warning instead.
    CheckpointError
        Encoder weights cannot be had; or `checkpoint_dir` holds another run, is in use by one, or cannot be written.
    StoreError
        Compact counts cannot be written beside `checkpoint_dir`.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 1-6.
    """
    slides = {"slide": sdata} if isinstance(sdata, SpatialData) else dict(sdata)
    model_params, train_params = ModelParams.read(model_params), TrainParams.read(train_params)
    aggregation = aggregation_of(model_params, objective)
    check_validation(validation, list(slides))
    fabric = make_fabric(device)
    settings = train_settings(
        train_params,
        objective=objective,
        target_sum=model_params.target_sum,
        holds_out=validation is not None,
        max_epochs=max_epochs,
        batch_size=batch_size or _BATCH_SIZE.get(fabric.device.type, 2),
        seed=seed,
    )
    torch.manual_seed(seed)
    weights = model_params.encoder_weights
    backbone = build_encoder(model_params.encoder, weights, frozen=model_params.freeze_encoder)
    shape = decoder_config(model_params)
    check_decoder(backbone.channels, shape, model_params.decoder_width, fabric.device)
    sources = open_sources(
        slides,
        image_key=image_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
        allow_any_mpp=train_params.allow_any_mpp,
        working_mpp=model_params.working_mpp,
    )
    tiles = [_tile(source.slide, settings.tile_px) for source in sources.values()]
    check_batch(tiles, settings.batch_size, settings.tile_px, values_per_px(backbone.channels, shape), fabric.device)
    n_genes = genes if isinstance(genes, int) else None
    data = training_data(
        sources,
        genes=None if genes == "all" or isinstance(genes, int) else genes,
        n_genes=n_genes,
        target_sum=model_params.target_sum,
        objective=objective,
        validation=validation,
        seed=seed,
        cache=_models_folder(checkpoint_dir, slides) / "pixnet_sd_cache",
    )
    described = describe(sources, data)
    images = {name: (source.slide, pixels_of(slides[name], source.slide)) for name, source in sources.items()}
    del sources  # of millions of bins it holds what the training does not need
    genes_learnt = [str(gene) for gene in data.genes]
    network = Network(
        backbone,
        shape,
        len(outputs_of(genes_learnt, objective)),
        aggregation,
        link_of(objective),
    )
    record = _record(
        network,
        settings,
        genes=genes_learnt,
        objective=objective,
        target_sum=model_params.target_sum,
        working_mpp=model_params.working_mpp,
        encoder=model_params.encoder,
        encoder_weights=None if weights is None else Path(weights).name,
        slides=described,
        images=images,
        data=data_parts(data),
    )
    directory = _directory(checkpoint_dir, slides, record.training["fingerprint"])
    record.check()
    # A folder that was given is held since the call began.
    with alone_in(directory) if checkpoint_dir is None else nullcontext():
        model = _finished(directory, record) or _trained(
            PixNet(network, record), data, images, settings, fabric, directory, show_progress_bar
        )
    if record_model:
        for name, (slide, pixels) in images.items():
            _note(slides[name], str(directory.resolve()), slide.image_key, pixels)
    return model


def _tile(slide: Slide, tile_px: int) -> tuple[int, int]:
    """Rows and columns of a tile: no larger than the slide and the margins that regions keep."""
    rows, cols = (min(tile_px, size + 2 * (tile_px // MARGIN_SHARE)) for size in slide.working_shape)
    return rows, cols


def _record(
    network: Network,
    settings: TrainSettings,
    *,
    images: Mapping[str, tuple[Slide, PixelContent]],
    data: Mapping[str, Any],
    **known: Any,
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
    record.training = asdict(settings)
    record.depends_on = as_json(training_parts(record, record.training, images, data))
    record.training["fingerprint"] = fingerprint(record.depends_on)
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
    whole = (directory / CHECKSUMS).exists()  # the last that is written
    if not whole and (RunState.is_there(directory / "training") or not (directory / "config.json").exists()):
        return None  # of a run that was killed while its model was saved the state is still there
    found = PixNet.load(directory)
    if found.record.training.get("fingerprint") != record.training["fingerprint"]:
        differing = differing_parts(found.record.depends_on, record.depends_on)
        raise CheckpointError(
            f"{str(directory)!r} already holds a model of another run, which differs in {_listed(differing)}. Give "
            "another checkpoint_dir, or delete it."
        )
    with suppress(OSError):  # a kill may have come before it, and now the folder may be one that is only read
        RunState.remove(directory / "training")
    logger.info("the same run has finished before: its model is taken from %s", directory)
    return found


def _listed(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _FIRST} more" if len(parts) > _FIRST else ""
    return ", ".join(map(repr, parts[:_FIRST])) + more


def _note(sdata: SpatialData, folder: str, image_key: str, pixels: PixelContent) -> None:
    """Record the model in the object, and in its store if that can be written, with what was hashed of the image."""
    try:
        note(sdata, "model", None, folder)
        if pixels.is_settled:
            note(sdata, "content", image_key, pixels.note())
    except StoreError as error:
        sdata.attrs["pixnet_sd"] = {**(sdata.attrs.get("pixnet_sd") or {}), "model": folder}
        logger.warning("the model is recorded in memory only: %s", error)


def _trained(
    model: PixNet,
    data: TrainingData,
    images: Mapping[str, tuple[Slide, PixelContent]],
    settings: TrainSettings,
    fabric: Fabric,
    directory: Path,
    show_progress_bar: bool,
) -> PixNet:
    """Train, and save into the directory."""
    with no_empty_folders_left(directory / "training"):
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
    for slide, pixels in images.values():
        check_same_pixels(slide, pixels)
    model.network.cpu()
    model.record.history = result.history
    model.record.held_out_pcc = [None if math.isnan(v) else v for v in result.pcc_per_gene]
    model.record.training |= {"best_epoch": result.best_epoch, **quality_of(result.quality)}
    model.save(directory)
    RunState.remove(directory / "training")
    logger.info("model of epoch %d saved to %s", result.best_epoch, directory)
    poor = why_poor(model.record)
    if poor:
        warn(f"The model is worse than none: {poor}. Lower lr= (now {settings.lr:g}), or train longer.")
    return model
