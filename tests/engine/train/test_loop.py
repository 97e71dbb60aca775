"""The training loop: it learns, goes on where it was, keeps the best epoch, and stops when it diverges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pixnet_sd.engine import TrainingSlide, make_fabric, training_tiles
from pixnet_sd.engine.train import RunState, Scores, Trainer, hold_out_blocks, train
from pixnet_sd.errors import CheckpointError, DivergenceError, PixNetError
from pixnet_sd.geometry import Grid
from pixnet_sd.model import build_operator

FILE = "training_state.pt"
OF_COUNTS = {"n_genes": 4, "link": "softplus"}  # three genes, and their sum


class Interrupted(Exception):
    """Stands in for a kill."""


@pytest.fixture
def run(fabric, make_run) -> Callable[..., Any]:
    return lambda network, training, held_out=(), **options: train(
        network, make_run(training, held_out, **options), fabric, show_progress_bar=False
    )


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


@pytest.fixture
def counted(learnable) -> Callable[..., TrainingSlide]:
    """Slides with counts in place of colours, and their sum last."""

    def make(seed: int = 0, name: str = "slide", depth: float = 1.0, **options: Any) -> TrainingSlide:
        slide = learnable(seed=seed, name=name, **options)
        rng = np.random.default_rng(seed)
        each = []
        for measured in slide.measured:
            n_px = measured.regions.area[:, None]
            counts = rng.poisson(0.5 * depth * n_px * measured.values**2).astype(np.float32)
            each.append(replace(measured, values=np.concatenate([counts, counts.sum(1, keepdims=True)], axis=1)))
        return replace(slide, measured=tuple(each), depth=depth)

    return make


@pytest.mark.parametrize("held", [False, True])
def test_learns(make_network, run, learnable, held: bool) -> None:
    """Of several slides and sizes, every one is read; the model is said to be worth what it is."""
    slides = [learnable(radii=(6.0, 10.0)), learnable(64, 150, seed=1, name="second")]
    other = learnable(seed=2, name="other")
    network = make_network()
    result = run(network, slides, [other] if held else [], max_epochs=10, stain_jitter=0.0)
    history, quality = result.history, result.quality
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert slides[1].read.calls
    n_tiles = len(training_tiles(slides[0], 64).tiles)
    assert len({call[:3:2] for call in slides[0].read.calls}) > 2 * n_tiles  # they move from epoch to epoch
    assert quality["mse"] < quality["gene_mean_mse"]
    assert not network.training
    if held:
        assert quality["pcc"] == max(row["val_pcc"] for row in history) > 0.6
    else:
        assert (result.best_epoch, result.pcc_per_gene, quality["scored_on"]) == (10, [], "training")
        assert quality["pcc"] > 0.3


def test_learns_counts(make_network, run, counted) -> None:
    """Of two sizes and depths; totals of regions of a size that it has not seen come out right too."""
    slides = [counted(radii=(5.0, 9.0)), counted(seed=2, name="deep", radii=(5.0, 9.0), depth=3.0)]
    network = make_network(**OF_COUNTS)
    options = {"objective": "nb_pcc", "stain_jitter": 0.0, "max_epochs": 30}
    assert run(network, slides, [counted(seed=1, name="other")], **options).quality["pcc"] > 0.5
    (other,) = counted(seed=1, radii=(7.0,)).measured
    features = network.eval()(torch.from_numpy(counted(seed=1).read(0, 96, 0, 128)).permute(2, 0, 1)[None].float())
    found = network.predict_regions(features, build_operator(other.regions, Grid(24, 32, 4))).detach().numpy()
    assert found[:, -1].sum() == pytest.approx(other.values[:, -1].sum(), rel=0.15)


def interrupt(monkeypatch: pytest.MonkeyPatch, epoch: int, *, saved: bool) -> None:
    """Stop the next run when the state of an epoch is written, before it or after."""
    save = RunState.save

    def saving(state: RunState, directory: Path) -> None:
        if saved or state.epoch != epoch:
            save(state, directory)
        if state.epoch == epoch:
            raise Interrupted

    monkeypatch.setattr(RunState, "save", saving)


@pytest.mark.parametrize(
    ("objective", "frozen", "epoch", "saved", "held"),
    [
        ("mse_pcc", False, 1, False, True),
        ("mse_pcc", True, 2, True, True),
        ("mse_pcc", True, 4, False, False),
        ("nb_pcc", False, 2, True, True),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    make_network, run, learnable, counted, monkeypatch, objective, frozen, epoch, saved, held
) -> None:
    """From the last epoch that was saved, which with short epochs is not the last."""
    slides = [learnable()] if objective == "mse_pcc" else [counted(), counted(seed=2, name="two", depth=2.0)]
    training, held_out = hold_out_blocks(slides[0], 0.3, 0) if held else (slides[0], None)
    data = [training, *slides[1:]], ([held_out] if held else [])
    network = partial(make_network, frozen=frozen, dropout=0.3, **({} if objective == "mse_pcc" else OF_COUNTS))
    options = {"anneal": True, "objective": objective, "max_epochs": 4, "save_every_s": 0.0 if saved else 60.0}
    straight, resumed = network(), network()
    expected = run(straight, *data, folder="straight", **options)
    interrupt(monkeypatch, epoch, saved=saved)
    with pytest.raises(Interrupted):
        run(network(), *data, **options)
    monkeypatch.undo()
    found = run(resumed, *data, **options)
    assert same(straight, resumed)
    one, other = ([row | {"seconds": 0} for row in result.history] for result in (found, expected))
    assert one == other
    assert found.best_epoch == expected.best_epoch


@pytest.mark.parametrize(("save_every_s", "epochs"), [(60.0, [1, 3]), (0.0, [1, 2, 3])])
def test_the_state_is_written_by_time_and_at_the_end(make_network, run, learnable, monkeypatch, save_every_s, epochs):
    written = []
    monkeypatch.setattr(RunState, "save", lambda state, directory: written.append(state.epoch))
    run(make_network(), [learnable()], save_every_s=save_every_s)
    assert written == epochs


@pytest.mark.parametrize(("frozen", "keep_best"), [(True, True), (False, False)])
def test_only_what_is_trained_is_kept(make_network, make_run, fabric, learnable, frozen, keep_best) -> None:
    """In one file at the end; a frozen encoder's features are gone, and its weights are not in it."""
    run, network = make_run([learnable()], [learnable(seed=1)], keep_best=keep_best), make_network(frozen=frozen)
    before = copy.deepcopy(network)
    train(network, run, fabric, show_progress_bar=False)
    assert same(before.encoder, network.encoder) == frozen
    assert not same(before.decoder, network.decoder)
    assert [path.name for path in run.directory.iterdir()] == [FILE]
    kept = RunState.load(run.directory, "this run")
    trained = {k for k in network.state_dict() if not (frozen and k.startswith("encoder."))}
    assert set(kept.network) == trained
    assert set(kept.best.weights) == (trained if keep_best else set())


