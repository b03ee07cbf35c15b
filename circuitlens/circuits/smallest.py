"""The smallest circuit that keeps a wanted share of the task margin."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.ablation import circuit_label_logits, head_mask
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import caveat_of, normalised
from circuitlens.circuits.measure_faithfulness import check_scores
from circuitlens.errors import BASELINE, MODEL, SCORES, TASK, InputError, check_types
from circuitlens.models.batch import margin
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.score_heads import discovery_examples
from circuitlens.tasks import Encoded, Task

__all__ = ["smallest_circuit"]

# Sizes that are measured at once between two known ones.
_BETWEEN = 8


def smallest_circuit(
    model: HookedModel,
    task: Task,
    scores: HeadScores,
    baseline: MeanBaseline,
    *,
    f: float = 0.8,
    max_examples: int | None = 200,
    batch_size: int = 32,
    rows: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> Circuit:
    """Choose the fewest top heads that keep a share ``f`` of the margin on *discovery* examples.

    The size is chosen on the examples that were scored, so that :func:`circuitlens.faithfulness`
    of the circuit can be measured on others; there it may be a little lower.

    Args:
        model: the model that was scored.
        task: the task of the scores.
        scores: their ranking is followed.
        baseline: the means that replace all other heads.
        f: share of the margin, as in :func:`circuitlens.faithfulness`.
        max_examples: a random subset of this size of the scored examples.
        batch_size: examples that are padded to one width and share a clean run.
        rows: prompts that go through the model at once; halves when memory runs out.
        seed: for the subset.
        quiet: no progress bar.

    Raises:
        InputError: if ``f`` is not between 0 and 1, f has no meaning on these examples, or scores
            or baseline are of another model or task.
    """
    check_types(
        "smallest_circuit",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
        scores=(scores, HeadScores, SCORES),
        baseline=(baseline, MeanBaseline, BASELINE),
    )
    if not 0 < f <= 1:
        raise InputError(f"A share of the margin must be between 0 and 1, but f is {f}.")
    baseline.check_task(task)
    baseline.check_model(model)
    check_scores(model, scores, baseline)
    encoded = baseline.encode(model, task, discovery_examples(task, baseline, max_examples, seed))
    g, ranking = model.geometry, scores.ranking()

    def margins(counts: list[int]) -> Float[np.ndarray, " size"]:
        kept = torch.stack([head_mask(ranking[:n], g.n_layers, g.n_heads) for n in counts])
        return _margins(model, encoded, kept, baseline, batch_size, rows, quiet)

    empty, full = margins([0, len(g)])
    if caveat := caveat_of(empty, full):
        raise InputError(caveat)
    low, high = 0, len(g)
    # f need not grow with every head, so the first size that reaches it is looked for from below.
    while high - low > 1:
        steps = np.unique(np.geomspace(low + 1, high - 1, _BETWEEN).round().astype(int)).tolist()
        found = normalised(margins(steps), empty, full)
        reached = [n for n, value in zip(steps, found, strict=True) if value >= f]
        high = reached[0] if reached else high
        low = max([low, *(n for n in steps if n < high)])
    top = scores.top(high)
    how = f"{scores.method}: smallest with f ≥ {f:g} on {len(encoded)} scored examples"
    return Circuit(top.heads, top.n_layers, top.n_heads, how, top.provenance)


def _margins(
    model: HookedModel,
    encoded: Encoded,
    kept: torch.Tensor,
    baseline: MeanBaseline,
    batch_size: int,
    rows: int,
    quiet: bool,
) -> Float[np.ndarray, " circuit"]:
    labels = circuit_label_logits(
        model,
        encoded,
        kept,
        baseline,
        batch_size=batch_size,
        rows=rows,
        label="Smallest circuit",
        quiet=quiet,
    )
    return margin(labels, torch.tensor(encoded.gold)).mean(-1).numpy()
