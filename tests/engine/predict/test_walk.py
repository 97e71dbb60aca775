"""One pass over a slide, against the whole slide in one piece and Eq. 4-5 written out with masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from pixnet_sd.engine import AHEAD, make_fabric
from pixnet_sd.engine.predict import PredictPlan, RegionPlan, StoredMap, Tiling, Walk, plan_regions, window_side
from pixnet_sd.geometry import MAP_STRIDE, Circles, Grid, LabelGrid, Lattice, Polygons, RegionShare, Window
from pixnet_sd.model import Factors, Network, apply_head, build_encoder, receptive_radius_px

Block = tuple[int, int, int, int]

HEIGHT, WIDTH = 301, 371
GRID = Grid(76, 93, MAP_STRIDE)
GENES = np.array([2, 0])
TOLERANCE = 1e-5  # of the map's standard deviation

WALKS = [(64, 1, None), (64, 3, 16), (96, 1, 7), (160, 2, 12), (256, 1, 100)]
"""Tile side, batch size, block side: those that fit together and those that do not."""


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
def network(make_network) -> Network:
    return make_network()


@pytest.fixture(scope="module")
def halo_px(network) -> int:
    return receptive_radius_px(network)


@pytest.fixture(scope="module")
def gene_map(network, pixels, reader, halo_px) -> NDArray[np.float32]:
    """The whole slide in one piece, far into the white around it, glass included: (genes, rows, columns)."""
    return one_piece(network, reader(pixels), halo_px)


def one_piece(network: Network, read: Any, halo_px: int) -> NDArray[np.float32]:
    edge = halo_px + 64
    image = read(-edge, 320 + edge, -edge, 384 + edge)
    with torch.no_grad():
        d = network.eval()(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        whole = network.gene_map(d)[0, GENES.tolist()].numpy()
    first = edge // MAP_STRIDE
    return whole[:, first : first + GRID.height, first : first + GRID.width]


def some_circles() -> Circles:
    """Anywhere, partly outside, on glass, off the slide, and one between pixel centres."""
    rng = np.random.default_rng(4)
    centres = rng.uniform([0, 0], [WIDTH, HEIGHT], (25, 2))
    special = [[0, 150], [360, 280], [350, 20], [-90, 50], [100.0, 100.0]]
    return Circles(np.concatenate([centres, special]), np.r_[rng.uniform(2, 40, 25), 30, 18, 6, 20, 0.3])


def star(centre: tuple[float, float], radius: float, n: int = 9) -> NDArray[np.float64]:
    angle = np.arange(2 * n) * np.pi / n + 0.1
    reach = np.where(np.arange(2 * n) % 2, 0.6, 1.0) * radius
    return np.stack([centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)], 1)


RINGS = [[star((170, 140), 150), star((160, 120), 50)], [star((40, 260), 30)], [star((345, 60), 20)]]
"""Of three polygons: one larger than most tiles, with a hole; one on a border of the tissue; one on glass."""


def some_polygons() -> Polygons:
    rings = [ring for polygon in RINGS for ring in polygon]
    owner = [k for k, polygon in enumerate(RINGS) for _ in polygon]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rings])])
    return Polygons(np.concatenate(rings), offsets, np.array(owner), len(RINGS))


def label_image() -> NDArray[np.int32]:
    """Half the resolution of the slide: patches of 3 to 40 pixels, with ids that are no counts."""
    y, x = np.mgrid[: HEIGHT // 2, : WIDTH // 2]
    patch = (y // 40) * 5 + x // 37
    return np.where((x * 7 + y * 3) % 11 < 8, patch * 10 + 5, 0).astype(np.int32)


def some_labels() -> LabelGrid:
    labels = label_image()
    return LabelGrid(labels, np.unique(labels)[1:].astype(np.int64), np.diag([2.0, 2.0, 1.0]))


KINDS = {"circles": some_circles, "polygons": some_polygons, "labels": some_labels}


def mask_of(regions: Any, k: int) -> NDArray[np.bool_]:
    """Pixels of a region, from its definition."""
    y, x = np.mgrid[: GRID.height * MAP_STRIDE, : GRID.width * MAP_STRIDE] + 0.5
    if isinstance(regions, Circles):
        cx, cy = regions.centre_xy[k]
        return (x - cx) ** 2 + (y - cy) ** 2 <= regions.radius[k] ** 2
    if isinstance(regions, Polygons):
        return shapely.contains_xy(shapely.Polygon(RINGS[k][0], RINGS[k][1:]), x, y)
    full = np.zeros(x.shape, np.int64)
    twice = np.kron(label_image(), np.ones((2, 2), np.int64))
    full[: twice.shape[0], : twice.shape[1]] = twice
    return full == regions.ids[k]


def resized(low: NDArray[Any]) -> NDArray[np.float64]:
    full = torch.from_numpy(low.astype(np.float64))[None]
    return interpolate(full, scale_factor=MAP_STRIDE, mode="bilinear", align_corners=False)[0].numpy()


def literal(
    regions: Any, gene_map: NDArray[np.float32], tissue: NDArray[np.bool_], aggregation: str
) -> NDArray[np.float64]:
    """Eq. 4-5 by masks over the full-resolution map: tissue pixels, or all of them on glass."""
    whole, on_tissue, seen = resized(gene_map), resized(gene_map * tissue), resized(tissue[None])[0]
    values = []
    for k in range(len(regions)):
        mask = mask_of(regions, k)
        if not mask.any():
            values.append(at_centre(whole, regions, k) * (1 if aggregation == "mean" else regions.area[k]))
        else:
            glass = seen[mask].sum() == 0
            total = (whole if glass else on_tissue)[:, mask].sum(axis=1)
            divisor = (mask.sum() if glass else seen[mask].sum()) if aggregation == "mean" else 1
            values.append(total / divisor)
    return np.array(values)


def at_centre(whole: NDArray[np.float64], regions: Any, k: int) -> NDArray[np.float64]:
    """Value at a region's centre, a corner of four pixels; NaN off the slide."""
    x, y = regions.centre_xy[k].astype(int)
    return whole[:, y - 1 : y + 1, x - 1 : x + 1].mean(axis=(1, 2)) if min(x, y) > 0 else np.full(len(whole), np.nan)


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


