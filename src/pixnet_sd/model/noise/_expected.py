"""What is expected to be measured of log-normalised expression."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STEP, _FIRST, _LAST = 1.0, -4.0, 2.0  # of the quadrature, in the logarithm; the first is added to -log(largest)


class _ExpectedLog(torch.autograd.Function):
    """See `expected_log_normalised`; derivatives are summed up on the way, so that no node is kept."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, scale: Tensor, nodes: tuple[float, ...]) -> Tensor:
        z, spread = scale * mean, dispersion * mean
        value = torch.log1p(z)
        by_mean = scale / (1 + z) if ctx.needs_input_grad[0] else None
        by_dispersion = torch.zeros_like(value) if ctx.needs_input_grad[1] else None
        for s in nodes:
            weight = _STEP * math.exp(-s)
            caught = -torch.expm1(-s * scale)
            grown = torch.log1p(spread * caught)
            transform, of_mean = torch.exp(-grown / dispersion), torch.exp(-s * z)
            value.sub_(transform - of_mean, alpha=weight)
            slope = transform / (1 + spread * caught) * caught
            if by_mean is not None:
                by_mean.add_(slope - s * scale * of_mean, alpha=weight)
            if by_dispersion is not None:
                by_dispersion.add_((slope * mean - transform * grown / dispersion) / dispersion, alpha=weight)
        ctx.save_for_backward(by_mean, by_dispersion)
        ctx.shape = dispersion.shape
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        by_mean, by_dispersion = (None if by is None else grads[0] * by for by in ctx.saved_tensors)
        return by_mean, None if by_dispersion is None else by_dispersion.sum_to_size(ctx.shape), None, None


def expected_log_normalised(mean: Tensor, dispersion: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """Compute E[log1p(target_sum y / total)] of negative binomial counts y: means (n, M), total (n, 1) -> (n, M).

    The variance of y is ``mean + dispersion * mean ** 2``; `dispersion`, above 0, broadcasts to the means, which are no
    more than the total. Exact to 1e-3, differentiable in mean and dispersion. Where the total is 0, so is the result.

    log(1 + z) is the integral of (1 - exp(-s z)) exp(-s) / s over s > 0, so its expectation takes no more than the
    Laplace transform of y, ``(1 + dispersion mean (1 - exp(-s))) ** (-1 / dispersion)``. Over log s the trapezoidal
    rule converges exponentially; log1p of the mean is taken out, of which the same integral is known.
    """
    first = _FIRST - math.log(max(target_sum, 1.0))
    nodes = tuple(np.exp(np.arange(first, _LAST + _STEP / 2, _STEP)).tolist())
    some = total > 0
    value = _ExpectedLog.apply(mean, dispersion, target_sum / torch.where(some, total, 1.0), nodes)
    return torch.where(some, value, 0.0)
