"""One pass over a slide, against the whole slide in one piece and Eq. 4-5 written out with masks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from pixnet_sd.engine import AHEAD, make_fabric
from pixnet_sd.engine.predict import Block, PredictPlan, RegionPlan, StoredMap, Tiling, Walk, plan_regions, window_side
from pixnet_sd.geometry import MAP_STRIDE, Circles, Grid, LabelGrid, Lattice, Polygons, RegionShare, Window
from pixnet_sd.model import Factors, Network, apply_head, build_encoder, receptive_radius_px

HEIGHT, WIDTH = 301, 371
GRID = Grid(76, 93, MAP_STRIDE)
GENES = np.array([2, 0])
TOLERANCE = 1e-5  # of the map's standard deviation

NETWORKS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"aggregation": "sum"},
    "density": {"aggregation": "sum", "link": "softplus"},
    "backbone": {},
}
WALKS = [
    ("mean", 64, 1, None),
    ("mean", 64, 3, 16),
    ("mean", 96, 1, 7),
    ("mean", 256, 1, 100),
    ("sum", 64, 1, None),
    ("density", 96, 1, 7),
    ("density", 160, 2, 12),
    ("backbone", 64, 4, 16),
    ("backbone", 256, 4, 100),
]
"""Network, tile side, batch size, block side: those that fit together and those that do not."""


@pytest.fixture(scope="module")
def pixels(draw) -> NDArray[np.uint8]:
    return draw(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def tissue() -> NDArray[np.bool_]:
    """Two pieces with ragged edges; the right fifth is glass."""
    y, x = np.mgrid[: GRID.height, : GRID.width]
    ragged = 3 * np.sin(x / 2) + 3 * np.cos(y / 3)
    return ((y - 30) ** 2 + (x - 35) ** 2 < (28 + ragged) ** 2) | ((y > 62 + ragged) & (x < 60))


@pytest.fixture(scope="module")
def known(make_network, pixels, reader) -> Callable[[str], tuple[Network, int, NDArray[np.float32]]]:
    """A network, its halo, and its map of the slide in one piece, far into the white around it, glass included."""

    @cache
    def make(name: str) -> tuple[Network, int, NDArray[np.float32]]:
        torch.manual_seed(0)
        encoder = build_encoder("test_resnet", None) if name == "backbone" else None
        network = make_network(**NETWORKS[name], encoder=encoder)
        for module in network.modules() if name == "backbone" else ():  # as if it had been trained
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        if name == "density":
            network.head.unit.copy_(torch.tensor([0.3, 1.0, 2.5]))
        halo_px = receptive_radius_px(network)
        edge = halo_px + 64
        image = reader(pixels)(-edge, 320 + edge, -edge, 384 + edge)
        with torch.no_grad():
            d = network.eval()(torch.from_numpy(image).permute(2, 0, 1)[None].float())
            whole = network.gene_map(d)[0, GENES.tolist()].numpy()
        first = edge // MAP_STRIDE
        return network, halo_px, whole[:, first : first + GRID.height, first : first + GRID.width]

    return make


@pytest.fixture(scope="module")
def gene_map(known) -> NDArray[np.float32]:
    return known("mean")[2]


def star(x: float, y: float, radius: float) -> NDArray[np.float64]:
    angle = np.arange(18) * np.pi / 9 + 0.1
    reach = np.where(np.arange(18) % 2, 0.6, 1.0) * radius
    return np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], 1)


ANYWHERE = np.random.default_rng(4).uniform([0, 0, 2], [WIDTH, HEIGHT, 40], (25, 3))
SPECIAL = [[0, 150, 30], [360, 280, 18], [350, 20, 6], [-90, 50, 20], [100, 100, 0.3]]
"""x, y and radius: partly outside, twice on glass, off the slide, and between pixel centres."""
XYR = np.concatenate([ANYWHERE, SPECIAL])

RINGS = [star(170, 140, 150), star(160, 120, 50), star(40, 260, 30), star(345, 60, 20)]
OWNER = np.array([0, 0, 1, 2])
"""Of three polygons: one larger than most tiles, with a hole; one on a border of the tissue; one on glass."""

ROW, COL = np.mgrid[: HEIGHT // 2, : WIDTH // 2]
LABELS = np.where((COL * 7 + ROW * 3) % 11 < 8, (ROW // 40 * 5 + COL // 37) * 10 + 5, 0).astype(np.int32)
"""Half the resolution of the slide: patches of 3 to 40 pixels, with ids that are no counts."""

CIRCLES = Circles(XYR[:, :2], XYR[:, 2])
POLYGONS = Polygons(np.concatenate(RINGS), np.arange(0, 18 * 5, 18), OWNER, 3)
KINDS = {
    "circles": CIRCLES,
    "polygons": POLYGONS,
    "labels": LabelGrid(LABELS, np.unique(LABELS)[1:].astype(np.int64), np.diag([2.0, 2.0, 1.0])),
}
NO_REGIONS = Circles(np.empty((0, 2)), np.empty(0))


def mask_of(regions: Any, k: int) -> NDArray[np.bool_]:
    """Pixels of a region, from its definition."""
    y, x = np.mgrid[: GRID.height * MAP_STRIDE, : GRID.width * MAP_STRIDE] + 0.5
    if isinstance(regions, Circles):
        cx, cy = regions.centre_xy[k]
        return (x - cx) ** 2 + (y - cy) ** 2 <= regions.radius[k] ** 2
    if isinstance(regions, Polygons):
        rings = [shapely.Polygon(RINGS[ring]) for ring in np.flatnonzero(k == OWNER)]
        return np.logical_xor.reduce([shapely.contains_xy(ring, x, y) for ring in rings])
    of_label = np.kron(regions.ids[k] == LABELS, np.ones((2, 2), bool))
    return np.pad(of_label, [(0, n - m) for n, m in zip(x.shape, of_label.shape, strict=True)])


def resized(low: NDArray[Any]) -> NDArray[np.float64]:
    full = torch.from_numpy(low.astype(np.float64))[None]
    return interpolate(full, scale_factor=MAP_STRIDE, mode="bilinear", align_corners=False)[0].numpy()


def literal(
    regions: Any, gene_map: NDArray[np.float32], tissue: NDArray[np.bool_], aggregation: str
) -> NDArray[np.float64]:
    """Eq. 4-5 by masks over the full-resolution map's tissue pixels; NaN where there are none."""
    whole, on_tissue, seen = resized(gene_map), resized(gene_map * tissue), resized(tissue[None])[0]
    values = []
    for k in range(len(regions)):
        mask = mask_of(regions, k)
        if not mask.any():  # the value at its centre, a corner of four pixels; NaN off the slide
            x, y = regions.centre_xy[k].astype(int)
            value = whole[:, y - 1 : y + 1, x - 1 : x + 1].mean(axis=(1, 2)) if min(x, y) > 0 else np.full(2, np.nan)
            values.append(value * (1 if aggregation == "mean" else regions.area[k]))
        else:
            n_px = seen[mask].sum() or np.nan
            values.append(on_tissue[:, mask].sum(axis=1) / n_px * (1 if aggregation == "mean" else n_px))
    return np.array(values)


