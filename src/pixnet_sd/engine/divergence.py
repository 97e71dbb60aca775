"""When a training has left any sane range: it is stopped, as nothing comes back from there."""

from __future__ import annotations

import math

from pixnet_sd._errors import DivergenceError, PixNetError

from .validate import Scores

__all__ = ["Watch"]

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
