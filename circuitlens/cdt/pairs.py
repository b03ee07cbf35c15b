"""The rules by which a pair (relevant, irrelevant) passes single maps, as published.

Hsu et al. 2024, arXiv 2407.00886. Written (r, i), with total r + i; all of it is elementwise but
for the map itself:

    share(u, v; b)  (b|u| / (|u| + |v| + TOL), b|v| / (|u| + |v| + TOL))
    LIN             u = rW, v = iW;  (u, v) + share(u, v; b)
    LN              ((r − mean r)/s·g, (i − mean i)/s·g) + share(r, i; b),
                    s = sqrt(E[x²] − E[x]² + eps) of the total x
    CANCEL          where r·i < 0, the smaller in magnitude becomes 0 and the larger r + i
    ACT             (f(r + i) − f(i), f(i))
    sources         r ← r + i − m, i ← m
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["TOL", "Pair", "activate", "cancel", "linear", "norm", "set_sources", "share"]

# Keeps a share from dividing by zero where both parts are 0; the published value. It is also why
# the parts of the logits do not quite add up to the model's: the shares of b lack
# b·TOL/(|u| + |v| + TOL), which is next to nothing except where an output happens to be near 0.
TOL = 1e-8


@dataclass(frozen=True)
class Pair:
    """The two parts of an activation; they add up to it."""

    relevant: Float[Tensor, "*shape"]
    irrelevant: Float[Tensor, "*shape"]

    def __add__(self, other: Pair) -> Pair:
        return Pair(self.relevant + other.relevant, self.irrelevant + other.irrelevant)

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """Apply a linear function, such as a change of shape, to each part."""
        return Pair(function(self.relevant), function(self.irrelevant))

    @property
    def total(self) -> Float[Tensor, "*shape"]:
        """The activation."""
        return self.relevant + self.irrelevant


def share(weights: Pair, bias: Float[Tensor, " d"]) -> Pair:
    """Share a bias out in proportion to the magnitudes of two parts."""
    size = weights.relevant.abs() + weights.irrelevant.abs() + TOL
    return Pair(
        bias * (weights.relevant.abs() / size),
        bias * (weights.irrelevant.abs() / size),
    )


def linear(
    x: Pair, weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"] | None
) -> Pair:
    """LIN: a linear map; its bias, if any, is shared by what the map makes of the parts."""
    mapped = x.map(lambda part: part @ weight)
    return mapped if bias is None else mapped + share(mapped, bias)


def norm(x: Pair, gain: Float[Tensor, " d"], bias: Float[Tensor, " d"], eps: float) -> Pair:
    """LN: both parts centred and scaled as the total asks; the bias is shared by the inputs."""
    total = x.total
    variance = total.square().mean(-1, keepdim=True) - total.mean(-1, keepdim=True).square()
    scale = (variance + eps).sqrt()
    normed = x.map(lambda part: (part - part.mean(-1, keepdim=True)) / scale * gain)
    return normed + share(x, bias)


def cancel(x: Pair) -> Pair:
    """CANCEL: where the parts have opposite signs the larger takes their sum, the other 0."""
    r, i, total = x.relevant, x.irrelevant, x.total
    opposed, larger = r * i < 0, r.abs() >= i.abs()
    zero = torch.zeros_like(total)
    return Pair(
        torch.where(opposed, torch.where(larger, total, zero), r),
        torch.where(opposed, torch.where(larger, zero, total), i),
    )


def activate(x: Pair, function: Callable[[Tensor], Tensor]) -> Pair:
    """ACT: the irrelevant part by itself, and what the relevant part adds to it."""
    alone = function(x.irrelevant)
    return Pair(function(x.total) - alone, alone)


def set_sources(
    z: Pair, chosen: Bool[Tensor, "row pos head"], mean: Float[Tensor, "pos head d_head"]
) -> Pair:
    """Make deviations from the mean relevant, and means irrelevant, at the chosen sources."""
    where = chosen[..., None]
    return Pair(
        torch.where(where, z.total - mean, z.relevant),
        torch.where(where, mean, z.irrelevant),
    )
