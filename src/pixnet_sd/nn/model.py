"""PixNet's network: encoder, decoder, and the head, which aggregation lets us apply last while it is linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .decoder import Decoder, Lateral
from .encoder import STRIDES, Encoder
from .head import Head, Link
from .operators import Operator

__all__ = ["MAP_STRIDE", "Aggregation", "DecoderConfig", "Network", "apply_head"]

Aggregation = Literal["mean", "sum"]

MAP_STRIDE = STRIDES[0]
"""Working pixels per pixel of the gene map."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder.

    Attributes
    ----------
    widths
        Channels of D per level, finest first; None: the encoder's own channels, without laterals.
    hidden
        Hidden channels of the feed-forwards, finest first.
    dropout
        Channel dropout of the laterals.
    """

    widths: tuple[int, ...] | None
    hidden: tuple[int, ...]
    dropout: float = 0.0


def apply_head(pooled: Tensor, n_px: Tensor, weight: Tensor, bias: Tensor, aggregation: Aggregation) -> Tensor:
    """Eq. 4-5 of regions whose features are summed already: A (D W + b), over n_px for a mean, from A D.

    Parameters
    ----------
    pooled
        A D, shape (n, C).
    n_px
        Pixels of each region, shape (n, 1).
    weight, bias
        Of the head, shapes (M, C) and (M,).
    aggregation
        ``"mean"`` or ``"sum"``.

    Returns
    -------
    Shape (n, M).
    """
    if aggregation == "mean":
        return nn.functional.linear(pooled / n_px.clamp_min(1e-12), weight, bias)
    # A sum has n_px times the bias: one channel more, so that nothing of the size of the result is added up.
    return torch.cat([pooled, n_px], dim=1) @ torch.cat([weight, bias[:, None]], dim=1).T


class Network(nn.Module):
    """Image in, feature map D out; regions by `predict_regions`, the gene map by `gene_map`.

    Parameters
    ----------
    encoder
        Feature pyramid.
    decoder
        Its shape.
    n_outputs
        M.
    aggregation
        ``"mean"`` or ``"sum"`` over a region's pixels (Eq. 5 is the sum). Densities are always summed.
    link
        Of the head: ``"identity"``, or ``"softplus"`` for densities.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderConfig,
        n_outputs: int,
        aggregation: Aggregation,
        link: Link = "identity",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(encoder.channels, decoder.widths, decoder.hidden, decoder.dropout)
        self.decoder_config = decoder
        self.head = Head(self.decoder.channels_out, n_outputs, link)
        self.aggregation = aggregation

    def forward(self, image: Tensor) -> Tensor:
        """RGB (B, 3, H, W) on a scale of 0 to 255 -> feature map D (B, C, H / 4, W / 4)."""
        return self.decoder(self.encoder(image))

    def gene_map(self, features: Tensor) -> Tensor:
        """Eq. 4 before its Resize: D (B, C, h, w) -> values of the head (B, M, h, w)."""
        return self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def predict_regions(self, features: Tensor, operator: Operator) -> Tensor:
        """Eq. 4-5 without the map: A (D W + b), over n_px for a mean; of densities, A unit ⊙ softplus(D W + b).

        Parameters
        ----------
        features
            Feature maps in the order of the operator's columns, shape (B, C, h, w) with B h w columns.
        operator
            Aggregation operator of n regions.

        Returns
        -------
        Shape (n, M); of a region off the slide (n_px 0) the sum is 0 and the mean the bias.
        """
        return self.region_values(self.region_inputs(features, operator), operator)

    def region_inputs(self, features: Tensor, operator: Operator) -> Tensor:
        """All that `region_values` needs of the features: A D under a linear head, D itself otherwise."""
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        return operator.apply(rows) if self.head.is_linear else rows

    def region_values(self, inputs: Tensor, operator: Operator, outputs: slice = slice(None)) -> Tensor:
        """Some outputs of `predict_regions`, shape (n, outputs), from `region_inputs`."""
        if not self.head.is_linear:
            return operator.apply(self.head(inputs, outputs))
        n_px = torch.as_tensor(operator.n_px, dtype=inputs.dtype, device=inputs.device)[:, None]
        weight, bias = self.head.weight[outputs].float(), self.head.bias[outputs].float()
        with torch.autocast(inputs.device.type, enabled=False):
            return apply_head(inputs, n_px, weight, bias, self.aggregation)

    @torch.no_grad()
    def start_from(self, mean_expression: Tensor, n_px: float) -> None:
        """Start the head at the training mean, so that the first steps do not go into finding it.

        Parameters
        ----------
        mean_expression
            Mean target of each gene, shape (M,).
        n_px
            Typical pixels of a region; a sum is that much larger than a mean.
        """
        per_pixel = 1.0 if self.aggregation == "mean" else max(n_px, 1.0)
        self.head.bias.copy_(mean_expression / per_pixel)
        self.head.weight.mul_(0.1 / per_pixel)

    @torch.no_grad()
    def start_at(self, density: Tensor) -> None:
        """Start a head of densities at the training mean.

        Parameters
        ----------
        density
            Mean of each output per working pixel, shape (M,).
        """
        self.head.unit.copy_(density)
        self.head.bias.zero_()
        self.head.weight.mul_(0.1)

    @property
    def has_laterals(self) -> bool:
        """Whether the pyramid is standardised and projected before the decoder."""
        return isinstance(self.decoder.laterals[0], Lateral)

    def calibrate(self, samples: Sequence[Tensor]) -> None:
        """Set the laterals' standardising constants.

        Parameters
        ----------
        samples
            Feature vectors of each level, shapes (n, C_l).
        """
        for lateral, values in zip(self.decoder.laterals, samples, strict=True):
            if isinstance(lateral, Lateral):
                lateral.calibrate(values.mean(0), values.std(0, correction=0))
