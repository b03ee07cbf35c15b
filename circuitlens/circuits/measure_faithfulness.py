"""Measuring the faithfulness of circuits of growing size.

What it is: :mod:`circuitlens.circuits.curve`.

1. Lay out as masks all circuits of the curve: the top heads of each size, the model without them,
   random ones, and random ones matched layer by layer.
2. Run every batch once as it is, then under all circuits (:mod:`circuitlens.cdt.ablation`).
3. Average margin, accuracy and probability of the right label over examples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.ablation import circuit_label_logits
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.random_circuits import layer_matched_masks, random_masks
from circuitlens.errors import BASELINE, MODEL, SCORES, TASK, InputError, check_types
from circuitlens.models.batch import margin
from circuitlens.models.hooked import HookedModel
from circuitlens.neurons import neuron_means
from circuitlens.node_circuit import NodeCircuit, NodeGrid
from circuitlens.scoring.head_scores import HeadScores, head_count
from circuitlens.scoring.node_scores import NodeScores
from circuitlens.tasks import Encoded, Example, Task

__all__ = ["DEFAULT_SHARES", "default_sizes", "faithfulness", "refuse_seen", "unseen_examples"]

DEFAULT_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def default_sizes(n_heads: int) -> list[int]:
    """Circuit sizes of the default curve.

    No heads, and :data:`DEFAULT_SHARES` of all heads as whole numbers, at least 1; in small models
    several shares are the same number.
    """
    return sorted({0, *(max(1, round(share * n_heads)) for share in DEFAULT_SHARES)})


def faithfulness(
    model: HookedModel,
    task: Task,
    scores: HeadScores | Circuit | NodeScores | NodeCircuit,
    baseline: MeanBaseline,
    *,
    sizes: Sequence[int | float] | None = None,
    n_random: int = 30,
    examples: Sequence[Example] | None = None,
    batch_size: int = 32,
    rows: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> FaithfulnessCurve:
    """Measure circuits of growing size, or one circuit, all other nodes mean-ablated.

    Args:
        model: the model that was scored.
        task: gives the held-out examples (pool B and validation of the source language).
        scores: their ranking is followed, the most supporting head first. Or a circuit, wherever
            it comes from: found by another tool, in the explorer, or made by hand. Its curve has
            three sizes, no head, the circuit and all heads. Scores and circuits of other nodes
            (heads with MLPs, heads at positions, neurons) are measured in the same way: only the
            nodes of that kind are ablated, and all else stays as it is.
        baseline: the means that replace the ablated heads, and the positions where they do.
        sizes: how many heads to keep (integers) or which shares of all heads (floats), as in
            :meth:`HeadScores.top`; default: :func:`default_sizes`. No head and all heads are
            always included. A circuit has its own size.
        n_random: random circuits for each size; as many more are matched layer by layer.
        examples: use these instead of the held-out ones.
        batch_size: examples that are padded to one width and share a clean run.
        rows: prompts that go through the model at once; halves when memory runs out.
        seed: for the random circuits and the bootstrap.
        quiet: no progress bar.

    Raises:
        UnsupportedModelError: for neurons of a mixture of experts.
        InputError: if there are no examples or one was used for discovery, the baseline, the
            scores or the circuit are of another model, the baseline is of another task, or a size
            or ``n_random`` is impossible. (Only you know which examples your own circuit was
            chosen on: leave those out.)
    """
    check_types(
        "faithfulness",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        scores=(scores, (HeadScores, Circuit, NodeScores, NodeCircuit), SCORES),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    baseline.check_task(task)
    baseline.check_model(model)
    if n_random < 0:
        raise InputError(f"n_random cannot be negative, but is {n_random}.")
    g = model.geometry
    grid = NodeGrid("heads", g.n_layers, g.n_heads, g.n_heads)
    if isinstance(scores, NodeScores | NodeCircuit):
        grid = scores.grid
    if isinstance(scores, Circuit | NodeCircuit):
        if sizes is not None:
            raise InputError("A circuit has its own size: leave sizes out, or give scores.")
        scores.check_model(model)
        seen, method = set(baseline.example_ids), scores.selection
        circuits = {0: (), len(scores): tuple(scores), len(grid): tuple(grid)}
    else:
        check_scores(model, scores, baseline)
        seen, method = {*scores.example_ids, *baseline.example_ids}, scores.method
        wanted = default_sizes(len(grid)) if sizes is None else sizes
        ranking = scores.ranking()
        numbers = {0, len(grid), *(head_count(size, len(grid)) for size in wanted)}
        circuits = {n: tuple(ranking[:n]) for n in numbers}
    counts = sorted(circuits)
    encoded = baseline.encode(model, task, unseen_examples(task, examples, seen))
    means = baseline.means(model.device)
    if grid.kind == "neurons":
        means = replace(means, neurons=neuron_means(model, task, baseline))
    _check_prompts(encoded, grid)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([grid.mask(circuits[n]) for n in counts])
    masks = {
        "": kept,
        "random_": random_masks(counts, g.n_layers, grid.width, n_random, generator),
        "layer_matched_": layer_matched_masks(kept, n_random, generator),
        "without_": ~kept,
    }
    labels = circuit_label_logits(
        model,
        encoded,
        torch.cat([group.flatten(0, -3) for group in masks.values()]),
        baseline,
        kind=grid.kind,
        means=means,
        batch_size=batch_size,
        rows=rows,
        label="Faithfulness",
        quiet=quiet,
    )
    found: dict[str, np.ndarray] = {}
    groups = labels.split([group[..., 0, 0].numel() for group in masks.values()])
    for (kind, group), part in zip(masks.items(), groups, strict=True):
        for metric, values in _measure(part, torch.tensor(encoded.gold)).items():
            found[kind + metric] = values.mean(-1).view(group.shape[:-2]).numpy()
            if (kind, metric) == ("", "margin"):
                found["example_margin"] = values.numpy()
    settings = {
        "n_random": n_random,
        "positions": baseline.positions,
        "pooling": baseline.pooling,
        "reference": baseline.reference,
        "scores": method,
    }
    return FaithfulnessCurve(
        sizes=tuple(counts),
        n_heads=len(grid),
        nodes=grid.kind,
        method=method,
        example_ids=encoded.ids,
        provenance=baseline.provenance_of(model, task, seed, settings),
        **found,
    )


def _check_prompts(encoded: Encoded, grid: NodeGrid) -> None:
    """Reject prompts that are longer than the positions which are told apart.

    Raises:
        InputError: naming the prompt.
    """
    if grid.kind != "heads@positions":
        return
    lengths = dict(zip(encoded.ids, map(len, encoded.tokens), strict=True))
    longest = max(lengths, key=lambda i: lengths[i])
    if lengths[longest] > grid.n_positions or encoded.n_rows > 1:
        raise InputError(
            f"Heads are told apart at {grid.n_positions} positions from the end, but the prompt of "
            f"{longest!r} has {lengths[longest]} tokens: heads at positions are for prompts of one "
            "template, of one length."
        )


def check_scores(
    model: HookedModel, scores: HeadScores | NodeScores, baseline: MeanBaseline
) -> None:
    """Reject scores of another model.

    Raises:
        InputError: if sizes or weights differ.
    """
    g = model.geometry
    if (scores.n_layers, scores.n_heads) != (g.n_layers, g.n_heads):
        raise InputError(
            f"The scores are of a {scores.n_layers} × {scores.n_heads} model, but {model.name} has "
            f"{g.n_layers} layers of {g.n_heads} heads: call cl.relevance on this model."
        )
    if scores.provenance.model_fingerprint != baseline.provenance.model_fingerprint:
        raise InputError(
            f"The scores are of other weights than those of {model.name}: call cl.relevance on "
            "this model."
        )


def _measure(
    labels: Float[Tensor, "circuit example label"], gold: Int[Tensor, " example"]
) -> dict[str, Float[Tensor, "circuit example"]]:
    index = gold.expand(labels.shape[:-1])[..., None]
    return {
        "margin": margin(labels, gold),
        "accuracy": (labels.argmax(-1) == gold).double(),
        "probability": labels.softmax(-1).gather(-1, index)[..., 0],
    }


def unseen_examples(
    task: Task, examples: Sequence[Example] | None, seen: Collection[str]
) -> tuple[Example, ...]:
    """The examples to measure on: those given, or the held-out ones of the task.

    Raises:
        InputError: if there are none, or the id of one of them is in ``seen``.
    """
    chosen = task.held_out if examples is None else tuple(examples)
    if not chosen:
        raise InputError(
            "There are no examples to measure on: give some, or leave examples out to use the "
            "held-out ones."
        )
    refuse_seen(chosen, seen)
    return chosen


def refuse_seen(examples: Sequence[Example], seen: Collection[str]) -> None:
    """Reject examples on which a circuit was found.

    Raises:
        InputError: if the id of one of them is in ``seen``.
    """
    if both := [e.id for e in examples if e.id in seen]:
        raise InputError(
            f"Example {both[0]!r} was used for discovery, so faithfulness measured on it would "
            "be too good: use other examples."
        )
