"""What is expected to be measured of log-normalised expression."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STEP, _FIRST, _LAST = 1.0, -4.0, 2.0  # of the quadrature, in the logarithm; the first is added to -log(largest)


class _ExpectedLog(torch.autograd.Function):
    """See `expected_log_normalised`; the derivative is summed up on the way, so that no node is kept."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, scale: Tensor, nodes: tuple[float, ...]) -> Tensor:
        spread, by_power = dispersion * mean, -1 / dispersion
        below = scale * (_STEP * nodes[0] / math.expm1(_STEP))  # all nodes below the first
        value, slope = below * mean, below.expand_as(mean).clone()
        for s in nodes:
            weight, caught = _STEP * math.exp(-s), -torch.expm1(-s * scale)
            argument = spread * caught
            lacking = torch.log1p(argument).mul_(by_power).expm1_()  # the Laplace transform, less 1
            value.sub_(lacking, alpha=weight)
            if ctx.needs_input_grad[0]:
                slope.add_(lacking.add_(1).div_(argument.add_(1)).mul_(caught), alpha=weight)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None, None


def expected_log_normalised(mean: Tensor, dispersion: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """Compute E[log1p(target_sum y / total)] of negative binomial counts y: means (n, M), total (n, 1) -> (n, M).

    The variance of y is ``mean + dispersion * mean ** 2``; `dispersion`, above 0, broadcasts to the means, which are no
    more than the total. Exact to 1e-3, differentiable in the mean. Where the total is 0, so is the result.

    log(1 + z) is the integral of (1 - exp(-s z)) exp(-s) / s over s > 0, so its expectation takes no more than the
    Laplace transform of y, ``(1 + dispersion mean (1 - exp(-s))) ** (-1 / dispersion)``. Over log s the trapezoidal
    rule converges exponentially, and below its first node the integrand is proportional to s, so that its sum is known.
    """
    first = _FIRST - math.log(max(target_sum, 1.0))
    nodes = tuple(np.exp(np.arange(first, _LAST + _STEP / 2, _STEP)).tolist())
    some = total > 0
    value = _ExpectedLog.apply(mean, dispersion, target_sum / torch.where(some, total, 1.0), nodes)
    return torch.where(some, value, 0.0)