def test_nothing_is_taken_from_a_run_that_left_no_state(make_network, run, learnable, monkeypatch) -> None:
    """Stopped in its first epoch, a run with another encoder leaves only kept features behind."""
    clean, after = (make_network(frozen=True) for _ in range(2))
    run(clean, [learnable()], folder="clean", max_epochs=1)
    interrupt(monkeypatch, 1, saved=False)
    with pytest.raises(Interrupted):
        run(make_network(frozen=True, seed=9), [learnable()], fingerprint="another run")
    monkeypatch.undo()
    run(after, [learnable()], max_epochs=1)
    assert same(clean, after)


def test_the_state_of_another_network_is_refused(make_network, run, learnable) -> None:
    run(make_network(), [learnable()], max_epochs=1)
    with pytest.raises(CheckpointError, match="to train anew"):
        run(make_network(laterals=False), [learnable()], max_epochs=1)


def scripted(monkeypatch: pytest.MonkeyPatch, *pccs: float, mse: tuple[float, ...] = ()) -> None:
    """Let validation find these scores, epoch by epoch, where the gene means have an error of 1."""
    errors = mse or (1.0,) * len(pccs)
    scores = iter(Scores(r, e, [r, 0.25, float("nan")], 1.0, 1.0) for r, e in zip(pccs, errors, strict=False))
    monkeypatch.setattr(Trainer, "score", lambda *_: next(scores))


