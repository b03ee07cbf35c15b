"""Relevance of the neurons of MLPs, by one forward and one backward pass for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.gradient import LinearisedRun
from circuitlens.cdt.rules import RULES, RuleSet
from circuitlens.errors import BASELINE, MODEL, TASK, CircuitLensError, InputError, check_types
from circuitlens.models.batch import at_least_float32, margin
from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import counting
from circuitlens.neurons import neuron_hook, neuron_means
from circuitlens.node_circuit import NodeGrid
from circuitlens.scoring.node_scores import NodeScores
from circuitlens.scoring.score_heads import discovery_examples
from circuitlens.tasks import Task
from circuitlens.utils.processes import mine, n_processes, summed
from circuitlens.utils.progress import progress

__all__ = ["neuron_relevance"]


def neuron_relevance(
    model: HookedModel,
    task: Task,
    baseline: MeanBaseline,
    *,
    rules: str | RuleSet = "cdt-linear",
    max_examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
) -> NodeScores:
    """Score every neuron of every MLP: how far its deviation from its mean moves the task margin.

    A neuron is an entry of what the output map of an MLP reads. Relevance is ⟨a − μ, ∂margin/∂a⟩
    in the linearised network, summed over positions, with μ the label-balanced mean of the neuron.
    The neurons of a layer add up to the relevance of its MLP, where that has no norm at its end.

    Args:
        model: the model of the baseline.
        task: the task that the baseline was taken on.
        baseline: gives the examples, the positions, and whether labels count the same in μ.
        rules: the name of a rule set of gradients, or one of your own.
        max_examples: a random subset of this size of the correctly answered examples.
        batch_size: examples that go through the model at once; sets memory, not the result.
        seed: for the subset and bootstrap intervals.
        quiet: no progress bar.

    Returns:
        Scores of all neurons; ``top(0.01)`` is a circuit that :func:`circuitlens.faithfulness`
        measures. ``transfer(…, strategy="neurons")`` trains such a circuit.

    Raises:
        InputError: for rules that are not of gradients, or a baseline of another model or task.
        UnsupportedModelError: for mixtures of experts.
    """
    check_types(
        "neuron_relevance",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    chosen = RULES.get(rules) if isinstance(rules, str) else rules
    if chosen is None or chosen.activation == "difference":
        able = ", ".join(name for name, r in RULES.items() if r.activation != "difference")
        raise InputError(f"Neurons are scored by rules of gradients, not {rules!r}: use {able}.")
    baseline.check_task(task)
    baseline.check_model(model)
    g = model.geometry
    names = [neuron_hook(model, layer) for layer in range(g.n_layers)]
    encoded = task.encode(model, discovery_examples(task, baseline, max_examples, seed))
    found: Tensor | None = None
    batches = mine(encoded.batches(batch_size, model.device), model.device)
    total = -(-encoded.n_batches(batch_size) // n_processes(model.device))
    with counting() as count:
        means = neuron_means(model, task, baseline)
        for index, batch in progress(batches, "Relevance of neurons", quiet=quiet, total=total):
            run = LinearisedRun(model, batch, chosen, nodes=names)
            slopes = run.gradients(margin(run.labels, batch.gold).sum())
            where = batch.mask(baseline.positions)[..., None]
            layers = []
            for layer, name in enumerate(names):
                deviation = at_least_float32(run.outputs[name] - means[layer].to(run.outputs[name]))
                terms = deviation * at_least_float32(slopes[name])
                # Some models give NaN in the padding, and NaN · 0 is NaN.
                layers.append(torch.where(where, terms, 0.0).sum(1))
            values = batch.of_examples(torch.stack(layers, dim=1)).float().cpu()
            if found is None:
                found = torch.zeros(len(encoded), *values.shape[1:])
            found[index] = values
    if found is None:
        # Of several processes one may have no batch.
        found = torch.zeros(len(encoded), g.n_layers, means.shape[-1])
    found = summed(found, model.device)
    if not bool(found.isfinite().all()):
        raise CircuitLensError(
            f"{chosen.name} gave scores of {model.name} that are not finite: the activations "
            f"overflow in {model.dtype}; load the model with dtype float32."
        )
    settings = {
        "method": chosen.name,
        "positions": baseline.positions,
        "pooling": baseline.pooling,
        "reference": baseline.reference,
        "max_examples": max_examples,
        "passes": count.per_prompt(len(encoded) * encoded.n_rows, model.device),
    }
    return NodeScores(
        found,
        NodeGrid("neurons", g.n_layers, found.shape[-1], g.n_heads),
        chosen.name,
        baseline.positions,
        encoded.ids,
        baseline.provenance_of(model, task, seed, settings),
    )
