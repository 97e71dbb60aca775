"""How likely counts are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._pieces import pieces

_TINY = 1e-12
_LEAST = 1e-8  # of a dispersion: no count is so large that less would be seen, and float32 holds what is made of it


class _MinusLogLikelihood(torch.autograd.Function):
    """See `minus_log_likelihood`; derivatives are taken on the way, so that nothing but these is kept."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, measured: Tensor, dispersion: Tensor) -> Tensor:
        dispersion = dispersion.clamp_min(_LEAST)
        shape = 1 / dispersion
        start, start_slope = _log_gamma(shape)
        lost, by_shape, by_mean = torch.zeros_like(dispersion), torch.zeros_like(dispersion), torch.empty_like(mean)
        for rows in pieces(mean):
            y = measured[rows]
            spread, counted = dispersion * mean[rows], y + shape
            grown, known = torch.log1p(spread), torch.log(spread + _TINY).mul_(y)
            rising, slope = _log_gamma(counted)
            lost += torch.addcmul(-known, counted, grown).sub_(rising.sub_(start)).sum(0)
            pull = torch.div(counted, spread + 1).sub_(y.div(spread.add(_TINY))).mul_(dispersion)
            by_mean[rows] = pull
            by_shape += grown.sub_(slope.sub_(start_slope)).sub_(pull.mul_(spread)).sum(0)
        ctx.save_for_backward(by_mean, -by_shape * shape * shape)
        return lost

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        by_mean, by_dispersion = ctx.saved_tensors
        return grads[0] * by_mean, None, grads[0] * by_dispersion


def minus_log_likelihood(mean: Tensor, measured: Tensor, dispersion: Tensor) -> Tensor:
    """Sum what negative binomial counts cost over regions, per gene: means, counts (n, M), dispersion (M,) -> (M,).

    The term that depends on the count alone is left out. Means and dispersion are above 0; differentiable in both.
    """
    lost: Tensor = _MinusLogLikelihood.apply(mean, measured, dispersion)
    return lost


def _log_gamma(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log Γ(x) and its derivative of 0 < x < 1e9, by Stirling's series at x + 4, to 1e-6, faster than torch."""
    pairs = x * (x + 3)  # x (x + 1) (x + 2) (x + 3) = pairs (pairs + 2)
    product = pairs * (pairs + 2)
    far = x + 4
    log, inverse = torch.log(far), 1 / far
    square = inverse * inverse
    value = torch.log(product).neg_().add_(math.log(2 * math.pi) / 2).sub_(far).addcmul_(far - 0.5, log)
    value.addcmul_(inverse, square.mul(-1 / 360).add_(1 / 12))
    slope = log.sub_(inverse, alpha=0.5).addcmul_(square, square.mul(1 / 120).sub_(1 / 12))
    slope.sub_((2 * x).add_(3).mul_(pairs.add_(1).mul_(2)).div_(product))
    return value, slope
