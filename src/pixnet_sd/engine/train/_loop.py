"""When a training has left any sane range: it is stopped, as nothing comes back from there.

The training loop: tiles in, the objective down, the best epoch on held-out regions out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd._util import bar_class, logger, warn
from pixnet_sd.engine import N_SYMMETRIES, TrainingSlide, TrainingTiles, fixed_shapes, prefetch, training_tiles
from pixnet_sd.errors import CheckpointError, DivergenceError, PixNetError
from pixnet_sd.geometry import MAP_STRIDE, Regions
from pixnet_sd.model import Network, Objective, count_pixels, make_objective

from ._batches import Batch, BatchPlan, make_batch, plan_batches
from ._features import FeatureMaps, calibrate
from ._objective import BatchLoss, TrainSettings, learning_rate
from ._state import BestEpoch, RunState
from ._validate import Scores, gene_means, score_training, validate

__all__ = ["TrainResult", "Watch", "train"]

_ABSURD = 100.0  # times the loss at the start, where the head predicts the genes' means


class Watch:
    """Judges losses and scores of a run.

    Parameters
    ----------
    lr
        Learning rate of the run.
    start
        Loss where the run began, if it began before; otherwise the first loss that is seen.
    """

    def __init__(self, lr: float, start: float | None = None) -> None:
        self.lr, self.start = lr, start

    def loss(self, value: float, slide: str) -> None:
        """Judge the loss of a step, or of an epoch.

        Raises
        ------
        DivergenceError
            It is a hundred times what it was at the start.
        PixNetError
            It is not finite.
        """
        if not math.isfinite(value):
            raise PixNetError(
                f"The loss became {value} on slide {slide!r}. Lower lr (now {self.lr:g}), or look for extreme values "
                "in the table."
            )
        if self.start is None:
            self.start = value
        if value > _ABSURD * (1 + abs(self.start)):
            raise self._error(
                f"the loss became {value:.3g} on slide {slide!r}, from {self.start:.3g} where each gene is predicted "
                "at its mean"
            )

    def scores(self, scores: Scores, which: str) -> None:
        """Judge the scores after an epoch, on regions that are held out or not.

        Raises
        ------
        DivergenceError
            They are absurd, see `Scores.is_absurd`.
        """
        if not scores.is_absurd:
            return
        found = f"the mean squared error on {which} regions became {scores.mse:.3g}, and of each gene's mean it is "
        found += f"{scores.gene_mean_mse:.3g}"
        if scores.counts_are_off:
            found += f"; predicted counts are {scores.count_ratio:.3g} times those measured"
        raise self._error(found)

    def _error(self, found: str) -> DivergenceError:
        return DivergenceError(
            f"The training diverged: {found}. Lower lr= (now {self.lr:g}), for instance to {self.lr / 10:g}."
        )


_SAMPLE = 1024  # regions whose pixels are counted for a typical size
_SMALL_BYTES = 64 << 20  # of a state: history, scores, dispersions
_LOOK_EVERY = 16  # steps between looks at the loss, each of which waits for the device
_STEPS_A_SCORE = 50  # of training for one batch that is scored where nothing is held out
_MOST_SCORED = 8  # batches


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves besides the network's weights.

    Attributes
    ----------
    history
        One row an epoch: epoch, loss, val_pcc, val_mse, val_gene_mean_mse, lr, seconds.
    best_epoch
        The epoch whose weights the network has.
    pcc_per_gene
        Held-out PCC of each gene at that epoch; empty without held-out regions.
    quality
        Of these weights: ``mse``, ``gene_mean_mse`` (of predicting the genes' means over the training regions) and
        ``pcc``, and ``scored_on`` which regions: ``"held_out"``, or else some for ``"training"``.
    """

    history: list[dict[str, float]]
    best_epoch: int
    pcc_per_gene: list[float]
    quality: dict[str, Any]


def _seed_epoch(seed: int, epoch: int) -> np.random.Generator:
    """One stream a (seed, epoch): a resumed run draws what the uninterrupted one would have drawn."""
    sequence = np.random.SeedSequence((seed, epoch))
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def _start_head(network: Network, slides: Sequence[TrainingSlide], each_mean: list[list[NDArray[Any]]]) -> None:
    """Start the head at the mean target of the training regions, of each slide and size."""
    means = [mean for of_slide in each_mean for mean in of_slide]
    n_px = [count_pixels(_some(m.regions), s.height, s.width) for s in slides for m in s.measured]
    if network.head.is_linear:
        typical = float(np.median([np.median(each) for each in n_px]))
        network.start_from(torch.from_numpy(np.mean(means, axis=0)), typical)
        return
    depth = [s.depth for s in slides for _ in s.measured]
    density = [mean / (each.mean() * d) for mean, each, d in zip(means, n_px, depth, strict=True)]
    network.start_at(torch.from_numpy(np.mean(density, axis=0)))


