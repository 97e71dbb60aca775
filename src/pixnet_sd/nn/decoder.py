"""The decoder of Eq. 3: coarse to fine, one transposed convolution and one feed-forward a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Decoder", "Lateral"]


class Lateral(nn.Module):
    """Standardise a feature map per channel and project it, both in one 1 × 1 convolution.

    Backbone channels differ in scale by orders of magnitude, which a few hundred spots cannot teach a network. The
    constants are measured once on training tiles (`calibrate`), so they carry no statistics of the batch: batch norm
    would remove what tells one slide from another.

    Dropping a standardised channel everywhere is the same as dropping its column of the projection, which costs
    nothing however large the map is.

    Parameters
    ----------
    channels_in, channels_out
        Channels before and after.
    dropout
        Probability of dropping an input channel in training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, channels_in: int, channels_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels_in, channels_out, 1)
        self.dropout = dropout
        self.register_buffer("mean", torch.zeros(channels_in))
        self.register_buffer("scale", torch.ones(channels_in))

    @torch.no_grad()
    def calibrate(self, mean: Tensor, std: Tensor) -> None:
        """Set the constants.

        Parameters
        ----------
        mean, std
            Of each channel over the training tiles, shape (channels,).
        """
        self.mean.copy_(mean)
        self.scale.copy_(1 / (std + 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        keep = functional.dropout(torch.ones_like(self.scale), self.dropout, self.training) * self.scale
        weight = self.project.weight * keep[:, None, None]
        bias = self.project.bias - weight.flatten(1) @ self.mean  # type: ignore[operator]
        return functional.conv2d(x, weight, bias)


class FeedForward(nn.Sequential):
    """DFFN: a 3 × 3 convolution to the hidden width and a 1 × 1 convolution back."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, channels, 1),
        )


class Decoder(nn.Module):
    """D_0 = F_L; D_l = DFFN(Dconv(D_{l-1}) + δ_l F_{L-l}), l = 1..L-1 (Eq. 3, its index corrected).

    Parameters
    ----------
    encoder_channels
        Channels of F_1..F_L.
    widths
        Channels of D at the stride of each F_l, finest first; None: the encoder's own, with F fed in as it is (the
        paper). Otherwise every F_l passes a `Lateral`.
    hidden
        Hidden channels of each feed-forward, finest first, one fewer than levels.
    dropout
        Channel dropout of the laterals.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 3.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        widths: Sequence[int] | None,
        hidden: Sequence[int],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out = list(encoder_channels if widths is None else widths)
        self.laterals = nn.ModuleList(
            [nn.Identity() for _ in out]
            if widths is None
            else [Lateral(c, w, dropout) for c, w in zip(encoder_channels, out, strict=True)]
        )
        finer = range(len(out) - 1)
        self.upsample = nn.ModuleList([nn.ConvTranspose2d(out[k + 1], out[k], 2, stride=2) for k in finer])
        self.feed_forward = nn.ModuleList([FeedForward(out[k], hidden[k]) for k in finer])
        self.skip_scale = nn.Parameter(torch.ones(len(out) - 1))
        self.channels_out = out[0]
        self.apply(_keep_variance)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """F_1..F_L, each (B, C_l, h_l, w_l), -> the feature map D_{L-1}, (B, C, h_1, w_1)."""
        levels = [lateral(level) for lateral, level in zip(self.laterals, pyramid, strict=True)]
        d = levels[-1]
        for k in reversed(range(len(levels) - 1)):
            d = self.feed_forward[k](self.upsample[k](d) + self.skip_scale[k] * levels[k])
        return d


def _keep_variance(module: nn.Module) -> None:
    """Start convolutions so that signals keep their size; torch's default shrinks them at every stage.

    The four pixels that an upsampled one becomes start with the same weights. Regions are larger than that, so training
    would leave what differs between them as it began: a grid in every gene map (Aitken et al., arXiv 1707.02937).
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    elif isinstance(module, nn.ConvTranspose2d):  # 2 × 2 with stride 2: each output pixel sees one input pixel
        one = torch.randn(*module.weight.shape[:2], 1, 1) * module.in_channels**-0.5
        module.weight.data = one.expand_as(module.weight).clone()
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
