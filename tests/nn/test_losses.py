from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from torch import Tensor

from pixnet_sd.model._objectives import pcc_terms, pearson_per_gene, varying


def expression(n: int = 12, genes: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, genes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scipy_pearson(predicted: Tensor, measured: Tensor) -> np.ndarray:
    return np.array([pearsonr(p, m).statistic for p, m in zip(predicted.T.numpy(), measured.T.numpy(), strict=True)])


def pcc_loss(predicted: Tensor, measured: Tensor) -> Tensor:
    """Mean over the genes that vary."""
    return pcc_terms(predicted, measured).sum() / (varying(measured).sum().clamp_min(1) if len(measured) else 1)


def test_terms_are_those_of_eq_6() -> None:
    predicted, measured = expression(seed=0), expression(seed=1)
    np.testing.assert_allclose(pcc_terms(predicted, measured), 1 - scipy_pearson(predicted, measured), atol=1e-7)


def test_pearson_is_scipys() -> None:
    predicted, measured = expression(seed=0), expression(seed=1)
    expected = scipy_pearson(predicted, measured)
    np.testing.assert_allclose(pearson_per_gene(predicted, measured), expected, atol=1e-7)


@settings(deadline=None)
@given(st.floats(0.1, 100), st.floats(-100, 100), st.integers(0, 50))
def test_correlation_ignores_scale_and_shift(scale: float, shift: float, seed: int) -> None:
    predicted, measured = expression(seed=seed), expression(seed=seed + 1)
    reference = pcc_loss(predicted, measured).item()
    assert pcc_loss(predicted * scale + shift, measured).item() == pytest.approx(reference, abs=1e-6)
    assert pcc_loss(predicted, measured * scale + shift).item() == pytest.approx(reference, abs=1e-6)
    assert pcc_loss(-predicted, measured).item() == pytest.approx(2 - reference, abs=1e-6)


def test_gene_constant_in_the_batch_takes_no_part() -> None:
    predicted, measured = expression(seed=0), expression(seed=1)
    measured[:, 2] = 3.25
    others = [0, 1, 3, 4]
    assert torch.isnan(pearson_per_gene(predicted, measured)).tolist() == [False, False, True, False, False]
    expected = pcc_loss(predicted[:, others], measured[:, others]).item()
    predicted.requires_grad_()
    loss = pcc_loss(predicted, measured)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert predicted.grad is not None
    np.testing.assert_array_equal(predicted.grad[:, 2], 0)


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [
        (expression(1), expression(1, seed=1)),
        (expression(), torch.ones(12, 5, dtype=torch.float64)),
        (expression(0), expression(0)),
    ],
    ids=["one region", "nothing varies", "no region"],
)
def test_nothing_to_correlate(predicted: Tensor, measured: Tensor) -> None:
    predicted = predicted.clone().requires_grad_()
    loss = pcc_loss(predicted, measured)
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad is not None
    np.testing.assert_array_equal(predicted.grad, 0)


def test_constant_prediction_has_no_correlation_and_finite_gradients() -> None:
    """As of tiles that all look alike to the network."""
    predicted = expression().index_fill(1, torch.tensor([1, 3]), 0.7).requires_grad_()
    measured = expression(seed=1)
    correlation = pearson_per_gene(predicted, measured)
    np.testing.assert_allclose(correlation.detach()[[1, 3]], 0, atol=1e-7)
    pcc_loss(predicted, measured).backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    np.testing.assert_array_equal(predicted.grad[:, [1, 3]], 0)
    assert (predicted.grad[:, [0, 2, 4]] != 0).all()
