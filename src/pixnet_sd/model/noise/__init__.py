"""What is measured of counts that are expected: negative binomial, with a dispersion for each gene and size."""

from __future__ import annotations

from ._dispersion import Dispersion
from ._expected import expected_log_normalised
from ._intervals import LEVEL, calibrated_dispersion, coverage, cumulative, inside, quantiles
from ._likelihood import minus_log_likelihood

__all__ = [
    "LEVEL",
    "Dispersion",
    "calibrated_dispersion",
    "coverage",
    "cumulative",
    "expected_log_normalised",
    "inside",
    "minus_log_likelihood",
    "quantiles",
]
