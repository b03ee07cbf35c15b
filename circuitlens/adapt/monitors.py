"""Numbers that are watched while a model is trained, and that may limit what is chosen.

A speech model that is adapted with text must still hear; Fang et al. (arXiv 2506.05671) stop
their training by such a number, taken while it runs. A monitor is measured before the training,
after every epoch and at every α. With a limit, only epochs, rates and α are chosen that lose at
most so much of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from circuitlens.errors import InputError
from circuitlens.models.freezing import evaluating
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Task
from circuitlens.tasks.evaluation import evaluate_encoded

__all__ = ["PREFIX", "Measure", "Watch", "limits_of", "measured", "watches_of"]

Measure = Callable[[HookedModel], float]
# Of the entries of a history that are monitors.
PREFIX = "monitor: "


@dataclass(frozen=True)
class Watch:
    """One monitor.

    Attributes:
        name: of it.
        measure: gives the number for a model; larger is better.
        keep: how much of it may be lost; ``None`` watches only.
        least: the smallest value that may be chosen, once the start is known.
        identity: what tells it from another one of that name; of a function nothing does.
    """

    name: str
    measure: Measure
    keep: float | None = None
    least: float = -math.inf
    identity: str = ""

    def value(self, model: HookedModel) -> float:
        """The number for a model.

        Raises:
            InputError: if it is not a finite number.
        """
        whole = cast(nn.Module, model.whole)
        wanted = [(p, p.requires_grad) for p in {*whole.parameters(), *model.hf.parameters()}]
        try:
            with torch.no_grad(), evaluating(whole), evaluating(model.hf):
                found: Any = self.measure(model)
        except Exception as error:
            error.add_note(f"This came from the monitor {self.name!r}.")
            raise
        finally:
            for parameter, trained in wanted:
                parameter.requires_grad_(trained)
        # Scalars of numpy and torch.
        if (
            isinstance(found, np.generic | np.ndarray | torch.Tensor)
            and math.prod(found.shape) == 1
        ):
            found = found.item()
        if not isinstance(found, Real) or not math.isfinite(found):
            hint = ", such as its .accuracy" if hasattr(found, "accuracy") else ""
            raise InputError(
                f"The monitor {self.name!r} gave {found!r}: return a finite number, larger where "
                f"the model is better{hint}."
            )
        return float(found)

    def after(self, start: float) -> Watch:
        """The monitor with its limit, once it was measured on the model as it was."""
        return self if self.keep is None else replace(self, least=start - self.keep)


def watches_of(
    model: HookedModel,
    monitor: Task | Measure | Mapping[str, Task | Measure] | None,
    keep_monitor: float | Mapping[str, float] | None,
) -> tuple[Watch, ...]:
    """The monitors that were asked for; tasks are encoded once, on their validation split.

    Raises:
        InputError: for anything that is neither a task nor callable, for a name that no monitor
            has, or for a limit that is negative or not finite.
    """
    named = _named(monitor)
    limits = limits_of(keep_monitor, list(named))
    return tuple(
        Watch(
            name,
            _measure(model, name, what),
            limits.get(name),
            identity=what.fingerprint() if isinstance(what, Task) else "",
        )
        for name, what in named.items()
    )


def _named(
    monitor: Task | Measure | Mapping[str, Task | Measure] | None,
) -> Mapping[str, Task | Measure]:
    if monitor is None:
        return {}
    if isinstance(monitor, Task):
        return {monitor.full_name: monitor}
    if isinstance(monitor, Mapping):
        return {str(name): what for name, what in monitor.items()}
    return {getattr(monitor, "__name__", type(monitor).__name__): monitor}


def _measure(model: HookedModel, name: str, what: Task | Measure) -> Measure:
    if isinstance(what, Task):
        data = what.encode(model, "validation")
        return lambda now: evaluate_encoded(now, data).accuracy
    if not callable(what):
        raise InputError(
            f"The monitor {name!r} is {what!r}: give a task, whose validation accuracy is "
            "watched, or a function that takes the model and returns a number."
        )
    return what


def limits_of(
    keep_monitor: float | Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float]:
    """How much of each monitor may be lost.

    Raises:
        InputError: if it is negative or not finite, or names no monitor.
    """
    if keep_monitor is None:
        return {}
    if not names:
        raise InputError("keep_monitor limits what is lost of a monitor: pass monitor=… too.")
    if not isinstance(keep_monitor, Mapping):
        keep_monitor = dict.fromkeys(names, keep_monitor)
    if other := [name for name in keep_monitor if name not in names]:
        raise InputError(
            f"keep_monitor names {other[0]!r}, but the monitors are {', '.join(names)}."
        )
    for name, limit in keep_monitor.items():
        number: Any = limit
        if not isinstance(number, Real) or not 0 <= float(number) < math.inf:
            raise InputError(
                f"keep_monitor is how much of {name!r} may be lost, a number of at least 0 in its "
                f"own units, but is {limit!r}."
            )
    return {name: float(limit) for name, limit in keep_monitor.items()}


def measured(model: HookedModel, watches: Sequence[Watch]) -> tuple[float, ...]:
    """The numbers of all monitors for a model."""
    return tuple(watch.value(model) for watch in watches)