@pytest.mark.parametrize(
    ("options", "pccs", "n_epochs", "best"),
    [
        ({"patience": 2}, (0.1, 0.5, 0.3, 0.5, 0.9), 4, 2),
        ({"keep_best": False, "patience": None}, (0.5, 0.1, 0.2, 0.1, 0.1), 5, 5),
    ],
)
def test_the_epoch_that_is_kept(make_network, run, learnable, monkeypatch, options, pccs, n_epochs, best) -> None:
    slide, network, shorter = learnable(), make_network(), make_network()
    with monkeypatch.context() as patch:
        scripted(patch, *pccs)
        result = run(network, [slide], [slide], max_epochs=5, **options)
    assert [row["val_pcc"] for row in result.history] == list(pccs[:n_epochs])
    assert result.best_epoch == best
    assert result.pcc_per_gene == pytest.approx([pccs[best - 1], 0.25, float("nan")], nan_ok=True)
    run(shorter, [slide], folder="shorter", max_epochs=best)
    assert same(network, shorter)


def test_a_run_that_had_stopped_early_stays_stopped(make_network, run, learnable, monkeypatch) -> None:
    """Its state has a good and a bad epoch, and there is no third score."""
    scripted(monkeypatch, 0.5, 0.1)
    for _ in range(2):
        result = run(make_network(), [learnable()], [learnable()], max_epochs=5, patience=1)
        assert (len(result.history), result.best_epoch) == (2, 1)


def test_a_frozen_encoder_sees_each_tile_once_a_symmetry(make_network, run, learnable) -> None:
    slide, passes = learnable(), []
    network = make_network(frozen=True)
    network.encoder.register_forward_hook(lambda *_: passes.append(1))
    run(network, [slide], max_epochs=8)
    n_tiles = len(set(slide.read.calls))
    assert n_tiles < len(slide.read.calls) == len(passes) <= 8 * n_tiles


@pytest.mark.parametrize(("aggregation", "n_px"), [("mean", 1), ("sum", 113)])
def test_the_head_starts_at_the_mean_target(make_network, run, learnable, aggregation: str, n_px: int) -> None:
    """Of a sum, over the pixels of a circle of radius 6."""
    slide, network = learnable(), make_network(aggregation=aggregation)
    slide.measured[0].values[:] *= n_px
    run(network, [slide], max_epochs=1, lr=1e-12)
    mean = slide.measured[0].values.mean(axis=0)
    np.testing.assert_allclose(network.head.bias.detach() * n_px, mean, rtol=0.02)


def test_the_papers_optimizer(make_network, run, learnable, monkeypatch) -> None:
    adam = Mock(wraps=torch.optim.Adam)
    monkeypatch.setattr(torch.optim, "Adam", adam)
    options = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-4}
    run(make_network(laterals=False, aggregation="sum"), [learnable()], max_epochs=1, **options)
    assert adam.call_args.kwargs == {"lr": 1e-3, "weight_decay": 1e-4}


