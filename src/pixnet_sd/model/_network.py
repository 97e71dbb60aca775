"""PixNet's network: encoder, decoder (Eq. 3) and head (Eq. 4), which is applied last while it is linear.

Then how far a pixel of the map looks, so that tiles get a halo that makes their borders invisible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd.geometry import MAP_STRIDE, STRIDES
from pixnet_sd.params import Aggregation

from ._encoder import Encoder
from ._operators import Operator
from ._record import DecoderConfig, Link

_AT_ONE = math.log(math.e - 1)  # where softplus is 1
_ALIGN_PX = STRIDES[-1]
_SPREADING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_DISPERSION = -2.0  # its logarithm before training


class Head(nn.Module):
    """D -> M outputs at every pixel: D W + b (Eq. 4), or densities of counts, the last of them that of all genes.

    The density of all genes is ``t = unit * softplus(D W + b)``, and that of a gene a share of it,
    ``t * unit * softplus(D W + b)``: so what a region has of a gene, relative to all, does not depend on how well t is
    known, which on a slide of another depth or thickness it is not.

    `weight` (M, C) and `bias` (M,) are learnt. A head of densities (link ``"softplus"``) also has `unit` (M,), the
    density of each output where D W + b is 0, and `is_total` (M,), which output is that of all genes.
    """

    unit: Tensor
    is_total: Tensor

    def __init__(self, channels: int, n_outputs: int, link: Link = "identity") -> None:
        super().__init__()
        start = nn.Linear(channels, n_outputs)
        self.weight, self.bias, self.link = start.weight, start.bias, link
        self.in_features, self.n_outputs = channels, n_outputs
        if link == "softplus":
            self.register_buffer("unit", torch.ones(n_outputs))
            self.register_buffer("is_total", torch.arange(n_outputs) == n_outputs - 1, persistent=False)
        self._whole: Head | None = None  # of a selected head, which may lack the output for all genes

    @property
    def is_linear(self) -> bool:
        """Whether the head can be applied to sums of D in place of D."""
        return self.link == "identity"

    def forward(self, rows: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Return the values of outputs at pixels: rows (..., n, C) -> (..., n, outputs), float32."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.float()
            linear = functional.linear(rows, self.weight[outputs].float(), self.bias[outputs].float())
            if self.is_linear:
                return linear
            relative = functional.softplus(linear + _AT_ONE) * self.unit[outputs]
            # Only the counts of all genes teach the total: in a region's shares it is no more than the weight of each
            # pixel, and would become what makes genes fit best, on glass too.
            return relative * torch.where(self.is_total[outputs], 1.0, self._total(rows).detach()[..., None])

    def columns(self, d: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the values of all outputs, pixels last, as a map lies: D (C, n) float32 -> (M, n), put into `out`."""
        linear = torch.addmm(self.bias[:, None], self.weight, d, out=out)
        if self.is_linear:
            return linear
        relative = functional.softplus(linear.add_(_AT_ONE)).mul_(self.unit[:, None])
        return relative.mul_(torch.where(self.is_total[:, None], 1.0, self._total(d.T)))

    def _total(self, rows: Tensor) -> Tensor:
        """Return the density of all genes at pixels, relative to the usual one: (n, C) -> (n,)."""
        whole = self._whole or self
        return functional.softplus(rows @ whole.weight[-1].float() + whole.bias[-1].float() + _AT_ONE)

    @torch.no_grad()
    def select(self, index: ArrayLike, scale: float = 1.0) -> Head:
        """Make a frozen float32 copy for some outputs; `scale` multiplies densities, to give them another unit."""
        index = torch.as_tensor(index, device=self.weight.device)
        chosen = Head(self.in_features, len(index), self.link)
        chosen.weight.data, chosen.bias.data = self.weight[index].float(), self.bias[index].float()
        if not self.is_linear:
            chosen.unit, chosen.is_total = self.unit[index].float() * scale, self.is_total[index]
            whole, chosen._whole = self._whole or self, Head(self.in_features, 1)
            chosen._whole.weight.data = whole.weight.detach()[-1:].float()
            chosen._whole.bias.data = whole.bias.detach()[-1:].float()
        return chosen.requires_grad_(requires_grad=False)


class Factors:
    """In place of a linear head: D and a 1 (0 off the tissue), of which any output, or average of it, is a sum."""

    is_linear = True

    def __init__(self, channels: int) -> None:
        self.n_outputs = channels + 1

    def columns(self, d: Tensor, out: Tensor | None = None) -> Tensor:
        """Append a 1: D (C, n) -> (C + 1, n); see `Head.columns`."""
        return torch.cat([d, d.new_ones(1, d.shape[1])], out=out)


