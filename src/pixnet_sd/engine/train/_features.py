"""With a frozen encoder a tile's feature pyramid never changes: compute it once a symmetry and keep it on disk.

From a batch to its feature maps, whether pixels are encoded now or their pyramids are already stored.

Measure, once and before training, on what scale each encoder channel varies between regions.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixnet_sd._files import replace_file
from pixnet_sd._util import logger
from pixnet_sd.engine import Copies, Tile, TrainingSlide, TrainingTiles, apply_symmetry, jitter_stain, undo_symmetry
from pixnet_sd.geometry import STRIDES
from pixnet_sd.model import Encoder, Network

from ._batches import Batch, make_batch, plan_batches
from ._objective import TrainSettings

__all__ = ["FeatureMaps", "PyramidCache", "calibrate"]

_FREE_SHARE = 0.5  # of the free disk that the cache may take


class PyramidCache:
    """Feature pyramids of training tiles, as float16 files.

    Colour jitter, drawn from the seed and the tile, is part of what is stored: augmentation becomes a set of stored
    copies. When the disk has no room for more, pyramids are computed each time.

    Parameters
    ----------
    encoder
        The frozen encoder, on its device.
    directory
        Where the files go; made on first use, removed by `clear`.
    stain_jitter
        Strength of `jitter_stain` for all but the unturned copy.
    seed
        Of the jitter.
    """

    def __init__(self, encoder: Encoder, directory: Path, stain_jitter: float, seed: int) -> None:
        self.encoder = encoder
        self.directory = directory
        self.stain_jitter = stain_jitter
        self.seed = seed
        self._full = False

    def get(self, slide: TrainingSlide, tile: Tile, symmetry: int) -> list[Tensor]:
        """Pyramid of a turned tile.

        Parameters
        ----------
        slide
            Its slide.
        tile
            Its place.
        symmetry
            How it is turned.

        Returns
        -------
        F_1..F_L, each (1, C_l, h_l, w_l), on the encoder's device, in the encoder's floating type.
        """
        path = self._path(slide, tile, symmetry)
        device = self.encoder.mean.device
        stored = _stored(path)
        if stored is not None:
            return [level.to(device).float() for level in stored]
        pyramid = [level.half() for level in self._compute(slide, tile, symmetry)]
        self._keep(path, pyramid)
        return [level.float() for level in pyramid]

    def clear(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, slide: TrainingSlide, tile: Tile, symmetry: int) -> Path:
        return self.directory / f"{_key(slide, tile, symmetry):08x}_{'_'.join(map(str, tile))}_{symmetry}.safetensors"

    @torch.no_grad()
    def _compute(self, slide: TrainingSlide, tile: Tile, symmetry: int) -> list[Tensor]:
        pixels = slide.read(tile.row0, tile.row0 + tile.height, tile.col0, tile.col0 + tile.width)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.encoder.mean.device).float()
        if symmetry:
            generator = torch.Generator().manual_seed(self.seed + _key(slide, tile, symmetry))
            image = jitter_stain(image, self.stain_jitter, generator)
        return self.encoder(apply_symmetry(image, symmetry).contiguous())

    def _keep(self, path: Path, pyramid: list[Tensor]) -> None:
        if self._full:
            return
        needed = sum(level.numel() * 2 for level in pyramid)
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


def _stored(path: Path) -> list[Tensor] | None:
    """A stored pyramid, if it is there and can be read."""
    if not path.is_file():
        return None
    try:
        stored = load_file(path)
        return [stored[str(k)] for k in range(len(STRIDES))]
    except (KeyError, OSError, SafetensorError):  # cut off when the machine was: it is made anew
        return None


def _key(slide: TrainingSlide, tile: Tile, symmetry: int) -> int:
    return zlib.crc32(f"{slide.name}/{tuple(tile)}/{symmetry}".encode())


class FeatureMaps:
    """Feature maps D of batches, turned back to the slide's orientation.

    Parameters
    ----------
    network
        The network, on its device.
    fabric
        Precision.
    settings
        Of the run.
    directory
        For stored pyramids.

    Attributes
    ----------
    copies
        To and from the network's device.
    pins
        Whether batches are to be made in page-locked memory.
    stored
        Whether pyramids are stored.
    """

    def __init__(self, network: Network, fabric: Fabric, settings: TrainSettings, directory: Path) -> None:
        self.network = network
        self.fabric = fabric
        self.settings = settings
        self.device = fabric.device
        self.copies = Copies(self.device)
        self.pins = self.copies.gpu
        if self.pins:
            network.to(memory_format=torch.channels_last)
        self._compiled = torch.compile(network, dynamic=False) if settings.compile else network
        self._cache = PyramidCache(network.encoder, directory, settings.stain_jitter, settings.seed)
        self.stored = network.encoder.frozen

    def of(self, batch: Batch, slide: TrainingSlide, tiles: TrainingTiles) -> Tensor:
        """D of a batch, shape (B, C, h, w)."""
        turn = batch.plan.symmetry
        if self.stored:
            with self.fabric.autocast():
                features = self.network.decoder(self.pyramid(slide, [tiles.tiles[t] for t in batch.plan.tiles], turn))
        else:
            assert batch.image is not None  # batches carry pixels unless pyramids are stored
            features = self._encode(batch.image, turn)
        return undo_symmetry(features.float(), turn)

    def pyramid(self, slide: TrainingSlide, tiles: list[Tile], turn: int) -> list[Tensor]:
        """Stored pyramids of some tiles, each level (B, C_l, h_l, w_l)."""
        each = [self._cache.get(slide, tile, turn) for tile in tiles]
        return [torch.cat(level) for level in zip(*each, strict=True)]

    def _encode(self, pixels: Tensor, turn: int) -> Tensor:
        image = pixels.to(self.device).float()
        if self.network.training:
            image = jitter_stain(image, self.settings.stain_jitter, torch.default_generator)
        image = apply_symmetry(image, turn)
        layout = torch.channels_last if self.pins else torch.contiguous_format
        # What is left over of a slide makes batches of other sizes, each of which would be compiled anew.
        forward = self._compiled if len(image) == self.settings.batch_size else self.network
        with self.fabric.autocast():
            return forward(image.contiguous(memory_format=layout))

    def clear(self) -> None:
        """Delete stored pyramids."""
        self._cache.clear()


_MAX_BATCHES = 16
_MAX_REGIONS = 1024  # kept of a batch and size: two moments need no more, and a batch has thousands of 2 µm bins


@torch.no_grad()
def calibrate(
    network: Network,
    features: FeatureMaps,
    slides: Sequence[TrainingSlide],
    tiles: list[TrainingTiles],
    settings: TrainSettings,
) -> None:
    """Set the standardising constants of the network's laterals.

    They are the mean and standard deviation of each feature channel over training regions, each level pooled exactly
    over the regions: a channel that flickers from pixel to pixel but says little between regions is not drowned, and
    one that separates regions is put on the same scale as its peers.

    Parameters
    ----------
    network
        The network; one without laterals is left as it is.
    features
        Its feature maps.
    slides
        Training slides.
    tiles
        Their tiles.
    settings
        Batch size and seed.
    """
    if not network.has_laterals:
        return
    plans = plan_batches(tiles, settings.batch_size, None)
    picked = torch.randperm(len(plans))[:_MAX_BATCHES].tolist()
    network.train()  # an encoder that will be trained normalises by batch statistics, a frozen one never does
    pooled: list[list[Tensor]] = [[] for _ in STRIDES]
    for plan in (plans[i] for i in picked):
        slide, found = slides[plan.slide], tiles[plan.slide]
        pyramid = features.pyramid(slide, [found.tiles[t] for t in plan.tiles], 0)
        for level, stride in enumerate(STRIDES):
            rows = pyramid[level].float().permute(0, 2, 3, 1).flatten(0, 2)
            for operator in make_batch(slide, found, plan, stride, with_image=False, with_targets=False).operators:
                n_px = torch.as_tensor(operator.n_px, dtype=torch.float32, device=rows.device)
                means = operator.apply(rows) / n_px.clamp_min(1e-12)[:, None]
                pooled[level].append(means[:: -(-len(means) // _MAX_REGIONS) or 1])
    network.calibrate([torch.cat(level) for level in pooled])
