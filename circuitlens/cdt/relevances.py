"""What every engine returns for a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

__all__ = ["Relevances"]


@dataclass(frozen=True)
class Relevances:
    """Relevance of nodes on each example of a batch, in logits of task margin.

    Attributes:
        heads: of heads that deviate at all chosen positions together.
        mlps: the same for MLPs, if asked for.
        by_position: of heads at single positions (0 where a head does not deviate), if asked for.
        details: how they came about, for JSON.
    """

    heads: Float[Tensor, "batch layer head"]
    mlps: Float[Tensor, "batch layer"] | None = None
    by_position: Float[Tensor, "batch pos layer head"] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
