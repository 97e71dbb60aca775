"""Shapes, chunks, shards and blocks of a gene map: pure arithmetic, done before anything is opened.

A map of H x W pixels is stored in levels that halve each time. It is written in square blocks. A block of b pixels is
one file (a zarr shard) of b / 2^k pixels on level k, so no file is ever written twice, and a map of any shape has fewer
than 20,000. Inside a shard a few genes lie together (a chunk), so that one gene is read without the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from pixnet_sd.errors import StoreError

Block = tuple[int, int, int, int]
"""row0, row1, col0, col1 in map pixels."""

MAX_FILES = 20_000
MAX_BLOCK_BYTES = 64 * 2**20
MAX_WHOLE_BYTES = 16 * 2**20
"""Of a block whose channels are read together."""
BLOCK_PX = (32, 512)
"""Side of a block; larger only where there would be too many files."""
COARSEST_PX = 512
CHUNK_BYTES = 4 * 2**20
CHUNK_GENES = 8
FLOAT_BYTES = 4


@dataclass(frozen=True)
class MapLayout:
    """How a gene map lies on disk."""

    n_genes: int
    height: int  # map pixels that are predicted
    width: int
    block_px: int  # a power of two
    n_levels: int  # the full one included, at least 2
    whole_channels: bool = False  # a chunk holds all channels: of factors all are needed at once, of genes a few

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width rounded up to a multiple of 2^(levels - 1): every level is exactly half of the one below."""
        factor = 2 ** (self.n_levels - 1)
        return -(-self.height // factor) * factor, -(-self.width // factor) * factor

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """Channels, height, width of a level."""
        height, width = self.padded
        return self.n_genes, height >> level, width >> level

    def level_chunks(self, level: int) -> tuple[int, int, int]:
        """Chunk shape of a level: one block wide; more channels the coarser, to keep the number of chunks down."""
        height, width = (min(self.block_px, side) for side in self.padded)
        genes = self.n_genes
        if not self.whole_channels:
            fitting = max(1, CHUNK_BYTES // (height * width * FLOAT_BYTES))
            genes = min(genes, min(fitting, CHUNK_GENES) << level)
        return genes, height >> level, width >> level

    def level_shards(self, level: int) -> tuple[int, int, int] | None:
        """Shape of a level's files, all channels of a block; None where that is one chunk."""
        genes, height, width = self.level_chunks(level)
        return None if genes == self.n_genes else (-(-self.n_genes // genes) * genes, height, width)

    def blocks(self) -> list[Block]:
        """All blocks, row by row, clipped to the predicted pixels."""
        step = self.block_px
        return [
            (row, min(row + step, self.height), col, min(col + step, self.width))
            for row in range(0, self.height, step)
            for col in range(0, self.width, step)
        ]

    @property
    def n_files(self) -> int:
        """Files of all blocks."""
        return self.n_levels * prod(-(-side // self.block_px) for side in (self.height, self.width))

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of all levels, as if all of it were tissue."""
        return sum(FLOAT_BYTES * prod(self.level_shape(level)) for level in range(self.n_levels))


def map_layout(
    n_genes: int, shape: tuple[int, int], block_px: int | None = None, *, whole_channels: bool = False
) -> MapLayout:
    """Lay out a map of ``n_genes`` over ``shape`` (height, width) map pixels.

    Levels are added until the longer side is at most 512 pixels, but no more than a block can be halved. Blocks, where
    their side is not given, are the largest of 32 to 512 pixels that take no more than 64 MiB, 16 MiB with
    ``whole_channels``; they are made larger where the map would not stay under 20,000 files.
    """
    height, width = shape
    if n_genes < 1 or height < 1 or width < 1:
        raise StoreError(f"A gene map of {n_genes} genes over {height} x {width} pixels is empty.")
    if block_px is not None and (block_px < 2 or block_px & (block_px - 1)):
        raise StoreError(f"block_px is {block_px}; it has to be a power of two, at least 2.")
    most, (least_px, block) = MAX_WHOLE_BYTES if whole_channels else MAX_BLOCK_BYTES, BLOCK_PX
    while block > least_px and n_genes * block * block * FLOAT_BYTES > most:
        block //= 2
    block = block_px or block
    while True:
        halvings = 1
        while -(-max(height, width) >> halvings) > COARSEST_PX and 2 << halvings <= block:
            halvings += 1
        layout = MapLayout(n_genes, height, width, block, halvings + 1, whole_channels)
        if layout.n_files < MAX_FILES:
            return layout
        block *= 2
