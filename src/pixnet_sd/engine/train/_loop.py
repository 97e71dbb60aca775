"""The training loop: tiles in, the objective down, the best epoch on held-out regions out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from pixnet_sd._util import bar_class, logger, warn
from pixnet_sd.engine import TrainingSlide, fixed_shapes, freed_memory, training_tiles
from pixnet_sd.errors import CheckpointError, DivergenceError, PixNetError
from pixnet_sd.model import Network, count_pixels, make_objective

from ._batches import Batch, plan_batches
from ._features import FeatureMaps, calibrate
from ._level import set_dispersion, set_level
from ._run import BestEpoch, Run, RunState
from ._scores import BatchLoss, Scores, score_regions

_ABSURD = 100.0  # times the loss at the start, where the head predicts the genes' means
_SAMPLE = 1024  # regions whose pixels are counted for a typical size
_SMALL_BYTES = 64 << 20  # of a state: history, scores, dispersions
_LOOK_EVERY = 16  # steps between looks at the loss, each of which waits for the device
_STEPS_A_SCORE = 50  # of training for one batch that is scored where nothing is held out
_MOST_SCORED = 8  # batches
_STEPS_A_LEVEL = 10  # of training for one batch that the level is taken of
_QUALITY = ("mse", "gene_mean_mse", "pcc")
_DISPERSION_RATE = 20.0  # times that of the weights


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves besides the network's weights."""

    history: list[dict[str, float]]  # one row an epoch: epoch, loss, val_pcc, val_mse, val_gene_mean_mse, lr, seconds
    best_epoch: int  # whose weights the network has
    pcc_per_gene: list[float]  # held out, at that epoch; empty without held-out regions
    quality: dict[str, Any]  # of these weights: mse, gene_mean_mse, pcc, and scored_on "held_out" or "training" regions


def _seed_epoch(seed: int, epoch: int) -> np.random.Generator:
    """Seed one stream a (seed, epoch): a resumed run draws what the uninterrupted one would have drawn."""
    sequence = np.random.SeedSequence((seed, epoch))
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def _start_head(network: Network, slides: Sequence[TrainingSlide]) -> None:
    """Start the head at the mean target of the training regions, over slides and sizes."""
    every, typical = [], []
    for slide in slides:
        for regions, mean in ((m.regions, m.values.mean(axis=0)) for m in slide.measured):
            sample = np.unique(np.linspace(0, len(regions) - 1, _SAMPLE).astype(np.intp))
            n_px = count_pixels(regions.subset(sample), slide.height, slide.width)
            typical.append(np.median(n_px) if network.head.is_linear else 1.0)
            every.append(mean if network.head.is_linear else mean / (n_px.mean() * slide.depth))
    network.start_from(torch.from_numpy(np.mean(every, axis=0)), float(np.median(typical)))


def _trained(network: Network) -> dict[str, Tensor]:
    """Pick what is trained from the network's state: a frozen encoder is rebuilt from its source."""
    frozen = "encoder." if network.encoder.frozen else "."
    return {name: value for name, value in network.state_dict().items() if not name.startswith(frozen)}