@dataclass
class Map:
    """Keeps blocks in an array; NaN where nothing was written."""

    block_px: int
    shape: tuple[int, int] = (GRID.height, GRID.width)
    n_channels: int = len(GENES)
    done: set[Block] = field(default_factory=set)
    written: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = np.full((self.n_channels, *self.shape), np.nan, np.float32)

    @property
    def blocks(self) -> list[Block]:
        (height, width), side = self.shape, self.block_px
        corners = itertools.product(range(0, height, side), range(0, width, side))
        return [(r, min(r + side, height), c, min(c + side, width)) for r, c in corners]

    def write(self, block: Block, values: NDArray[np.float32]) -> None:
        row0, row1, col0, col1 = block
        assert values.shape == (self.n_channels, row1 - row0, col1 - col0)
        self.values[:, row0:row1, col0:col1] = values
        self.written.append(block)


class Walked:
    """What came of a walk: the regions' sums, added up over windows, and the map."""

    def __init__(self, n: int, n_columns: int, sink: Map | None) -> None:
        self.sums, self.weight, self.whole = np.zeros((n, n_columns)), np.zeros(n), np.zeros(n, int)
        self.windows: list[Window] = []
        self.map, self.tiles_run, self.windows_reused, self.aggregation = sink, 0, 0, "mean"

    def put(self, share: RegionShare) -> None:
        window, index, sums, weight, complete = share
        assert window not in self.windows
        assert (np.diff(index) > 0).all()
        assert len(index) == len(sums) == len(weight) == len(complete)
        self.windows.append(window)
        assert not self.weight[index[complete]].any()  # a complete share comes alone
        self.sums[index] += sums
        self.weight[index] += weight
        self.whole[index] += complete

    @property
    def values(self) -> NDArray[np.float64]:
        off = self.weight[:, None] == 0
        return np.where(off, np.nan, self.sums / np.where(off | (self.aggregation == "sum"), 1, self.weight[:, None]))


