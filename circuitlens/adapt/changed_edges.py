"""Which layers fine-tuning rewires: edges between heads, before a full training and after it.

CircuitLoRA (arXiv 2502.11812) finds circuits before and after fine-tuning and gives a higher rank
to layers whose edges change most. Here:

1. Edges of the source's circuit are found level by level (:func:`circuitlens.discover`, two levels
   of as many heads as the circuit has).
2. All weights are trained on the target once, at the middle rate, and the edges are found again.
3. A layer weighs as much as the scores of the edges from and to its heads have changed.
"""

from __future__ import annotations

from circuitlens.adapt.choice import Choice
from circuitlens.adapt.rivals import trained_first
from circuitlens.adapt.selections import MAX_EXAMPLES
from circuitlens.baseline import label_balanced_mean
from circuitlens.errors import InputError, first_line
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head
from circuitlens.scoring.discovery import discover

__all__ = ["edge_changed_layers"]


def edge_changed_layers(model: HookedModel, choice: Choice) -> dict[int, float]:
    """Of every layer, how much the scores of edges from and to its heads change (docstring above).

    Raises:
        InputError: without a source task, if there are no edges, or if training forgets a label
            of the source.
    """
    before = _edges(model, choice)
    trained = trained_first(model, choice).model
    try:
        after = _edges(trained, choice)
    except InputError as error:
        raise InputError(
            "circuit-lora-edges looks for edges in the model as one full training leaves it, and "
            f"that one has none in the source: {first_line(error)}. Give lower learning rates."
        ) from error
    weight = dict.fromkeys(range(model.geometry.n_layers), 0.0)
    for edge in before.keys() | after.keys():
        change = abs(after.get(edge, 0.0) - before.get(edge, 0.0))
        for head in edge:
            weight[head.layer] += change
    if not any(weight.values()):
        raise InputError(
            "No edge between heads changes, so circuit-lora-edges has no layers to choose: use "
            "circuit-lora or circuit-lora-change."
        )
    return weight


def _edges(model: HookedModel, choice: Choice) -> dict[tuple[Head, Head], float]:
    source = choice.known
    baseline = label_balanced_mean(model, source, allow_chance=True, quiet=True)
    found = discover(
        model,
        source,
        baseline,
        share=len(choice.circuit) / len(model.geometry),
        max_examples=MAX_EXAMPLES,
        seed=choice.seed,
        quiet=True,
    )
    return dict(found.edges)
