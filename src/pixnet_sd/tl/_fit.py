"""Train a model on slides that have both an image and measured expression."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from lightning_fabric import Fabric
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._files import no_empty_folders_left
from pixnet_sd._fingerprint import as_json, differing_parts, fingerprint
from pixnet_sd._notes import remember
from pixnet_sd._util import logger, warn
from pixnet_sd.engine import MARGIN_SHARE, make_fabric
from pixnet_sd.engine.train import Run, RunState, train, warn_of_versions
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

from ._checks import check_batch, check_decoder, models_folder, pixels_of, training_parts, why_poor
from ._training_data import data_parts, describe, held_out_names, open_sources, sizes_of, training_data

_DROPOUT = 0.2  # of channels of the decoder's laterals
_MIN_WIDTH = 32  # fewest channels of a level, unless `decoder_width` itself is smaller
_LEVELS = len(STRIDES)
_BATCH_SIZE = {"cuda": 8, "mps": 4, "cpu": 2}
_LOCK = ".training.lock"
_Images: TypeAlias = Mapping[str, tuple[Slide, PixelContent]]
_FIRST = 5  # differences that are named


def decoder_config(params: ModelParams) -> DecoderConfig:
    """Choose the decoder's shape: Eq. 3, or widths that halve at each finer stride, to 32, the rank of the gene map."""
    width = params.decoder_width
    if params.decoder == "paper":
        return DecoderConfig(widths=None, hidden=(width,) * (_LEVELS - 1))
    widths = tuple(max(width >> (_LEVELS - 1 - k), min(width, _MIN_WIDTH)) for k in range(_LEVELS))
    return DecoderConfig(widths=widths, hidden=tuple(2 * w for w in widths[:-1]), dropout=_DROPOUT)


def _aggregation(params: ModelParams, objective: ObjectiveName) -> Aggregation:
    """Choose sum or mean: counts are summed, and the mean puts logarithms of several sizes on one scale."""
    if objective == "mse_pcc":
        return params.aggregation or "mean"
    if params.aggregation == "mean":
        raise PixNetError(f"objective={objective!r} sums densities: leave out aggregation='mean'.")
    return "sum"


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Hold a checkpoint's folder against other runs, made if needed, left only if filled; a finished one is read."""
    if os.path.exists(directory / CHECKSUMS):  # unlike that of a path it raises for no name
        if (directory / _LOCK).exists():  # of a run that was killed when its model was there
            with contextlib.suppress(OSError, StoreError), hold_lock(directory / _LOCK, wait_s=0, busy=""):
                pass
        yield
        return
    busy = (
        f"Another run is training in {str(directory)!r}. Give another checkpoint_dir, or wait: its model is taken then."
    )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(no_empty_folders_left(directory))
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):  # `os.access` is wrong for network mounts and the superuser
                pass
            held.enter_context(hold_lock(directory / _LOCK, wait_s=0, busy=busy))
        except StoreError as error:
            raise CheckpointError(str(error)) from error
        except (OSError, ValueError) as error:  # the latter: a name that no folder can have
            why = getattr(error, "strerror", None) or error
            message = f"{str(directory)!r} cannot be written ({why}). Give checkpoint_dir= a folder that can be."
            raise CheckpointError(message) from error
        yield


