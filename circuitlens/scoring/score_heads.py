"""Relevance of every head, by a named method, on the examples of a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from circuitlens.baseline import MeanBaseline, examples_by_id
from circuitlens.cdt import Path, Relevances, RuleSet
from circuitlens.errors import (
    BASELINE,
    MODEL,
    TASK,
    CircuitLensError,
    InputError,
    check_types,
)
from circuitlens.models.batch import Batch
from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import counting
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.request import Request
from circuitlens.scoring.scorers import Scorer, scorer
from circuitlens.tasks import Encoded, Example, Task
from circuitlens.utils.processes import mine, n_processes, summed
from circuitlens.utils.progress import progress
from circuitlens.utils.row_budget import RowBudget

__all__ = ["discovery_examples", "relevance", "score_encoded"]


def relevance(
    model: HookedModel,
    task: Task,
    baseline: MeanBaseline,
    *,
    method: str | RuleSet = "cdt-linear",
    mlps: bool = False,
    by_position: bool = False,
    path: Path = "total",
    steps: int = 5,
    rounds: int = 8,
    share: float = 0.4,
    candidates: Sequence[str] = ("cdt-linear", "sampled"),
    max_examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
) -> HeadScores:
    """Score every head of a model on a task.

    Every method scores the same examples against the same baseline, so that rankings can be
    compared.

    Args:
        model: competent in the task.
        task: the task that the baseline was taken on.
        baseline: means of the nodes; scores are taken on its (correctly answered) examples, at
            its positions.
        method: one of :data:`METHODS`, or your own rule set. The default found circuits at
            least as faithful as ``cdt`` on the models we measured, at a tenth of its cost.
        mlps: score MLPs too.
        by_position: score every head at every single position too. By gradient that costs
            nothing but memory; by difference, a pass for every head and position.
        path: by gradient, let β pass through later heads and MLPs (``"total"``), or hold later
            nodes at their clean values (``"direct"``); MLPs are held if ``mlps`` is true.
        steps: number of steps of ``integrated-gradients``.
        rounds: number of rounds of ``sampled``.
        share: share of the remaining heads that ``iterative`` removes in each round.
        candidates: what ``auto`` chooses from: methods by name.
        max_examples: use a random subset of this size.
        batch_size: examples per forward pass; the scores do not depend on it. It halves, with a
            line in the log, when memory runs out.
        seed: for the subset, the ``random`` method and bootstrap intervals.
        quiet: no progress bar.

    Raises:
        InputError: for an unknown method or path, a method that cannot do what is asked, a rule
            set with the name of another method, or a baseline of another model or task.
    """
    check_types(
        "relevance",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    by = scorer(method)
    request = Request(
        positions=baseline.positions,
        mlps=mlps,
        by_position=by_position,
        path=path,
        steps=steps,
        rounds=rounds,
        share=share,
        candidates=tuple(candidates),
        seed=seed,
        # Patched runs: few rows stay in a processor's caches, many keep an accelerator busy.
        budget=RowBudget(batch_size * (2 if model.device.type == "cpu" else 16)),
    )
    by.check(request)
    if by.only is not None:
        baseline.check_constant(by.name)
    baseline.check_task(task)
    baseline.check_model(model)
    examples = discovery_examples(task, baseline, max_examples, seed)
    encoded = baseline.encode(model, task, examples)
    by.check_readout(encoded.readout)
    if by_position and encoded.n_rows > 1:
        raise InputError(
            "by_position=True tells positions of one prompt apart, but here every example is run "
            f"with {encoded.n_rows} beginnings of answers: leave by_position out, or use words "
            "that readout='token' tells apart."
        )
    with counting() as count:
        found = score_encoded(
            model, encoded, baseline, by, request, batch_size=batch_size, seed=seed, quiet=quiet
        )
    for scores in (found.heads, found.mlps, found.by_position):
        if scores is not None and not bool(torch.isfinite(scores).all()):
            raise CircuitLensError(
                f"{by.name} gave scores of {model.name} that are not finite: the activations "
                f"overflow in {model.dtype}; load the model with dtype float32."
            )
    settings = {
        "method": by.name,
        "positions": baseline.positions,
        "pooling": baseline.pooling,
        "reference": baseline.reference,
        "path": path,
        # Some scorers move heads and MLPs together.
        "mlps": mlps,
        "by_position": by_position,
        "max_examples": max_examples,
    }
    if isinstance(method, RuleSet):
        settings["rules"] = asdict(method)
    own = {"integrated-gradients": ["steps"], "sampled": ["rounds"], "iterative": ["share"]}
    own["auto"] = ["rounds", "candidates"]
    settings |= {name: getattr(request, name) for name in own.get(by.name, ())}
    settings |= found.details
    # Processes share the batches; what sees all examples together each does for itself.
    shared_by = None if by.batch is None else model.device
    settings["passes"] = count.per_prompt(len(encoded) * encoded.n_rows, shared_by)
    return HeadScores(
        per_example=found.heads,
        method=by.name,
        positions=baseline.positions,
        example_ids=encoded.ids,
        provenance=baseline.provenance_of(model, task, seed, settings),
        mlps=found.mlps,
        by_position=found.by_position,
        unit=by.unit,
        whole=by.shared,
    )


def discovery_examples(
    task: Task, baseline: MeanBaseline, max_examples: int | None, seed: int
) -> list[Example]:
    """The correctly answered examples of a baseline, or a random part of them.

    Raises:
        InputError: if there are none, one is not of the task, or ``max_examples`` is not positive.
    """
    if not baseline.example_ids:
        raise InputError(
            "The baseline has no examples to score: take it with cl.label_balanced_mean."
        )
    by_id = examples_by_id(task)
    if unknown := [i for i in baseline.example_ids if i not in by_id]:
        raise InputError(
            f"The baseline was taken on example {unknown[0]!r}, which is not in any pool of "
            f"{task.full_name}: take the baseline on examples of this task."
        )
    if max_examples is not None and max_examples < 1:
        raise InputError(f"max_examples must be positive, but is {max_examples}.")
    ids = list(baseline.example_ids)
    if max_examples is not None and max_examples < len(ids):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(ids), generator=generator)[:max_examples].sort().values
        ids = [ids[i] for i in chosen]
    return [by_id[i] for i in ids]


def score_encoded(
    model: HookedModel,
    encoded: Encoded,
    baseline: MeanBaseline,
    by: Scorer,
    request: Request,
    *,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
) -> Relevances:
    """Score any encoded examples, whether they are answered correctly or not."""
    if by.batch is None:
        return _whole(model, encoded, baseline, by, request, batch_size, seed)
    return _batched(model, encoded, baseline, by, request, batch_size, quiet)


def _whole(
    model: HookedModel,
    encoded: Encoded,
    baseline: MeanBaseline,
    by: Scorer,
    request: Request,
    batch_size: int,
    seed: int,
) -> Relevances:
    """Score all examples together."""
    g = model.geometry
    if by.whole is None:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(g.n_layers, g.n_heads, generator=generator)
        return Relevances(scores.expand(len(encoded), -1, -1).clone())
    numbered = list(encoded.batches(batch_size, model.device))
    batches = [batch for _, batch in numbered]
    found = by.whole(model, batches, baseline.means(model.device), request)
    # Batches are of prompts of one length, so examples do not come in their order.
    order = torch.cat([index for index, _ in numbered]).argsort()
    heads = found.heads.float().expand(len(encoded), -1, -1)[order]
    mlps = None if found.mlps is None else found.mlps[order]
    return Relevances(heads.clone(), mlps, details=found.details)


def _batched(
    model: HookedModel,
    encoded: Encoded,
    baseline: MeanBaseline,
    by: Scorer,
    request: Request,
    batch_size: int,
    quiet: bool,
) -> Relevances:
    assert by.batch is not None
    score, g, n = by.batch, model.geometry, len(encoded)
    means = baseline.means(model.device)
    width = max(map(len, encoded.tokens))
    # Zeros, to which processes that work together add what they find.
    heads = torch.zeros(n, g.n_layers, g.n_heads)
    mlps = torch.zeros(n, g.n_layers) if request.mlps else None
    at = torch.zeros(n, width, g.n_layers, g.n_heads) if request.by_position else None
    budget = RowBudget(batch_size)

    def keep(values: Tensor) -> Tensor:
        return values.detach().float().cpu()

    batches = mine(encoded.batches(batch_size, model.device), model.device)
    total = -(-encoded.n_batches(batch_size) // n_processes(model.device))
    for index, batch in progress(batches, f"Relevance ({by.name})", quiet=quiet, total=total):

        def run(chunk: range, index: Tensor = index, batch: Batch = batch) -> None:
            chosen = index[chunk.start : chunk.stop]
            found = score(model, batch.part(chunk), means, request)
            heads[chosen] = keep(found.heads)
            if mlps is not None and found.mlps is not None:
                mlps[chosen] = keep(found.mlps)
            if at is not None and found.by_position is not None:
                at[chosen, width - found.by_position.shape[1] :] = keep(found.by_position)

        budget.chunked(len(index), run, rows_per_item=batch.n_rows)

    def whole(part: Tensor | None) -> Tensor | None:
        return None if part is None else summed(part, model.device)

    return Relevances(summed(heads, model.device), whole(mlps), whole(at))
