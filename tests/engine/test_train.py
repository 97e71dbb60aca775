from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixnet_sd.engine import TrainingSlide, make_fabric
from pixnet_sd.engine.train import RunState, TrainSettings, hold_out_blocks, train
from pixnet_sd.engine.train import _loop as module
from pixnet_sd.engine.train._loop import TrainResult
from pixnet_sd.engine.train._validate import Scores
from pixnet_sd.errors import CheckpointError, DivergenceError, PixNetError
from pixnet_sd.geometry import Grid
from pixnet_sd.model import Network, build_operator

SETTINGS = TrainSettings(max_epochs=3, lr=5e-3, tile_px=64, batch_size=3)


class Interrupted(Exception):
    """Stands in for a kill."""


@pytest.fixture
def run(fabric, tmp_path: Path) -> Callable[..., TrainResult]:
    def start(
        network: Network,
        slides: Sequence[TrainingSlide],
        held_out: Sequence[TrainingSlide] = (),
        *,
        folder: str = "run",
        fingerprint: str = "this run",
        **settings: Any,
    ) -> TrainResult:
        return train(
            network,
            slides,
            held_out,
            replace(SETTINGS, **settings),
            fabric=fabric,
            directory=tmp_path / folder,
            fingerprint=fingerprint,
            show_progress_bar=False,
        )

    return start


def weights(network: Network) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a | b)


def without_seconds(result: TrainResult) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


def test_learns(make_network, run, learnable) -> None:
    slide, other = learnable(), learnable(seed=1, name="other")
    network = make_network(n_genes=3)
    history = run(network, [slide], [other], max_epochs=10, stain_jitter=0.0).history
    assert [row["epoch"] for row in history] == list(range(1, 11))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["val_pcc"] > 0.6
    assert history[-1]["val_mse"] < history[0]["val_mse"]


@pytest.fixture
def counted(learnable) -> Callable[..., TrainingSlide]:
    """The same slides with counts in place of colours, and their sum last."""

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


@pytest.mark.parametrize("objective", ["poisson", "nb"])
def test_learns_counts(make_network, run, counted, fabric, tmp_path, objective: str) -> None:
    """Of two sizes and depths; totals of regions of a size that it has not seen come out right too."""
    slides = [counted(radii=(5.0, 9.0)), counted(seed=2, name="deep", radii=(5.0, 9.0), depth=3.0)]
    network = make_network(n_genes=4, link="softplus")
    options = {"objective": objective, "stain_jitter": 0.0, "max_epochs": 30}
    history = run(network, slides, [counted(seed=1, name="other")], **options).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["val_pcc"] > 0.5
    (other,) = counted(seed=1, radii=(7.0,)).measured
    features = network.eval()(torch.from_numpy(counted(seed=1).read(0, 96, 0, 128)).permute(2, 0, 1)[None].float())
    found = network.predict_regions(features, build_operator(other.regions, Grid(24, 32, 4))).detach().numpy()
    assert found[:, -1].sum() == pytest.approx(other.values[:, -1].sum(), rel=0.15)


def test_a_resumed_run_of_counts_ends_where_the_uninterrupted_one_does(make_network, run, counted, monkeypatch) -> None:
    slides = [counted(), counted(seed=2, name="two", depth=2.0)]
    options = {"objective": "nb"}
    straight, resumed = (make_network(n_genes=4, link="softplus") for _ in range(2))
    run(straight, slides, folder="straight", **options)
    interrupt(monkeypatch, 2, saved=True)
    with pytest.raises(Interrupted):
        run(make_network(n_genes=4, link="softplus"), slides, **options)
    monkeypatch.undo()
    run(resumed, slides, **options)
    assert same(weights(straight), weights(resumed))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_seed_decides(make_network, run, learnable, frozen: bool) -> None:
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        network = make_network(frozen=frozen, dropout=0.3)
        result = run(network, [learnable()], folder=folder, seed=seed, max_epochs=2)
        found.append((weights(network), without_seconds(result)))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