class Lateral(nn.Module):
    """Standardise a feature map per channel and project it, both in one 1 × 1 convolution.

    Backbone channels differ in scale by orders of magnitude, which a few hundred spots cannot teach a network. The
    constants are measured once on training tiles (`Network.calibrate`), so they carry no statistics of the batch:
    batch norm would remove what tells one slide from another.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, channels_in: int, channels_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels_in, channels_out, 1)
        self.dropout = dropout
        self.register_buffer("mean", torch.zeros(channels_in))
        self.register_buffer("scale", torch.ones(channels_in))

    def forward(self, x: Tensor) -> Tensor:
        """Project (B, C_in, h, w) -> (B, C_out, h, w), dropping input channels in training."""
        # Dropping a standardised channel everywhere is dropping its column of the projection, however large the map is.
        keep = functional.dropout(torch.ones_like(self.scale), self.dropout, self.training) * self.scale
        weight = self.project.weight * keep[:, None, None]
        bias = self.project.bias - weight.flatten(1) @ self.mean  # type: ignore[operator]
        return functional.conv2d(x, weight, bias)


class Decoder(nn.Module):
    """D_0 = F_L; D_l = DFFN(Dconv(D_{l-1}) + δ_l F_{L-l}), l = 1..L-1 (Eq. 3, its index corrected).

    `widths` are the channels of D at the stride of each F_l, and every F_l passes a `Lateral`; with None, F is fed in
    as it is and D has the encoder's channels (the paper, Zhang et al., arXiv 2503.01347). `hidden` are the channels of
    each feed-forward, one fewer than levels. All go from the finest level to the coarsest.
    """

    def __init__(
        self, encoder_channels: Sequence[int], widths: Sequence[int] | None, hidden: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        out = list(encoder_channels if widths is None else widths)
        self.laterals = nn.ModuleList(
            [nn.Identity() for _ in out]
            if widths is None
            else [Lateral(c, w, dropout) for c, w in zip(encoder_channels, out, strict=True)]
        )
        self.upsample = nn.ModuleList([nn.ConvTranspose2d(low, c, 2, stride=2) for c, low in pairwise(out)])
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, c, 1))
            for c, width in zip(out[:-1], hidden, strict=True)
        )
        self.skip_scale = nn.Parameter(torch.ones(len(out) - 1))
        self.channels_out = out[0]
        self.apply(_keep_variance)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Decode F_1..F_L, each (B, C_l, h_l, w_l), into the feature map D_{L-1}, (B, C, h_1, w_1)."""
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


def apply_head(pooled: Tensor, n_px: Tensor, weight: Tensor, bias: Tensor, aggregation: Aggregation) -> Tensor:
    """Finish Eq. 4-5 from summed features: A (D W + b), over n_px for a mean, from A D.

    Shapes: pooled (n, C), n_px (n, 1), weight (M, C), bias (M,) -> (n, M).
    """
    if aggregation == "mean":
        return functional.linear(pooled / n_px.clamp_min(1e-12), weight, bias)
    # A sum has n_px times the bias: one channel more, so that nothing of the size of the result is added up.
    return torch.cat([pooled, n_px], dim=1) @ torch.cat([weight, bias[:, None]], dim=1).T