@pytest.fixture(scope="module")
def walk(known, pixels, reader, fabric, tissue) -> Callable[..., Walked]:
    network, halo_px, _ = known("mean")

    def run(
        regions: Any = NO_REGIONS,
        tile_px: int = 64,
        batch_size: int = 1,
        block_px: int | None = None,
        *,
        sink: Map | None = None,
        done: Callable[[Window], bool] = lambda window: False,
        n_symmetries: int = 1,
        plan: RegionPlan | None = None,
        read: Any = None,
        net: Network = network,
        halo: int = halo_px,
        fabric: Any = fabric,
        **options: Any,
    ) -> Walked:
        sink = sink or (Map(block_px) if block_px else None)
        plan = plan or plan_regions(regions, GRID, tissue)
        tiling, side = Tiling(tile_px, halo, batch_size, n_symmetries), window_side(tile_px, sink and sink.block_px)
        head = net.head.select(GENES)
        whole = PredictPlan(plan, tiling, side, head, **({"shown": head} | options))
        found = Walked(len(plan.regions), whole.n_columns, sink)
        visits = whole.visits([b for b in sink.blocks if b not in sink.done] if sink else [], done)
        with Walk(net, read or reader(pixels), whole, visits, fabric) as walking:
            for result in walking.results(show_progress_bar=False):
                for block, lent in result.blocks:
                    with lent() as values:
                        sink.write(block, values)
                if result.share is not None:
                    with result.share() as share:
                        found.put(share)
        found.tiles_run, found.windows_reused = walking.n_tiles, sum(visit.reuse for visit in visits)
        found.aggregation = net.aggregation
        return found

    return run


def stored_map(values: NDArray[np.float32], columns: int = GRID.width, **options: Any) -> StoredMap:
    """A gene map of which the columns up to one were predicted."""
    read = lambda w: values[:, w.row0 : w.row1, w.col0 : w.col1]  # noqa: E731
    return StoredMap(read, (GRID.height, columns), **options)


def assert_close(found: NDArray[Any], expected: NDArray[Any], unit: float, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * unit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "tile_px", "batch_size", "block_px"), WALKS)
def test_neither_map_nor_regions_depend_on_the_walk(
    walk, known, tissue, kind, name, tile_px, batch_size, block_px
) -> None:
    """Nor does it matter whether the map is written as well; glass blocks are never written, the others once.

    Densities are summed over the map after the link.
    """
    (net, halo, whole), regions = known(name), KINDS[kind]
    found = walk(regions, tile_px, batch_size, block_px, net=net, halo=halo)
    expected, n_px = literal(regions, whole, tissue, net.aggregation), 1
    if net.aggregation == "sum":
        n_px = np.array([max(mask_of(regions, k).sum(), 1) for k in range(len(regions))])[:, None]
    assert_close(found.values / n_px, expected / n_px, whole.std())
    if block_px is not None:
        with_tissue = [b for b in found.map.blocks if tissue[b[0] : b[1], b[2] : b[3]].any()]
        assert sorted(found.map.written) == sorted(with_tissue)
        expected = np.full_like(whole, np.nan)
        for row0, row1, col0, col1 in with_tissue:
            expected[:, row0:row1, col0:col1] = (whole * tissue)[:, row0:row1, col0:col1]
        assert_close(found.map.values, expected, whole.std())


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_sums_of_d_become_those_of_the_genes(make_network, walk, aggregation) -> None:
    net = make_network(aggregation=aggregation)
    found = walk(CIRCLES, net=net, pooled=True, block_px=16)
    on_slide = found.weight > 0
    weight, n_px = net.head.weight.detach()[GENES], torch.from_numpy(found.weight[on_slide]).float()[:, None]
    pooled = torch.from_numpy(found.sums[on_slide]).float()
    values = apply_head(pooled, n_px, weight, net.head.bias.detach()[GENES], aggregation).numpy()
    expected = walk(CIRCLES, net=net).values
    np.testing.assert_array_equal(on_slide, ~np.isnan(expected).any(axis=1))
    np.testing.assert_allclose(values, expected[on_slide], rtol=1e-5, atol=1e-5 * np.nanstd(expected))