def interrupt(monkeypatch: pytest.MonkeyPatch, epoch: int, *, saved: bool) -> None:
    """Stop the next run at the end of an epoch, after or before its state is written."""
    save = RunState.save

    def stop(state: RunState, directory: Path) -> None:
        if saved or state.epoch < epoch:
            save(state, directory)
        if state.epoch == epoch:
            raise Interrupted

    monkeypatch.setattr(RunState, "save", stop)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("epoch", "saved", "held"),
    [(1, False, True), (1, True, False), (2, True, True), (3, False, False), (3, True, True)],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    make_network, run, learnable, monkeypatch, frozen: bool, epoch: int, saved: bool, held: bool
) -> None:
    slide = learnable()
    training, held_out = hold_out_blocks(slide, 0.3, 0) if held else (slide, None)
    data = [training], ([held_out] if held else [])
    options = {"anneal": True}
    straight, resumed = (make_network(frozen=frozen, dropout=0.3) for _ in range(2))
    expected = run(straight, *data, folder="straight", **options)

    interrupt(monkeypatch, epoch, saved=saved)
    with pytest.raises(Interrupted):
        run(make_network(frozen=frozen, dropout=0.3), *data, **options)
    monkeypatch.undo()
    found = run(resumed, *data, **options)

    assert same(weights(straight), weights(resumed))
    assert without_seconds(found) == without_seconds(expected)
    assert found.best_epoch == expected.best_epoch
    np.testing.assert_array_equal(found.pcc_per_gene, expected.pcc_per_gene)


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_taken_from_a_run_that_left_no_state(make_network, run, learnable, monkeypatch, frozen) -> None:
    """Stopped in its first epoch, a run with another encoder leaves only stored pyramids behind."""
    clean, after = (make_network(frozen=frozen) for _ in range(2))
    run(clean, [learnable()], folder="clean")
    interrupt(monkeypatch, 1, saved=False)
    with pytest.raises(Interrupted):
        run(make_network(frozen=frozen, seed=9), [learnable()], fingerprint="another run")
    monkeypatch.undo()
    run(after, [learnable()])
    assert same(weights(clean), weights(after))


def test_the_state_of_another_run_is_refused(make_network, run, learnable, monkeypatch) -> None:
    interrupt(monkeypatch, 1, saved=True)
    with pytest.raises(Interrupted):
        run(make_network(), [learnable()], fingerprint="another run")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="other data or settings"):
        run(make_network(), [learnable()])


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_state_is_left_behind(make_network, run, learnable, tmp_path: Path, monkeypatch, frozen: bool) -> None:
    directory = tmp_path / "run"
    seen = []
    save = RunState.save

    def look(state: RunState, folder: Path) -> None:
        save(state, folder)
        seen.append(sorted(p.name for p in folder.iterdir()))

    monkeypatch.setattr(RunState, "save", look)
    run(make_network(frozen=frozen), [learnable()])
    assert all("training_state.pt" in names for names in seen)
    assert ("features" in seen[-1]) or not frozen
    assert [path.name for path in directory.iterdir()] == ["training_state.pt"]


def scripted(monkeypatch: pytest.MonkeyPatch, *pccs: float) -> None:
    """Let validation return these, epoch by epoch."""
    scores = iter(pccs)
    monkeypatch.setattr(module, "validate", lambda *_: Scores(next(scores), 1.0, [0.5, 0.25, float("nan")], 1.0, 1.0))


def test_early_stopping_restores_the_best_epoch(make_network, run, learnable, monkeypatch) -> None:
    slide = learnable()
    scripted(monkeypatch, 0.1, 0.5, 0.3, 0.5, 0.9)
    network, two_epochs = make_network(), make_network()
    result = run(network, [slide], [slide], max_epochs=5, patience=2)
    assert [row["val_pcc"] for row in result.history] == [0.1, 0.5, 0.3, 0.5]
    assert result.best_epoch == 2
    assert result.pcc_per_gene == pytest.approx([0.5, 0.25, float("nan")], nan_ok=True)
    run(two_epochs, [slide], folder="two", max_epochs=2)
    assert same(weights(network), weights(two_epochs))
    assert not network.training


def test_the_last_epoch_on_request(make_network, run, learnable, monkeypatch) -> None:
    slide = learnable()
    scripted(monkeypatch, 0.5, 0.1, 0.2)
    network, plain = make_network(), make_network()
    assert run(network, [slide], [slide], keep_best=False).best_epoch == 3
    run(plain, [slide], folder="plain")
    assert same(weights(network), weights(plain))


def test_without_patience_all_epochs_run(make_network, run, learnable, monkeypatch) -> None:
    scripted(monkeypatch, 0.5, 0.1, 0.1, 0.1)
    result = run(make_network(), [learnable()], [learnable()], max_epochs=4)
    assert len(result.history) == 4
    assert result.best_epoch == 1


