"""From feature map to genes: the linear head, and the link that makes a density of it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

__all__ = ["Head", "Link"]

Link = Literal["identity", "softplus"]

_AT_ONE = math.log(math.e - 1)
"""Where softplus is 1."""


class Head(nn.Module):
    """D -> M outputs at every pixel: D W + b (Eq. 4), or a density ``unit * softplus(D W + b)``.

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
    """

    unit: Tensor

    def __init__(self, channels: int, n_outputs: int, link: Link = "identity") -> None:
        super().__init__()
        start = nn.Linear(channels, n_outputs)
        self.weight, self.bias, self.link = start.weight, start.bias, link
        if link == "softplus":
            self.register_buffer("unit", torch.ones(n_outputs))

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
            D of each pixel, shape (n, C).
        outputs
            Which.

        Returns
        -------
        Shape (n, outputs), float32.
        """
        with torch.autocast(rows.device.type, enabled=False):
            linear = nn.functional.linear(rows.float(), self.weight[outputs].float(), self.bias[outputs].float())
            return linear if self.is_linear else nn.functional.softplus(linear + _AT_ONE) * self.unit[outputs]

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
        return nn.functional.softplus(linear.add_(_AT_ONE)).mul_(self.unit[:, None])

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
        for name, value in self.state_dict().items():
            getattr(chosen, name).data = value.detach().float()[index.to(value.device)]
        if not self.is_linear:
            chosen.unit *= scale
        return chosen.requires_grad_(requires_grad=False)
