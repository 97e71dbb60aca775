"""From a batch to its feature maps, whether pixels are encoded now or their pyramids are already stored."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pixnet_sd.nn.model import Network

from .augment import apply_symmetry, jitter_stain, undo_symmetry
from .batches import Batch
from .copies import Copies
from .pyramids import PyramidCache
from .settings import TrainSettings
from .slides import TrainingSlide
from .tiling import Tile, TrainingTiles

__all__ = ["FeatureMaps"]


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