class Rows:
    """Keeps the regions' sums in an array, added up over windows."""

    def __init__(self, n: int, n_columns: int, done: Callable[[Window], bool]) -> None:
        self.sums, self.weight = np.zeros((n, n_columns)), np.zeros(n)
        self.whole = np.zeros(n, int)
        self.windows: list[Window] = []
        self.is_done = done

    def put(self, share: RegionShare) -> None:
        window, index, sums, weight, complete = share
        assert window not in self.windows
        assert (np.diff(index) > 0).all()
        assert len(index) == len(sums) == len(weight) == len(complete)
        self.windows.append(window)
        assert not self.weight[index[complete]].any()  # a complete share comes alone
        self.sums[index] += sums
        self.weight[index] += weight
        self.whole[index] += np.where(complete, 1, 0)

    def values(self, aggregation: str) -> NDArray[np.float64]:
        off = self.weight[:, None] == 0
        return np.where(off, np.nan, self.sums / np.where(off | (aggregation == "sum"), 1, self.weight[:, None]))


@dataclass
class Walked:
    """What came of a walk."""

    values: NDArray[np.float64]
    tiles_run: int
    windows_reused: int
    rows: Rows


@pytest.fixture(scope="module")
def walk(network, pixels, reader, fabric, halo_px, tissue) -> Callable[..., Walked]:
    def run(
        regions: Any = None,
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
        shown: Any = None,
        pooled: bool = False,
        stored: StoredMap | None = None,
        fabric: Any = fabric,
    ) -> Walked:
        if sink is None and block_px is not None:
            sink = Map(block_px)
        if regions is None:
            regions = Circles(np.empty((0, 2)), np.empty(0))
        head = net.head.select(GENES)
        whole = PredictPlan(
            plan or plan_regions(regions, GRID, tissue, 16),
            Tiling(tile_px, halo, batch_size, n_symmetries),
            window_side(tile_px, sink.block_px if sink else None),
            head,
            shown or head,
            pooled,
            stored,
        )
        rows = Rows(len(whole.regions.regions), whole.n_columns, done)
        visits = whole.visits([b for b in sink.blocks if b not in sink.done] if sink else [], rows.is_done)
        with Walk(net, read or reader(pixels), whole, visits, fabric) as walking:
            for result in walking.results(show_progress_bar=False):
                for block, lent in result.blocks:
                    with lent() as values:
                        sink.write(block, values)
                if result.share is not None:
                    with result.share() as share:
                        rows.put(share)
        n_reused = sum(visit.reuse for visit in visits)
        return Walked(rows.values(net.aggregation), walking.n_tiles, n_reused, rows)

    return run