class Network(nn.Module):
    """Image in, feature map D out; regions by `predict_regions`, the gene map by `gene_map`.

    Values are averaged or summed over a region's pixels (Eq. 5 is the sum); densities are always summed, and have
    `log_dispersion` (sizes, M): that of the counts of regions of each size, which is learnt beside them.
    """

    log_dispersion: nn.Parameter | None

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderConfig,
        n_outputs: int,
        aggregation: Aggregation,
        link: Link = "identity",
        n_sizes: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(encoder.channels, decoder.widths, decoder.hidden, decoder.dropout)
        self.decoder_config = decoder
        self.head = Head(self.decoder.channels_out, n_outputs, link)
        self.aggregation = aggregation
        log_dispersion = None if link == "identity" else nn.Parameter(torch.full((n_sizes, n_outputs), _DISPERSION))
        self.register_parameter("log_dispersion", log_dispersion)

    def forward(self, image: Tensor) -> Tensor:
        """Map RGB (B, 3, H, W) on a scale of 0 to 255 to the feature map D (B, C, H / 4, W / 4)."""
        return self.decoder(self.encoder(image))

    def gene_map(self, features: Tensor) -> Tensor:
        """Apply the head, Eq. 4 before its Resize: D (B, C, h, w) -> (B, M, h, w)."""
        return self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def predict_regions(self, features: Tensor, operator: Operator) -> Tensor:
        """Compute Eq. 4-5 without the map: A (D W + b), over n_px for a mean; of densities, A unit ⊙ softplus(D W + b).

        Features (B, C, h, w), in the order of the operator's B h w columns -> (n, M). Of a region off the slide (n_px
        0) the sum is 0 and the mean the bias.
        """
        return self.region_values(self.region_inputs(self.rows(features), operator), operator)

    def rows(self, features: Tensor) -> Tensor:
        """Lay feature maps out as operators have their columns: (B, C, h, w) -> (B h w, C)."""
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])

    def region_inputs(self, rows: Tensor, operator: Operator) -> Tensor:
        """Return all that regions need of feature `rows`: A D under a linear head, else D where A is not 0."""
        return operator.apply(rows) if self.head.is_linear else operator.gather(rows)

    def region_values(self, inputs: Tensor, operator: Operator, outputs: slice = slice(None)) -> Tensor:
        """Compute outputs of `predict_regions`, shape (n, outputs), from `region_inputs`."""
        return self.summed(self.pixel_values(inputs, outputs), operator, outputs)

    def pixel_values(self, inputs: Tensor, outputs: slice) -> Tensor:
        """Compute what of `region_values` depends on the inputs only, so that sizes with the same share it."""
        return inputs if self.head.is_linear else self.head(inputs, outputs)

    def summed(self, values: Tensor, operator: Operator, outputs: slice) -> Tensor:
        """Compute `region_values` from `pixel_values`."""
        if not self.head.is_linear:
            return operator.total(values)
        n_px = torch.as_tensor(operator.n_px, dtype=values.dtype, device=values.device)[:, None]
        weight, bias = self.head.weight[outputs].float(), self.head.bias[outputs].float()
        with torch.autocast(values.device.type, enabled=False):
            return apply_head(values, n_px, weight, bias, self.aggregation)

    def log_dispersion_of(self, size: int | None, outputs: slice) -> Tensor:
        """Return the logarithm of the dispersion of outputs, (outputs,), at a size; at one that is new, the mean."""
        assert self.log_dispersion is not None  # of densities
        learnt = self.log_dispersion[:, outputs]
        return learnt.mean(0) if size is None else learnt[size]

    @torch.no_grad()
    def start_from(self, mean: Tensor, n_px: float = 1.0) -> None:
        """Start the head at the mean of each output, (M,), so that the first steps do not go into finding it.

        It is that of the regions' targets, of typically `n_px` pixels each: a sum is that much larger than a mean. Of
        densities it is the mean per working pixel.
        """
        per_pixel = 1.0 if self.aggregation == "mean" else max(n_px, 1.0)
        (self.head.bias if self.head.is_linear else self.head.unit).copy_(mean / per_pixel)
        if not self.head.is_linear:
            self.head.bias.zero_()
        self.head.weight.mul_(0.1 / per_pixel)

    @property
    def has_laterals(self) -> bool:
        """Whether the pyramid is standardised and projected before the decoder."""
        return isinstance(self.decoder.laterals[0], Lateral)

    @torch.no_grad()
    def calibrate(self, samples: Sequence[Tensor]) -> None:
        """Set the laterals' standardising constants from feature vectors of each level, shapes (n, C_l)."""
        for lateral, values in zip(self.decoder.laterals, samples, strict=True):
            if isinstance(lateral, Lateral):
                lateral.mean.copy_(values.mean(0))
                lateral.scale.copy_(1 / (values.std(0, correction=0) + 1e-3))


# How far a pixel looks


@contextmanager
def _evaluating(network: Network) -> Iterator[torch.device]:
    """Set evaluation mode for a while; yields the network's device."""
    was_training = network.training
    network.eval()
    try:
        yield next(network.parameters()).device
    finally:
        network.train(was_training)


@torch.no_grad()
def receptive_radius_px(network: Network) -> int:
    """Bound how far from a map pixel the image can matter, in working pixels, a multiple of 32.

    Sums the reach of every convolution and pooling layer on the way, at the resolution it works at; branches are
    added as if they followed each other, so the bound is safe, and exact for plain residual networks. Global operations
    (attention, squeeze-excite) are not seen here, see `sees_whole_tile`.
    """
    side = 4 * _ALIGN_PX
    reach = float(2 * MAP_STRIDE)  # the bilinear Resize

    def add(module: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal reach
        kernel, dilation = (int(np.max(value)) for value in (module.kernel_size, getattr(module, "dilation", 1)))
        spread = (kernel - 1) * dilation // 2 + (kernel + 1) % 2  # input pixels to one side
        reach += spread * side / args[0].shape[-1]

    with _evaluating(network) as device, ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, _SPREADING):
                hooks.enter_context(module.register_forward_hook(add))
        network(torch.zeros(1, 3, side, side, device=device))
    return int(-(-reach // _ALIGN_PX) * _ALIGN_PX)


@torch.no_grad()
def sees_whole_tile(network: Network, radius_px: int) -> bool:
    """Tell whether pixels beyond the receptive radius change the map, as with attention and squeeze-excite.

    The result then depends on how the slide is cut into tiles, however wide the halo.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, _ALIGN_PX, radius_px + 3 * _ALIGN_PX, generator=generator) * 255
    changed = image.clone()
    changed[..., radius_px + _ALIGN_PX :] = 255 - changed[..., radius_px + _ALIGN_PX :]
    near = slice(0, _ALIGN_PX // MAP_STRIDE)
    with _evaluating(network) as device:
        before, after = (network(x.to(device))[..., near] for x in (image, changed))
    return bool((before - after).abs().max() > 1e-5 * before.std())
