"""Shapes, chunks and blocks of a gene map: pure arithmetic.

A map of H × W pixels is stored in levels that halve each time. It is written in square blocks aligned with the chunks
of every level at once, so that no chunk is ever written twice: a block of b pixels is b/2 pixels on level 1, b/4 on
level 2, and those are the chunk sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixnet_sd.errors import StoreError

__all__ = ["Block", "MapLayout", "default_block_px", "estimate_bytes", "map_layout"]

Block = tuple[int, int, int, int]
"""row0, row1, col0, col1 in map pixels."""

MAX_BLOCK_PX = 512
MIN_BLOCK_PX = 32
MAX_BLOCK_BYTES = 64 * 2**20
MAX_CHUNK_BYTES = 16 * 2**20
COARSEST_PX = 512
CHUNK_BYTES = 4 * 2**20
CHUNK_GENES = 8
FLOAT_BYTES = 4


@dataclass(frozen=True)
class MapLayout:
    """How a gene map lies on disk.

    Attributes
    ----------
    n_genes
        Channels.
    height, width
        Map pixels that are predicted.
    block_px
        Side of a block, a power of two.
    n_levels
        Levels, the full one included, at least 2.
    whole_channels
        Whether a chunk holds all channels: of factors all are needed at once, of genes a few.
    """

    n_genes: int
    height: int
    width: int
    block_px: int
    n_levels: int
    whole_channels: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width rounded up to a multiple of 2^(levels − 1): every level is exactly half of the one below."""
        factor = 2 ** (self.n_levels - 1)
        return -(-self.height // factor) * factor, -(-self.width // factor) * factor

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """Channels, height, width of a level."""
        height, width = self.padded
        return self.n_genes, height >> level, width >> level

    def level_chunks(self, level: int) -> tuple[int, int, int]:
        """Chunk shape of a level: one block wide; more channels the coarser, to keep the number of files down."""
        height, width = (min(self.block_px, side) for side in self.padded)
        if self.whole_channels:
            return self.n_genes, height >> level, width >> level
        fitting = max(1, CHUNK_BYTES // (height * width * FLOAT_BYTES))
        genes = min(fitting, CHUNK_GENES) << level
        return min(self.n_genes, genes), height >> level, width >> level

    def blocks(self) -> list[Block]:
        """All blocks, row by row, clipped to the predicted pixels."""
        step = self.block_px
        return [
            (row, min(row + step, self.height), col, min(col + step, self.width))
            for row in range(0, self.height, step)
            for col in range(0, self.width, step)
        ]

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of all levels."""
        return sum(FLOAT_BYTES * _product(self.level_shape(level)) for level in range(self.n_levels))


def default_block_px(n_genes: int, max_bytes: int = MAX_BLOCK_BYTES) -> int:
    """Largest power of two in 32 … 512 for which a block of ``n_genes`` float32 channels is not too large."""
    block_px = MAX_BLOCK_PX
    while block_px > MIN_BLOCK_PX and n_genes * block_px * block_px * FLOAT_BYTES > max_bytes:
        block_px //= 2
    return block_px


def map_layout(
    n_genes: int, shape: tuple[int, int], block_px: int | None = None, *, whole_channels: bool = False
) -> MapLayout:
    """Layout of a map of ``n_genes`` over ``shape`` (height, width) map pixels.

    Levels are added until the longer side is at most 512 pixels, but no more than a block can be halved.

    Raises
    ------
    StoreError
        When the map is empty or ``block_px`` is no power of two of at least 2.
    """
    height, width = shape
    if n_genes < 1 or height < 1 or width < 1:
        raise StoreError(f"A gene map of {n_genes} genes over {height} × {width} pixels is empty.")
    most = MAX_CHUNK_BYTES if whole_channels else MAX_BLOCK_BYTES
    block = default_block_px(n_genes, most) if block_px is None else block_px
    if block < 2 or block & (block - 1):
        raise StoreError(f"block_px is {block}; it has to be a power of two, at least 2.")
    halvings = 1
    while -(-max(height, width) >> halvings) > COARSEST_PX and 2 << halvings <= block:
        halvings += 1
    return MapLayout(n_genes, height, width, block, halvings + 1, whole_channels)


def estimate_bytes(n_genes: int, height: int, width: int) -> int:
    """Bytes that a gene map takes at most: float32, all levels, before compression, as if all of it were tissue."""
    return map_layout(n_genes, (height, width)).nbytes


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
