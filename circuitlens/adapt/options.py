"""How to train, and what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from circuitlens.errors import InputError, check_whole

__all__ = ["TrainingLog", "TrainingOptions", "rank"]


_WHOLE = {"epochs": 1, "batch_size": 1, "patience": 1, "accumulation": 1, "seed": 0}
_REAL = ("learning_rate", "weight_decay", "warmup", "max_grad_norm")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        learning_rate: peak rate; linear decay to zero.
        epochs: passes over the training examples, at most.
        batch_size: examples per step, over all processes.
        weight_decay: decoupled (AdamW), on trained entries only.
        warmup: share of the steps in which the rate rises.
        patience: stop after this many epochs without a better validation score, not counting
            those of the warm-up.
        max_grad_norm: gradients are clipped to this norm (after masking).
        accumulation: parts of a batch that are run one after another, gradients accumulated: less
            memory, and less padding where lengths differ, at the same result up to rounding.
        bf16: run the model in bfloat16 (autocast); weights and optimiser keep their own type.
        seed: order of the examples, dropout.
    """

    learning_rate: float
    epochs: int = 10
    batch_size: int = 16
    weight_decay: float = 0.0
    warmup: float = 0.1
    patience: int = 10
    max_grad_norm: float = 1.0
    accumulation: int = 1
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least))
        for name in _REAL:
            value = getattr(self, name)
            # NaN is not larger than anything.
            if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise InputError(f"{name} must be a number of at least 0, but is {value!r}.")
            object.__setattr__(self, name, float(value))
        if self.learning_rate == 0:
            raise InputError("learning_rate must be positive, but is 0.")
        if self.warmup > 1:
            raise InputError(f"warmup is a share of the steps, but is {self.warmup}.")
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32, but is {self.seed}.")
        if self.accumulation > self.batch_size:
            raise InputError(
                f"accumulation is the number of parts of a batch, so it cannot be more than "
                f"batch_size ({self.batch_size}), but is {self.accumulation}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingLog:
    """What happened.

    Attributes:
        history: one entry per epoch: ``epoch``, ``accuracy`` and ``margin`` on validation; empty
            without validation.
        best: the entry whose weights were kept.
        steps: optimiser steps taken.
        seconds: that it took, in all processes that went on with it.
    """

    history: tuple[dict[str, float], ...]
    best: dict[str, float]
    steps: int
    seconds: float


def rank(entry: Mapping[str, float]) -> tuple[float, float]:
    """Sort key of the entries of a history: the best epoch and the best rate are the largest."""
    # Accuracy on a hundred examples ties often; the margin then decides.
    return entry["accuracy"], entry["margin"]
