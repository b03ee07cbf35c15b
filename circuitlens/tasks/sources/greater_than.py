"""Greater-than: a year after another (Hanna et al. 2023, arXiv 2305.00586).

The paper sums the probabilities of all later and of all earlier years. Here an example is a choice
between one of each, so that its margin is a difference of two logits, as of every other task.
"""

from __future__ import annotations

import random
from functools import partial

from circuitlens.tasks.sources.by_template import PROMPT, ByTemplate, Made
from circuitlens.tasks.sources.data_set import DataSet

__all__ = ["DATA_SET"]

_NOUNS = (
    "war strike siege famine voyage treaty rebellion drought campaign expedition conflict "
    "reign dispute festival trial project epidemic journey embargo truce"
)


def _make(rng: random.Random) -> Made:
    noun, century = rng.choice(_NOUNS.split()), rng.randint(11, 17)
    start = rng.randint(2, 98)
    later, earlier = rng.randint(start + 1, 99), rng.randint(2, start)

    def text(year: int) -> str:
        return f"The {noun} lasted from the year {century}{year:02d} to the year"

    # Every year of the century comes after 01 (the paper's counterfactual).
    return Made(text(start), f"{century}{later:02d}", f"{century}{earlier:02d}", text(1))


DATA_SET = DataSet(
    name="greater-than",
    description="years after another, made by a template (English)",
    open=partial(ByTemplate.open, "greater-than", _make),
    language="english",
    prompt=PROMPT,
)
