"""Multi-level discovery: heads that move the task margin, heads that move those, and so on.

1. Level 1 are the heads with the largest relevance to the task margin.
2. Relevance of a head s to a target head t above it is the projection of s's β at t onto t's own
   deviation,

       e(s → t) = Σ_p ⟨β_s at z_t(p), (z_t(p) − μ_t)/|z_t(p) − μ_t|⟩,

   summed over the positions p at which heads deviate, in units of z, mean over examples.
3. Level n + 1 are the heads with the largest sum of e(s → t) over the targets t of level n, among
   those that are in no level yet.

This is CD-T's recursion from the outputs down (arXiv 2407.00886); CT-SFT's decision heads are
level 1 (arXiv 2601.08146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt import RULES, FrozenNetwork, LinearisedRun, RuleSet, Source, project
from circuitlens.circuit import Circuit
from circuitlens.errors import BASELINE, MODEL, TASK, InputError, check_types
from circuitlens.models.batch import Batch, at_least_float32
from circuitlens.models.hooked import HookedModel
from circuitlens.node_means import NodeMeans
from circuitlens.nodes import Head
from circuitlens.scoring.score_heads import discovery_examples, relevance
from circuitlens.tasks import Task
from circuitlens.utils.progress import progress
from circuitlens.utils.row_budget import RowBudget

__all__ = ["discover"]

Edges = Float[Tensor, "batch layer head target"]

# Source heads whose traces at the targets are kept at once.
_SOURCES = 64


def discover(
    model: HookedModel,
    task: Task,
    baseline: MeanBaseline,
    *,
    depth: int = 2,
    share: float = 0.05,
    method: str | RuleSet = "cdt-linear",
    max_examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
) -> Circuit:
    """Find a circuit level by level, from the task margin down.

    Args:
        model: competent in the task.
        task: the task that the baseline was taken on.
        baseline: means of the heads.
        depth: number of levels.
        share: share of all heads that each level takes (at least one head). A level ends early
            if no further head has a positive score.
        method: a rule set, by name or your own.
        max_examples: use a random subset of this size.
        batch_size: examples per forward pass; the result does not depend on it.
        seed: for the subset.
        quiet: no progress bar.

    Returns:
        A circuit that records the level of every head, and the edge scores between its heads.

    Raises:
        InputError: if ``depth`` or ``share`` is out of range, ``method`` is no rule set, or no head
            has a positive score.
    """
    check_types(
        "discover",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    if depth < 1:
        raise InputError(f"A circuit has at least one level, but depth is {depth}.")
    if not 0 < share <= 1:
        raise InputError(f"A share of heads must be between 0 and 1, but {share} was given.")
    if isinstance(method, str) and method not in RULES:
        raise InputError(
            f"{method!r} cannot score one head's effect on another; these can: {', '.join(RULES)}."
        )
    rules = RULES[method] if isinstance(method, str) else method
    baseline.check_constant("discover")
    scores = relevance(
        model,
        task,
        baseline,
        method=rules,
        max_examples=max_examples,
        batch_size=batch_size,
        seed=seed,
        quiet=quiet,
    )
    g = model.geometry
    count = max(1, round(share * len(g)))
    levels: dict[Head, int] = {}
    edges: dict[tuple[Head, Head], float] = {}
    level = _best(scores.mean, count, levels)
    if not level:
        raise InputError(
            f"No head of {model.name} supports the task by {rules.name}: every score is 0 or "
            "negative, so there is no circuit to start from; look at the scores (cl.relevance), or "
            "use another method."
        )
    for number in range(1, depth + 1):
        levels |= dict.fromkeys(level, number)
        targets = [head for head in level if head.layer > 0]
        # The last level has its edges too: they join it to the heads below that are in the circuit.
        if not targets:
            break
        found = _edge_scores(
            model, task, baseline, targets, rules, max_examples, batch_size, seed, quiet
        )
        for k, target in enumerate(targets):
            for head in g:
                if head.layer < target.layer:
                    edges[head, target] = float(found[head.layer, head.index, k])
        level = _best(found.sum(-1), count, levels)
        if not level:
            break
    kept = {(s, t): e for (s, t), e in edges.items() if s in levels and t in levels}
    return Circuit(
        tuple(levels),
        g.n_layers,
        g.n_heads,
        f"{rules.name}: {max(levels.values())} levels of {count}",
        scores.provenance,
        levels=levels,
        edges=kept,
    )


def _best(scores: Float[Tensor, "layer head"], count: int, taken: dict[Head, int]) -> list[Head]:
    """The heads with the largest positive scores that are in no level yet."""
    n_heads = scores.shape[1]
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    ranked = [Head(i // n_heads, i % n_heads) for i in order]
    able = [h for h in ranked if h not in taken and scores[h.layer, h.index] > 0]
    return able[:count]


def _edge_scores(
    model: HookedModel,
    task: Task,
    baseline: MeanBaseline,
    targets: Sequence[Head],
    rules: RuleSet,
    max_examples: int | None,
    batch_size: int,
    seed: int,
    quiet: bool,
) -> Float[Tensor, "layer head target"]:
    encoded = task.encode(model, discovery_examples(task, baseline, max_examples, seed))
    means = baseline.means(model.device)
    engine: Callable[..., Edges] = (
        edges_by_difference if rules.activation == "difference" else edges_by_gradient
    )
    total = torch.zeros(
        model.geometry.n_layers, model.geometry.n_heads, len(targets), dtype=torch.float64
    )
    budget = RowBudget(batch_size)
    for index, batch in progress(
        encoded.batches(batch_size, model.device),
        f"Edges to {len(targets)} heads",
        quiet=quiet,
        total=encoded.n_batches(batch_size),
    ):

        def run(chunk: range, batch: Batch = batch) -> Tensor:
            part = batch.part(chunk)
            where = part.mask(baseline.positions)
            found = engine(model, part, means, rules, targets, where)
            return found.double().sum(0).cpu()

        total += torch.stack(budget.chunked(len(index), run, rows_per_item=batch.n_rows)).sum(0)
    return total / len(encoded)


@torch.no_grad()
def edges_by_difference(
    model: HookedModel,
    batch: Batch,
    means: NodeMeans,
    rules: RuleSet,
    targets: Sequence[Head],
    where: Bool[Tensor, "batch pos"],
) -> Edges:
    """Edge scores with a patched run for every head below a target."""
    g = model.geometry
    wanted = {
        layer: [t.index for t in targets if t.layer == layer]
        for layer in {t.layer for t in targets}
    }
    network = FrozenNetwork(
        model,
        batch,
        rules,
        reach=where,
        record={model.z_hook(n): partial(_heads, indices=i) for n, i in wanted.items()},
    )
    below = [head for head in g if head.layer < max(wanted)]
    result = network.labels.new_zeros(len(where), g.n_layers, g.n_heads, len(targets))
    # What several rows of an example share counts once.
    chosen = batch.once(where)[:, network.first :]
    # What is recorded of every source at every position is large, so it is projected in pieces.
    for start in range(0, len(below), _SOURCES):
        sources = below[start : start + _SOURCES]
        _, patched = network.patched([[Source(head, where)] for head in sources], means)
        for k, target in enumerate(targets):
            name, place = model.z_hook(target.layer), wanted[target.layer].index(target.index)
            z = network.recorded[name][:, :, place]
            direction = _direction(z, means.of_heads(target.layer, z)[:, target.index], chosen)
            beta = at_least_float32(z - patched[name][:, :, :, place])
            scores = einsum(
                beta, direction, "source batch pos d_head, batch pos d_head -> batch source"
            )
            for column, head in enumerate(sources):
                if head.layer < target.layer:
                    result[:, head.layer, head.index, k] = scores[:, column]
    return result


def _heads(z: Tensor, indices: list[int]) -> Tensor:
    return z[:, :, indices]


@torch.enable_grad()
def edges_by_gradient(
    model: HookedModel,
    batch: Batch,
    means: NodeMeans,
    rules: RuleSet,
    targets: Sequence[Head],
    where: Bool[Tensor, "batch pos"],
) -> Edges:
    """Edge scores in the linearised network: a backward pass for every target."""
    run = LinearisedRun(model, batch, rules)
    once = batch.once(where)
    found = []
    for k, target in enumerate(targets):
        z = run.live[model.z_hook(target.layer)][:, :, target.index]
        mean = means.of_heads(target.layer, z)[:, target.index]
        direction = _direction(z.detach(), mean, once)
        objective = (at_least_float32(z) * direction).sum()
        gradients = run.gradients(objective, keep=k + 1 < len(targets))
        scores = project(model, batch, run.outputs, gradients, means, where, False, False).heads
        scores[:, target.layer :] = 0
        found.append(scores.detach())
    return torch.stack(found, dim=-1)


def _direction(
    z: Float[Tensor, "batch pos d_head"],
    mean: Float[Tensor, "pos d_head"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_head"]:
    """A target's own deviation, of length 1 where it counts and 0 elsewhere."""
    deviation = at_least_float32(z - mean)
    size = deviation.norm(dim=-1, keepdim=True)
    unit: Tensor = deviation / size.clamp(min=torch.finfo(size.dtype).tiny)
    return torch.where(where[..., None], unit, 0.0)
