"""Arguments of another type, swapped ones among them, get one sentence from every verb."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
from helpers import loaded

import circuitlens as cl

# What each verb takes first, in its order.
VERBS = {
    cl.finetune: ("model", "task"),
    cl.label_balanced_mean: ("model", "task"),
    cl.evaluate: ("model", "task", "examples"),
    cl.relevance: ("model", "task", "baseline"),
    cl.discover: ("model", "task", "baseline"),
    cl.faithfulness: ("model", "task", "scores", "baseline"),
    cl.minimality: ("model", "task", "circuit", "baseline"),
    cl.transfer: ("model", "circuit", "task"),
    cl.compare: ("model", "circuit", "task", "languages"),
}
CASES = [
    (verb, names, k)
    for verb, names in VERBS.items()
    for k, name in enumerate(names)
    if name not in ("examples", "languages")
]


@pytest.fixture(scope="module")
def right(toy_task):
    model = loaded("qwen2")
    g = model.geometry
    return {
        "model": model,
        "task": toy_task,
        "circuit": cl.Circuit((cl.Head(0, 0),), g.n_layers, g.n_heads),
        "baseline": object.__new__(cl.MeanBaseline),
        "scores": object.__new__(cl.HeadScores),
        "examples": "test",
        "languages": ["near"],
    }


@pytest.mark.parametrize(
    ("verb", "names", "k"), CASES, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_another_type_is_named_with_the_remedy(verb, names, k, right):
    arguments = [right[name] for name in names]
    arguments[k] = "javanese"
    with pytest.raises(cl.InputError, match=f"{verb.__name__}: {names[k]} must be a .* is a str: "):
        inspect.unwrap(verb)(*arguments)


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v.__name__)
def test_swapped_arguments_are_seen(verb, right):
    names = VERBS[verb]
    arguments = [right[name] for name in (names[1], names[0], *names[2:])]
    order = ", ".join(name for name in names if name not in ("examples", "languages"))
    says = (
        f"{verb.__name__}: model must be a HookedModel.*looks like {names[1]}; the order is {order}"
    )
    with pytest.raises(cl.InputError, match=says):
        inspect.unwrap(verb)(*arguments)


def test_data_in_memory_are_no_name():
    with pytest.raises(cl.InputError, match=r"not a DataFrame: .*cl.Task.from_records"):
        inspect.unwrap(cl.load_task)(pd.DataFrame({"text": ["a"]}))
