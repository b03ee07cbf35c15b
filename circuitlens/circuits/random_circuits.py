"""Circuits drawn at random, against which a found one is judged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = ["layer_matched_masks", "random_masks"]


def random_masks(
    sizes: Sequence[int], n_layers: int, n_heads: int, n: int, generator: torch.Generator
) -> Bool[Tensor, "draw size layer head"]:
    """Draw heads uniformly from all layers; a draw's larger circuits contain its smaller ones."""
    total = n_layers * n_heads
    orders = torch.empty(n, total, dtype=torch.long)
    for draw in range(n):
        orders[draw] = torch.randperm(total, generator=generator)
    # The place of each head in the order: those placed before the size are in.
    place = orders.argsort(1).view(n, 1, n_layers, n_heads)
    return place < torch.tensor(sizes)[:, None, None]


def layer_matched_masks(
    kept: Bool[Tensor, "size layer head"], n: int, generator: torch.Generator
) -> Bool[Tensor, "draw size layer head"]:
    """Draw circuits that have as many heads in every layer as the circuits ``kept`` have there.

    A head's layer alone says much about what it can do; these draws leave only its place in the
    layer to chance. If ``kept`` grows from size to size, so do the draws.
    """
    _, n_layers, n_heads = kept.shape
    place = torch.rand(n, 1, n_layers, n_heads, generator=generator).argsort(-1).argsort(-1)
    return place < kept.sum(-1, keepdim=True)
