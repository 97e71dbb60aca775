from __future__ import annotations

import pytest
import torch

from pixnet_sd.model import Factors, Head
from pixnet_sd.model._network import Link


def make(link: Link) -> Head:
    torch.manual_seed(0)
    head = Head(4, 6, link)
    if link == "softplus":
        head.unit.copy_(torch.rand(6) + 0.1)
    return head


D = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))


def test_identity_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 6)
    torch.testing.assert_close(make("identity")(D), linear(D))


def test_densities_are_positive_and_one_unit_at_zero() -> None:
    head = make("softplus")
    assert (head(100 * D) >= 0).all()
    head.bias.data.zero_()
    torch.testing.assert_close(head(torch.zeros(1, 4))[0], head.unit)


def test_genes_are_shares_of_the_last_output() -> None:
    """Twice the density of all genes is twice that of each."""
    head = make("softplus")
    before = head(D).detach()
    head.bias.data[-1] += 3
    after = head(D).detach()
    torch.testing.assert_close(after / after[:, -1:], before / before[:, -1:])
    assert (after > 1.5 * before).all()


@pytest.mark.parametrize("link", ["identity", "softplus"])
def test_all_ways_give_the_same(link: Link) -> None:
    head = make(link)
    expected = head(D).detach()
    torch.testing.assert_close(head(D, slice(2, 5)), expected[:, 2:5])
    with torch.no_grad():
        torch.testing.assert_close(head.columns(D.T), expected.T)
        out = torch.empty(6, 9)
        torch.testing.assert_close(head.columns(D.T, out), expected.T)
    chosen = head.select(torch.tensor([5, 0]))
    torch.testing.assert_close(chosen(D), expected[:, [5, 0]])
    torch.testing.assert_close(chosen.select([1])(D), expected[:, [0]])
    assert not any(p.requires_grad for p in chosen.parameters())
    assert chosen.is_linear == head.is_linear == (link == "identity")


def test_factors_are_d_and_one() -> None:
    out = torch.empty(5, 9)
    for found in (Factors(4).columns(D.T), Factors(4).columns(D.T, out)):
        torch.testing.assert_close(found, torch.cat([D.T, torch.ones(1, 9)]))
    assert out[-1].eq(1).all()


def test_stays_float32_under_autocast() -> None:
    head = make("softplus")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(D), make("softplus")(D))
