"""From batches to feature maps D: pixels are encoded, or, with a frozen encoder, pyramids that are kept on disk read.

A frozen encoder's pyramid of a turned tile never changes: it is computed once and kept as float16. Kept pyramids are
read ahead of the network in the threads that make batches.
"""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from pixnet_sd._files import replace_file
from pixnet_sd._util import logger
from pixnet_sd.engine import (
    AHEAD,
    Copies,
    Tile,
    TrainingSlide,
    TrainingTiles,
    apply_symmetry,
    jitter_stain,
    prefetch,
    training_tiles,
    undo_symmetry,
)
from pixnet_sd.geometry import MAP_STRIDE, STRIDES
from pixnet_sd.model import ENOUGH_COUNTS, Encoder, Network

from ._batches import Batch, BatchPlan, Pyramid, make_batch, plan_batches, tile_operators
from ._run import Run

_FREE_SHARE = 0.5  # of the free disk that the cache may take
_AHEAD_BYTES = 2**30  # of pyramids that are read ahead: a ViT's of one batch may have 300 MB


class PyramidCache:
    """Feature pyramids of training tiles, as float16 files in a folder that is made on first use.

    Turned copies are colour-jittered by the seed and the tile: augmentation is a set of stored copies. When the disk
    has no room for more, pyramids are computed each time.
    """

    def __init__(self, encoder: Encoder, directory: Path, stain_jitter: float, seed: int) -> None:
        self.encoder, self.directory = encoder, directory
        self.stain_jitter, self.seed = stain_jitter, seed
        self._full = False

    def read(self, slide: TrainingSlide, tile: Tile, symmetry: int) -> Pyramid | None:
        """Read the kept pyramid of a turned tile, on the host; None where there is none that can be read."""
        path = self._path(slide, tile, symmetry)
        with contextlib.suppress(KeyError, OSError, SafetensorError):  # cut off when the machine was: it is made anew
            stored = load_file(path) if path.is_file() else {}
            return [stored[str(k)] for k in range(len(STRIDES))]
        return None

    @torch.no_grad()
    def make(self, slide: TrainingSlide, tile: Tile, symmetry: int, pixels: Tensor) -> Pyramid:
        """Compute and keep the pyramid of a turned tile from its pixels (1, 3, H, W), on the encoder's device."""
        image = pixels.to(self.encoder.mean.device).float()
        if symmetry:
            generator = torch.Generator().manual_seed(self.seed + _key(slide, tile, symmetry))
            image = jitter_stain(image, self.stain_jitter, generator)
        pyramid = [level.half() for level in self.encoder(apply_symmetry(image, symmetry).contiguous())]
        if self._full:
            return pyramid
        path, needed = self._path(slide, tile, symmetry), sum(level.nbytes for level in pyramid)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._full = needed > _FREE_SHARE * shutil.disk_usage(self.directory).free
            if not self._full:
                # Aside is where few files are to be looked through, not among the tiles.
                with replace_file(path, aside=self.directory.parent, durable=False) as aside:
                    save_file({str(k): level.cpu().contiguous() for k, level in enumerate(pyramid)}, aside)
        except (OSError, SafetensorError):  # a quota, which the free disk does not show
            self._full = True
        if self._full:
            logger.warning("no disk left for the feature cache in %s: further tiles are encoded each time", path.parent)
        return pyramid

    def clear(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, slide: TrainingSlide, tile: Tile, symmetry: int) -> Path:
        return self.directory / f"{_key(slide, tile, symmetry):08x}_{'_'.join(map(str, tile))}_{symmetry}.safetensors"


def _key(slide: TrainingSlide, tile: Tile, symmetry: int) -> int:
    return zlib.crc32(f"{slide.name}/{tuple(tile)}/{symmetry}".encode())


