"""The errors that circuitlens raises on purpose.

Each message is one sentence that names the offending thing and the remedy; the command line
prints it without a traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuitlens.model import HookedModel

__all__ = ["CircuitLensError", "CompetenceError", "InputError", "UnsupportedModelError"]


class CircuitLensError(Exception):
    """Base of all errors raised on purpose."""


class InputError(CircuitLensError, ValueError):
    """An argument, a file or a data set cannot be used as it is."""


class UnsupportedModelError(CircuitLensError):
    """The model has no attention heads that the hooks or the weight slices can reach."""


class CompetenceError(CircuitLensError):
    """The model does the task no better than chance, so a circuit for it would be noise.

    Attributes:
        model: the model as it was when the check failed (trained, if training led here).
    """

    def __init__(self, message: str, model: HookedModel | None = None) -> None:
        super().__init__(message)
        self.model = model