def test_steps_are_counted_and_rates_annealed_over_them(make_network, run, learnable) -> None:
    rates = [row["lr"] for row in run(make_network(), [learnable()], anneal=True, max_epochs=100, max_steps=9).history]
    assert len(rates) == 3  # at least three steps an epoch, and none after the ninth
    assert np.argmax(rates) in (0, 1)
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize(
    ("objective", "lr", "held", "steps"),
    [
        ("mse_pcc", 3, False, {"max_epochs": 1, "max_steps": 1}),
        ("nb_pcc", 30, True, {"max_epochs": 1, "max_steps": 1}),
        ("nb_pcc", 30, False, {"max_epochs": 3}),
    ],
)
def test_divergence_is_an_error(make_network, run, learnable, counted, tmp_path, objective, lr, held, steps) -> None:
    """Of the last step too, which no loss has seen; NaN has an error of its own."""
    logs = objective == "mse_pcc"
    slide = learnable() if logs else counted()
    network = make_network(**({} if logs else OF_COUNTS))
    with pytest.raises(PixNetError, match="Lower lr") as caught:
        run(network, [slide], [slide] if held else [], objective=objective, lr=lr, **steps)
    if "became nan" not in str(caught.value):
        assert isinstance(caught.value, DivergenceError)
        assert f"{lr / 10:g}" in str(caught.value)
    assert "max_steps" not in steps or not (tmp_path / "run" / FILE).exists()


def test_the_state_before_a_divergence_stays(make_network, run, learnable, tmp_path) -> None:
    """The same call diverges again, from there."""
    state = tmp_path / "run" / FILE
    run(make_network(), [learnable()], max_epochs=2, folder="other")
    (tmp_path / "run").mkdir()
    before = (tmp_path / "other" / FILE).rename(state).read_bytes()
    for _ in range(2):
        with pytest.raises(DivergenceError, match="epoch 2 in .*checkpoint_dir"):
            run(make_network(), [learnable()], max_epochs=4, lr=3.0)
        assert state.read_bytes() == before


def test_a_good_epoch_before_a_divergence_is_the_model(make_network, run, learnable, monkeypatch) -> None:
    """Correlations see no scale: the epoch that exploded is not the best one."""
    network, two_epochs = make_network(), make_network()
    with monkeypatch.context() as patch:
        scripted(patch, 0.0, 0.1, 0.2, mse=(0.8, 0.7, 1e16))
        with pytest.warns(UserWarning, match=r"1e\+16.* of 2"):
            result = run(network, [learnable()], [learnable()], max_epochs=5)
    assert len(result.history) == 2
    assert result.quality == {"mse": 0.7, "gene_mean_mse": 1.0, "pcc": 0.1, "scored_on": "held_out"}
    run(two_epochs, [learnable()], folder="two", max_epochs=2)
    assert same(network, two_epochs)


@pytest.mark.parametrize(("mse", "keep_best"), [((float("nan"),), True), ((0.8, 1e16), False)])
def test_a_divergence_without_a_good_epoch(make_network, run, learnable, monkeypatch, mse, keep_best) -> None:
    scripted(monkeypatch, 0.0, 0.1, mse=mse)
    with pytest.raises(DivergenceError):
        run(make_network(), [learnable()], [learnable()], keep_best=keep_best)


def test_errors_surface(make_network, run, learnable) -> None:
    """Of reading, of regions larger than a tile before anything is read, and of a loss that is not finite."""
    slide, infinite = replace(learnable(), read=lambda *_: 1 / 0), learnable()
    with pytest.raises(ZeroDivisionError):
        run(make_network(), [slide])
    with pytest.raises(PixNetError, match="tile_px="):
        run(make_network(), [replace(slide, measured=learnable(radii=(30.0,)).measured)])
    infinite.measured[0].values[5, 1] = np.inf
    with pytest.raises(PixNetError, match="'slide'.*lr"):
        run(make_network(), [infinite])


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_on_a_gpu(make_network, make_run, learnable, frozen: bool) -> None:
    slide = learnable()
    result = train(make_network(frozen=frozen), make_run([slide], [slide], max_epochs=8), make_fabric("cuda"))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert max(row["val_pcc"] for row in result.history) > 0.3
