"""What is expected to be measured of log-normalised expression."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._pieces import pieces

_STEP, _FIRST, _LAST = 1.0, -4.0, 2.0  # of the quadrature, in the logarithm; the first is added to -log(largest)
_LOG2_E = math.log2(math.e)  # torch is three times quicker at powers of 2


class _ExpectedLog(torch.autograd.Function):
    """See `expected_log_normalised`; the derivative is summed up on the way, so that no node is kept."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, scale: Tensor, nodes: tuple[float, ...]) -> Tensor:
        value, slope = torch.empty_like(mean), torch.empty_like(mean) if ctx.needs_input_grad[0] else None
        for rows in pieces(mean):
            of_rows = dispersion[rows] if len(dispersion) > 1 else dispersion
            _integrate(mean[rows], of_rows, scale[rows], nodes, value[rows], None if slope is None else slope[rows])
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return None if slope is None else grads[0] * slope, None, None, None


def _integrate(
    mean: Tensor, dispersion: Tensor, scale: Tensor, nodes: Iterable[float], value: Tensor, slope: Tensor | None
) -> None:
    """Write the expectation of some rows into `value` and its derivative by the mean into `slope`, in place."""
    z, spread, power = scale * mean, dispersion * mean, -_LOG2_E / dispersion
    grown, transform, of_mean, by_scale = (torch.empty_like(z) for _ in range(4))
    torch.log1p(z, out=value)
    if slope is not None:
        torch.reciprocal(z + 1, out=by_scale)
        slope.zero_()
    for s in nodes:
        weight, caught = _STEP * math.exp(-s), -torch.expm1(-s * scale)
        torch.mul(spread, caught, out=grown)
        torch.log1p(grown, out=transform).mul_(power).exp2_()
        torch.mul(z, -s * _LOG2_E, out=of_mean).exp2_()
        value.sub_(transform, alpha=weight).add_(of_mean, alpha=weight)
        if slope is not None:
            slope.addcmul_(transform.div_(grown.add_(1)), caught, value=weight)
            by_scale.sub_(of_mean, alpha=weight * s)
    if slope is not None:
        slope.addcmul_(by_scale, scale)


def expected_log_normalised(mean: Tensor, dispersion: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """Compute E[log1p(target_sum y / total)] of negative binomial counts y: means (n, M), total (n, 1) -> (n, M).

    The variance of y is ``mean + dispersion * mean ** 2``; `dispersion`, above 0, broadcasts to the means, which are no
    more than the total. Exact to 1e-3, differentiable in the mean. Where the total is 0, so is the result.

    log(1 + z) is the integral of (1 - exp(-s z)) exp(-s) / s over s > 0, so its expectation takes no more than the
    Laplace transform of y, ``(1 + dispersion mean (1 - exp(-s))) ** (-1 / dispersion)``. Over log s the trapezoidal
    rule converges exponentially; log1p of the mean is taken out, of which the same integral is known.
    """
    first = _FIRST - math.log(max(target_sum, 1.0))
    nodes = tuple(np.exp(np.arange(first, _LAST + _STEP / 2, _STEP)).tolist())
    some = total > 0
    rows = dispersion if dispersion.ndim > 1 else dispersion[None]
    value = _ExpectedLog.apply(mean, rows, target_sum / torch.where(some, total, 1.0), nodes)
    return torch.where(some, value, 0.0)
