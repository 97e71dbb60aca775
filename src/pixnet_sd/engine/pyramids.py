"""With a frozen encoder a tile's feature pyramid never changes: compute it once a symmetry and keep it on disk."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixnet_sd._files import replace_file
from pixnet_sd._logging import logger
from pixnet_sd.nn.encoder import STRIDES, Encoder

from .augment import apply_symmetry, jitter_stain
from .slides import TrainingSlide
from .tiling import Tile

__all__ = ["PyramidCache"]

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
