"""How to train, and what happened.

:class:`TrainingOptions` is the one home of training settings. Verbs take an object of it
(``training=``) or its fields as keyword arguments; ``@trains`` shows these in their signatures.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, ParamSpec, TypedDict, TypeVar

from circuitlens.errors import InputError, check_whole

__all__ = [
    "COMPETENCE",
    "DEFAULT_RATES",
    "DEFAULT_STRATEGIES",
    "ROUNDING",
    "TRANSFER",
    "TrainingKeywords",
    "TrainingLog",
    "TrainingOptions",
    "check_keep_source",
    "check_replay",
    "rank",
    "replays_of",
    "training_tries",
    "trains",
]

P = ParamSpec("P")
R = TypeVar("R")

_WHOLE = {"epochs": 1, "batch_size": 1, "patience": 1, "accumulation": 1, "seed": 0}
_REAL = ("learning_rate", "weight_decay", "warmup", "max_grad_norm")


class TrainingKeywords(TypedDict, total=False):
    """The fields of :class:`TrainingOptions` as keyword arguments of the verbs."""

    learning_rate: float
    epochs: int
    batch_size: int
    weight_decay: float
    warmup: float
    patience: int
    max_grad_norm: float
    accumulation: int
    bf16: bool
    seed: int


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; in brackets the nearest name of ``transformers.TrainingArguments``.

    Attributes:
        learning_rate: peak rate; linear decay to zero (``learning_rate``).
        epochs: passes over the training examples, at most (``num_train_epochs``).
        batch_size: examples per step, over all parts and processes
            (``per_device_train_batch_size`` times steps of accumulation times devices).
        weight_decay: decoupled (AdamW), on trained entries only (``weight_decay``).
        warmup: share of the steps in which the rate rises (``warmup_ratio``).
        patience: stop after this many epochs without a better validation score, not counting
            those of the warm-up (``early_stopping_patience``).
        max_grad_norm: gradients are clipped to this norm, after masking; 0 does not clip
            (``max_grad_norm``).
        accumulation: parts of a batch that are run one after another, gradients accumulated: less
            memory, and less padding where lengths differ, at the same result up to rounding
            (``gradient_accumulation_steps``, which multiplies the batch instead).
        bf16: run the model in bfloat16 (autocast); weights and optimiser keep their own type
            (``bf16``).
        seed: order of the examples, dropout (``seed``).

    Raises:
        InputError: for a value that no training could work with.
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
        if not isinstance(self.bf16, bool):
            raise InputError(f"bf16 must be True or False, but is {self.bf16!r}.")
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

    def updated(self, changes: Mapping[str, Any]) -> TrainingOptions:
        """Return these options with some fields changed.

        Raises:
            InputError: for a value that no training could work with.
            TypeError: for anything that is not a field.
        """
        known = [field.name for field in fields(self)]
        if unknown := [name for name in changes if name not in known]:
            raise TypeError(
                f"There is no argument {unknown[0]!r}; training options are {', '.join(known)}."
            )
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return asdict(self)


# Accuracies are quotients: 0.85 - 0.84 is a little more than 0.01.
ROUNDING = 1e-9
# What finetune and transfer do unless told otherwise.
COMPETENCE = TrainingOptions(learning_rate=1e-3, weight_decay=0.01, patience=3)
DEFAULT_RATES = (3e-4, 1e-3, 3e-3)
# What is compared unless told otherwise; all strategies would take twice as long.
DEFAULT_STRATEGIES = ("circuit", "near-zero", "random", "norms", "lora", "full")
TRANSFER = TrainingOptions(learning_rate=DEFAULT_RATES[1])


def training_tries(
    learning_rates: Iterable[float] | float | None,
    training: TrainingOptions | None,
    changes: Mapping[str, Any],
) -> list[TrainingOptions]:
    """Options for every learning rate that is tried, each once.

    Args:
        learning_rates: by default that of ``training``, or :data:`DEFAULT_RATES`.
        training: how to train.
        changes: fields to change.

    Raises:
        InputError: for settings that no transfer could work with.
        TypeError: for anything that is not a field.
    """
    options = (training or TRANSFER).updated(changes)
    if learning_rates is None:
        given = training is not None or "learning_rate" in changes
        return [options] if given else training_tries(DEFAULT_RATES, training, changes)
    if isinstance(learning_rates, float | int):
        raise InputError(f"learning_rates is a list: give [{learning_rates:g}].")
    if "learning_rate" in changes:
        raise InputError("Give learning_rate or learning_rates, not both.")
    rates = list(dict.fromkeys(map(float, learning_rates)))
    if not rates:
        raise InputError("Give at least one learning rate.")
    return [replace(options, learning_rate=rate) for rate in rates]


def check_replay(replay: float) -> None:
    """Reject an impossible number of source examples.

    Raises:
        InputError: if it is negative or not finite.
    """
    if not 0 <= replay < math.inf:
        raise InputError(
            f"replay is a number of source examples per target example, not {replay!r}."
        )


def replays_of(replay: float | Iterable[float | int]) -> tuple[float, ...]:
    """Amounts of replay that are tried, each once.

    Raises:
        InputError: if one is negative or not finite, or there is none.
    """
    given = (replay,) if isinstance(replay, float | int) else tuple(replay)
    found = tuple(dict.fromkeys(given))
    if not found:
        raise InputError("replay is an empty list: give 0 for none.")
    for amount in found:
        check_replay(float(amount))
    return tuple(map(float, found))


def check_keep_source(keep_source: float | None) -> None:
    """Reject an impossible loss of source accuracy.

    Raises:
        InputError: if it is not a share.
    """
    if keep_source is None:
        return
    if not 0 <= keep_source < 1:
        raise InputError(
            "keep_source is the source accuracy that may be lost, as a share below 1 (0.01 is one "
            f"point), but is {keep_source!r}."
        )


def trains(
    defaults: TrainingOptions, *, but: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show training options in the signature of a verb that takes them as ``**options``.

    Args:
        defaults: of the verb.
        but: fields that the verb takes otherwise.
    """

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(verb)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return verb(*args, **kwargs)

        shown = inspect.signature(verb)
        given = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(defaults, field.name),
                annotation=field.type,
            )
            for field in fields(defaults)
            if field.name not in but
        ]
        call.__signature__ = shown.replace(parameters=[*given, *options])  # type: ignore[attr-defined]
        return call

    return decorate


@dataclass(frozen=True)
class TrainingLog:
    """What happened.

    Attributes:
        history: one entry per epoch: ``epoch``, ``accuracy`` and ``margin`` on validation, and
            ``monitor: NAME`` of what was watched; ``within`` is 0 where a monitor lost more than
            its limit. Empty without validation.
        best: the entry whose weights were kept.
        steps: optimiser steps taken.
        seconds: that it took, in all processes that continued it.
        forward, backward: prompts that went through the model, validation too, in all of these.
    """

    history: tuple[dict[str, float], ...]
    best: dict[str, float]
    steps: int
    seconds: float
    forward: float = 0.0
    backward: float = 0.0


def rank(entry: Mapping[str, float]) -> tuple[float, float, float]:
    """Sort key of the entries of a history: the best epoch and the best rate are the largest."""
    # Those that a monitor's limit leaves out come last. Accuracy on a hundred examples ties often;
    # the margin then decides.
    return entry.get("within", 1.0), entry["accuracy"], entry["margin"]
