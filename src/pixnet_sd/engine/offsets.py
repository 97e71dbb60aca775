"""What sets the slides of a run apart, gene by gene: learnt in training so that the network need not, then dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .slides import TrainingSlide

__all__ = ["SlideOffsets"]

_SHARE = 0.1  # of the mean, that keeps the logarithm of a gene without counts finite


class SlideOffsets(nn.Module):
    """An offset for every slide and output; over all regions they cancel, so what is predicted without is their mean.

    Parameters
    ----------
    slides
        Training slides.
    logarithmic
        Offsets are factors' logarithms, as densities need them.
    """

    share: Tensor

    def __init__(self, slides: Sequence[TrainingSlide], *, logarithmic: bool) -> None:
        super().__init__()
        n = torch.tensor([sum(len(m.regions) for m in slide.measured) for slide in slides], dtype=torch.float64)
        self.register_buffer("share", (n / n.sum()).float()[:, None])
        mean = torch.stack([_mean(slide, per_count=logarithmic) for slide in slides])
        if logarithmic:
            mean = torch.log(mean + _SHARE * mean.mean(0, keepdim=True) + 1e-12)
        self.shift = nn.Parameter(mean - (self.share * mean).sum(0))

    def of(self, slide: int) -> Callable[[slice], Tensor]:
        """Offset of some outputs on a slide, shape (outputs,)."""
        return lambda outputs: self.shift[slide, outputs] - (self.share * self.shift[:, outputs]).sum(0)


def _mean(slide: TrainingSlide, *, per_count: bool) -> Tensor:
    """Mean target of a slide's regions, all sizes alike; counts as shares of all counts, the last output."""
    each = torch.stack([torch.from_numpy(m.values.mean(axis=0)).double() for m in slide.measured])
    return (each / each[:, -1:] if per_count else each).mean(0).float()
