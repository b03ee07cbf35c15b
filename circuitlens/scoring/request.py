"""What is asked of a scorer, and what those that see all examples together answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor

from circuitlens.cdt import Path
from circuitlens.errors import InputError, check_choice
from circuitlens.models.batch import Positions
from circuitlens.utils.row_budget import RowBudget

__all__ = ["Request", "Scored"]


@dataclass(frozen=True)
class Request:
    """What is asked of a scorer.

    Attributes:
        positions: where nodes deviate from their means.
        mlps: score MLPs too.
        by_position: score every head at every single position too.
        path: ``"total"`` or ``"direct"``, for scorers by gradient.
        steps: number of steps of integrated gradients.
        rounds: number of rounds of ``sampled``.
        share: share of the remaining heads that ``iterative`` removes in each round.
        candidates: scorers that ``auto`` chooses from.
        seed: of what is drawn.
        budget: prompts that go through the model at once in patched runs.
    """

    positions: Positions = "all"
    mlps: bool = False
    by_position: bool = False
    path: Path = "total"
    steps: int = 5
    rounds: int = 8
    share: float = 0.4
    candidates: tuple[str, ...] = ("cdt-linear", "sampled")
    seed: int = 0
    budget: RowBudget = field(default_factory=lambda: RowBudget(32))

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, get_args(Positions))
        check_choice("path", self.path, get_args(Path))
        if self.rounds < 1:
            raise InputError(f"rounds must be at least 1, but is {self.rounds}.")
        if not 0 < self.share < 1:
            raise InputError(f"share must lie between 0 and 1, but is {self.share}.")
        if not self.candidates:
            raise InputError("auto chooses from candidates: name at least one.")


@dataclass(frozen=True)
class Scored:
    """Scores of all examples together.

    Attributes:
        heads: one score for all examples, or one for each.
        stages: scores of other methods that came on the way, by name.
        mlps: of MLPs on each example, if asked for.
        details: what the result should record about how it came about, for JSON.
    """

    heads: Float[Tensor, "layer head"] | Float[Tensor, "example layer head"]
    stages: Mapping[str, Tensor] = field(default_factory=dict)
    mlps: Float[Tensor, "example layer"] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
