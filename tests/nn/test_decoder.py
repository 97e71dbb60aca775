from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pixnet_sd.model import Decoder
from pixnet_sd.model._network import Lateral

CHANNELS = (3, 5, 7, 9)


def pyramid(channels: Sequence[int] = CHANNELS, side: int = 16, seed: int = 0) -> list[Tensor]:
    """F_1..F_4 of two images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, side >> k, 2 * side >> k, generator=generator) for k, c in enumerate(channels)]


def eq_3(decoder: Decoder, levels: Sequence[Tensor]) -> Tensor:
    """D_0 = F_L; D_l = DFFN(Dconv(D_{l-1}) + δ_l F_{L-l}), from the weights alone. Stages are stored finest first."""
    state = decoder.state_dict()
    d = levels[-1]
    for stage in range(1, len(levels)):
        k = len(levels) - 1 - stage
        f = levels[k]
        d = functional.conv_transpose2d(d, state[f"upsample.{k}.weight"], state[f"upsample.{k}.bias"], stride=2)
        d = d + state["skip_scale"][k] * f
        d = functional.conv2d(d, state[f"feed_forward.{k}.0.weight"], state[f"feed_forward.{k}.0.bias"], padding=1)
        d = functional.gelu(d)
        d = functional.conv2d(d, state[f"feed_forward.{k}.2.weight"], state[f"feed_forward.{k}.2.bias"])
    return d


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """A module with no zero biases and no equal scales."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module


def test_papers_decoder_is_eq_3() -> None:
    decoder = shaken(Decoder(CHANNELS, None, hidden=(4, 6, 8)))
    result = decoder(pyramid())
    assert result.shape == (2, 3, 16, 32)
    assert decoder.channels_out == 3
    torch.testing.assert_close(result, eq_3(decoder, pyramid()))


def test_levels_after_laterals_are_eq_3() -> None:
    decoder = shaken(Decoder(CHANNELS, (4, 4, 6, 6), hidden=(4, 6, 8), dropout=0.5)).eval()
    levels = [lateral(level) for lateral, level in zip(decoder.laterals, pyramid(), strict=True)]
    assert [level.shape[1] for level in levels] == [4, 4, 6, 6]
    torch.testing.assert_close(decoder(pyramid()), eq_3(decoder, levels))


def test_every_level_and_scale_matters() -> None:
    decoder = shaken(Decoder(CHANNELS, None, hidden=(4, 4, 4)))
    levels = [level.requires_grad_() for level in pyramid()]
    decoder(levels).square().mean().backward()
    assert all((level.grad != 0).any() for level in levels)
    assert decoder.skip_scale.shape == (3,)  # one a stage
    assert (decoder.skip_scale.grad != 0).all()


def test_signals_start_with_their_size() -> None:
    torch.manual_seed(0)
    decoder = Decoder((64, 64, 64, 64), None, hidden=(64, 64, 64))
    with torch.no_grad():
        assert 0.3 < decoder(pyramid((64, 64, 64, 64))).std() < 3


def explicit_lateral(lateral: Lateral, x: Tensor, keep: Tensor) -> Tensor:
    """Standardise, drop channels, project."""
    standard = (x - lateral.mean[:, None, None]) * lateral.scale[:, None, None]
    return functional.conv2d(standard * keep[:, None, None], lateral.project.weight, lateral.project.bias)


def calibrated(dropout: float) -> Lateral:
    lateral = shaken(Lateral(5, 4, dropout))
    assert isinstance(lateral, Lateral)
    lateral.calibrate(torch.tensor([1.0, -2, 0, 50, 0.3]), torch.tensor([1.0, 0.5, 3, 20, 0.01]))
    return lateral


def test_pixels_of_an_upsampled_one_start_equal() -> None:
    """A grid that the network starts with stays: no region of training is as small as its period."""
    torch.manual_seed(0)
    decoder = Decoder(CHANNELS, widths=(8, 8, 8, 8), hidden=(16, 16, 16)).eval()
    flat = [torch.randn(1, c, 1, 1).expand(-1, -1, 32 >> k, 32 >> k) for k, c in enumerate(CHANNELS)]
    inner = decoder(flat)[..., 12:20, 12:20]  # beyond the reach of the border's zeros
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), rtol=0, atol=1e-5)


def test_lateral_standardises() -> None:
    lateral = calibrated(0.0)
    torch.testing.assert_close(lateral.scale, 1 / torch.tensor([1.001, 0.501, 3.001, 20.001, 0.011]))
    x = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lateral(x), explicit_lateral(lateral, x, torch.ones(5)), rtol=1e-4, atol=1e-4)


def test_lateral_drops_whole_channels_in_training() -> None:
    """Every output is that of one of the 32 choices of channels, what is kept being doubled; all of them come up."""
    lateral, x = calibrated(0.5), torch.randn(1, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    choices = [torch.tensor([float(n >> k & 1) for k in range(5)]) for n in range(32)]
    with torch.no_grad():
        expected = torch.stack([explicit_lateral(lateral, x, 2 * keep) for keep in choices])
        torch.manual_seed(0)
        off = torch.stack([(expected - lateral(x)).abs().amax((1, 2, 3, 4)) for _ in range(640)])
    assert off.amin(1).max() < 1e-3
    assert off.argmin(1).unique().numel() == 32


def test_lateral_gradients_are_those_of_the_three_steps() -> None:
    lateral, generator = calibrated(0.0), torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 3, 3, generator=generator)
    upstream = torch.randn(1, 4, 3, 3, generator=generator)
    gradients = []
    for forward in (lambda v: lateral(v), lambda v: explicit_lateral(lateral, v, torch.ones(5))):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *lateral.parameters()]
        gradients.append(torch.autograd.grad((forward(leaf) * upstream).sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    decoder = Decoder(CHANNELS, (4, 4, 4, 4), hidden=(4, 4, 4), dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(decoder.train()(pyramid()), decoder(pyramid()))
        assert torch.equal(decoder.eval()(pyramid()), decoder(pyramid()))


def test_constants_are_saved() -> None:
    fresh = Lateral(5, 4)
    fresh.load_state_dict(calibrated(0.0).state_dict())
    torch.testing.assert_close(fresh.scale, calibrated(0.0).scale)
    assert not fresh.scale.requires_grad


def test_a_level_too_few() -> None:
    with pytest.raises(ValueError, match="zip"):
        Decoder(CHANNELS, None, hidden=(4, 4, 4))(pyramid()[1:])
