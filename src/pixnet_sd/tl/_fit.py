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
    Aggregation,
    DecoderConfig,
    ModelRecord,
    Network,
    ObjectiveName,
    PixNet,
    build_encoder,
    hash_weights,
    library_versions,
    link_of,
    outputs_of,
    receptive_radius_px,
    sees_whole_tile,
)
from pixnet_sd.slide import PixelContent, Slide, check_same_pixels
from pixnet_sd.store import hold_lock
from pixnet_sd.store import record as note

from ._checks import check_batch, check_decoder, pixels_of, quality_of, training_parts, values_per_px, why_poor
from ._training_data import TrainingData, check_validation, data_parts, describe, open_sources, training_data

__all__ = [
    "Preset",
    "alone_in",
    "alone_in_checkpoint_dir",
    "check_choices",
    "decoder_config",
    "default_aggregation",
    "fit",
    "train_settings",
]

Preset = Literal["paper"] | None

DROPOUT = 0.5
"""Channel dropout of the decoder's laterals."""

MIN_WIDTH = 32
"""Fewest channels of a level, unless `decoder_width` itself is smaller."""

PCC_WEIGHT, PAPER_PCC_WEIGHT = 2.0, 0.5
"""λ of Eq. 6: the weight with the best correlation over left-out sections (`benchmarks/her2st.py`), and the paper's."""

_LEVELS = len(STRIDES)


def decoder_config(decoder_width: int, preset: Preset) -> DecoderConfig:
    """Shape of the decoder.

    By default every level of the pyramid is standardised and projected, to `decoder_width` channels at the coarsest
    stride and half as many at each finer one, where maps have four times the pixels, down to 32: the finest width is
    the rank of the gene map. ``preset="paper"`` feeds in the encoder's own channels, and every feed-forward is
    `decoder_width` wide (Eq. 3).
    """
    if preset == "paper":
        return DecoderConfig(widths=None, hidden=(decoder_width,) * (_LEVELS - 1))
    least = min(decoder_width, MIN_WIDTH)
    widths = tuple(max(decoder_width >> (_LEVELS - 1 - k), least) for k in range(_LEVELS))
    return DecoderConfig(widths=widths, hidden=tuple(2 * w for w in widths[:-1]), dropout=DROPOUT)


def default_aggregation(preset: Preset, objective: ObjectiveName) -> Aggregation:
    """Eq. 5 sums, and so do counts; the mean is what puts logarithms of several sizes on one scale."""
    return "sum" if preset == "paper" or objective != "mse_pcc" else "mean"


def check_choices(preset: Preset, objective: ObjectiveName, aggregation: Aggregation | None) -> None:
    """Options that do not go together."""
    if objective != "mse_pcc" and (preset == "paper" or aggregation == "mean"):
        raise PixNetError(
            f"objective={objective!r} sums densities: leave out aggregation= and preset=, which belong to 'mse_pcc'."
        )


def train_settings(
    *,
    preset: Preset,
    max_epochs: int,
    max_steps: int | None = None,
    lr: float,
    weight_decay: float,
    objective: ObjectiveName,
    pcc_weight: float | None,
    target_sum: float,
    tile_px: int,
    batch_size: int,
    patience: int | None,
    holds_out: bool,
    compile: bool,
    seed: int,
) -> TrainSettings:
    """Settings of a run.

    A run with held-out regions may stop at any epoch, so its rate stays constant; one of known length anneals it.
    ``preset="paper"``: Adam at a constant rate for all epochs, the last of which is kept; nothing jittered.
    """
    paper = preset == "paper"
    if pcc_weight is None:
        pcc_weight = PAPER_PCC_WEIGHT if paper else PCC_WEIGHT
    return TrainSettings(
        max_epochs=max_epochs,
        max_steps=max_steps,
        lr=lr,
        weight_decay=weight_decay,
        optimizer="adam" if paper else "adamw",
        anneal=not paper and not holds_out,
        objective=objective,
        pcc_weight=pcc_weight,
        target_sum=target_sum,
        tile_px=tile_px,
        batch_size=batch_size,
        patience=None if paper or not holds_out else patience,
        keep_best=not paper,
        stain_jitter=0.0 if paper else 0.05,
        compile=compile,
        seed=seed,
    )


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
    check_choices(preset, objective, aggregation)
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
    shape = decoder_config(decoder_width, preset)
    check_decoder(backbone.channels, shape, decoder_width, fabric.device)
    sources = open_sources(
        slides,
        image_key=image_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
        allow_any_mpp=allow_any_mpp,
        working_mpp=working_mpp,
    )
    tiles = [_tile(source.slide, tile_px) for source in sources.values()]
    check_batch(tiles, settings.batch_size, tile_px, values_per_px(backbone.channels, shape), fabric.device)
    data = training_data(
        sources,
        genes=genes,
        n_genes=n_genes,
        target_sum=target_sum,
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
    preset: str | None,
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
    record.training = {"preset": preset, **asdict(settings)}
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
