"""The errors that circuitlens raises on purpose.

Each message is one sentence that names what is wrong and the remedy; the command line
prints it without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

__all__ = [
    "BASELINE",
    "CIRCUIT",
    "MODEL",
    "SCORES",
    "TASK",
    "CircuitLensError",
    "CompetenceError",
    "InputError",
    "NotFiniteError",
    "UnsupportedModelError",
    "check_choice",
    "check_types",
    "check_whole",
    "first_line",
]


class CircuitLensError(Exception):
    """Base of all errors raised on purpose."""


class InputError(CircuitLensError, ValueError):
    """An argument, a file or a data set cannot be used as it is."""


class NotFiniteError(InputError):
    """A model gives NaN or infinity: its training diverged, or its numbers overflow."""


class UnsupportedModelError(CircuitLensError):
    """The model has no attention heads that the hooks or the weight slices can reach."""


class CompetenceError(CircuitLensError):
    """The model does the task no better than chance, so a circuit for it would be noise.

    Attributes:
        model: the :class:`circuitlens.HookedModel` as it was when the check failed (trained, if
            training led here).
    """

    def __init__(self, message: str, model: Any = None) -> None:
        super().__init__(message)
        self.model = model


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Reject the value of an argument that is not one of the known ones.

    Raises:
        InputError: naming the argument, its value and the known ones.
    """
    choices = tuple(known)
    if value not in choices:
        raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def check_types(verb: str, **arguments: tuple[object, type | tuple[type, ...], str]) -> None:
    """Reject arguments of another type, such as two that were swapped.

    Args:
        verb: the function that was called.
        arguments: by name, the value, the type (or one of the types) that it must have, and how to
            get such a value.

    Raises:
        InputError: naming the first wrong argument, what it is, and what was expected.
    """
    for name, (value, kind, remedy) in arguments.items():
        if isinstance(value, kind):
            continue
        swapped = [other for other, (_, right, _) in arguments.items() if isinstance(value, right)]
        hint = remedy
        if swapped:
            hint = f"it looks like {swapped[0]}; the order is {', '.join(arguments)}"
        kinds = " or a ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(
            f"{verb}: {name} must be a {kinds}, but is a {type(value).__name__}: {hint}."
        )


MODEL = "load it with cl.load(…)"
TASK = "make one with cl.load_task(…) or cl.Task.from_…"
BASELINE = "take it with cl.label_balanced_mean(model, task)"
SCORES = "score the heads with cl.relevance(model, task, baseline)"
CIRCUIT = "choose one with scores.top(…), or make one with cl.Circuit.of(…)"


def check_whole(name: str, value: object, least: int = 1) -> int:
    """Return a whole number, of whatever type, as an int.

    Raises:
        InputError: if it is none, or less than ``least``, naming the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, but is {value!r}.")
    return int(value)


def first_line(error: Exception) -> str:
    """First line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