def test_two_threads_take_a_tile_each(walk, gene_map, tissue) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = walk(CIRCLES, block_px=16)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert_close(found.map.values[:, tissue], gene_map[:, tissue], gene_map.std())
    assert_close(found.values, literal(CIRCLES, gene_map, tissue, "mean"), gene_map.std())


def test_a_halo_too_narrow_shows(walk, gene_map, tissue) -> None:
    """The tests above can fail."""
    found = walk(block_px=16, halo=0).map.values
    assert np.abs(found - gene_map)[:, tissue].max() > 0.01 * gene_map.std()


def test_only_tissue_tiles_run(walk, known, pixels, reader, tissue) -> None:
    """And without a map only those at regions, (345, 20) being glass; a forward pass takes tiles of several windows."""
    (network, halo_px, _), read, passes = known("mean"), reader(pixels), []
    handle = network.encoder.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    found = walk(block_px=16, batch_size=4, read=read)
    handle.remove()
    corners = itertools.product(range(0, GRID.height, 16), range(0, GRID.width, 16))
    wanted = [(row, col) for row, col in corners if tissue[row : row + 16, col : col + 16].any()]
    origins = [((r + halo_px) // MAP_STRIDE, (c + halo_px) // MAP_STRIDE) for r, _, c, _ in read.calls]
    assert sorted(origins) == wanted
    assert all((r1 - r0, c1 - c0) == (64 + 2 * halo_px,) * 2 for r0, r1, c0, c1 in read.calls)
    full, rest = divmod(len(wanted), 4)
    assert passes == [4] * full + [rest] * bool(rest)
    assert found.tiles_run == len(wanted)
    for centres, n_tiles in ([[100, 100]], 1), ([[100, 100], [345, 20]], 1), ([[345, 20]], 0), ([[-50, 100]], 0):
        assert walk(Circles(centres, 4.0)).tiles_run == n_tiles
    assert walk().tiles_run == 0


@pytest.mark.parametrize("offset", np.arange(-7, 8, 3.5))
def test_a_small_region_beside_a_corner_of_tiles(walk, gene_map, tissue, offset: float) -> None:
    """Its bilinear weights reach into tiles that its pixels do not touch."""
    circle = Circles([[128.2 + offset, 127.8 - 0.4 * offset]], 1.2)
    expected = literal(circle, gene_map, tissue, "mean")
    assert_close(walk(circle).values, expected, gene_map.std())


@pytest.fixture(scope="module")
def stored(walk) -> NDArray[np.float32]:
    return np.nan_to_num(walk(block_px=16).map.values)


@pytest.mark.parametrize(
    ("kind", "columns"), [*((kind, GRID.width) for kind in KINDS), *(("polygons", n) for n in (0, 40, 64))]
)
def test_a_stored_map_gives_the_same_values(walk, stored, gene_map, tissue, kind, columns) -> None:
    """Of a whole one no tile is run."""
    regions, values = KINDS[kind], stored.copy()
    values[:, :, columns:] = 1e6  # not to be read
    found = walk(regions, stored=stored_map(values, columns))
    assert_close(found.values, literal(regions, gene_map, tissue, "mean"), gene_map.std())
    assert (found.windows_reused > 0) == (columns > 0)
    assert (found.tiles_run > 0) == (columns < GRID.width)


@pytest.mark.parametrize(("link", "pooled"), [("identity", False), ("identity", True), ("softplus", False)])
def test_stored_factors_give_map_and_regions(make_network, walk, tissue, link, pooled: bool) -> None:
    net = make_network(link=link)
    factors = Factors(net.head.in_features)
    values = np.nan_to_num(walk(sink=Map(16, n_channels=factors.n_outputs), net=net, shown=factors).map.values)
    np.testing.assert_array_equal(values[-1], tissue)
    assert not values[:, ~tissue].any()
    on_tissue = POLYGONS.subset([0, 1])
    options = {"net": net, "block_px": 16, "pooled": pooled}
    expected = walk(on_tissue, **options)
    found = walk(on_tissue, stored=stored_map(values[:-1], has_features=True), **options)
    assert found.tiles_run == 0 < found.windows_reused
    np.testing.assert_allclose(found.map.values, expected.map.values, rtol=1e-5, atol=1e-6)
    assert_close(found.sums, expected.sums, np.abs(expected.sums).max())


@pytest.mark.parametrize("block_px", [8, 16])
def test_a_map_that_was_cut_off_goes_on(walk, gene_map, tissue, block_px: int) -> None:
    """Blocks that are done are left alone; regions over them are predicted all the same."""
    sink = Map(block_px)
    sink.done = set(sink.blocks[::3])
    found = walk(CIRCLES, sink=sink)
    assert not set(sink.written) & sink.done
    assert walk(sink=Map(block_px, done=set(sink.blocks))).tiles_run == 0
    assert set(sink.written) | sink.done >= {b for b in sink.blocks if tissue[b[0] : b[1], b[2] : b[3]].any()}
    assert_close(found.values, literal(CIRCLES, gene_map, tissue, "mean"), gene_map.std())
    there = tissue & ~np.isnan(sink.values[0])
    assert_close(sink.values[:, there], gene_map[:, there], gene_map.std())


@pytest.mark.parametrize(
    ("n_symmetries", "move", "holds"),
    [(8, np.rot90, True), (8, np.transpose, True), (4, np.flipud, True), (4, np.rot90, False), (1, np.fliplr, False)],
)
def test_averaging_makes_the_prediction_turn_with_the_slide(
    walk, draw, reader, n_symmetries: int, move: Callable[..., Any], holds: bool
) -> None:
    """Of sides that 32 divides, so that turning keeps every pixel in place under the coarsest stride."""
    pixels, (y, x) = draw(160, 192, seed=3), np.mgrid[:40, :48]
    tissue = (y - 15) ** 2 + (x - 25) ** 2 < 14**2
    moved = np.stack([move(pixels[..., c]) for c in range(3)], -1)
    maps = []
    for picture, mask in ((pixels, tissue), (moved, move(tissue).copy())):
        plan = plan_regions(NO_REGIONS, Grid(*mask.shape, MAP_STRIDE), mask)
        found = walk(plan=plan, sink=Map(16, mask.shape), read=reader(picture), n_symmetries=n_symmetries)
        maps.append(np.nan_to_num(found.map.values))
    expected = np.stack([move(gene) for gene in maps[0]])
    difference = np.abs(expected - maps[1]).max() / maps[0][:, tissue].std()
    assert difference < 1e-5 if holds else difference > 1e-2


def test_a_read_that_fails_surfaces(walk, pixels, reader) -> None:
    good = reader(pixels)
    with pytest.raises(ZeroDivisionError):
        walk(block_px=16, read=lambda *window: good(*window) if len(good.calls) < 4 else 1 / 0)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_few_tiles_are_held_at_once(walk, pixels, reader, batch_size: int) -> None:
    read = reader(pixels)
    assert walk(NO_REGIONS, 32, batch_size, 64, read=read).tiles_run > 5 * batch_size + 35
    assert read.most_alive <= batch_size + max(AHEAD, batch_size + 1) + 3


def test_the_network_is_left_in_evaluation_mode_without_gradients(make_network, walk) -> None:
    net = make_network(dropout=0.5).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    once, again = (walk(CIRCLES, 64, net=net.train()).values for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_windows_that_are_done_are_left_alone(walk) -> None:
    windows = walk(CIRCLES).windows
    found = walk(CIRCLES, done=lambda window: window in windows[:7])
    assert found.windows == windows[7:]
    assert found.tiles_run == len(windows) - 7


@pytest.mark.parametrize(("angle", "radius"), [(0.0, None), (0.0, 2.4), (np.deg2rad(0.5), None)])
def test_lattices_equal_their_plain_regions(walk, gene_map, angle: float, radius: float | None) -> None:
    row, col = (part.ravel() for part in np.mgrid[:58, :72])
    turn = np.array([[np.cos(angle), -np.sin(angle), 4.3], [np.sin(angle), np.cos(angle), 2.9], [0, 0, 1]])
    bins = Lattice(row, col, turn @ np.diag([5, 5, 1.0]), radius)
    one, other = (walk(each, 96, block_px=32) for each in (bins, bins.plain()))
    assert_close(one.values, other.values, gene_map.std())
    np.testing.assert_array_equal(one.whole, other.whole)


@pytest.mark.gpu
def test_on_a_gpu(known, walk, gene_map, tissue) -> None:
    """bf16 rounds, and that is all."""
    found = walk(CIRCLES, 64, 4, 16, net=copy.deepcopy(known("mean")[0]), fabric=make_fabric("cuda"))
    assert_close(found.map.values[:, tissue], gene_map[:, tissue], gene_map.std(), 0.1)
    assert_close(found.values, literal(CIRCLES, gene_map, tissue, "mean"), gene_map.std(), 0.1)