def test_a_run_killed_while_it_stopped_early_stays_stopped(make_network, run, learnable, monkeypatch) -> None:
    scripted(monkeypatch, 0.5, 0.1, 0.1)
    interrupt(monkeypatch, 2, saved=True)
    options = {"max_epochs": 5, "patience": 1}
    with pytest.raises(Interrupted):
        run(make_network(), [learnable()], [learnable()], **options)
    monkeypatch.undo()
    result = run(make_network(), [learnable()], [learnable()], **options)
    assert len(result.history) == 2
    assert result.best_epoch == 1


def test_without_held_out_regions_the_last_epoch_counts(make_network, run, learnable) -> None:
    result = run(make_network(), [learnable()], patience=1)
    assert result.best_epoch == 3
    assert result.pcc_per_gene == []
    assert set(result.history[0]) == {"epoch", "loss", "lr", "seconds"}


def test_several_slides_and_sizes(make_network, run, learnable) -> None:
    """Each slide with its own sizes; every one is read, and the held-out one only for validation."""
    slides = [
        learnable(100, 90, radii=(4.0, 10.0)),
        learnable(64, 150, seed=1, name="second"),
        learnable(90, 90, radii=(3.0, 6.0, 9.0), seed=2, name="third"),
    ]
    result = run(make_network(), slides[:2], slides[2:], max_epochs=6)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert len(result.pcc_per_gene) == 3
    assert all(s.read.calls for s in slides)


def test_a_frozen_encoder_reads_each_tile_once_a_symmetry(make_network, run, learnable) -> None:
    slide = learnable()
    network = make_network(frozen=True)
    passes = []
    network.encoder.register_forward_hook(lambda *_: passes.append(1))
    run(network, [slide], symmetries=False, max_epochs=4)
    n_tiles = len(set(slide.read.calls))
    assert len(slide.read.calls) == len(passes) == n_tiles > 1


def test_a_frozen_encoder_stays_as_it_is(make_network, run, learnable) -> None:
    network = make_network(frozen=True)
    encoder, decoder = (
        {k: v.clone() for k, v in part.state_dict().items()} for part in (network.encoder, network.decoder)
    )
    run(network, [learnable()])
    assert same(encoder, network.encoder.state_dict())
    assert not same(decoder, network.decoder.state_dict())


def test_tiles_move_from_epoch_to_epoch(make_network, run, learnable) -> None:
    slide = learnable()
    run(make_network(), [slide], max_epochs=3)
    assert len({(row0, col0) for row0, _, col0, _ in slide.read.calls}) > 2 * 4


def test_the_head_starts_at_the_mean_target(make_network, run, learnable) -> None:
    for aggregation in ("mean", "sum"):
        slide = learnable()
        if aggregation == "sum":
            slide.measured[0].values[:] *= 113  # pixels of a circle of radius 6
        network = make_network(aggregation=aggregation)
        run(network, [slide], max_epochs=1, lr=0.0, folder=aggregation)
        mean = slide.measured[0].values.mean(axis=0)
        n_px = 1 if aggregation == "mean" else 113
        np.testing.assert_allclose(network.head.bias.detach() * n_px, mean, rtol=0.02)


def test_the_papers_settings(make_network, run, learnable, monkeypatch) -> None:
    """Adam at a constant rate, no laterals, sums, no jitter."""
    made = []
    adam = torch.optim.Adam

    def spy(*args: Any, **options: Any) -> torch.optim.Optimizer:
        made.append(options)
        return adam(*args, **options)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    network = make_network(laterals=False, aggregation="sum")
    options = {"optimizer": "adam", "stain_jitter": 0.0, "lr": 1e-3, "weight_decay": 1e-4}
    history = run(network, [learnable()], max_epochs=6, **options).history
    assert made == [{"lr": 1e-3, "weight_decay": 1e-4}]
    assert {row["lr"] for row in history} == {1e-3}
    assert history[-1]["loss"] < history[0]["loss"]


def test_annealed_rates(make_network, run, learnable) -> None:
    rates = [row["lr"] for row in run(make_network(), [learnable()], anneal=True, max_epochs=5).history]
    assert np.argmax(rates) in (0, 1)
    assert rates[-1] < 0.1 * max(rates)


