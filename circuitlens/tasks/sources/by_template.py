"""Examples that a template makes of lists: what the tasks of published circuits are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuitlens.errors import InputError
from circuitlens.tasks.examples import Example

__all__ = ["CHOICES", "PROMPT", "ByTemplate", "Made", "two_choices"]

CHOICES = ("first", "second")
# Of both tasks.
PROMPT = {
    "template": "{text}",
    "labels": {"first": " first", "second": " second"},
    "choices": CHOICES,
}
_SIZES = {"test": 200, "validation": 100, "train": 600}


@dataclass(frozen=True)
class Made:
    """One filled template.

    Attributes:
        text: the prompt.
        right, wrong: what continues it, without a leading space.
        counterfactual: the prompt without what decides between the two, of as many words.
    """

    text: str
    right: str
    wrong: str
    counterfactual: str


@dataclass(frozen=True)
class ByTemplate:
    """Source of English examples; all follow from a seed.

    Attributes:
        name: of the task.
        make: fills a template at random.
        seed: of all examples.
    """

    name: str
    make: Callable[[random.Random], Made]
    seed: int = 0

    @classmethod
    def open(
        cls, name: str, make: Callable[[random.Random], Made], folder: Path | None
    ) -> ByTemplate:
        """Make the source.

        Raises:
            InputError: if a data folder is given.
        """
        if folder is not None:
            raise InputError(f"The task {name} makes its own data: leave data (--data) out.")
        return cls(name, make)

    @property
    def languages(self) -> Sequence[str]:
        """English only."""
        return ("english",)

    def resolve(self, language: str) -> str:
        """Accept English."""
        if language.strip().lower() not in ("english", "en", "eng"):
            raise InputError(f"The task {self.name} has no language {language!r}; it has english.")
        return "english"

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        """Make the three splits; no prompt is in two of them."""
        rng = random.Random(f"{self.name}-{self.seed}")
        seen: set[str] = set()
        return {
            split: tuple(self._example(f"{split}:{n}", rng, seen) for n in range(size))
            for split, size in _SIZES.items()
        }

    def _example(self, name: str, rng: random.Random, seen: set[str]) -> Example:
        while (made := self.make(rng)).text in seen:
            pass
        seen.add(made.text)
        return two_choices(name, made, right_first=rng.random() < 0.5)


def two_choices(name: str, made: Made, *, right_first: bool) -> Example:
    """Lay a filled template out as a choice between two continuations."""
    pair = (made.right, made.wrong) if right_first else (made.wrong, made.right)
    fields = {"text": made.text, **dict(zip(CHOICES, pair, strict=True))}
    label = CHOICES[0] if right_first else CHOICES[1]
    return Example(name, fields, label, counterfactual={"text": made.counterfactual})