def _some(regions: Regions) -> Regions:
    """Up to a thousand of them, from everywhere."""
    return regions.subset(np.unique(np.linspace(0, len(regions) - 1, _SAMPLE).astype(np.intp)))


class _Run:
    """One training run: network, optimizer, tiles and state."""

    def __init__(
        self,
        network: Network,
        slides: Sequence[TrainingSlide],
        held_out: Sequence[TrainingSlide],
        settings: TrainSettings,
        fabric: Fabric,
        directory: Path,
    ) -> None:
        self.slides, self.held_out, self.settings = slides, held_out, settings
        self.network, self.directory = network, directory
        self.features = FeatureMaps(network, fabric, settings, directory / "features")
        self.fabric = fabric
        self.sizes = list(dict.fromkeys(m.size_name for s in slides for m in s.measured))
        self.objective = _objective(network, settings, len(self.sizes))
        self.objective.to(fabric.device)
        self.optimizer = _optimizer(network, self.objective, settings, fabric)
        self.fixed_tiles = [training_tiles(s, settings.tile_px) for s in slides]
        self.mean_targets = [[m.values.mean(axis=0) for m in s.measured] for s in slides]
        self.means = gene_means(self.mean_targets, slides, self.objective)
        self.watch = Watch(settings.lr)
        self.unscored = 0  # steps since the training regions were scored
        self.last: Scores | None = None  # of them

    def tiles(self, rng: np.random.Generator) -> list[TrainingTiles]:
        """Tiles of an epoch: moved at random, unless stored features tie them to their places."""
        if self.features.stored:
            return self.fixed_tiles
        shifts = [tuple(rng.random(2)) for _ in self.slides]
        return [training_tiles(s, self.settings.tile_px, shift=d) for s, d in zip(self.slides, shifts, strict=True)]

    def epoch(self, epoch: int, steps_before: int, bar: Any) -> tuple[float, int]:
        """Pass over all tiles once, or until the run has taken its steps; returns the mean loss and the steps taken."""
        rng = _seed_epoch(self.settings.seed, epoch)
        tiles = self.tiles(rng)
        n_symmetries = N_SYMMETRIES if self.settings.symmetries else 1
        plans = plan_batches(tiles, self.settings.batch_size, rng, n_symmetries)
        if self.settings.max_steps is not None:
            plans = plans[: self.settings.max_steps - steps_before]
        self.network.train()
        losses: list[Tensor] = []
        for step, batch in enumerate(self.batches(tiles, plans)):
            losses.append(self.step(batch, tiles, self.rate(epoch - 1 + step / len(plans), steps_before + step)))
            if step % _LOOK_EVERY == 0:
                value = self.sane(losses[-1], batch)
                bar.set_postfix_str(f"step {step + 1}/{len(plans)}, loss {value:.4f}")
        return self.sane(torch.stack(losses).mean(), batch), len(losses)

    def rate(self, epochs: float, steps: int) -> float:
        """Learning rate after so many epochs and steps."""
        shares = [epochs / self.settings.max_epochs]
        if self.settings.max_steps is not None:
            shares.append(steps / self.settings.max_steps)
        return learning_rate(self.settings, max(shares))

    def batches(self, tiles: list[TrainingTiles], plans: list[BatchPlan]) -> Iterator[Batch]:
        """The epoch's batches, read ahead."""
        options = {"with_image": not self.features.stored, "pin": self.features.pins}
        made = prefetch(
            partial(make_batch, self.slides[p.slide], tiles[p.slide], p, MAP_STRIDE, **options) for p in plans
        )
        return self.features.copies.arriving(made)

    def step(self, batch: Batch, tiles: list[TrainingTiles], rate: float) -> Tensor:
        """One step of the optimizer; returns the loss, which nothing waits for."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        features = self.features.of(batch, self.slides[batch.plan.slide], tiles[batch.plan.slide])
        self.optimizer.zero_grad()
        loss = self.loss(batch).backward(features, self.fabric)
        self.optimizer.step()
        return loss

    def loss(self, batch: Batch) -> BatchLoss:
        """What a batch's features are trained on."""
        slide = self.slides[batch.plan.slide]
        sizes = [self.sizes.index(m.size_name) for m in slide.measured]
        return BatchLoss(self.network, self.objective, batch.operators, batch.targets, sizes, slide.depth)

    def sane(self, loss: Tensor, batch: Batch) -> float:
        """The loss as a number, if it is one to go on with."""
        value = loss.item()
        self.watch.loss(value, self.slides[batch.plan.slide].name)
        return value

    def restore(self, state: RunState) -> None:
        """Take up a saved state."""
        if state.epoch:
            try:
                self.network.load_state_dict(state.network)
                self.optimizer.load_state_dict(state.optimizer)
                self.objective.load_state_dict(state.extras)
                self.watch.start = state.history[0]["loss"]
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"The training state of epoch {state.epoch} is of another network ({type(error).__name__}). Delete "
                    f"the folder {str(self.directory)!r} to train anew."
                ) from error
            logger.info("resuming after epoch %d", state.epoch)

    def record(self, state: RunState, epoch: int, loss: float, steps: int, started: float) -> dict[str, float]:
        """Score, and write the epoch into the state: not at all if its weights are absurd."""
        row = {"epoch": float(epoch), "loss": loss}
        if self.held_out:
            options = (self.held_out, self.settings, self.means)
            scores = validate(self.network, self.objective, self.features, *options)
            self.watch.scores(scores, "held-out")
            row |= {"val_pcc": scores.pcc, "val_mse": scores.mse, "val_gene_mean_mse": scores.gene_mean_mse}
            if scores.pcc > state.best.pcc or not self.settings.keep_best:
                weights = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
                state.best = BestEpoch(epoch, scores.pcc, scores.pcc_per_gene, weights)
        else:
            self.score_training(state.steps + steps, steps, is_last=self.is_last(epoch, state.steps + steps))
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
        state.history.append(row)
        state.epoch, state.steps = epoch, state.steps + steps
        state.network, state.optimizer = self.network.state_dict(), self.optimizer.state_dict()
        state.extras = self.objective.state_dict()
        return row

    def is_last(self, epoch: int, steps: int) -> bool:
        """Whether the run ends here, early stopping aside."""
        most = self.settings.max_steps
        return epoch >= self.settings.max_epochs or (most is not None and steps >= most)

    def score_training(self, n_steps: int, new_steps: int, *, is_last: bool) -> None:
        """Look at the weights that the last step left, which no loss has seen: now and then, and at the end."""
        self.unscored += new_steps
        if not is_last and self.unscored < _STEPS_A_SCORE:
            return
        self.unscored = 0
        self.last = self.training_scores(n_steps if is_last else 1)
        self.watch.scores(self.last, "training")

    def training_scores(self, n_steps: int) -> Scores:
        """Scores on some of the training regions, in a small share of the time that so many steps took."""
        n_batches = min(max(1, n_steps // _STEPS_A_SCORE), _MOST_SCORED)
        options = (self.slides, self.settings, self.means, n_batches)
        return score_training(self.network, self.objective, self.features, *options)


def _objective(network: Network, settings: TrainSettings, n_sizes: int) -> Objective:
    return make_objective(
        settings.objective,
        pcc_weight=settings.pcc_weight,
        target_sum=settings.target_sum,
        n_sizes=n_sizes,
        n_outputs=network.head.n_outputs,
    )


def _optimizer(
    network: Network, objective: Objective, settings: TrainSettings, fabric: Fabric
) -> torch.optim.Optimizer:
    """Of the network, and of what the objective learns beside it, which does not decay."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    options: dict[str, Any] = {"fused": True} if fabric.device.type == "cuda" else {}
    groups: list[dict[str, Any]] = [{"params": [p for p in network.parameters() if p.requires_grad]}]
    beside = list(objective.parameters())
    if beside:
        groups.append({"params": beside, "weight_decay": 0.0})
    return kind(groups, lr=settings.lr, weight_decay=settings.weight_decay, **options)


def _describe(row: dict[str, float]) -> str:
    parts = [f"loss {row['loss']:.4f}"]
    if "val_pcc" in row:
        parts += [f"val PCC {row['val_pcc']:.3f}", f"val MSE {row['val_mse']:.4f}"]
    return ", ".join(parts)


def train(
    network: Network,
    slides: Sequence[TrainingSlide],
    held_out: Sequence[TrainingSlide],
    settings: TrainSettings,
    *,
    fabric: Fabric,
    directory: Path,
    fingerprint: str,
    show_progress_bar: bool = True,
) -> TrainResult:
    """Train a network.

    Parameters
    ----------
    network
        Trained in place; it ends with the weights of the best epoch on held-out regions, or of the last.
    slides
        Slides with their training regions.
    held_out
        Slides with the regions to validate on; may be empty.
    settings
        How.
    fabric
        Device and precision.
    directory
        For the state of the run (after every epoch) and, with a frozen encoder, for the feature cache. The state is
        still there at the end, so that nothing is lost until the model is saved: then call `RunState.remove`.
    fingerprint
        Identifies data and settings; a state found in `directory` is taken up if it has the same.
    show_progress_bar
        Show one bar over the epochs.

    Returns
    -------
    History and held-out scores.

    Raises
    ------
    CheckpointError
        `directory` holds the state of another run.
    PixNetError
        Tiles too small for the regions, or a loss that is not finite.
    DivergenceError
        Losses or scores that no training comes back from; the state of the epoch before is still there.
    """
    state = RunState.load(directory, fingerprint, most_bytes=_most_state_bytes(network))
    network.to(fabric.device)
    run = _Run(network, slides, held_out, settings, fabric, directory)
    if not state.epoch:
        run.features.clear()  # a run that was stopped in its first epoch may have had another encoder
        _seed_epoch(settings.seed, 0)
        _start_head(network, slides, run.mean_targets)
        calibrate(network, run.features, slides, run.fixed_tiles, settings)
    run.restore(state)
    bar = bar_class()(total=settings.max_epochs, initial=state.epoch, unit="epoch", disable=not show_progress_bar)
    with bar, fixed_shapes(fabric.device):
        for epoch in range(state.epoch + 1, settings.max_epochs + 1):
            if _exhausted(state, settings):
                break
            started = time.monotonic()
            try:
                loss, steps = run.epoch(epoch, state.steps, bar)
                row = run.record(state, epoch, loss, steps, started)
            except DivergenceError as error:
                _check_worth_keeping(state, settings, directory, error)
                warn(f"{error} The training ends with epoch {epoch}, and the model is that of {state.best.epoch}.")
                break
            state.save(directory)
            bar.set_description_str(_describe(row), refresh=False)
            bar.update()
    return _finish(run, state)


def _most_state_bytes(network: Network) -> int:
    """Twice what network, best network and the optimizer's two moments take, and room for what is small."""
    return 8 * sum(t.numel() * t.element_size() for t in network.state_dict().values()) + _SMALL_BYTES


def _exhausted(state: RunState, settings: TrainSettings) -> bool:
    """All steps taken, or early stopping: no better held-out PCC for `patience` epochs."""
    if settings.max_steps is not None and state.steps >= settings.max_steps:
        return True
    return (
        settings.patience is not None and bool(state.best.epoch) and state.epoch - state.best.epoch >= settings.patience
    )


def _check_worth_keeping(state: RunState, settings: TrainSettings, directory: Path, error: DivergenceError) -> None:
    """After a divergence only the best epoch is, if there is one."""
    if settings.keep_best and state.best.epoch:
        return
    left = f" Epoch {state.epoch} is still in {str(directory)!r}: delete it, or give another checkpoint_dir."
    raise DivergenceError(f"{error} No model was saved.{left if state.epoch else ''}") from error


def _finish(run: _Run, state: RunState) -> TrainResult:
    if state.best.weights:
        run.network.load_state_dict(state.best.weights)
    quality = _quality(run, state)
    run.network.eval()
    run.features.clear()
    return TrainResult(state.history, state.best.epoch or state.epoch, state.best.pcc_per_gene, quality)


def _quality(run: _Run, state: RunState) -> dict[str, Any]:
    """What the weights that are kept are worth."""
    if run.held_out:
        row = state.history[(state.best.epoch or state.epoch) - 1]
        found, which = {name: row.get(f"val_{name}", np.nan) for name in ("mse", "gene_mean_mse", "pcc")}, "held_out"
    else:
        scores = run.last or run.training_scores(state.steps)  # a run that was killed when all but this was done
        found, which = {"mse": scores.mse, "gene_mean_mse": scores.gene_mean_mse, "pcc": scores.pcc}, "training"
    return {**found, "scored_on": which}
