"""Everything that is chosen for a run: the arguments of ``circuitlens run``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from circuitlens.adapt.strategies import AUTO, strategy_of
from circuitlens.adapt.transfers import DEFAULT_RATES, training_options
from circuitlens.errors import InputError
from circuitlens.models.batch import Positions
from circuitlens.models.hooked import HookedModel
from circuitlens.models.loading import find_device, load
from circuitlens.scoring.scorers import METHODS
from circuitlens.tasks import Task, load_task
from circuitlens.tasks.task import COLUMNS
from circuitlens.tasks.toy import toy_model

__all__ = ["DEFAULT_STRATEGIES", "TOY", "RunSettings"]

TOY = "toy"

# What a run compares unless told otherwise; all of STRATEGIES would take twice as long.
DEFAULT_STRATEGIES = ("circuit", "near-zero", "random", "norms", "lora", "full")


@dataclass(frozen=True)
class RunSettings:
    """Everything that was chosen for a run; the arguments of ``circuitlens run``."""

    model: str
    task: str
    source: str | None = None
    targets: tuple[str, ...] = ()
    data: str | None = None
    template: str | None = None
    labels: dict[str, str] | None = None
    columns: dict[str, str] | None = None
    competence: Literal["auto", "always", "never"] = "auto"
    finetune_rate: float | None = None
    finetune_epochs: int | None = None
    positions: Positions = "all"
    method: str = "cdt-linear"
    size: float | int = 0.25
    max_examples: int | None = None
    n_random: int = 30
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    learning_rates: tuple[float, ...] = DEFAULT_RATES
    epochs: int = 10
    accumulation: int = 1
    bf16: bool = False
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"There is no method {self.method!r}; known: {', '.join(METHODS)}.")
        if unknown := sorted(set(self.columns or ()) - set(COLUMNS)):
            raise InputError(
                f"There is no column {unknown[0]!r} to name: it is one of {', '.join(COLUMNS)}; "
                "texts are the columns that the template names."
            )
        if self.n_random < 1:
            raise InputError(f"n_random must be positive, but is {self.n_random}.")
        for strategy in self.strategies:
            if strategy != AUTO:
                strategy_of(strategy)
        training_options(self.learning_rates, 0.0, **self.training)

    @property
    def training(self) -> dict[str, Any]:
        """What every transfer is trained with."""
        return {"epochs": self.epochs, "accumulation": self.accumulation, "bf16": self.bf16}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunSettings:
        """Rebuild settings from JSON."""
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        return cls(**arguments)

    def open_task(self) -> Task:
        """Load the task in the source language."""
        options: dict[str, Any] = {"seed": self.seed, **(self.columns or {})}
        if self.template is not None:
            options["template"] = self.template
        if self.labels is not None:
            options["labels"] = self.labels
        return load_task(self.task, self.source, data=self.data, **options)

    def open_model(self) -> HookedModel:
        """Load the model; the name ``toy`` makes the untrained toy model."""
        if self.model == TOY:
            if self.dtype not in ("auto", "float32"):
                raise InputError(f"The toy model is made in float32, not in {self.dtype}.")
            toy = toy_model(self.seed)
            if (device := find_device(self.device)) is not None:
                toy.hf.to(device)
            return toy
        return load(self.model, dtype=self.dtype, device=self.device)