class Trainer:
    """Takes a network through a run: network, objective, optimizer and feature maps."""

    def __init__(self, network: Network, run: Run, fabric: Fabric) -> None:
        network.to(fabric.device)
        self.network, self.run, self.fabric = network, run, fabric
        self.features = FeatureMaps(network, run, fabric)
        slides, params = run.training, run.params
        self.objective = make_objective(run.objective, pcc_weight=params.pcc_weight, target_sum=run.target_sum)
        dispersion = network.log_dispersion
        trained = [p for p in network.parameters() if p.requires_grad and p is not dispersion]
        groups: list[dict[str, Any]] = [{"params": trained, "times": 1.0}]
        if dispersion is not None:  # it does not decay, and has further to go than weights that start near 0
            groups.append({"params": [dispersion], "weight_decay": 0.0, "times": _DISPERSION_RATE})
        optimizer = torch.optim.AdamW if params.optimizer == "adamw" else torch.optim.Adam
        options: dict[str, Any] = {"fused": True} if fabric.device.type == "cuda" else {}
        self.optimizer = optimizer(groups, lr=params.lr, weight_decay=params.weight_decay, **options)
        self.fixed_tiles = [training_tiles(s, params.tile_px) for s in slides]
        self.first_loss: float | None = None
        self.unscored = 0  # steps since the training regions were scored
        self.last: Scores | None = None  # of them

    def start(self) -> None:
        """Set what is measured once, before the first epoch."""
        self.features.cache.clear()  # a run that was stopped in its first epoch may have had another encoder
        _seed_epoch(self.run.seed, 0)
        _start_head(self.network, self.run.training)
        calibrate(self.network, self.features, self.fixed_tiles, self.run.batch_size)

    def restore(self, state: RunState) -> None:
        """Take up a saved state."""
        try:
            missing = self.network.load_state_dict(state.network, strict=False)
            if missing.unexpected_keys or set(missing.missing_keys) & set(_trained(self.network)):
                raise KeyError
            self.optimizer.load_state_dict(state.optimizer)
            self.first_loss = state.history[0]["loss"]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"The training state of epoch {state.epoch} is of another network ({type(error).__name__})"
            raise CheckpointError(f"{what}. Delete {str(self.run.directory)!r} to train anew.") from error
        logger.info("resuming after epoch %d", state.epoch)

    def epoch(self, epoch: int, steps_before: int, bar: Any) -> tuple[float, int]:
        """Pass over all tiles once, or until the run has taken its steps; returns the mean loss and the steps taken."""
        rng, tilings, params = _seed_epoch(self.run.seed, epoch), self.fixed_tiles, self.run.params
        if not self.features.frozen:  # tiles move at random, unless kept features tie them to their places
            tilings = [training_tiles(s, params.tile_px, shift=tuple(rng.random(2))) for s in self.run.training]
        plans, most = plan_batches(tilings, self.run.batch_size, rng), params.max_steps
        if most is not None:
            plans = plans[: most - steps_before]
        self.network.train()
        losses: list[Tensor] = []
        for step, batch in enumerate(self.features.batches(plans)):
            progress = (epoch - 1 + step / len(plans)) / self.run.max_epochs
            progress = progress if most is None else max(progress, (steps_before + step) / most)
            losses.append(self.step(batch, self.run.learning_rate(progress)))
            if step % _LOOK_EVERY == 0:
                value = self.checked_loss(losses[-1], batch)
                bar.set_postfix_str(f"step {step + 1}/{len(plans)}, loss {value:.4f}")
        return self.checked_loss(torch.stack(losses).mean(), batch), len(losses)

    def step(self, batch: Batch, rate: float) -> Tensor:
        """Take one step of the optimizer; returns the loss, which nothing waits for."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        slide, features = batch.plan.slide, self.features.of(batch)
        self.optimizer.zero_grad()
        sizes = [self.run.sizes.index(m.size_name) for m in slide.measured]
        of_batch = batch.operators, batch.targets, sizes, batch.sums
        loss = BatchLoss(self.network, self.objective, *of_batch, slide.depth)
        value = loss.backward(features, self.fabric)
        self.optimizer.step()
        return value

    def checked_loss(self, loss: Tensor, batch: Batch) -> float:
        """Read the loss as a number, and refuse one that no training comes back from."""
        value, slide = loss.item(), batch.plan.slide.name
        if not math.isfinite(value):
            advice = f"Lower lr (now {self.run.params.lr:g}), or look for extreme values in the table."
            raise PixNetError(f"The loss became {value} on slide {slide!r}. {advice}")
        if self.first_loss is None:
            self.first_loss = value
        if value > _ABSURD * (1 + abs(self.first_loss)):
            raise self.diverged(f"the loss rose from {self.first_loss:.3g} to {value:.3g} on slide {slide!r}")
        return value

    def checked_score(self, *of_what: Any) -> Scores:
        """Score, and refuse scores that no training comes back from."""
        scores, which = self.score(*of_what), "held-out" if self.run.held_out else "training"
        if scores.is_absurd:
            counts = f", predicted counts {scores.count_ratio:.3g} times those measured" * self.objective.has_total
            raise self.diverged(
                f"the mean squared error on {which} regions became {scores.mse:.3g}, that of each gene's mean is "
                f"{scores.gene_mean_mse:.3g}{counts}"
            )
        return scores

    def diverged(self, what: str) -> DivergenceError:
        """Make the error of a run that left any sane range."""
        lr = self.run.params.lr
        return DivergenceError(f"The training diverged: {what}. Lower lr= (now {lr:g}), for instance to {lr / 10:g}.")

    def record(self, state: RunState, epoch: int, loss: float, steps: int, started: float) -> dict[str, float]:
        """Score, and write the epoch into the state: not at all if its weights are absurd."""
        row = {"epoch": float(epoch), "loss": loss}
        if self.run.held_out:
            scores = self.checked_score(self.run.held_out)
            row |= {"val_pcc": scores.pcc, "val_mse": scores.mse, "val_gene_mean_mse": scores.gene_mean_mse}
            keep_best = self.run.params.keep_best
            if scores.pcc > state.best.pcc or not keep_best:
                weights = {k: v.detach().cpu().clone() for k, v in _trained(self.network).items()} if keep_best else {}
                state.best = BestEpoch(epoch, scores.pcc, scores.pcc_per_gene, weights)
        else:  # weights that the last step left, which no loss has seen, are looked at now and then, and at the end
            self.unscored, is_last = self.unscored + steps, self.is_last(epoch, state.steps + steps)
            if is_last or self.unscored >= _STEPS_A_SCORE:
                self.last = self.checked_score(self.run.training, state.steps + steps if is_last else 1)
                self.unscored = 0
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
        state.history.append(row)
        state.epoch, state.steps = epoch, state.steps + steps
        return row

    def is_last(self, epoch: int, steps: int) -> bool:
        """Tell whether the run ends here, early stopping aside."""
        return epoch >= self.run.max_epochs or steps >= (self.run.params.max_steps or math.inf)

    def score(self, slides: Sequence[TrainingSlide], n_steps: int | None = None) -> Scores:
        """Score the network on slides' regions, or on some in a small share of the time that so many steps took."""
        n_batches = None if n_steps is None else min(max(1, n_steps // _STEPS_A_SCORE), _MOST_SCORED)
        return score_regions(self.network, self.objective, self.features, slides, n_batches)

    def has_ended(self, state: RunState) -> bool:
        """Tell whether all steps are taken, or the held-out PCC was not better for `patience` epochs."""
        patience, best = self.run.params.patience, state.best.epoch
        stopped_early = patience is not None and bool(best) and state.epoch - best >= patience
        return self.is_last(state.epoch, state.steps) or stopped_early

    def finish(self, state: RunState) -> TrainResult:
        """Give the network the weights that are kept, and say what they are worth."""
        self.network.load_state_dict(state.best.weights, strict=False)
        kept, held_out, scores = state.best.epoch or state.epoch, self.run.held_out, self.last
        if self.objective.has_total:
            set_level(self.network, self.features, self.run.training, max(_MOST_SCORED, state.steps // _STEPS_A_LEVEL))
            set_dispersion(self.network, self.features, held_out)
            scores = self.score(held_out) if held_out else None
        if held_out and scores is None:
            worth = {name: state.history[kept - 1].get(f"val_{name}", np.nan) for name in _QUALITY}
            pcc_per_gene = state.best.pcc_per_gene
        else:  # no score: the level was set, or a run was killed when it ended
            scores = scores or self.score(self.run.training, state.steps)
            worth = {name: getattr(scores, name) for name in _QUALITY}
            pcc_per_gene = scores.pcc_per_gene if held_out else []
        self.network.eval()
        self.features.cache.clear()
        scored_on = "held_out" if held_out else "training"
        return TrainResult(state.history, kept, pcc_per_gene, worth | {"scored_on": scored_on})


def train(network: Network, run: Run, fabric: Fabric, *, show_progress_bar: bool = True) -> TrainResult:
    """Train a network in place; it ends with the weights of the best epoch on held-out regions, or of the last.

    The state is written after the first epoch, then once a minute, and at the end: the caller removes it when the model
    is saved. A run that diverges raises, unless a good epoch came before; the state that was written stays.
    """
    # Twice what network, best network and the optimizer's two moments take, and room for what is small.
    most_bytes = 8 * sum(t.numel() * t.element_size() for t in network.state_dict().values()) + _SMALL_BYTES
    state = RunState.load(run.directory, run.fingerprint, most_bytes=most_bytes)
    trainer = Trainer(network, run, fabric)
    if state.epoch:
        trainer.restore(state)
    else:
        trainer.start()
    saved, saved_at = state.epoch, -math.inf
    bar = bar_class()(total=run.max_epochs, initial=state.epoch, unit="epoch", disable=not show_progress_bar)
    with bar, fixed_shapes(fabric.device), freed_memory(fabric.device, kept=False):
        while not trainer.has_ended(state):
            started = time.monotonic()
            try:
                loss, steps = trainer.epoch(state.epoch + 1, state.steps, bar)
                row = trainer.record(state, state.epoch + 1, loss, steps, started)
            except DivergenceError as error:
                if not (run.params.keep_best and state.best.epoch):
                    left = f" Delete epoch {saved} in {str(run.directory)!r}, or give another checkpoint_dir."
                    raise DivergenceError(f"{error} No model was saved.{left if saved else ''}") from error
                best = state.best.epoch
                warn(f"{error} The training ends with epoch {state.epoch + 1}, and the model is that of {best}.")
                break
            if trainer.has_ended(state) or time.monotonic() - saved_at >= run.save_every_s:
                state.network, state.optimizer = _trained(network), trainer.optimizer.state_dict()
                state.save(run.directory)
                saved, saved_at = state.epoch, time.monotonic()
            val = f", val PCC {row['val_pcc']:.3f}, val MSE {row['val_mse']:.4f}" if run.held_out else ""
            bar.set_description_str(f"loss {row['loss']:.4f}{val}", refresh=False)
            bar.update()
    return trainer.finish(state)