def test_a_loss_that_is_not_finite(make_network, run, learnable) -> None:
    slide = learnable()
    slide.measured[0].values[5, 1] = np.inf
    with pytest.raises(PixNetError, match=r"loss became .* on slide 'slide'.*Lower lr"):
        run(make_network(), [slide])


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("lr", [3, 30])
@pytest.mark.parametrize("objective", ["mse_pcc", "poisson", "nb"])
@pytest.mark.parametrize("steps", [{"max_epochs": 1, "max_steps": 1}, {"max_epochs": 3}], ids=["one step", "epochs"])
def test_divergence_is_an_error(make_network, run, learnable, counted, tmp_path, objective, lr, held, steps) -> None:
    """Of the last step too, which no loss has seen; NaN has an error of its own."""
    logs = objective == "mse_pcc"
    slide = learnable() if logs else counted()
    network = make_network(n_genes=3) if logs else make_network(n_genes=4, link="softplus")
    with pytest.raises(PixNetError, match=r"Lower lr") as caught:
        run(network, [slide], [slide] if held else [], objective=objective, lr=lr, **steps)
    if "became nan" not in str(caught.value):
        assert isinstance(caught.value, DivergenceError)
        assert f"for instance to {lr / 10:g}" in str(caught.value)
    assert "max_steps" not in steps or not (tmp_path / "run" / "training_state.pt").exists()


def test_the_state_before_a_divergence_stays(make_network, run, learnable, tmp_path) -> None:
    """The same call diverges again, from there."""
    state = tmp_path / "run" / "training_state.pt"
    run(make_network(), [learnable()], max_epochs=2, folder="other")
    (tmp_path / "run").mkdir()
    before = (tmp_path / "other" / "training_state.pt").rename(state).read_bytes()
    for _ in range(2):
        with pytest.raises(DivergenceError, match="Epoch 2 is still in"):
            run(make_network(), [learnable()], max_epochs=4, lr=3.0)
        assert state.read_bytes() == before


def exploding(monkeypatch: pytest.MonkeyPatch, *mse: float) -> None:
    """Let validation find these errors, where the gene means have 1, and ever better correlations."""
    scores = iter(Scores(k / 10, value, [k / 10], 1.0, 1.0) for k, value in enumerate(mse))
    monkeypatch.setattr(module, "validate", lambda *_: next(scores))


def test_a_good_epoch_before_a_divergence_is_the_model(make_network, run, learnable, monkeypatch) -> None:
    """Correlations do not see a scale: the epoch that exploded is not the best one."""
    exploding(monkeypatch, 0.8, 0.7, 1e16)
    network, two_epochs = make_network(), make_network()
    with pytest.warns(UserWarning, match=r"diverged: .*1e\+16.* the model is that of 2"):
        result = run(network, [learnable()], [learnable()], max_epochs=5)
    assert result.best_epoch == 2
    assert len(result.history) == 2
    assert result.quality == {"mse": 0.7, "gene_mean_mse": 1.0, "pcc": 0.1, "scored_on": "held_out"}
    run(two_epochs, [learnable()], folder="two", max_epochs=2)
    assert same(weights(network), weights(two_epochs))


@pytest.mark.parametrize("value", [1e16, float("nan")])
def test_a_divergence_without_a_good_epoch_is_an_error(make_network, run, learnable, monkeypatch, value) -> None:
    exploding(monkeypatch, value)
    with pytest.raises(DivergenceError):
        run(make_network(), [learnable()], [learnable()], folder="first")
    exploding(monkeypatch, 0.8, value)
    with pytest.raises(DivergenceError):
        run(make_network(), [learnable()], [learnable()], keep_best=False)


@pytest.mark.parametrize("held", [False, True])
def test_what_a_model_is_worth(make_network, run, learnable, held) -> None:
    slide = learnable()
    quality = run(make_network(), [slide], [slide] if held else [], max_epochs=6, stain_jitter=0.0).quality
    assert quality["scored_on"] == ("held_out" if held else "training")
    values = slide.measured[0].values
    assert quality["gene_mean_mse"] == pytest.approx(values.var(axis=0).mean(), rel=1e-4 if held else 0.3)
    assert quality["mse"] < quality["gene_mean_mse"]
    assert quality["pcc"] > 0.3


def test_an_error_while_reading_surfaces(make_network, run, learnable) -> None:
    def broken(*_: int) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(make_network(), [replace(learnable(), read=broken)])


def test_regions_larger_than_a_tile_are_refused_before_anything_is_read(make_network, run, learnable) -> None:
    slide = learnable(radii=(30.0,))
    slide.read.calls.clear()
    with pytest.raises(PixNetError, match="tile_px="):
        run(make_network(), [slide])
    assert not slide.read.calls


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_on_a_gpu(make_network, learnable, tmp_path: Path, frozen: bool) -> None:
    slide = learnable()
    settings = replace(SETTINGS, max_epochs=8)
    fabric = make_fabric("cuda")
    result = train(
        make_network(frozen=frozen), [slide], [slide], settings, fabric=fabric, directory=tmp_path, fingerprint="gpu"
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert max(row["val_pcc"] for row in result.history) > 0.3
