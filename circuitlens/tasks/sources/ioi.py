"""Indirect object identification: who is given something (Wang et al. 2023, arXiv 2211.00593)."""

from __future__ import annotations

import random
from functools import partial

from circuitlens.tasks.sources.by_template import PROMPT, ByTemplate, Made
from circuitlens.tasks.sources.data_set import DataSet

__all__ = ["DATA_SET"]

# One token each, after a space, for GPT-2's tokenizer.
_NAMES = (
    "Alice Amy Anna Anthony Brian Charles Chris Daniel David Emily Emma Eric Frank George "
    "Grace Henry Jack Jacob James Jason Jennifer John Joseph Julia Kate Kevin Laura Linda "
    "Lisa Lucy Maria Mark Martin Mary Michael Michelle Nick Oliver Patrick Paul Peter "
    "Rachel Richard Robert Ruth Samuel Sarah Simon Steven Susan Thomas Tom Victoria "
    "William"
)
_PLACES = "school park station garden hospital restaurant office house store library beach"
_OBJECTS = "book drink ring letter basketball computer bone necklace kiss snack key"
# Both orders of the two names, as in the paper: {first} is the name that comes first.
_TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "Then, {first} and {second} had a long talk at the {place}, and {giver} gave a {thing} to",
    "After {first} and {second} met at the {place}, {giver} decided to give a {thing} to",
    "While {first} and {second} were working at the {place}, {giver} handed a {thing} to",
    "Yesterday {first} and {second} walked to the {place}. There {giver} offered a {thing} to",
    "The {place} was empty when {first} and {second} arrived, so {giver} brought a {thing} to",
)


def _make(rng: random.Random) -> Made:
    giver, receiver, other, third, fourth = rng.sample(_NAMES.split(), 5)
    template = rng.choice(_TEMPLATES)
    words = {"place": rng.choice(_PLACES.split()), "thing": rng.choice(_OBJECTS.split())}
    first, second = rng.sample([giver, receiver], 2)
    text = template.format(first=first, second=second, giver=giver, **words)
    # Three other names, none of them twice: nothing says who receives (the paper's ABC prompts).
    without = template.format(first=other, second=third, giver=fourth, **words)
    return Made(text, right=receiver, wrong=giver, counterfactual=without)


DATA_SET = DataSet(
    name="ioi",
    description="indirect object identification, made by templates (English)",
    open=partial(ByTemplate.open, "ioi", _make),
    language="english",
    prompt=PROMPT,
)
