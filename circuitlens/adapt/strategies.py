"""Which weights a transfer trains: one registry, one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.geometry import norm_parameters, selection_masks
from circuitlens.model import HookedModel
from circuitlens.scores import HeadScores

__all__ = ["STRATEGIES", "choose_heads", "trainable_masks"]

STRATEGIES: dict[str, str] = {
    "circuit": "the circuit's slices of q, k, v, o, and all norms",
    "near-zero": "as many heads with relevance nearest to zero, and all norms",
    "random": "as many heads drawn at random, and all norms",
    "norms": "all norms only",
    "full": "all weights",
}

_NEEDS_SCORES: dict[str, Callable[[HeadScores, int, int], Circuit]] = {
    "near-zero": lambda scores, size, seed: scores.near_zero(size),
    "random": lambda scores, size, seed: scores.random(size, seed),
}


def choose_heads(
    strategy: str, circuit: Circuit, scores: HeadScores | None, seed: int
) -> Circuit | None:
    """Return the heads that ``strategy`` trains; ``None`` where it is not about heads.

    Raises:
        InputError: for an unknown strategy, or one that needs scores and has none.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"There is no strategy {strategy!r}; known are {', '.join(STRATEGIES)}.")
    if strategy == "circuit":
        return circuit
    if strategy not in _NEEDS_SCORES:
        return None
    if scores is None:
        raise InputError(f"The strategy {strategy!r} chooses heads by their scores: pass scores=….")
    return _NEEDS_SCORES[strategy](scores, len(circuit), seed)


def trainable_masks(
    model: HookedModel, strategy: str, heads: Circuit | None
) -> dict[str, Bool[Tensor, "..."]]:
    """Masks of the entries that are trained, by parameter name.

    Under grouped-query attention a chosen query head trains the key/value head that it shares.
    """
    if strategy == "full":
        parameters = model.hf.named_parameters()
        return {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters}
    slices = [piece for head in heads or () for piece in model.geometry.slices(head)]
    return selection_masks(model.hf, slices, norm_parameters(model.hf))