@checked()
def fit(  # noqa: PLR0913
    sdata: SpatialData | Mapping[str, SpatialData],
    *,
    image_key: str | None = None,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    genes: Sequence[str] | int | Literal["all"] = 250,
    objective: ObjectiveName = "nb_pcc",
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
        ``"nb_pcc"``: the negative binomial likelihood of raw counts, whose means are sums of a density over the region,
        so that what is predicted adds up from the smallest regions to the largest, and the correlation of what it
        expects with log-normalised expression. Genes are learnt relative to the counts that each region has, and these
        relative to the slide's counts per area. ``"mse_pcc"``: Eq. 6, squared error and correlation of log-normalised
        expression, for values that are not counts, and for the paper's own settings.
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
    The model, with the weights of its best epoch. With `record_model` its folder is noted in the
    attributes of every slide, and of its store when backed; nothing else of the slides is changed.

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
    params, train_params = ModelParams.read(model_params), TrainParams.read(train_params)
    aggregation = _aggregation(params, objective)
    held_out_names(validation, list(slides))
    fabric = make_fabric(device)
    batch_size = batch_size or _BATCH_SIZE[fabric.device.type]
    settings: dict[str, Any] = {"max_epochs": max_epochs, "batch_size": batch_size, "seed": seed}
    settings |= {"objective": objective, "target_sum": params.target_sum}
    folder = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
    home = models_folder(slides.values()) if folder is None else folder.parent
    with contextlib.ExitStack() as held:
        if folder is not None:  # a folder that was given is held before anything that takes long
            held.enter_context(_alone_in(folder))
        torch.manual_seed(seed)
        encoder = build_encoder(params.encoder, params.encoder_weights, frozen=params.freeze_encoder)
        shape = decoder_config(params)
        check_decoder(encoder.channels, shape, params.decoder_width, fabric.device)
        where = {"image_key": image_key, "coordinate_system": coordinate_system, "mpp": mpp}
        where |= {"allow_any_mpp": train_params.allow_any_mpp, "working_mpp": params.working_mpp}
        sources = open_sources(slides, table_key=table_key, **where)
        tile_px = train_params.tile_px  # at most: a tile is no larger than the slide and the margins of its regions
        most_px = [np.array(s.slide.working_shape) + 2 * (tile_px // MARGIN_SHARE) for s in sources.values()]
        sides = np.minimum(tile_px, most_px).tolist()
        check_batch(sides, batch_size, tile_px, encoder.channels, shape, fabric.device)
        how = {name: settings[name] for name in ("target_sum", "objective", "seed")}
        data = training_data(sources, genes=genes, validation=validation, cache=home / "pixnet_sd_cache", **how)
        images = {name: (source.slide, pixels_of(slides[name], source.slide)) for name, source in sources.items()}
        names, described = [str(gene) for gene in data.genes], describe(sources, data)
        del sources  # of millions of bins it holds what the training does not need
        sizes, n_outputs = sizes_of(data, params.working_mpp), len(outputs_of(names, objective))
        network = Network(encoder, shape, n_outputs, aggregation, link_of(objective), len(sizes))
        record = _record(network, params, objective, genes=names, slides=described, sizes=sizes, tile_px=tile_px)
        # What it is trained on and how, and the fingerprint of all that decides about it.
        record.training = {k: v for k, v in {**settings, **asdict(train_params)}.items() if k != "allow_any_mpp"}
        record.depends_on = as_json(training_parts(record, record.training, images, data_parts(data)))
        record.training["fingerprint"] = identity = fingerprint(record.depends_on)
        record.check()
        if folder is None:
            folder = home / identity[:12]
            held.enter_context(_alone_in(folder))
        run = Run(data.training, data.held_out, train_params, folder / "training", identity, **settings)
        model = _finished(folder, record)
        if model is None:
            model = _trained(PixNet(network, record), run, fabric, images, show_progress_bar=show_progress_bar)
    if record_model:
        _note(slides, images, str(folder.resolve()))
    return model


def _note(slides: Mapping[str, SpatialData], images: _Images, folder: str) -> None:
    """Record the model in each object, and in its store if that can be written, with what was hashed of the image."""
    for name, (slide, pixels) in images.items():
        try:
            note(slides[name], "model", None, folder)
            if pixels.is_settled:
                note(slides[name], "content", slide.image_key, pixels.note())
        except StoreError as error:
            remember(slides[name], "model", folder)
            logger.warning("the model is recorded in memory only: %s", error)


def _record(network: Network, params: ModelParams, objective: ObjectiveName, **known: Any) -> ModelRecord:
    """Describe a network that is about to be trained; `known` are fields of the record."""
    halo_px, weights = receptive_radius_px(network), params.encoder_weights
    return ModelRecord(
        objective=objective,
        target_sum=params.target_sum,
        working_mpp=params.working_mpp,
        aggregation=network.aggregation,
        encoder=params.encoder,
        encoder_weights=None if weights is None else Path(weights).name,
        encoder_sha256=hash_weights(network.encoder),
        freeze_encoder=network.encoder.frozen,
        decoder=network.decoder_config,
        halo_px=halo_px,
        sees_whole_tile=sees_whole_tile(network, halo_px),
        versions=library_versions(),
        **known,
    )


def _finished(folder: Path, record: ModelRecord) -> PixNet | None:
    """Load the model, if the same run has finished in the folder."""
    whole = (folder / CHECKSUMS).exists()  # the last that is written
    if not whole and (RunState.is_there(folder / "training") or not (folder / "config.json").exists()):
        return None  # of a run that was killed while its model was saved the state is still there
    model = PixNet.load(folder)
    if model.record.training.get("fingerprint") != record.training["fingerprint"]:
        differing = differing_parts(model.record.depends_on, record.depends_on)
        raise CheckpointError(
            f"{str(folder)!r} already holds a model of another run, which differs in {len(differing)} parts such as "
            f"{', '.join(map(repr, differing[:_FIRST]))}. Give another checkpoint_dir, or delete it."
        )
    with contextlib.suppress(OSError):  # a kill may have come before it, and now the folder may only be readable
        RunState.remove(folder / "training")
    warn_of_versions(model.record.versions, f"The model in {str(folder)!r}")
    logger.info("the same run has finished before: its model is taken from %s", folder)
    return model


def _trained(model: PixNet, run: Run, fabric: Fabric, images: _Images, *, show_progress_bar: bool) -> PixNet:
    """Train, and save into the folder that the run's is in."""
    with no_empty_folders_left(run.directory):
        result = train(model.network, run, fabric, show_progress_bar=show_progress_bar)
    for slide, pixels in images.values():
        check_same_pixels(slide, pixels)
    model.network.cpu()
    model.record.history = result.history
    model.record.held_out_pcc = [None if math.isnan(v) else v for v in result.pcc_per_gene]
    quality = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.quality.items()}
    model.record.training |= {"best_epoch": result.best_epoch, **quality}
    model.save(run.directory.parent)
    RunState.remove(run.directory)
    logger.info("model of epoch %d saved to %s", result.best_epoch, run.directory.parent)
    if poor := why_poor(model.record):
        warn(f"The model is worse than none: {poor}. Lower lr= (now {run.params.lr:g}), or train longer.")
    return model