def stored_map(values: NDArray[np.float32], columns: int = GRID.width, **options: Any) -> StoredMap:
    """A gene map of which the columns up to one were predicted."""
    read = lambda w: values[:, w.row0 : w.row1, w.col0 : w.col1]  # noqa: E731
    return StoredMap(read, (GRID.height, columns), **options)


def assert_close(found: NDArray[Any], expected: NDArray[Any], unit: float, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * unit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tile_px", "batch_size", "block_px"), WALKS)
def test_neither_map_nor_regions_depend_on_the_walk(
    walk, gene_map, tissue, kind, tile_px, batch_size, block_px
) -> None:
    """Nor does it matter whether the map is written as well; glass blocks are never written, the others once."""
    regions, sink = KINDS[kind](), Map(block_px) if block_px else None
    found = walk(regions, tile_px, batch_size, sink=sink)
    assert_close(found.values, literal(regions, gene_map, tissue, "mean"), gene_map.std())
    if sink is not None:
        with_tissue = [b for b in sink.blocks if tissue[b[0] : b[1], b[2] : b[3]].any()]
        assert sorted(sink.written) == sorted(with_tissue)
        expected = np.full_like(gene_map, np.nan)
        for row0, row1, col0, col1 in with_tissue:
            expected[:, row0:row1, col0:col1] = (gene_map * tissue)[:, row0:row1, col0:col1]
        assert_close(sink.values, expected, gene_map.std())


@pytest.mark.parametrize("kind", KINDS)
def test_sums(make_network, walk, gene_map, tissue, kind) -> None:
    regions = KINDS[kind]()
    expected = literal(regions, gene_map, tissue, "sum")
    n_px = np.array([max(mask_of(regions, k).sum(), 1) for k in range(len(regions))])[:, None]
    found = walk(regions, net=make_network(aggregation="sum"))
    assert_close(found.values / n_px, expected / n_px, gene_map.std())


@pytest.fixture(scope="module")
def density(make_network) -> Network:
    net = make_network(link="softplus")
    net.head.unit.copy_(torch.tensor([0.3, 1.0, 2.5]))
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tile_px", "batch_size", "block_px"), WALKS[2:4])
def test_densities(density, walk, pixels, reader, halo_px, tissue, kind, tile_px, batch_size, block_px) -> None:
    """The link comes before the Resize: regions are sums over the map of densities, whatever the walk."""
    whole = one_piece(density, reader(pixels), halo_px)
    regions, sink = KINDS[kind](), Map(block_px) if block_px else None
    n_px = np.array([max(mask_of(regions, k).sum(), 1) for k in range(len(regions))])[:, None]
    found = walk(regions, tile_px, batch_size, sink=sink, net=density).rows.sums
    expected = literal(regions, whole, tissue, "sum")
    some = ~np.isnan(expected).any(axis=1)
    assert_close(found[some] / n_px[some], expected[some] / n_px[some], whole.std())
    if sink is not None:
        seen = ~np.isnan(sink.values)
        assert_close(sink.values[seen], np.where(tissue, whole, 0)[seen], whole.std())
        assert np.nanmin(sink.values) >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_sums_of_d_become_those_of_the_genes(make_network, walk, tissue, kind, aggregation) -> None:
    net, regions = make_network(aggregation=aggregation), KINDS[kind]()
    rows = walk(regions, net=net, pooled=True, block_px=16).rows
    some = rows.weight > 0
    weight, n_px = net.head.weight.detach()[GENES], torch.from_numpy(rows.weight[some]).float()[:, None]
    pooled = torch.from_numpy(rows.sums[some]).float()
    found = apply_head(pooled, n_px, weight, net.head.bias.detach()[GENES], aggregation).numpy()
    expected = walk(regions, net=net).values
    np.testing.assert_array_equal(some, ~np.isnan(expected).any(axis=1))
    np.testing.assert_allclose(found, expected[some], rtol=1e-5, atol=1e-5 * np.nanstd(expected))


def test_a_real_backbone(make_network, walk, pixels, reader, tissue) -> None:
    torch.manual_seed(0)
    net = make_network(encoder=build_encoder("test_resnet", None))
    for module in net.modules():  # as if it had been trained
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    halo = receptive_radius_px(net)
    expected = one_piece(net, reader(pixels), halo)
    regions = some_circles()
    for tile_px, block_px in ((64, 16), (256, 100)):
        sink = Map(block_px)
        found = walk(regions, tile_px, 4, sink=sink, net=net, halo=halo)
        assert_close(sink.values[:, tissue], expected[:, tissue], expected.std())
        assert_close(found.values, literal(regions, expected, tissue, "mean"), expected.std())


def test_a_halo_too_narrow_shows(walk, gene_map, tissue) -> None:
    """The tests above can fail."""
    sink = Map(16)
    walk(None, 64, sink=sink, halo=0)
    assert np.abs(sink.values - gene_map)[:, tissue].max() > 0.01 * gene_map.std()


def test_only_tissue_tiles_run(walk, network, pixels, reader, tissue, halo_px) -> None:
    read, passes = reader(pixels), []
    handle = network.encoder.register_forward_hook(lambda *_: passes.append(1))
    found = walk(None, 64, 1, sink=Map(16), read=read)
    handle.remove()
    wanted = {
        (row, col)
        for row in range(0, GRID.height, 16)
        for col in range(0, GRID.width, 16)
        if tissue[row : row + 16, col : col + 16].any()
    }
    origins = [((r + halo_px) // MAP_STRIDE, (c + halo_px) // MAP_STRIDE) for r, _, c, _ in read.calls]
    assert len(origins) == len(passes) == found.tiles_run
    assert sorted(origins) == sorted(wanted)
    assert all((r1 - r0, c1 - c0) == (64 + 2 * halo_px,) * 2 for r0, r1, c0, c1 in read.calls)


def test_without_a_map_only_tiles_at_regions_run(walk, pixels, reader) -> None:
    read = reader(pixels)
    assert walk(Circles([[100, 100]], 4.0), 64, read=read).tiles_run == len(read.calls) == 1
    assert walk(Circles([[100, 100], [345, 20]], 4.0), 64, read=read).tiles_run == 2  # the second one on glass
    assert walk(Circles([[-50, 100]], 4.0), 64, read=read).tiles_run == 0
    assert walk(None, 64, read=read).tiles_run == 0


@pytest.mark.parametrize("offset", np.arange(-7, 8, 3.5))
def test_a_small_region_beside_a_corner_of_tiles(walk, gene_map, tissue, offset: float) -> None:
    """Its bilinear weights reach into tiles that its pixels do not touch."""
    circle = Circles([[128.2 + offset, 127.8 - 0.4 * offset]], 1.2)
    expected = literal(circle, gene_map, tissue, "mean")
    assert_close(walk(circle, 64).values, expected, gene_map.std())


@pytest.fixture(scope="module")
def stored(walk) -> NDArray[np.float32]:
    sink = Map(16)
    walk(None, 64, sink=sink)
    return np.nan_to_num(sink.values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_map_gives_the_same_values(walk, stored, gene_map, tissue, kind, pixels, reader) -> None:
    """Without a tile run, unless regions lie on glass, which the map knows nothing of."""
    regions = KINDS[kind]()
    plan = plan_regions(regions, GRID, tissue, 16)
    read = reader(pixels)
    found = walk(plan=plan, tile_px=64, stored=stored_map(stored), read=read)
    assert_close(found.values, literal(regions, gene_map, tissue, "mean"), gene_map.std())
    assert found.windows_reused > 0
    assert len(read.calls) == found.tiles_run < walk(regions, 64).tiles_run

    on_tissue = regions.subset(np.nonzero(~plan.on_glass)[0])
    again = walk(on_tissue, 64, stored=stored_map(stored), read=reader(pixels))
    assert again.tiles_run == 0
    assert_close(again.values, found.values[~plan.on_glass], gene_map.std())


@pytest.fixture(params=["identity", "softplus"])
def with_factors(request, make_network, walk, tissue) -> tuple[Network, StoredMap]:
    """A network and the factors of its map."""
    net = make_network(link=request.param)
    sink = Map(16, n_channels=net.head.in_features + 1)
    walk(None, 64, sink=sink, net=net, shown=Factors(net.head.in_features))
    values = np.nan_to_num(sink.values)
    np.testing.assert_array_equal(values[-1], tissue)
    assert not values[:, ~tissue].any()
    return net, stored_map(values[:-1], has_features=True)


@pytest.mark.parametrize("pooled", [False, True])
def test_stored_factors_give_map_and_regions(walk, with_factors, tissue, pooled: bool) -> None:
    net, kept = with_factors
    pooled = pooled and net.head.is_linear
    regions = some_polygons()
    on_tissue = regions.subset(np.nonzero(~plan_regions(regions, GRID, tissue, 16).on_glass)[0])

    direct, sink = Map(16), Map(16)
    expected = walk(on_tissue, 64, net=net, sink=direct, pooled=pooled)
    found = walk(on_tissue, 64, net=net, sink=sink, pooled=pooled, stored=kept)
    assert found.tiles_run == 0 < found.windows_reused
    np.testing.assert_allclose(sink.values, direct.values, rtol=1e-5, atol=1e-6)
    assert_close(found.rows.sums, expected.rows.sums, np.abs(expected.rows.sums).max())


@pytest.mark.parametrize("columns", [0, 40, 64])
def test_part_of_a_stored_map(walk, stored, gene_map, tissue, columns: int) -> None:
    regions = some_polygons()
    partial = stored.copy()
    partial[:, :, columns:] = 1e6  # not to be read
    found = walk(regions, 64, stored=stored_map(partial, columns))
    assert_close(found.values, literal(regions, gene_map, tissue, "mean"), gene_map.std())
    assert (found.windows_reused > 0) == (columns > 0)
    assert found.tiles_run > 0


@pytest.mark.parametrize("block_px", [8, 16])
def test_a_map_that_was_cut_off_goes_on(walk, gene_map, tissue, block_px: int) -> None:
    """Blocks that are done are left alone; regions over them are predicted all the same."""
    regions, sink = some_circles(), Map(block_px)
    sink.done = set(sink.blocks[::3])
    found = walk(regions, 64, sink=sink)
    assert not set(sink.written) & sink.done
    assert walk(None, 64, sink=Map(block_px, done=set(sink.blocks))).tiles_run == 0
    assert set(sink.written) | sink.done >= {b for b in sink.blocks if tissue[b[0] : b[1], b[2] : b[3]].any()}
    assert_close(found.values, literal(regions, gene_map, tissue, "mean"), gene_map.std())
    there = tissue & ~np.isnan(sink.values[0])
    assert_close(sink.values[:, there], gene_map[:, there], gene_map.std())


def square_slide(draw: Callable[..., NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Sides that 32 divides, so that turning it keeps every pixel in place under the coarsest stride."""
    y, x = np.mgrid[:40, :48]
    return draw(160, 192, seed=3), (y - 15) ** 2 + (x - 25) ** 2 < 14**2


@pytest.mark.parametrize(
    ("n_symmetries", "move", "holds"),
    [
        (8, np.rot90, True),
        (8, np.transpose, True),
        (4, np.flipud, True),
        (4, np.rot90, False),
        (1, np.fliplr, False),
    ],
)
def test_averaging_makes_the_prediction_turn_with_the_slide(
    walk, draw, reader, n_symmetries: int, move: Callable[..., Any], holds: bool
) -> None:
    pixels, tissue = square_slide(draw)
    moved = np.stack([move(pixels[..., c]) for c in range(3)], -1)
    maps = []
    for picture, mask in ((pixels, tissue), (moved, move(tissue).copy())):
        empty = Circles(np.empty((0, 2)), np.empty(0))
        plan = plan_regions(empty, Grid(*mask.shape, MAP_STRIDE), mask, 16)
        sink = Map(16, mask.shape)
        walk(plan=plan, tile_px=64, sink=sink, read=reader(picture), n_symmetries=n_symmetries)
        maps.append(np.nan_to_num(sink.values))
    here = np.stack([move(gene) for gene in maps[0]])
    difference = np.abs(here - maps[1]).max() / maps[0][:, tissue].std()
    assert (difference < 1e-5) == holds
    assert holds or difference > 1e-2


def test_tissue_at_the_far_corner(walk, pixels, reader, gene_map) -> None:
    """The last map pixel hangs over the slide's edge."""
    mask = np.zeros((GRID.height, GRID.width), bool)
    mask[-1, -1] = True
    plan = plan_regions(Circles([[WIDTH - 1, HEIGHT - 1]], 4.0), GRID, mask, 16)
    sink = Map(16)
    found = walk(plan=plan, tile_px=64, sink=sink)
    assert found.tiles_run == 1
    assert_close(sink.values[:, -1, -1], gene_map[:, -1, -1], gene_map.std())
    assert_close(found.values[0], gene_map[:, -1, -1], gene_map.std())


def test_a_read_that_fails_surfaces(walk, pixels, reader) -> None:
    good, calls = reader(pixels), []

    def read(*window: int) -> NDArray[np.uint8]:
        calls.append(window)
        if len(calls) == 4:
            raise OSError("the disk is gone")
        return good(*window)

    with pytest.raises(OSError, match="the disk is gone"):
        walk(None, 64, sink=Map(16), read=read)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_few_tiles_are_held_at_once(walk, pixels, reader, batch_size: int) -> None:
    read = reader(pixels)
    found = walk(None, 32, batch_size, sink=Map(64), read=read)
    assert found.tiles_run > 5 * batch_size + 35
    assert read.most_alive <= batch_size + max(AHEAD, batch_size + 1) + 3


def test_the_network_is_left_in_evaluation_mode_without_gradients(make_network, walk) -> None:
    net = make_network(dropout=0.5).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    once, again = (walk(some_circles(), 64, net=net.train()).values for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_a_forward_pass_takes_tiles_of_several_windows(walk, network, batch_size: int) -> None:
    passes: list[int] = []
    handle = network.encoder.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    found = walk(some_circles(), 64, batch_size)
    handle.remove()
    assert len(found.rows.windows) >= found.tiles_run > batch_size
    full, rest = divmod(found.tiles_run, batch_size)
    assert passes == [batch_size] * full + [rest] * bool(rest)


def test_windows_that_are_done_are_left_alone(walk, gene_map, tissue) -> None:
    regions = some_circles()
    first = walk(regions, 64).rows
    found = walk(regions, 64, done=lambda window: window in first.windows[:7])
    assert found.rows.windows == first.windows[7:]
    assert found.tiles_run == len(first.windows) - 7


@pytest.mark.parametrize(("tile_px", "block_px"), [(64, None), (64, 100), (256, None)])
def test_complete_shares_are_the_only_ones(walk, tile_px: int, block_px: int | None) -> None:
    """`Rows.put` sees to it that a complete share comes alone; most small regions have one."""
    small = lattice_of_bins(8.0, np.deg2rad(0.5))
    rows = walk(small, tile_px, block_px=block_px).rows
    assert set(rows.whole) <= {0, 1}
    seen = rows.weight > 0
    assert rows.whole[seen].mean() > 0.5
    wide = walk(small, 512).rows
    assert (wide.whole[wide.weight > 0] == 1).all()


def lattice_of_bins(pitch: float, angle: float, radius: float | None = None) -> Lattice:
    row, col = (part.ravel() for part in np.mgrid[: int(290 / pitch), : int(360 / pitch)])
    turn = np.array([[np.cos(angle), -np.sin(angle), 4.3], [np.sin(angle), np.cos(angle), 2.9], [0, 0, 1]])
    return Lattice(row, col, turn @ np.diag([pitch, pitch, 1]), radius)


@pytest.mark.parametrize("angle", [0.0, np.deg2rad(0.5)])
@pytest.mark.parametrize("radius", [None, 2.4])
def test_lattices_equal_their_plain_regions(walk, gene_map, angle: float, radius: float | None) -> None:
    bins = lattice_of_bins(5.0, angle, radius)
    one, other = walk(bins, 96, block_px=32), walk(bins.plain(), 96, block_px=32)
    assert_close(one.values, other.values, gene_map.std())
    np.testing.assert_array_equal(one.rows.whole, other.rows.whole)


@pytest.mark.gpu
def test_on_a_gpu(make_network, walk, gene_map, tissue) -> None:
    """bf16 rounds, and that is all."""
    regions, sink = some_circles(), Map(16)
    found = walk(regions, 64, 4, sink=sink, net=make_network(), fabric=make_fabric("cuda"))
    assert_close(sink.values[:, tissue], gene_map[:, tissue], gene_map.std(), 0.1)
    assert_close(found.values, literal(regions, gene_map, tissue, "mean"), gene_map.std(), 0.1)