class FeatureMaps:
    """Makes batches ahead, and their feature maps D, turned back to the slide's orientation."""

    def __init__(self, network: Network, run: Run, fabric: Fabric) -> None:
        self.network, self.run, self.fabric = network, run, fabric
        self.frozen = network.encoder.frozen  # then pyramids are kept, and tiles stay in their places
        self.copies = Copies(fabric.device)
        if self.copies.gpu:
            network.to(memory_format=torch.channels_last)
        self._forward = torch.compile(network, dynamic=False) if run.params.compile else network
        self.cache = PyramidCache(network.encoder, run.directory / "features", run.params.stain_jitter, run.seed)
        per_px = sum(c / stride**2 for c, stride in zip(network.encoder.channels, STRIDES, strict=True))
        n_bytes = 2 * per_px * run.params.tile_px**2 * run.batch_size
        self._ahead = min(max(int(_AHEAD_BYTES / n_bytes), 1), AHEAD) if self.frozen else AHEAD

    def batches(self, plans: Sequence[BatchPlan], *, gradient: bool = True) -> Iterator[Batch]:
        """Make batches ahead of the network, with pixels or, where they are kept, pyramids."""
        kept = self.cache.read if self.frozen else None
        least = ENOUGH_COUNTS if gradient and self.run.objective != "mse_pcc" else None
        make = partial(make_batch, least_counts=least, kept=kept, pin=self.copies.gpu, gradient=gradient)
        return self.copies.arriving(prefetch((partial(make, plan) for plan in plans), self._ahead))

    def of(self, batch: Batch) -> Tensor:
        """Compute D of a batch, shape (B, C, h, w)."""
        turn = batch.plan.symmetry
        if self.frozen:
            with self.fabric.autocast():
                features = self.network.decoder(self.pyramid(batch))
        else:
            assert batch.image is not None  # nothing is kept
            image = batch.image.to(self.fabric.device).float()
            if self.network.training:
                image = jitter_stain(image, self.run.params.stain_jitter, torch.default_generator)
            layout = torch.channels_last if self.copies.gpu else torch.contiguous_format
            # What is left over of a slide makes batches of other sizes, each of which would be compiled anew.
            forward = self._forward if len(image) == self.run.batch_size else self.network
            with self.fabric.autocast():
                features = forward(apply_symmetry(image, turn).contiguous(memory_format=layout))
        return undo_symmetry(features.float(), turn)

    def scored(self, slides: Sequence[TrainingSlide], n_batches: int | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Pass over slides' regions, each once, or over so many batches spread evenly, as is predicted and not trained.

        Yields batches and their feature maps.
        """
        self.network.eval()
        tilings = [training_tiles(slide, self.run.params.tile_px, once=True) for slide in slides]
        plans = plan_batches(tilings, self.run.batch_size)
        if n_batches is not None:
            n = min(n_batches, len(plans))
            plans = [plans[i] for i in np.unique(np.linspace(0, len(plans) - 1, n).astype(int))]
        for batch in self.batches(plans, gradient=False):
            yield batch, self.of(batch)

    def pyramid(self, batch: Batch) -> Pyramid:
        """Compute the pyramid of a batch or take what is kept of it: each level (B, C_l, h_l, w_l), float32.

        A trainable encoder normalises by the statistics of the batch, as in training; those it keeps do not move.
        """
        if not self.frozen:
            assert batch.image is not None  # nothing is kept
            encoder = self.network.encoder
            buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
            return functional_call(encoder, buffers, (batch.image.to(self.fabric.device).float(),))
        plan, pixels = batch.plan, iter(() if batch.image is None else batch.image.split(1))
        pyramids = [
            self.cache.make(plan.slide, tile, plan.symmetry, next(pixels)) if kept is None else kept
            for tile, kept in zip(plan.tiles, batch.kept, strict=True)
        ]
        return [torch.cat(level).to(self.fabric.device).float() for level in zip(*pyramids, strict=True)]


_MAX_BATCHES = 16
_MAX_REGIONS = 1024  # kept of a batch and size: two moments need no more, and a batch has thousands of 2 µm bins


@torch.no_grad()
def calibrate(network: Network, features: FeatureMaps, tilings: Sequence[TrainingTiles], batch_size: int) -> None:
    """Set the standardising constants of the network's laterals, if it has any.

    They are mean and standard deviation of each channel over training regions, not pixels: a channel that flickers from
    pixel to pixel but says little between regions does not set the scale.
    """
    if not network.has_laterals:
        return
    plans = plan_batches(tilings, batch_size)
    network.train()  # an encoder that will be trained normalises by batch statistics, a frozen one never does
    pooled: list[list[Tensor]] = [[] for _ in STRIDES]
    for batch in features.batches([plans[i] for i in torch.randperm(len(plans))[:_MAX_BATCHES].tolist()]):
        members = [batch.plan.tiling.members(tile) for tile in batch.plan.tiles]
        for maps, stride, level in zip(features.pyramid(batch), STRIDES, pooled, strict=True):
            rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
            own = batch.operators if stride == MAP_STRIDE else tile_operators(batch.plan, members, stride)
            for operator in own:
                n_px = torch.as_tensor(operator.n_px, dtype=torch.float32, device=rows.device)
                means = operator.apply(rows) / n_px.clamp_min(1e-12)[:, None]
                level.append(means[:: -(-len(means) // _MAX_REGIONS) or 1])
    network.calibrate([torch.cat(level) for level in pooled])
