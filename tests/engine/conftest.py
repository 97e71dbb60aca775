"""Synthetic slides and networks, small enough to train in a second."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from pixnet_sd.engine import MeasuredRegions, ReadTile, TrainingSlide, make_fabric
from pixnet_sd.geometry import Circles, Regions
from pixnet_sd.model import DecoderConfig, Encoder, Network

CHANNELS = (6, 6, 8, 8)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny convolutions are slower in several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return make_fabric("cpu")


class Reader:
    """Reads a numpy slide, white outside; remembers what was read, and how many tiles were alive at once."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels
        self.calls: list[tuple[int, int, int, int]] = []
        self.most_alive = 0
        self._alive = 0
        self._lock = threading.Lock()

    def __call__(self, row0: int, row1: int, col0: int, col1: int) -> NDArray[np.uint8]:
        tile = np.full((row1 - row0, col1 - col0, 3), 255, np.uint8)
        height, width = self.pixels.shape[:2]
        top, bottom, left, right = (*np.clip([row0, row1], 0, height), *np.clip([col0, col1], 0, width))
        tile[top - row0 : bottom - row0, left - col0 : right - col0] = self.pixels[top:bottom, left:right]
        with self._lock:
            self.calls.append((row0, row1, col0, col1))
            self._alive += 1
            self.most_alive = max(self.most_alive, self._alive)
        weakref.finalize(tile, self._gone)
        return tile

    def _gone(self) -> None:
        with self._lock:
            self._alive -= 1


@pytest.fixture(scope="session")
def reader() -> Callable[..., Reader]:
    return Reader


@pytest.fixture(scope="session")
def draw() -> Callable[..., NDArray[np.uint8]]:
    """RGB pixels with structure from the size of the slide down to single pixels."""

    def make(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        waves = np.zeros((height, width, 3))
        for length in (200, 90, 40, 15):
            angle, phase = rng.uniform(0, 2 * np.pi, (2, 3))
            along = x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)
            waves += 22 * np.sin(2 * np.pi * along / length + phase)
        return np.clip(140 + waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)

    return make


class TinyBody(nn.Module):
    """Five strided convolutions with batch norm: maps at strides 4 to 32 with a receptive field of a few tiles."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 6, *CHANNELS)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, d, 3, stride=2, padding=1), nn.BatchNorm2d(d), nn.ReLU())
            for c, d in itertools.pairwise(widths)
        )
        for stage in self.stages:  # as if it had been trained: evaluation and training mode differ
            stage[1].running_mean.normal_(0, 0.1)
            stage[1].running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Network]:
    """A network of a few thousand weights."""

    def make(
        *,
        seed: int = 0,
        n_genes: int = 3,
        frozen: bool = False,
        laterals: bool = True,
        dropout: float = 0.0,
        aggregation: Any = "mean",
        encoder: Encoder | None = None,
        link: Any = "identity",
    ) -> Network:
        torch.manual_seed(seed)
        if encoder is None:
            encoder = Encoder(TinyBody(), CHANNELS, (0.5,) * 3, (0.25,) * 3, frozen=frozen)
        widths = (4, 4, 8, 8) if laterals else None
        return Network(encoder, DecoderConfig(widths, (8, 8, 8), dropout), n_genes, aggregation, link, n_sizes=2)

    return make


@pytest.fixture(scope="session")
def slide_of() -> Callable[..., TrainingSlide]:
    """A slide around regions, without pixels unless a reader is given."""

    def make(
        *regions: Regions,
        values: Sequence[NDArray[np.float32]] | None = None,
        read: ReadTile | None = None,
        height: int = 10_000,
        width: int = 10_000,
        name: str = "slide",
    ) -> TrainingSlide:
        values = [np.zeros((len(r), 1), np.float32) for r in regions] if values is None else values
        measured = [MeasuredRegions(f"size{k}", r, v) for k, (r, v) in enumerate(zip(regions, values, strict=True))]
        return TrainingSlide(name, read or _no_pixels, height, width, tuple(measured))

    return make


def _no_pixels(*window: int) -> NDArray[np.uint8]:
    raise AssertionError(f"nothing should be read, {window} was")


def lattice(height: int, width: int, pitch: float, radius: float) -> Circles:
    y, x = np.meshgrid(np.arange(pitch / 2, height, pitch), np.arange(pitch / 2, width, pitch), indexing="ij")
    return Circles(np.stack([x.ravel(), y.ravel()], 1), np.full(x.size, radius))


@pytest.fixture(scope="session")
def learnable(
    draw: Callable[..., NDArray[np.uint8]], slide_of: Callable[..., TrainingSlide]
) -> Callable[..., TrainingSlide]:
    """A slide whose three genes are the mean colours of its circles, of one size a radius."""

    def make(
        height: int = 96, width: int = 112, *, radii: Sequence[float] = (6.0,), seed: int = 0, name: str = "slide"
    ) -> TrainingSlide:
        read = Reader(draw(height, width, seed))
        regions, values = [lattice(height, width, 2.5 * r, r) for r in radii], []
        y, x = np.mgrid[:height, :width] + 0.5
        for circles, r in zip(regions, radii, strict=True):
            inside = (np.hypot(x - cx, y - cy) <= r for cx, cy in circles.centre_xy)
            values.append(np.array([read.pixels[mask].mean(axis=0) / 128 for mask in inside], np.float32))
        return slide_of(*regions, values=values, read=read, height=height, width=width, name=name)

    return make
