"""From feature map to genes: the linear head, and the link that makes a density of it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

__all__ = ["Factors", "Head", "Link"]

Link = Literal["identity", "softplus"]

_AT_ONE = math.log(math.e - 1)
"""Where softplus is 1."""


class Head(nn.Module):
    """D -> M outputs at every pixel: D W + b (Eq. 4), or densities of counts, the last of them that of all genes.

    The density of all genes is ``t = unit * softplus(D W + b)``, and that of a gene a share of it,
    ``t * unit * softplus(D W + b)``: so what a region has of a gene, relative to all, does not depend on how well t is
    known, which on a slide of another depth or thickness it is not.

    Parameters
    ----------
    channels
        C.
    n_outputs
        M.
    link
        ``"identity"``, or ``"softplus"`` for densities, which are never negative.

    Attributes
    ----------
    weight, bias
        Shapes (M, C) and (M,).
    unit
        Density of each output where D W + b is 0, shape (M,); none with the identity.
    is_total
        Which output is that of all genes, shape (M,); none with the identity.
    """

    unit: Tensor
    is_total: Tensor

    def __init__(self, channels: int, n_outputs: int, link: Link = "identity") -> None:
        super().__init__()
        start = nn.Linear(channels, n_outputs)
        self.weight, self.bias, self.link = start.weight, start.bias, link
        if link == "softplus":
            self.register_buffer("unit", torch.ones(n_outputs))
            self.register_buffer("is_total", torch.arange(n_outputs) == n_outputs - 1, persistent=False)
        self._whole: Head | None = None  # of a selected head, which may lack the output for all genes

    @property
    def in_features(self) -> int:
        """C."""
        return self.weight.shape[1]

    @property
    def n_outputs(self) -> int:
        """M."""
        return self.weight.shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether it can be applied to sums of D in place of D."""
        return self.link == "identity"

    def forward(self, rows: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Values of some outputs at some pixels.

        Parameters
        ----------
        rows
            D of each pixel, shape (n, C), or with more axes before.
        outputs
            Which.

        Returns
        -------
        Shape (n, outputs), float32.
        """
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.float()
            linear = nn.functional.linear(rows, self.weight[outputs].float(), self.bias[outputs].float())
            if self.is_linear:
                return linear
            relative = nn.functional.softplus(linear + _AT_ONE) * self.unit[outputs]
            return relative * torch.where(self.is_total[outputs], 1.0, self._total(rows)[..., None])

    def columns(self, d: Tensor, out: Tensor | None = None) -> Tensor:
        """Values of all outputs at some pixels, pixels last: the layout of a map.

        Parameters
        ----------
        d
            D, shape (C, n), float32.
        out
            Where to put them, shape (M, n).

        Returns
        -------
        Shape (M, n).
        """
        linear = torch.addmm(self.bias[:, None], self.weight, d, out=out)
        if self.is_linear:
            return linear
        relative = nn.functional.softplus(linear.add_(_AT_ONE)).mul_(self.unit[:, None])
        return relative.mul_(torch.where(self.is_total[:, None], 1.0, self._total(d.T)))

    def _total(self, rows: Tensor) -> Tensor:
        """Density of all genes at some pixels, relative to the usual one, shape (n,)."""
        whole = self if self._whole is None else self._whole
        return nn.functional.softplus(rows @ whole.weight[-1].float() + whole.bias[-1].float() + _AT_ONE)

    @torch.no_grad()
    def select(self, index: ArrayLike, scale: float = 1.0) -> Head:
        """A head of its own for some outputs, in float32; nothing of it is trained.

        Parameters
        ----------
        index
            The outputs.
        scale
            Multiplies densities, to give them another unit.
        """
        index = torch.as_tensor(index)
        chosen = Head(self.in_features, len(index), self.link)
        for name in ("weight", "bias", *([] if self.is_linear else ["unit", "is_total"])):
            value = getattr(self, name).detach()
            picked = value[index.to(value.device)]
            getattr(chosen, name).data = picked if value.dtype == torch.bool else picked.float()
        if not self.is_linear:
            chosen.unit *= scale
            whole, chosen._whole = self if self._whole is None else self._whole, Head(self.in_features, 1)
            chosen._whole.weight.data = whole.weight.detach()[-1:].float()
            chosen._whole.bias.data = whole.bias.detach()[-1:].float()
        return chosen.requires_grad_(requires_grad=False)


class Factors:
    """In place of a head: D as it is, and a 1, which says where tissue is once a map is 0 elsewhere.

    Under a linear head any output is then the weighted sum of these, on tissue and off, and of averages as well.

    Parameters
    ----------
    channels
        C.
    """

    is_linear = True

    def __init__(self, channels: int) -> None:
        self.n_outputs = channels + 1

    def columns(self, d: Tensor, out: Tensor | None = None) -> Tensor:
        """D (C, n) -> D and a 1 (C + 1, n); see `Head.columns`."""
        return torch.cat([d, d.new_ones(1, d.shape[1])], out=out)
